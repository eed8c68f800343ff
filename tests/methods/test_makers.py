"""What advantages by name take from rollouts, stats and states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages, data, methods
from jaxrl_post.types import TokenStats
from tests.advantages.compiled import all_compiled, compiled

advantages = all_compiled(advantages)

PROMPTS, GROUP, LENGTH = 2, 4, 7


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    completions = [[list(rng.integers(5, 9, rng.integers(2, 6))) for _ in range(GROUP)] for _ in range(PROMPTS)]
    made = data.to_rollouts([[2], [3]], completions, length=LENGTH)
    place = jnp.cumsum(made.mask, axis=1)
    reward = jnp.asarray(rng.normal(size=(PROMPTS, GROUP)), jnp.float32)
    valid = jnp.ones((PROMPTS, GROUP), bool).at[1, 2].set(False)
    step = jnp.where(made.mask > 0, (place > 2).astype(jnp.int32), -1)
    agent = jnp.where(step == 1, 5, 3) * jnp.ones_like(step)
    extras = {"agent": agent, "state": 10 * step + 1, "episode": jnp.array([[0, 0, 1, 1]] * 2)}
    return made.replace(reward=reward, valid=valid, step=step, extras=extras, rewards={"a": reward, "b": reward**2})


def _targets(method, batch, state=None):
    logp = -batch.mask * (1 + 0.1 * jnp.arange(LENGTH))
    stats = {
        role: TokenStats(logp=logp - 0.5 * (role == "teacher"), sum_p_squared=batch.mask / 2) for role in method.needs
    }
    state = method.init(jax.eval_shape(lambda: batch), 9) if state is None else state
    return compiled(method.targets)(state, batch, stats, jax.random.key(0))


def test_dr_mas_compares_each_turn_with_those_of_its_agent(batch):
    given = _targets(methods.dr_mas(), batch)[0].advantages
    rows, expected = np.arange(PROMPTS * GROUP), np.zeros((PROMPTS * GROUP, LENGTH))
    for p in range(PROMPTS):
        for turn in range(2):
            acts = [b for b in rows if b // GROUP == p and batch.valid.reshape(-1)[b] and (batch.step[b] == turn).any()]
            own = np.array([batch.reward.reshape(-1)[b] for b in acts])
            for b, r in zip(acts, own, strict=True):
                if len(own) > 1:
                    expected[b, np.asarray(batch.step[b] == turn)] = (r - own.mean()) / own.std(ddof=1)
    np.testing.assert_allclose(given, expected, atol=1e-4)
    first = _targets(methods.dr_mas(max_turns=1), batch)[0].advantages
    np.testing.assert_allclose(first, expected * np.asarray(batch.step == 0), atol=1e-4)


def test_gigpo_with_one_state_per_turn_adds_the_comparison_of_turns(batch):
    given = _targets(methods.gigpo(gamma=1.0, step_weight=0.0), batch)[0].advantages
    mask = batch.valid_mask
    episode = advantages.per_token(advantages.grpo(batch.reward, batch.valid), mask)
    np.testing.assert_allclose(given, episode, atol=1e-6)
    steps = _targets(methods.gigpo(gamma=1.0, episode_weight=0.0), batch)[0].advantages
    # All are in one state in their first turn, and the return is the reward: GRPO again.
    first = np.asarray(batch.step == 0)
    np.testing.assert_allclose(np.asarray(steps)[first], np.asarray(episode)[first], atol=1e-5)


def test_a_sequence_belongs_to_the_agent_of_its_first_token(batch):
    given = _targets(methods.hierarchical_grpo(episode_agents=[3]), batch)[0].advantages
    r = np.asarray(batch.reward)
    expected = np.stack([r[:, 0] - r[:, 1], r[:, 1] - r[:, 0], r[:, 2] - r[:, 3], r[:, 3] - r[:, 2]], axis=1) / 2
    expected[1, 2:] = 0  # the other rollout of that episode is not valid
    np.testing.assert_allclose(given, advantages.per_token(expected, batch.mask), atol=1e-6)
    across = _targets(methods.hierarchical_grpo(episode_agents=[5]), batch)[0].advantages
    centered = advantages.dr_grpo(batch.reward, batch.valid)
    np.testing.assert_allclose(across, advantages.per_token(centered, batch.valid_mask), atol=1e-6)


def test_the_baselines_of_roles_are_carried_from_step_to_step(batch):
    method = methods.rae(roles=4, decay=0.5, order="batch")
    found, state = _targets(method, batch)
    reward = jnp.where(batch.valid, batch.reward, 0.0)
    np.testing.assert_allclose(found.advantages, advantages.per_token(reward, batch.valid_mask), atol=1e-6)
    again, _ = _targets(method, batch, state)
    baseline = (1 - 0.5**7) * np.asarray(batch.reward)[np.asarray(batch.valid)].mean()
    expected = advantages.per_token(jnp.where(batch.valid, batch.reward - baseline, 0.0), batch.valid_mask)
    np.testing.assert_allclose(again.advantages, expected, atol=1e-5)


def test_the_quantiles_of_bundles_are_carried_from_step_to_step(batch):
    method = methods.riskpo(bundle_size=2, lr=0.5)
    _, state = _targets(method, batch)
    _, quantiles = advantages.riskpo(batch.reward, jnp.zeros(2), batch.valid, bundle_size=2, lr=0.5)
    again, _ = _targets(method, batch, state)
    expected, _ = advantages.riskpo(batch.reward, quantiles, batch.valid, bundle_size=2, lr=0.5)
    np.testing.assert_allclose(again.advantages, advantages.per_token(expected, batch.valid_mask), rtol=1e-5)
    assert np.asarray(expected).any()


def test_several_rewards_are_found_by_name(batch):
    both = jnp.stack([batch.reward, batch.reward**2], axis=2)
    given = _targets(methods.gdpo(weights={"b": 2.0, "a": 1.0}, by_token=True), batch)[0].advantages
    lengths = jnp.sum(batch.mask, axis=1).reshape(PROMPTS, GROUP)
    expected = advantages.gdpo(both, batch.valid, weights=jnp.array([1.0, 2.0]), lengths=lengths)
    np.testing.assert_allclose(given, advantages.per_token(expected, batch.valid_mask), atol=1e-5)
    tamed = _targets(methods.paco_grpo(), batch)[0].advantages
    expected = advantages.grpo(advantages.log_tamed(both, batch.valid), batch.valid)
    np.testing.assert_allclose(tamed, advantages.per_token(expected, batch.valid_mask), atol=1e-5)
    with pytest.raises(ValueError, match=r"weights names 'c', but the rollouts have the components a, b"):
        _targets(methods.gdpo(weights={"c": 1.0}), batch)


def test_copo_takes_equal_completions_for_equal_answers_and_blends_two_losses(batch):
    tokens = batch.tokens.at[1].set(batch.tokens[0])
    same = batch.replace(tokens=tokens, mask=batch.mask.at[1].set(batch.mask[0]), valid=jnp.ones_like(batch.valid))
    method = methods.copo(gamma=1.0, rho=1.0)
    found, _ = _targets(method, same)
    # Of prompt 0, two of four answers agree: entropy log 4 - log(2) / 2.
    weight = 1 / (1 + np.exp(-(np.log(4) - np.log(2) / 2 - 1)))
    np.testing.assert_allclose(found.extras["local_weight"][:GROUP], np.full(GROUP, weight), rtol=1e-5)
    stats = {"policy": TokenStats(logp=found.old_logp)}
    value = method.loss(stats, same, found)["policy"].value  # at ratio 1 the loss is minus the advantage
    across = advantages.per_token(advantages.global_advantage(same.reward), same.mask)
    blend = weight * found.advantages + (1 - weight) * across
    np.testing.assert_allclose(value[:GROUP], -blend[:GROUP], atol=1e-5)


def test_the_teacher_and_the_policys_probabilities_are_read_from_stats(batch):
    opd = _targets(methods.opd(), batch.replace(logp=-batch.mask * (1 + 0.1 * jnp.arange(LENGTH))))[0]
    np.testing.assert_allclose(opd.advantages, -0.5 * batch.valid_mask, atol=1e-6)
    otb = _targets(methods.otb(), batch)[0]
    mask, logp = batch.valid_mask, -batch.mask * (1 + 0.1 * jnp.arange(LENGTH))
    rewards = advantages.on_last_token(batch.reward, mask)
    np.testing.assert_allclose(
        otb.advantages, advantages.otb(rewards, mask, logp, batch.mask / 2, group_size=GROUP), atol=1e-6
    )
    with pytest.raises(ValueError, match=r"reads rollouts.extras\['episode'\]"):
        _targets(methods.hierarchical_grpo(episode_agents=[1]), batch.replace(extras={"agent": batch.step}))

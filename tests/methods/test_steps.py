"""What methods of steps take from rollouts and from the models they train."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_post import advantages, data, losses, methods, rewards, training
from jaxrl_post.methods import credit
from jaxrl_post.types import TokenStats
from tests.advantages.compiled import all_compiled, compiled
from tests.claims import lab

advantages, losses = all_compiled(advantages), all_compiled(losses)

PROMPTS, GROUP, LENGTH = 2, 4, 8


@pytest.fixture(scope="module")
def batch():
    """Two prompts, rows of two turns with a tool's token between them, one row not valid."""
    rng = np.random.default_rng(0)
    completions = [[list(rng.integers(5, 7, 6)) for _ in range(GROUP)] for _ in range(PROMPTS)]
    made = data.to_rollouts([[2], [3]], completions, length=LENGTH)
    mask = made.mask.at[:, 4].set(0)
    place = jnp.arange(LENGTH)
    step = jnp.where(mask > 0, (place > 4).astype(jnp.int32), -1)
    reward = jnp.array([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 9.0]])
    earned = jnp.asarray(rng.choice([0.0, 1.0], mask.shape), jnp.float32)
    return made.replace(
        mask=mask,
        step=step,
        logp=-jnp.asarray(rng.uniform(0.1, 1, mask.shape), jnp.float32) * mask,
        reward=reward,
        rewards={"step": earned, "whole": reward / 9, "unscored": jnp.where(place == 2, jnp.nan, earned)},
        valid=jnp.ones((PROMPTS, GROUP), bool).at[1, 3].set(False),
        extras={"state": 10 * jnp.maximum(step, 0) + 1},
    )


def _stats(batch, seed=0):
    rng = np.random.default_rng(seed)
    near = {role: batch.logp + jnp.asarray(rng.normal(0, 0.2, batch.mask.shape)) for role in ("policy", "prm")}
    stats = {role: TokenStats(logp=logp * batch.mask) for role, logp in near.items()}
    return stats | {"critic": TokenStats(value=jnp.asarray(rng.normal(size=batch.mask.shape), jnp.float32))}


def _run(method, batch, stats):
    return jax.jit(lambda *given: method.targets((), *given, jax.random.key(0))[0])(batch, stats)


def _targets(method, batch):
    return _run(method, batch, _stats(batch))


def _by_step(x, batch):
    """`[P, G, 2]` sums over the turns, by a loop."""
    x, step, mask = (np.asarray(a, np.float64) for a in (x, batch.step, batch.mask))
    return np.stack([(x * mask * (step == k)).sum(1) for k in range(2)], axis=1).reshape(PROMPTS, GROUP, 2)


def test_srgpo_reads_step_rewards_off_their_tokens_and_gives_them_to_the_trained_tokens_of_the_step(batch):
    given = _targets(methods.srgpo(block_size=None, by_step=False), batch).advantages
    earned = _by_step(batch.rewards["step"], batch)
    exists = jnp.broadcast_to(batch.valid[:, :, None], earned.shape)
    expected = advantages.grpo(batch.reward, batch.valid)[:, :, None] + advantages.grpo_by_key(
        earned, np.zeros(earned.shape, int), exists
    )
    expected = jnp.where(exists, expected, 0).reshape(-1, 2)
    np.testing.assert_allclose(given, advantages.from_turns(expected, batch.step, batch.mask), atol=1e-5)
    assert not np.asarray(given)[:, 4].any()  # the tool's token


def test_a_reward_of_the_whole_sequence_is_that_of_each_step_and_an_unscored_step_has_none(batch):
    whole = _targets(methods.srgpo(step_reward="whole", block_size=None), batch).advantages
    assert np.isfinite(whole).all()
    given = _targets(methods.srgpo(step_reward="unscored", block_size=None, by_step=False), batch).advantages
    episode = advantages.grpo(batch.reward, batch.valid).reshape(-1, 1) * np.asarray(batch.step == 0)
    np.testing.assert_allclose(np.asarray(given) * np.asarray(batch.step == 0), episode, atol=1e-5)
    with pytest.raises(ValueError, match=r"reads rollouts.rewards\['closer'\].*step, unscored, whole"):
        _targets(methods.srgpo(step_reward="closer"), batch)


def test_salt_merges_the_turns_of_equal_tokens_from_equal_states(batch):
    given = np.asarray(_targets(methods.salt(), batch).advantages)
    whole = np.asarray(advantages.grpo(batch.reward, batch.valid)).reshape(-1)
    tokens, mask, step = (np.asarray(x) for x in (batch.tokens, batch.valid_mask, batch.step))
    for b in np.flatnonzero(mask.any(1)):
        for k in range(2):
            did = {c: tuple(tokens[c, (step[c] == k) & (mask[c] > 0)]) for c in np.flatnonzero(mask.any(1))}
            group = [c for c in did if c // GROUP == b // GROUP and did[c] == did[b]]
            np.testing.assert_allclose(given[b, (step[b] == k) & (mask[b] > 0)], whole[group].mean(), atol=1e-5)
    assert not given[~mask.astype(bool)].any()


def test_with_the_prefix_as_state_only_equal_beginnings_are_shared(batch):
    same = batch.replace(tokens=jnp.broadcast_to(batch.tokens[:1], batch.tokens.shape))
    shared = _targets(methods.salt(state="prefix"), same).advantages
    np.testing.assert_allclose(shared, 0, atol=1e-6)
    tool = same.replace(tokens=same.tokens.at[:, 4].set(jnp.arange(PROMPTS * GROUP)))  # tools answered differently
    given = np.asarray(_targets(methods.salt(state="prefix"), tool).advantages)
    whole = advantages.per_token(advantages.grpo(batch.reward, batch.valid), batch.mask)
    np.testing.assert_allclose(given[:, 1:4], 0, atol=1e-6)
    np.testing.assert_allclose(given[:, 5:], whole[:, 5:], atol=1e-6)
    with pytest.raises(ValueError, match="state='prefix'"):
        _targets(methods.salt(state="room"), batch)


def test_the_reward_models_loss_is_dpo_of_the_groups_against_the_policy_that_sampled(batch):
    stage = methods.trajectory_preference(beta=0.5)
    stats = _stats(batch)
    targets, _ = compiled(stage.targets)((), batch, stats, None)
    term = stage.loss(stats, batch, targets)["preference"]
    np.testing.assert_array_equal(term.mask, [1, 0])  # the second prompt's valid outcomes are equal
    gap = np.asarray((stats["prm"].logp - batch.logp) * batch.mask).sum(1)[:4] * 0.5
    pairs = [(i, j) for i in (0, 3) for j in (1, 2)]
    expected = np.mean([np.log1p(np.exp(gap[j] - gap[i])) for i, j in pairs])
    np.testing.assert_allclose(term.value[0], expected, rtol=1e-5)
    found = stage.metrics(stats, batch, targets)
    assert float(found["prm/pairs"].result()) == 4
    assert float(found["prm/accuracy"].result()) == np.mean([gap[i] > gap[j] for i, j in pairs])
    averaged = methods.trajectory_preference(beta=0.5, over_steps="mean")
    halved = averaged.loss(stats, batch, compiled(averaged.targets)((), batch, stats, None)[0])["preference"].value[0]
    np.testing.assert_allclose(halved, np.mean([np.log1p(np.exp((gap[j] - gap[i]) / 2)) for i, j in pairs]), rtol=1e-5)


def test_the_policy_learns_from_steps_even_where_all_outcomes_are_equal(batch):
    equal = batch.replace(reward=jnp.ones((PROMPTS, GROUP)))
    stage = methods.oprl(prm_beta=0.1, alpha=2.0).stages["policy"]
    stats = _stats(equal)
    given = _run(stage, equal, stats)
    earned = 0.1 * _by_step(stats["prm"].logp - equal.logp, equal)
    prompt = np.broadcast_to(np.arange(PROMPTS)[:, None, None], earned.shape)
    exists = np.broadcast_to(np.asarray(equal.valid)[:, :, None], earned.shape)
    expected = 2 * advantages.grpo_by_key(earned, prompt, exists).reshape(-1, 2)
    np.testing.assert_allclose(given.advantages, advantages.from_turns(expected, equal.step, equal.mask), atol=2e-4)
    value = stage.loss(stats, equal, given)["policy"].value
    step_form = losses.step_ppo(
        stats["policy"].logp, equal.logp, given.advantages, given.mask, equal.step, normalize_length=False
    )
    np.testing.assert_allclose(value, step_form, atol=1e-6)


def test_a_batch_without_a_pair_is_a_skipped_update_of_the_reward_model_and_the_steps_go_on():
    task = lab.Task(2, 2, 3, lambda rollouts, key: rollouts.replace(step=jnp.arange(4) - jnp.ones_like(rollouts.step)))
    method = methods.oprl()
    table = jax.random.normal(jax.random.key(1), task.params().shape)
    start = {"policy": task.params(), "prm": table}
    state = training.init(start, method, optax.sgd(0.1), jax.random.key(0))
    step = training.make_step(lab.score, method, optax.sgd(0.1))
    state, metrics = step(state, compiled(lab.sample)(task, task.params(), jax.random.key(2), 4))
    assert int(metrics["prm/empty_updates"]) == 1
    assert int(metrics["policy/empty_updates"]) == 0
    np.testing.assert_array_equal(state.params["prm"], table)
    assert float(jnp.abs(state.params["policy"]).max()) > 0


def test_a_preset_says_for_both_stages_whose_log_probs_are_the_old_ones(batch):
    stats = _stats(batch)
    for options, expected in (
        ({}, batch.logp),
        ({"preset": "trl"}, stats["policy"].logp),
        ({"preset": "verl", "old_logp": "rollout"}, batch.logp),
    ):
        for stage in methods.oprl(**options).stages.values():
            np.testing.assert_array_equal(_run(stage, batch, stats).old_logp, expected)


def test_the_reward_models_steps_have_an_optimizer_of_their_own_and_peak_at_the_decisive_step():
    # Four steps, of which the third decides.
    def judge(rollouts, key):
        del key
        step = jnp.where(rollouts.mask > 0, jnp.arange(-1, 4), -1)
        return rollouts.replace(step=step, reward=(rollouts.tokens[:, 3] == 1).reshape(8, 8).astype(jnp.float32))

    task = lab.Task(8, 2, 4, judge)
    method = methods.oprl()
    optimizers = {"policy": optax.sgd(0.0), "prm": optax.sgd(50.0)}
    start = {"policy": task.params(), "prm": task.params()}
    state = training.init(start, method, optimizers, jax.random.key(0))
    step = training.make_step(lab.score, method, optimizers)
    sample = jax.jit(lambda key: lab.sample(task, task.params(), key, 8))
    for number in range(30):
        state, _ = step(state, sample(jax.random.key(number)))
    assert not np.asarray(state.params["policy"]).any()
    rollouts = sample(jax.random.key(99))
    learned = compiled(lab.score)(state.params["prm"], rollouts, frozenset({"logp"}), None).logp - rollouts.logp
    right = np.asarray(rollouts.tokens[:, 3] == 1)
    size = np.abs(np.asarray(learned)[:, 1:]).mean(0)
    assert size[2] > 2 * np.delete(size, 2).max()
    assert (np.asarray(learned)[right, 3] > 0).all()
    assert (np.asarray(learned)[~right, 3] < 0).all()


def test_ppr_puts_centred_scores_on_the_ends_of_steps_before_it_estimates_advantages(batch):
    given = _targets(methods.ppr_renorm(process="step", outcome="whole", whiten=False), batch)
    score = _by_step(batch.rewards["step"], batch).reshape(-1, 2)
    outcome = np.asarray(batch.rewards["whole"]).reshape(-1, 1)
    ends = {0: 3, 1: int(np.flatnonzero(np.asarray(batch.mask[0]))[-1])}
    per_token = np.zeros(batch.mask.shape)
    for k, place in ends.items():
        per_token[:, place] = (score + outcome - 1)[:, k]
    valid = np.asarray(batch.valid).reshape(-1)
    value = np.asarray(_stats(batch)["critic"].value)
    mask = np.asarray(batch.mask) * valid[:, None]
    returns = np.cumsum((per_token * mask)[:, ::-1], axis=1)[:, ::-1] * mask
    np.testing.assert_allclose(given.returns, returns, atol=1e-5)
    np.testing.assert_allclose(given.advantages, (returns - value) * mask, atol=1e-5)
    steps = methods.ppr_renorm(process="step").metrics(
        _stats(batch) | {"policy": TokenStats(logp=batch.logp)}, batch, given
    )
    assert float(steps["steps/mean"].result()) == 2
    with pytest.raises(ValueError, match="outcome='step' must name a component"):
        _targets(methods.ppr_renorm(process="step", outcome="step"), batch)


def test_a_single_step_and_steps_beyond_the_limit_are_handled(batch):
    one = {"name": "delimiter", "delimiters": [[77]]}  # which is not found
    given = _targets(methods.srgpo(steps=one, block_size=None, by_step=False), batch).advantages
    total = jnp.sum(batch.rewards["step"] * batch.mask, axis=1).reshape(PROMPTS, GROUP)
    key = np.zeros(total.shape, int)
    expected = advantages.grpo(batch.reward, batch.valid) + advantages.grpo_by_key(total, key, batch.valid)
    np.testing.assert_allclose(given, advantages.per_token(expected, batch.valid_mask), atol=1e-5)
    for method in (methods.salt(max_steps=1), methods.srgpo(max_steps=1), methods.oprl(max_steps=1).stages["policy"]):
        cut = np.asarray(_targets(method, batch).advantages)
        assert cut[:, 1:4].any()
        assert not cut[:, 5:].any()
    ppr = _targets(methods.ppr_renorm(process="step", max_steps=1, whiten=False), batch)
    np.testing.assert_allclose(ppr.returns[:, 5:], 0, atol=1e-6)


def test_keywords_out_of_range_are_refused_where_the_method_is_made():
    wrong = [
        (methods.srgpo, {"block_size": 0}, "block_size must be at least 1"),
        (methods.srgpo, {"block_size": True}, "block_size must be a number, got True"),
        (methods.srgpo, {"step_weight": -0.5}, "step_weight must be at least 0"),
        (methods.srgpo, {"blocks": "turn"}, "blocks must be one of batch, prompt, sequence"),
        (methods.salt, {"history": 0}, "history must be at least 1"),
        (methods.salt, {"estimator": "gae"}, "estimator must be one of grpo, rloo"),
        (methods.salt, {"steps": "lines"}, "there is no 'lines'"),
        (methods.oprl, {"prm_beta": 0.0}, "beta must be above 0"),
        (methods.oprl, {"alpha": -1.0}, "alpha must be at least 0"),
        (methods.oprl, {"pairs": "best"}, "pairs must be one of all, extremes"),
        (methods.oprl, {"dual_clip": 3.0}, "dual_clip does not apply to oprl"),
        (methods.oprl, {"clip_low": 2.0}, "clip_low must be between 0 and 1"),
        (methods.ppr_renorm, {"unscored": 2.0}, "unscored must be between 0 and 1"),
        (methods.ppr_renorm, {"max_steps": 0}, "max_steps must be at least 1"),
    ]
    for function, keywords, message in wrong:
        with pytest.raises(ValueError, match=message):
            function(**keywords)
    assert credit.as_advantage("salt").min_group == 2


def test_step_rewards_from_a_potential_do_not_change_the_best_policy_and_others_do():
    # All policies of a tree of three steps, by enumeration: the best sequence, and every advantage along the way.
    rng = np.random.default_rng(0)
    length, gamma, returns = 3, 0.8, jax.jit(advantages.step_returns)
    paths = np.array(np.unravel_index(np.arange(3**length), (3,) * length)).T
    nodes = np.zeros((len(paths), length + 1), int)
    for k in range(length):
        nodes[:, k + 1] = nodes[:, k] * 3 + paths[:, k] + 1
    count = nodes.max() + 1
    for _ in range(10):
        earned, potential = rng.normal(size=count), rng.normal(size=count)
        potential[nodes[:, -1]] = 0.0  # where an episode ends
        step = earned[nodes[:, 1:]]
        shaped = step + gamma * potential[nodes[:, 1:]] - potential[nodes[:, :-1]]
        there = np.ones(step.shape)
        plain, moved = (np.asarray(returns(x, there, gamma=gamma)) for x in (step, shaped))
        # What a step and those after it earn differs by the potential of the state before it, whatever is done there.
        np.testing.assert_allclose(moved - plain, -potential[nodes[:, :-1]], atol=1e-5)
        assert plain[:, 0].argmax() == moved[:, 0].argmax()
    useless = step + 3.0 * (paths == 0)  # a bonus for an action is not a difference of potentials
    assert returns(useless, there, gamma=gamma)[:, 0].argmax() != plain[:, 0].argmax()


def test_centred_scores_rank_every_success_above_every_failure_and_added_ones_do_not():
    process, outcome = jnp.array([[0.0, 0.1, 0.0], [1.0, 1.0, 1.0]]), jnp.array([1.0, 0.0])
    centred = jnp.sum(rewards.renorm(process, outcome), axis=1)
    assert centred[0] >= 0 >= centred[1]
    lengths = jnp.array([[1, 0, 0], [1, 1, 1]])  # one step of a success, three of a failure
    added = jnp.sum((process + outcome[:, None]) * lengths, axis=1)
    assert added[1] > added[0]

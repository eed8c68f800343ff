"""GiGPO with rewards that turns earn: from an environment that pays before the end, and worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import data, methods, models
from jaxrl_post.rollout import generate_turns
from jaxrl_post.rollout.environments import Environment, Text, Transition
from jaxrl_post.types import TokenStats

VOCAB, GROUP, TASKS = 4, 8, 2
KEY = jax.random.key(0)


def advantages_of(method, rollouts):
    @jax.jit
    def targets(rollouts):
        stats = {role: TokenStats(logp=rollouts.logp) for role in method.needs}
        return method.targets(method.init(None, 1), rollouts, stats, KEY)[0].advantages

    return np.asarray(targets(rollouts))


def two_trajectories(earned):
    """One prompt, two rows: three turns of one, one and two tokens with a token of a tool behind each but the last."""
    made = data.to_rollouts([[9]], [[[1, 8, 2, 8, 3, 4], [1, 8, 2, 8, 3, 4]]], length=8)
    step = jnp.array([[-1, 0, -1, 1, -1, 2, 2, -1]] * 2)
    mask = (step >= 0).astype(jnp.float32)
    # Both begin in room 5 and end in room 7; the second rooms differ.
    state = jnp.array([[0, 5, 0, 6, 0, 7, 0, 0], [0, 5, 0, 8, 0, 7, 0, 0]])
    earned = jnp.asarray(earned, jnp.float32)
    reward = jnp.nansum(earned * mask, axis=1)[None]
    return made.replace(
        mask=mask, step=step, logp=-mask, reward=reward, rewards={"earned": earned}, extras={"state": state}
    )


PAYS_FIRST = [[0, 2.0, 0, 0, 0, 0, 0, 0], [0, 0, 9.0, 0, 0, 0, 1.0, 0]]
"""The first trajectory is paid 2 in its first turn, the second 1 in its last; what is on a tool's token is nobody's."""

plain = functools.partial(methods.gigpo, gamma=0.5, normalize_std=False)


def test_what_the_first_turn_earns_is_the_return_of_the_first_turn_alone():
    rollouts = two_trajectories(PAYS_FIRST)
    found = advantages_of(plain(step_reward="earned"), rollouts)
    # Returns 2, 0, 0 and 1/4, 1/2, 1. Episodes +-1/2. Room 5: +-7/8. The second rooms: 0. Room 7: -+1/2.
    np.testing.assert_allclose(found[0], [0, 1.375, 0, 0.5, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(found[1], [0, -1.375, 0, -0.5, 0, 0, 0, 0], atol=1e-6)
    # Without it the last turn has earned it all. Returns 1/2, 1, 2 and 1/4, 1/2, 1: room 5: +-1/8, room 7: +-1/2.
    found = advantages_of(plain(), rollouts)
    np.testing.assert_allclose(found[0], [0, 0.625, 0, 0.5, 0, 1.0, 1.0, 0], atol=1e-6)
    np.testing.assert_allclose(found[1], [0, -0.625, 0, -0.5, 0, -1.0, -1.0, 0], atol=1e-6)


def test_turns_that_do_not_count_earn_nothing_and_neither_do_rows_that_are_not_valid():
    rollouts = two_trajectories(PAYS_FIRST)
    found = advantages_of(plain(step_reward="earned", max_turns=2, episode_weight=0.0), rollouts)
    np.testing.assert_allclose(found[:, 1], [1.0, -1.0], atol=1e-6)  # returns 2 and 0
    assert not found[:, 2:].any()
    alone = rollouts.replace(valid=jnp.array([[True, False]]))
    assert not advantages_of(plain(step_reward="earned"), alone).any()


def test_a_turn_that_could_not_be_scored_and_those_before_it_are_compared_by_their_trajectories_alone():
    rollouts = two_trajectories([[0, 2.0, 0, np.nan, 0, 0, 0, 0], PAYS_FIRST[1]])
    found = advantages_of(plain(step_reward="earned"), rollouts)
    np.testing.assert_allclose(found[0], [0, 0.5, 0, 0.5, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(found[1], [0, -0.5, 0, -0.5, 0, 0, 0, 0], atol=1e-6)


def test_a_step_reward_that_is_not_there_or_is_that_of_sequences_is_refused():
    rollouts = two_trajectories(PAYS_FIRST)
    with pytest.raises(ValueError, match=r"reads rollouts.rewards\['paid'\].*the components earned"):
        advantages_of(plain(step_reward="paid"), rollouts)
    whole = rollouts.replace(rewards={"earned": rollouts.reward})
    with pytest.raises(ValueError, match=r"step_reward='earned' must name a component \[B, T\].*\(1, 2\)"):
        advantages_of(plain(step_reward="earned"), whole)


def shop():
    """Three turns: token 3 in the first is paid 1 at once, token 2 in the last 0.25; others nothing."""

    def reset(task, key):
        del key
        return jnp.zeros(2, jnp.int32), Text(task[None], jnp.int32(1))

    def step(state, action, key):
        del key
        turn, said = state[0], action.tokens[0]
        reward = jnp.where((turn == 0) & (said == 3), 1.0, 0.0) + jnp.where((turn == 2) & (said == 2), 0.25, 0.0)
        return Transition(jnp.stack([turn + 1, said % 2]), Text(said[None], jnp.int32(1)), reward, turn == 2)

    return Environment(reset, step, max_prompt=1, max_observation=1, fingerprint=lambda state: 2 * state[0] + state[1])


def by_hand(actions, gamma):
    """Advantages `[P, G, 3]` of GiGPO in the shop, in float64 from what was said."""
    found = np.zeros(actions.shape)
    for p, group in enumerate(actions):
        earned = np.stack([group[:, 0] == 3, 0 * group[:, 1], 0.25 * (group[:, 2] == 2)], axis=1).astype(float)
        total = earned.sum(axis=1)
        last = earned[:, 2]
        returns = np.stack([earned[:, 0] + gamma**2 * last, gamma * last, last], axis=1)
        rooms = np.stack([np.zeros(GROUP), 2 + group[:, 0] % 2, 4 + group[:, 1] % 2], axis=1)
        for g in range(GROUP):
            found[p, g] = (total[g] - total.mean()) / (total.std(ddof=1) + 1e-6)
            for turn in range(3):
                met = returns[rooms == rooms[g, turn]]
                if len(met) > 1 and met.std() > 0:
                    found[p, g, turn] += (returns[g, turn] - met.mean()) / (met.std(ddof=1) + 1e-6)
    return found


def test_an_environment_that_pays_in_the_first_turn_gives_the_credit_to_the_first_turn():
    policy = models.decoder(vocab_size=VOCAB, width=8, layers=1, heads=2)

    @jax.jit
    def played(key):
        params = policy.init(key)
        tasks = jnp.arange(TASKS)
        return generate_turns(policy, params, shop(), tasks, key, max_turns=3, max_turn_tokens=1, group_size=GROUP)

    out = played(jax.random.key(5))
    tokens, step = np.asarray(out.tokens), np.asarray(out.step)
    actions = np.stack([tokens[step == turn] for turn in range(3)], axis=1)
    expected = by_hand(actions.reshape(TASKS, GROUP, 3), gamma=0.9).reshape(-1, 3)
    first = actions[:, 0] == 3
    assert 0 < first[:GROUP].sum() < GROUP
    assert (actions[:, 2] == 2).any()
    found = advantages_of(methods.gigpo(step_reward="environment", gamma=0.9), out)
    assert not found[step < 0].any()
    np.testing.assert_allclose(np.stack([found[step == turn] for turn in range(3)], axis=1), expected, atol=1e-4)
    # The sum at the end would have the later turns share in it.
    assert np.abs(advantages_of(methods.gigpo(gamma=0.9), out) - found).max() > 0.1

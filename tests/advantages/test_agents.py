import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages
from jaxrl_post.advantages.agents import rae
from tests.advantages.compiled import all_compiled

advantages = all_compiled(advantages)

BY_KEY = jax.jit(advantages.grpo_by_key, static_argnames=("normalize_std", "ddof", "eps"))


def _random(seed=0, n=60):
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=n)
    first, second = rng.integers(-2, 3, n), rng.integers(0, 4, n) * 1000
    rewards[(first == 1) & (second == 0)] = 0.7  # equal rewards
    first[0], second[0] = 99, 99  # a group of one
    return rewards, first, second, rng.random(n) < 0.8


@pytest.mark.parametrize("ddof", [0, 1])
def test_groups_by_key_agree_with_a_float64_loop(ddof):
    rewards, first, second, valid = _random()
    expected = np.zeros(len(rewards))
    for i in np.flatnonzero(valid):
        group = rewards[(first == first[i]) & (second == second[i]) & valid]
        if len(group) > 1:
            spread = group.std(ddof=ddof)
            expected[i] = (rewards[i] - group.mean()) / (spread + 1e-6) if spread > 1e-12 else 0
    given = BY_KEY(np.where(valid, rewards, np.nan), (first, second), valid, ddof=ddof)
    np.testing.assert_allclose(given, expected, atol=1e-5)
    assert given[0] == 0


def test_groups_by_row_equal_grpo():
    rewards = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
    valid = np.random.default_rng(2).random((4, 6)) < 0.7
    rows = np.broadcast_to(np.arange(4)[:, None], (4, 6))
    np.testing.assert_allclose(BY_KEY(rewards, rows, valid), advantages.grpo(rewards, valid), atol=1e-5)
    centered = BY_KEY(rewards, rows, valid, normalize_std=False)
    np.testing.assert_allclose(centered, advantages.dr_grpo(rewards, valid), atol=1e-6)


def test_a_reward_that_is_not_a_number_is_seen_by_key_in_its_group_alone():
    given = np.asarray(BY_KEY(jnp.array([1.0, jnp.nan, 1.0, 0.0]), jnp.array([0, 0, 1, 1])))
    assert np.isnan(given[:2]).all()
    assert np.isfinite(given[2:]).all()


def test_equal_rewards_but_for_rounding_by_key_are_no_signal_and_gradients_are_finite():
    rewards = np.float32([0.3, 0.3, np.nextafter(np.float32(0.3), np.float32(1)), 5.0])
    key = np.array([0, 0, 0, 1])
    assert not np.asarray(BY_KEY(rewards, key, eps=0.0)).any()
    gradient = jax.jit(jax.grad(lambda r: jnp.sum(jnp.arange(4) * BY_KEY(r, key))))(jnp.asarray(rewards))
    assert np.isfinite(gradient).all()
    assert BY_KEY(jnp.ones(4, jnp.bfloat16), key).dtype == jnp.float32


def test_dr_mas_gives_the_papers_numbers():
    rewards, agent = jnp.array([1.0, 1, 1, 0, 1, 0]), jnp.array([0, 0, 0, 0, 1, 1])
    prompt = jnp.zeros(6, int)
    given = advantages.dr_mas(rewards, prompt, agent, eps=0.0)
    np.testing.assert_allclose(given, [0.5, 0.5, 0.5, -1.5, 0.70711, -0.70711], rtol=1e-5)
    pooled = advantages.grpo_by_key(rewards, prompt, eps=0.0)
    np.testing.assert_allclose(pooled, [0.6455, 0.6455, 0.6455, -1.2910, 0.6455, -1.2910], rtol=1e-4)


def test_the_second_moment_of_a_pooled_advantage_is_the_factor_it_says():
    rng = np.random.default_rng(3)
    agent, prompt = rng.integers(0, 3, 400), rng.integers(0, 2, 400)
    rewards = rng.normal(size=400) * (1 + agent) + agent
    factor = np.asarray(advantages.second_moment_factor(rewards, prompt, agent))
    pooled = np.asarray(advantages.grpo_by_key(rewards, prompt, ddof=0, eps=0.0))
    own = np.asarray(advantages.dr_mas(rewards, prompt, agent, ddof=0, eps=0.0))
    for k in range(3):
        for p in range(2):
            rows = (agent == k) & (prompt == p)
            np.testing.assert_allclose(factor[rows], (pooled[rows] ** 2).mean(), rtol=1e-4)
            np.testing.assert_allclose((own[rows] ** 2).mean(), 1, rtol=1e-4)
    np.testing.assert_allclose(factor[prompt == 0].mean(), 1, rtol=1e-4)
    equal = advantages.second_moment_factor(jnp.ones(4), jnp.zeros(4, int), jnp.array([0, 0, 1, 1]))
    assert not np.asarray(equal).any()


def test_solvers_are_compared_within_an_episode_and_proposers_across_them():
    # Two tasks with two episodes each; agent 0 proposes once, agent 7 solves twice.
    group = np.repeat([0, 1], 6)
    episode = np.tile(np.repeat([0, 1], 3), 2)
    agent = np.tile([0, 7, 7], 4)
    rewards = np.float32([1, 1, 0, 0, 4, 2, 3, 0, 0, 5, 1, 1])
    given = advantages.hierarchical_grpo(rewards, group, episode, agent, episode_agents=[7])
    assert given.tolist() == [0.5, 0.5, -0.5, -0.5, 1, -1, -1, 0, 0, 1, 0, 0]
    flat = advantages.hierarchical_grpo(rewards, group, episode, agent, episode_agents=[])
    np.testing.assert_allclose(flat, advantages.grpo_by_key(rewards, (group, agent), normalize_std=False))


def test_a_roles_baseline_is_the_running_mean_of_its_own_rewards():
    rng = np.random.default_rng(4)
    rewards, role, valid = rng.normal(size=(5, 6)), rng.integers(0, 3, (5, 6)), rng.random((5, 6)) < 0.8
    ema, expected = np.array([0.5, 0.0, -1.0]), np.zeros((5, 6))
    for b in range(5):
        for g in range(6):
            if valid[b, g]:
                expected[b, g] = rewards[b, g] - ema[role[b, g]]
                ema[role[b, g]] = 0.9 * ema[role[b, g]] + 0.1 * rewards[b, g]
    start = jnp.array([0.5, 0.0, -1.0])
    given, new = jax.jit(functools.partial(advantages.rae, decay=0.9))(
        np.where(valid, rewards, np.nan), role, start, valid
    )
    np.testing.assert_allclose(given, expected, atol=1e-5)
    np.testing.assert_allclose(new, ema, atol=1e-5)


def test_the_batch_form_of_a_roles_baseline_does_not_depend_on_the_order():
    rng = np.random.default_rng(5)
    rewards, role = rng.normal(size=20).astype(np.float32), rng.integers(0, 2, 20)
    start = jnp.array([1.0, -1.0, 3.0])
    given, new = advantages.rae(rewards, role, start, decay=0.8, order="batch")
    np.testing.assert_allclose(given, rewards - np.array(start)[role], rtol=1e-5)
    order = rng.permutation(20)
    shuffled, same = advantages.rae(rewards[order], role[order], start, decay=0.8, order="batch")
    np.testing.assert_allclose(shuffled, np.asarray(given)[order], rtol=1e-5)
    np.testing.assert_allclose(same, new, rtol=1e-5)
    for k in range(2):
        own = rewards[role == k]
        keep = 0.8 ** len(own)
        np.testing.assert_allclose(new[k], keep * start[k] + (1 - keep) * own.mean(), rtol=1e-4)
    assert new[2] == 3  # a role that nobody played
    # Equal rewards: both orders end at the same baseline.
    ones = jnp.ones(4), jnp.zeros(4, int), jnp.zeros(1)
    np.testing.assert_allclose(advantages.rae(*ones, order="batch")[1], advantages.rae(*ones)[1], rtol=1e-5)


def test_gigpo_adds_the_comparison_at_equal_states_to_that_of_trajectories():
    # Two prompts, two trajectories of up to three steps, gamma 1/2, rewards on the last step.
    rewards = jnp.array([[1.0, 0.0], [0.0, 4.0]])
    state = jnp.array([[[5, 6, 7], [5, 7, 0]], [[5, 6, 0], [5, 6, 0]]])
    exists = jnp.array([[[1, 1, 1], [1, 1, 0]], [[1, 0, 0], [1, 1, 0]]])
    given = advantages.gigpo(rewards, state, exists, gamma=0.5, normalize_std=False)
    # Prompt 0: returns 1/4, 1/2, 1 and 0, 0. State 5: +-1/8, state 6 alone: 0, state 7: +-1/2. Episodes +-1/2.
    # Prompt 1: returns 0 and 2, 4. State 5: -+1, state 6 alone. Episodes -+2.
    expected = [[[0.625, 0.5, 1.0], [-0.625, -1.0, 0]], [[-3.0, 0, 0], [3.0, 2.0, 0]]]
    np.testing.assert_allclose(given, expected, rtol=1e-6)
    steps_only = advantages.gigpo(rewards, state, exists, gamma=0.5, normalize_std=False, episode_weight=0.0)
    np.testing.assert_allclose(steps_only[0], [[0.125, 0, 0.5], [-0.125, -0.5, 0]], rtol=1e-6)
    earned = jnp.zeros((2, 2, 3)).at[0, 0, 2].set(1).at[1, 1, 1].set(4)
    same = advantages.gigpo(rewards, state, exists, step_rewards=earned, gamma=0.5, normalize_std=False)
    np.testing.assert_allclose(same, expected, rtol=1e-6)


def test_gigpo_without_repeated_states_is_grpo_and_reads_no_invalid_rollout():
    rng = np.random.default_rng(6)
    rewards = rng.normal(size=(3, 4)).astype(np.float32)
    valid = rng.random((3, 4)) < 0.7
    state = np.arange(3 * 4 * 5).reshape(3, 4, 5)
    given = advantages.gigpo(np.where(valid, rewards, np.nan), state, np.ones((3, 4, 5)), valid)
    expected = np.broadcast_to(np.asarray(advantages.grpo(rewards, valid))[:, :, None], (3, 4, 5))
    np.testing.assert_allclose(given, expected, atol=1e-5)


def test_vmap_over_seeds_equals_single_calls():
    pairs = [_random(seed) for seed in range(3)]
    rewards, first, second, valid = (np.stack(x) for x in zip(*pairs, strict=True))
    batched = jax.vmap(lambda r, a, b, v: advantages.dr_mas(r, a, b, v))(rewards, first, second, valid)
    for i in range(3):
        np.testing.assert_allclose(batched[i], BY_KEY(rewards[i], (first[i], second[i]), valid[i]), atol=1e-5)


def test_impossible_arguments_are_refused():
    x, key = jnp.zeros(4), jnp.zeros(4, int)
    with pytest.raises(ValueError, match=r"key 1 must have the shape of rewards, \(4,\), got \(3,\)"):
        advantages.dr_mas(x, key, key[:3])
    with pytest.raises(ValueError, match="key 0 must hold integers, got float32"):
        advantages.grpo_by_key(x, x)
    with pytest.raises(ValueError, match="ddof must be 1"):
        advantages.grpo_by_key(x, key, ddof=3)
    with pytest.raises(ValueError, match=r"role must be in \[0, 1\), got -1"):
        rae(x, key - 1, jnp.zeros(1))
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        advantages.rae(x, key, jnp.zeros(1), decay=1.0)
    with pytest.raises(ValueError, match='order must be "sequence" or "batch"'):
        advantages.rae(x, key, jnp.zeros(1), order="turn")
    with pytest.raises(ValueError, match=r"exists must be \[P, G, K\] with \[P, G\] = \(2, 2\), got shape \(2, 3, 4\)"):
        advantages.gigpo(jnp.zeros((2, 2)), jnp.zeros((2, 3, 4), int), jnp.ones((2, 3, 4)))
    with pytest.raises(ValueError, match="must not be empty"):
        advantages.grpo_by_key(jnp.zeros(0), jnp.zeros(0, int))

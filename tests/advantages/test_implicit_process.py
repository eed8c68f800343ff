"""PRIME's advantage."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages
from tests.advantages.compiled import all_compiled

advantages = all_compiled(advantages)


def test_outcomes_of_four_have_the_tables_baseline_on_all_tokens():
    outcome = jnp.array([[1.0, 0.0, 0.0, 1.0]])
    mask = jnp.array([[1, 1, 0], [0, 1, 1], [1, 1, 1], [0, 0, 1]])
    found = advantages.prime(jnp.zeros((4, 3)), outcome, mask, whiten=False)
    np.testing.assert_allclose(found, mask * np.array([[2 / 3], [-2 / 3], [-2 / 3], [2 / 3]]), rtol=1e-5)


@pytest.mark.parametrize("whiten", [False, True])
def test_the_advantage_is_that_of_a_float64_loop(whiten):
    rng = np.random.default_rng(0)
    prompts, group, length = 5, 4, 6
    process, outcome = rng.normal(size=(prompts * group, length)), rng.integers(0, 2, (prompts, group)).astype(float)
    mask, valid = rng.random((prompts * group, length)) < 0.7, rng.random((prompts, group)) < 0.8
    mask[3], valid[0] = False, True  # an answer without tokens
    expected = np.zeros_like(process)
    for p in range(prompts):
        rows = [g for g in range(group) if valid[p, g]]
        spoken = [g for g in rows if mask[p * group + g].any()]
        means = [process[p * group + g][mask[p * group + g]].mean() for g in spoken]
        k = len(spoken)
        for g in spoken:
            b = p * group + g
            token = (k * process[b] - sum(means)) / (k - 1) if k > 1 else 0 * process[b]
            others = [outcome[p, j] for j in rows if j != g]
            own = outcome[p, g] - np.mean(others) if others else 0.0
            token = 2.0 * np.where(mask[b], token, 0)
            to_go = np.cumsum(token[::-1])[::-1] + 0.5 * own
            expected[b] = np.where(mask[b], to_go, 0)
    counts = mask & valid.reshape(-1, 1)
    if whiten:
        expected[counts] = (expected[counts] - expected[counts].mean()) / np.sqrt(expected[counts].var(ddof=1) + 1e-8)
    found = advantages.prime(
        np.where(counts, process, np.nan), outcome, mask, valid, process_weight=2.0, outcome_weight=0.5, whiten=whiten
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_group_of_one_has_no_baseline_and_no_advantage():
    found = advantages.prime(jnp.ones((2, 3)), jnp.ones((2, 1)), jnp.ones((2, 3)))
    assert not found.any()
    assert not advantages.prime(jnp.ones((2, 3)), jnp.ones((1, 2)), jnp.zeros((2, 3))).any()


def test_rewards_are_divided_by_the_largest_sum_to_the_end():
    rewards, mask = np.array([[1.0, -4.0, np.nan], [0.5, 0.5, 0.5]]), np.array([[1, 1, 0], [1, 1, 1]])
    np.testing.assert_allclose(advantages.prime_norm(rewards, mask), np.where(mask, rewards, 0) / 4)
    assert not advantages.prime_norm(jnp.zeros((2, 2)), jnp.ones((2, 2))).any()
    assert not advantages.prime_norm(jnp.ones((2, 2)), jnp.zeros((2, 2))).any()


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="mask must have P \\* G = 4 rows"):
        advantages.prime(jnp.ones((3, 2)), jnp.ones((2, 2)), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="process_rewards must have the shape of mask"):
        advantages.prime(jnp.ones((4, 3)), jnp.ones((2, 2)), jnp.ones((4, 2)))

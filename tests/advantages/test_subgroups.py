"""HBPO's advantage against a loop, and where its sub-groups are small, equal or empty."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages
from tests.advantages.compiled import all_compiled

advantages = all_compiled(advantages)


def by_hand(rewards, budgets, levels, valid, weight=1.0):
    found = np.zeros(rewards.shape)
    for row in range(rewards.shape[0]):
        on = valid[row]
        if on.sum() < 2:
            continue
        mean, std = rewards[row][on].mean(), rewards[row][on].std(ddof=1)
        for i in np.flatnonzero(on):
            same = on & (budgets[row] == budgets[row, i])
            across = (rewards[row, i] - mean) / (std + 1e-6) if std > 1e-12 else 0.0
            found[row, i] = across + weight * (rewards[row][same].mean() - levels[row, i])
    return found


def case(seed=0, rows=5, size=8):
    rng = np.random.default_rng(seed)
    rewards = rng.uniform(-1, 4, (rows, size))
    rewards[0] = 2.0
    budgets = rng.choice([0.0, 512.0, 1024.0], (rows, size))
    levels = np.where(budgets > 0, 4 * np.cos(np.pi * budgets / 8192), 0.0)
    valid = rng.random((rows, size)) > 0.3
    valid[-1] = False
    valid[-1, 2] = True
    return rewards, budgets, levels, valid


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.0])
def test_it_agrees_with_a_loop_over_members(weight):
    given = case()
    expected = by_hand(*given, weight=weight)
    found = jax.jit(lambda *x: advantages.hbpo(*x, weight=weight))(*map(jnp.asarray, given))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=2e-5)
    with jax.enable_x64(True):
        wide = advantages.hbpo(*map(jnp.asarray, given), weight=weight)
        assert wide.dtype == jnp.float64
        np.testing.assert_allclose(wide, expected, atol=1e-9)


def test_two_budgets_by_hand():
    rewards, budgets = jnp.array([[1.0, 3.0, 2.0, 2.0]]), jnp.array([[8, 8, 16, 16]])
    levels = jnp.array([[3.0, 3.0, 1.5, 1.5]])
    # mean 2, std sqrt(2/3); the first sub-group is 1 below its level, the second 0.5 above
    scale = 1 / (np.sqrt(2 / 3) + 1e-6)
    found = advantages.hbpo(rewards, budgets, levels)
    np.testing.assert_allclose(found, [[-scale - 1, scale - 1, 0.5, 0.5]], rtol=1e-6)


def test_equal_rewards_are_held_against_the_level_alone():
    found = advantages.hbpo(jnp.full((1, 4), 2.0), jnp.array([[1, 1, 2, 2]]), jnp.array([[2.5, 2.5, 1.0, 1.0]]))
    np.testing.assert_allclose(found, [[-0.5, -0.5, 1.0, 1.0]])


def test_a_group_of_one_and_an_empty_one_get_nothing():
    one = advantages.hbpo(jnp.array([[3.0]]), jnp.array([[8]]), jnp.array([[1.0]]))
    none = advantages.hbpo(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.zeros((1, 2)), jnp.zeros((1, 2), bool))
    np.testing.assert_array_equal(one, [[0.0]])
    np.testing.assert_array_equal(none, [[0.0, 0.0]])


def test_what_an_invalid_member_holds_plays_no_part():
    rewards, budgets, levels, valid = case(3)
    junk = np.where(valid, rewards, np.nan)
    np.testing.assert_array_equal(
        advantages.hbpo(*map(jnp.asarray, (junk, budgets, levels, valid))),
        advantages.hbpo(*map(jnp.asarray, (rewards, budgets, levels, valid))),
    )


def test_the_order_of_members_does_not_matter():
    rewards, budgets, levels, valid = case(4)
    order = np.random.default_rng(1).permutation(rewards.shape[1])
    plain = advantages.hbpo(*map(jnp.asarray, (rewards, budgets, levels, valid)))
    moved = advantages.hbpo(*(jnp.asarray(x[:, order]) for x in (rewards, budgets, levels, valid)))
    np.testing.assert_allclose(moved, plain[:, order], atol=1e-5)


def test_arrays_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="budgets must have the shape of rewards"):
        advantages.hbpo(jnp.ones((1, 4)), jnp.ones((1, 2)), jnp.ones((1, 4)))
    with pytest.raises(ValueError, match="levels must have the shape of rewards"):
        advantages.hbpo(jnp.ones((1, 4)), jnp.ones((1, 4)), jnp.ones(4))
    with pytest.raises(ValueError, match=r"rewards must be \[P, G\]"):
        advantages.hbpo(jnp.ones(4), jnp.ones(4), jnp.ones(4))

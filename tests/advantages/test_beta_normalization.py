"""BNPO against the paper's example, the two normalisations that it contains, and its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxrl_post import advantages
from tests.advantages.compiled import all_compiled

advantages = all_compiled(advantages)


def binary(rates, group):
    """Groups with the given numbers of successes."""
    return jnp.asarray(np.arange(group)[None] < np.asarray(rates)[:, None], jnp.float32)


def test_two_prompts_with_a_quarter_and_three_quarters():
    found = advantages.bnpo(binary([1, 3], 4))
    np.testing.assert_allclose(found[0], [0.716606, -0.238869, -0.238869, -0.238869], rtol=1e-5)


def test_the_density_is_fitted_by_moments():
    rewards = binary([0, 1, 2, 5, 8, 3], 8)
    rate = np.asarray(rewards).mean(1)
    mean, variance = rate.mean(), rate.var(ddof=1)
    a, b = (mean * (1 - mean) / variance - 1) * np.array([mean, 1 - mean])
    alpha, beta = max(1, 1 + a / 3), max(1, 1 + b / 3)
    weight = 1 / stats.beta.pdf(np.clip(rate, 1e-6, 1 - 1e-6), alpha, beta)
    expected = weight[:, None] * (np.asarray(rewards) - rate[:, None])
    np.testing.assert_allclose(advantages.bnpo(rewards), expected, rtol=2e-4, atol=1e-6)
    assert np.all(np.asarray(advantages.bnpo(rewards))[[0, 4]] == 0)  # all wrong, all right


def test_it_contains_the_plain_difference_and_the_division_by_the_deviation():
    wide = binary([0, 8, 0, 8, 0, 8, 4], 8)  # variance 1/4 of the rates: a = b = 0, a flat density
    np.testing.assert_allclose(advantages.bnpo(wide), advantages.dr_grpo(wide), rtol=1e-5)
    even = binary([2, 4, 6], 8)  # variance 1/16: a = b = 3/2, the density of the square root
    np.testing.assert_allclose(advantages.bnpo(even), np.pi / 8 * advantages.grpo(even, ddof=0, eps=0.0), rtol=1e-5)


def test_one_prompt_equal_rates_and_single_rollouts_have_weight_one_or_no_advantage():
    one = binary([3], 8)
    np.testing.assert_allclose(advantages.bnpo(one), advantages.dr_grpo(one), rtol=1e-6)
    same = binary([3, 3, 3], 8)
    np.testing.assert_allclose(advantages.bnpo(same), advantages.dr_grpo(same), rtol=1e-6)
    assert bool(jnp.all(advantages.bnpo(jnp.array([[1.0], [0.0]])) == 0))


def test_rewards_of_another_range_are_mapped_and_what_is_not_valid_is_not_there():
    rewards = binary([1, 3, 2], 4)
    np.testing.assert_allclose(
        advantages.bnpo(2 * rewards - 1, low=-1.0, high=1.0), advantages.bnpo(rewards), rtol=1e-5, atol=1e-6
    )
    padded = jnp.pad(rewards, ((0, 1), (0, 1)), constant_values=jnp.nan)
    valid = jnp.pad(jnp.ones((3, 4), bool), ((0, 1), (0, 1)))
    np.testing.assert_allclose(advantages.bnpo(padded, valid)[:3, :4], advantages.bnpo(rewards), rtol=1e-6)
    assert bool(jnp.all(advantages.bnpo(padded, valid)[3] == 0))
    gradient = jax.jit(jax.grad(lambda r: advantages.bnpo(r, valid).sum()))(jnp.nan_to_num(padded))
    assert bool(jnp.all(jnp.isfinite(gradient)))
    with pytest.raises(ValueError, match="low, the reward of failure, must be below high"):
        advantages.bnpo(rewards, low=1.0, high=0.0)

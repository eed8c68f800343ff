"""Gaussian rewards of boxes, against numbers that were computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import rewards

GOLD = jnp.array([20.0, 10, 40, 30])


def test_point_and_coverage_are_the_papers():
    pred = jnp.array([10.0, 10, 30, 30])
    np.testing.assert_allclose(rewards.gaussian_point(pred, GOLD), np.exp(-0.5), rtol=1e-6)
    np.testing.assert_allclose(rewards.gaussian_coverage(pred, GOLD), np.exp(-0.125), rtol=1e-6)
    small, large = jnp.array([5.0, 5, 15, 15]), jnp.array([0.0, 0, 20, 20])
    np.testing.assert_allclose(rewards.gaussian_coverage(small, large), 0.8, rtol=1e-6)
    np.testing.assert_allclose(rewards.gaussian_coverage(GOLD, GOLD), 1.0, rtol=1e-6)


def test_coverage_is_the_overlap_of_two_normal_densities():
    pred = jnp.array([12.0, 14, 44, 24])
    grid = np.linspace(-60, 120, 4001)

    def density(low, high):
        mean, std = (low + high) / 2, 0.5 * (high - low)
        return np.exp(-0.5 * ((grid - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))

    overlaps = [
        np.trapezoid(np.sqrt(density(pred[i], pred[i + 2]) * density(GOLD[i], GOLD[i + 2])), grid) for i in (0, 1)
    ]
    np.testing.assert_allclose(rewards.gaussian_coverage(pred, GOLD), np.prod(overlaps), rtol=1e-4)


def test_a_box_without_area_earns_nothing_and_corners_may_be_in_any_order():
    flat = jnp.array([[20.0, 10, 20, 30], [40.0, 30, 20, 10]])
    gold = jnp.tile(GOLD, (2, 1))
    for function in (rewards.gaussian_point, rewards.gaussian_coverage):
        np.testing.assert_allclose(function(flat, gold), [0.0, 1.0], rtol=1e-6)
        assert bool(jnp.all(jnp.isfinite(jax.grad(lambda x, f=function: f(x, gold).sum())(flat))))
        with pytest.raises(ValueError, match="alpha"):
            function(GOLD, GOLD, alpha=0.0)


def test_the_reward_reads_the_last_box_of_a_completion():
    found = rewards.gaussian_box(
        ["?"] * 5,
        ["first [0, 0, 1, 1] then [10, 10, 30, 30]", "no box", "[20, 10, 40, 30]", "[1, 2, 3, 4]", "[1, 2, 3, 4]"],
        [GOLD.tolist(), GOLD.tolist(), "[20, 10, 40, 30]", [1, 1, 1, 5], None],
    )
    np.testing.assert_allclose(found[:3], [np.exp(-0.5) + np.exp(-0.125), 0.0, 2.0], rtol=1e-5)
    assert found[3:] == [None, None]

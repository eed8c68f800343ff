"""Rewards of steps: numbers of the papers, and what must cancel."""

import jax.numpy as jnp
import numpy as np

from jaxrl_post import advantages, diffusion


def test_gains_compared_step_by_step():
    rewards = jnp.array([[[0.2, 0.5, 0.6], [0.2, 0.1, 0.4]]])
    gains = diffusion.step_gains(rewards)
    np.testing.assert_allclose(gains, [[[0.3, 0.1], [-0.1, 0.3]]], atol=1e-6)
    np.testing.assert_allclose(gains.sum(-1), rewards[..., -1] - rewards[..., 0], atol=1e-6)
    compared = jnp.stack([advantages.grpo(gains[..., k], ddof=0, eps=0.0) for k in range(2)], axis=-1)
    np.testing.assert_allclose(compared, [[[1, -1], [-1, 1]]], atol=1e-5)


def test_a_turning_point_is_credited_with_all_that_follows():
    rewards = jnp.array([0.5, 0.4, 0.7, 0.8])
    np.testing.assert_allclose(diffusion.turning_point_rewards(rewards), [-0.1, 0.4, 0.1], atol=1e-6)
    np.testing.assert_allclose(diffusion.turning_point_rewards(rewards, jnp.array(0.9)), [-0.1, 0.5, 0.1], atol=1e-6)
    mirrored = diffusion.turning_point_rewards(1 - rewards)
    np.testing.assert_allclose(mirrored, [0.1, -0.4, -0.1], atol=1e-6)


def test_a_first_step_in_line_with_the_rest_and_a_flat_trajectory():
    rising = diffusion.turning_point_rewards(jnp.array([0.0, 0.25, 1.0]))
    np.testing.assert_allclose(rising, [1.0, 0.75], atol=1e-6)
    np.testing.assert_allclose(diffusion.turning_point_rewards(jnp.ones(4)), np.zeros(3))


def test_weights_by_noise():
    np.testing.assert_allclose(diffusion.noise_weights(jnp.array([0.6, 0.3, 0.3])), [1.5, 0.75, 0.75], rtol=1e-6)
    np.testing.assert_allclose(diffusion.noise_weights(jnp.zeros(3)), np.ones(3))


def test_levels_stay_within_their_bounds():
    gains = jnp.array([[0.1, 0.1, 0.0], [-0.1, 0.1, 0.0]])
    found = diffusion.calibrate_level(jnp.array([1.0, 0.1, 0.5]), gains, balance=0.5)
    np.testing.assert_allclose(found, [1.0, 0.1, 0.55], rtol=1e-6)

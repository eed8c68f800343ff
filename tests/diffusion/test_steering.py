"""Steering of samples: what is moved, by how much, and what stays."""

import jax.numpy as jnp
import numpy as np

from jaxrl_post import diffusion


def test_guidance_moves_by_strength_and_time():
    mean, gradient = jnp.array([[1.0, 0.0]]), jnp.array([[3.0, 4.0]])
    np.testing.assert_allclose(diffusion.guided_mean(mean, gradient, 0.5, strength=0.0), mean)
    np.testing.assert_allclose(diffusion.guided_mean(mean, gradient, -0.5, strength=0.2), [[1.3, 0.4]], rtol=1e-6)
    unit = diffusion.guided_mean(mean, gradient, 0.5, strength=2.0, normalize=True)
    np.testing.assert_allclose(unit, [[1.6, 0.8]], rtol=1e-6)
    still = diffusion.guided_mean(mean, jnp.zeros((1, 2)), 0.5, strength=2.0, normalize=True)
    np.testing.assert_allclose(still, mean)


def test_the_best_of_base_and_edited_actions():
    base = jnp.array([[0.2], [0.8]])
    both = jnp.concatenate([base, diffusion.edited(base, jnp.array([[40.0], [-40.0]]), scale=0.1)])
    np.testing.assert_allclose(both[:, 0], [0.2, 0.8, 0.3, 0.7], rtol=1e-6)
    action, value = diffusion.best_candidate(both, -jnp.square(both[:, 0] - 0.5))
    assert round(float(action[0]), 3) in (0.3, 0.7)
    np.testing.assert_allclose(value, -0.04, rtol=1e-4)
    np.testing.assert_allclose(diffusion.edited(base, 3.0 * base, scale=0.0), base)
    np.testing.assert_allclose(diffusion.edited(base + 9, base, bound=None) > 9, [[True], [True]])

"""Preferences between samples: numbers of the papers, ties, and where no gradient comes from."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post import diffusion


def test_d3po_clips_the_ratios_of_both():
    logp, ref = jnp.log(jnp.array([[[1.5, 1.05], [0.8, 1.0]]])), jnp.zeros((1, 2, 2))
    h = jnp.array([[1.0, -1.0]])
    found = diffusion.d3po(logp, ref, h)
    expected = [np.log1p(np.exp(-0.1 * (np.log(1.1) - np.log(0.9)))), np.log1p(np.exp(-0.1 * np.log(1.05)))]
    np.testing.assert_allclose(found, [expected], rtol=1e-5)
    slope = jax.grad(lambda x: jnp.sum(diffusion.d3po(x, ref, h)))(logp)
    assert slope[0, :, 0].tolist() == [0.0, 0.0]
    assert float(slope[0, 0, 1]) < 0 < float(slope[0, 1, 1])


def test_a_tie_has_no_gradient():
    logp = jnp.array([[[0.01], [0.02]]])
    loss = lambda x: jnp.sum(diffusion.d3po(x, jnp.zeros_like(logp), jnp.zeros((1, 2))))  # noqa: E731
    np.testing.assert_allclose(loss(logp), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(loss)(logp), np.zeros((1, 2, 1)))


def test_seppo_turns_a_sample_into_a_winner_where_the_winner_is_not_learned():
    def loss(chosen, sampled):
        return diffusion.seppo(chosen, jnp.array([0.7]), sampled, jnp.array([0.4]), beta=1.0)[0]

    np.testing.assert_allclose(loss(jnp.array([0.5]), jnp.array([0.45])), 0.575939, rtol=1e-5)
    swapped = diffusion.seppo(*(jnp.array([x]) for x in (0.7, 0.5, 0.45, 0.4)), beta=1.0)
    np.testing.assert_allclose(swapped, [0.825939], rtol=1e-5)
    assert float(jax.grad(loss, 1)(jnp.array([0.5]), jnp.array([0.45]))[0]) < 0  # away from the sample
    assert float(jax.grad(loss, 1)(jnp.array([0.9]), jnp.array([0.45]))[0]) > 0  # towards it

"""Directions of instability, against the paper's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import control


def test_the_direction_and_the_quotient_are_the_papers():
    gradients, other = jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [0.0, 2.0]])
    np.testing.assert_allclose(control.principal_direction(gradients), [1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(control.shared_instability(gradients, other), 0.25, rtol=1e-6)
    np.testing.assert_allclose(control.shared_instability(gradients, gradients), 1.0, rtol=1e-6)
    assert control.shared_instability(gradients, 0 * other).item() == 0.0
    with pytest.raises(ValueError, match="other"):
        control.shared_instability(gradients, jnp.ones((2, 3)))


def test_the_direction_is_the_first_eigenvector():
    gradients = jax.random.normal(jax.random.key(0), (20, 5))
    _, vectors = np.linalg.eigh(np.asarray(gradients.T @ gradients))
    found = control.principal_direction(gradients)
    assert abs(float(found @ vectors[:, -1])) == pytest.approx(1.0, abs=1e-4)
    unit = control.principal_direction(gradients, normalize=True)
    assert float(jnp.linalg.norm(unit)) == pytest.approx(1.0, abs=1e-5)


def test_gradients_are_those_of_the_cross_entropy_with_the_choice():
    weights = jnp.array([[1.0, -1.0], [0.5, 2.0], [0.0, 0.3]])
    states = jax.random.normal(jax.random.key(1), (4, 2))
    found = control.state_gradients(lambda s: weights @ s, states)
    for state, gradient in zip(states, found, strict=True):
        p = jax.nn.softmax(weights @ state)
        chosen = jax.nn.one_hot(jnp.argmax(p), 3)
        np.testing.assert_allclose(gradient, (p - chosen) @ weights, atol=1e-5)

"""Losses of verifiers of steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses
from tests.advantages.compiled import all_compiled

losses = all_compiled(losses)


def test_the_loss_is_the_cross_entropy_with_the_counted_success_rate():
    z, q = np.linspace(-6, 6, 5), np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    p = 1 / (1 + np.exp(-z))
    expected = -q * np.log(p) - (1 - q) * np.log(1 - p)
    np.testing.assert_allclose(losses.success_bce(jnp.asarray(z), jnp.asarray(q)), expected, rtol=1e-5)


def test_its_gradient_is_the_error_of_the_rate_and_none_reaches_the_counts():
    z, q = jnp.array([[-80.0, -1.0, 0.5, 80.0]]), jnp.array([[0.5, 0.2, 1.0, 0.5]])
    of_logits, of_rates = jax.jit(jax.grad(lambda z, q: jnp.sum(losses.success_bce(z, q)), argnums=(0, 1)))(z, q)
    np.testing.assert_allclose(of_logits, jax.nn.sigmoid(z) - q, atol=1e-6)
    assert not jnp.any(of_rates)
    assert losses.success_bce(z.astype(jnp.bfloat16), q).dtype == jnp.float32


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="success_rate must have the shape of logits"):
        losses.success_bce(jnp.zeros((2, 3)), jnp.zeros(2))

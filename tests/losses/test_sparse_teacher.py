"""What is kept of a teacher, and what is learned from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses


def test_a_distribution_is_kept_and_filled_up_again():
    p = jnp.array([0.6, 0.3, 0.05, 0.05])
    values, ids = losses.sparsify(p, 2)
    np.testing.assert_allclose(losses.densify(values, ids, 4), p, rtol=1e-6)
    np.testing.assert_allclose(losses.sparse_kl(jnp.zeros(4), values, ids), 0.41903, atol=1e-5)
    rounded = losses.densify(jnp.array([0.7, 0.3001]), jnp.array([2, 0]), 3)
    np.testing.assert_allclose(rounded, [0.3001 / 1.0001, 0.0, 0.7 / 1.0001], atol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 6, 7])
def test_the_kl_is_that_of_the_filled_up_distribution_in_value_and_gradient(k):
    rng = np.random.default_rng(0)
    teacher = jax.nn.softmax(jnp.asarray(rng.normal(size=(2, 3, 7)), jnp.float32))
    logits = jnp.asarray(rng.normal(size=(2, 3, 7)), jnp.float32)
    values, ids = losses.sparsify(teacher, k)
    dense = losses.densify(values, ids, 7)
    np.testing.assert_allclose(jnp.sum(dense, axis=-1), 1.0, rtol=1e-6)
    if k >= 6:
        np.testing.assert_allclose(dense, teacher, atol=1e-6)

    def reference(logits):
        return jnp.sum(dense * (jnp.log(jnp.maximum(dense, 1e-30)) - jax.nn.log_softmax(logits)))

    found, slope = jax.value_and_grad(lambda x: jnp.sum(losses.sparse_kl(x, values, ids)))(logits)
    expected, expected_slope = jax.value_and_grad(reference)(logits)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(slope, expected_slope, atol=1e-6)
    assert not np.asarray(jax.grad(lambda v: jnp.sum(losses.sparse_kl(logits, v, ids)))(values)).any()


def test_what_does_not_fit_is_refused():
    p = jnp.ones((2, 4)) / 4
    values, ids = losses.sparsify(p, 2)
    for k in (0, 5):
        with pytest.raises(ValueError, match="k must be"):
            losses.sparsify(p, k)
    with pytest.raises(ValueError, match="ids"):
        losses.densify(values, ids[:, :1], 4)
    with pytest.raises(ValueError, match="must agree"):
        losses.sparse_kl(p[0], values, ids)

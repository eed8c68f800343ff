import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxrl_post import losses


def test_value_loss_gives_hand_worked_numbers():
    values = jnp.array([[1.0, 0.2, -1.0]])
    returns = jnp.array([[2.0, 2.0, -0.6]])
    old_values = jnp.zeros((1, 3))
    # Plain: 1/2, 1.8^2 / 2 = 1.62, 0.4^2 / 2 = 0.08.
    np.testing.assert_allclose(losses.value(values, returns), [[0.5, 1.62, 0.08]], rtol=1e-6)
    # Clipped to +-0.5: 1.5^2 / 2 = 1.125 counts; 0.2 is inside; -0.5 is nearer than -1, so the plain 0.08 counts.
    np.testing.assert_allclose(losses.value(values, returns, old_values, clip=0.5), [[1.125, 1.62, 0.08]], rtol=1e-6)
    assert losses.value_clip_fraction(values, returns, old_values, clip=0.5).tolist() == [[1.0, 0.0, 0.0]]


def test_the_clip_of_the_value_takes_the_gradient_away_where_it_acts():
    rng = np.random.default_rng(0)
    values, returns, old_values = (jnp.asarray(rng.normal(size=(10, 10))) for _ in range(3))
    gradient = jax.jit(jax.grad(lambda v: losses.value(v, returns, old_values, clip=0.3).sum()))(values)
    acts = np.asarray(losses.value_clip_fraction(values, returns, old_values, clip=0.3)) == 1
    assert 5 < acts.sum() < 95
    np.testing.assert_array_equal(np.asarray(gradient) == 0, acts)
    np.testing.assert_allclose(gradient[~acts], (values - returns)[~acts], rtol=1e-6)


def test_value_agrees_with_finite_differences_and_sends_nothing_into_its_targets():
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        values, returns, old_values = (jnp.asarray(rng.normal(size=(3, 4))) for _ in range(3))
        check_grads(
            jax.jit(lambda v: losses.value(v, returns, old_values, clip=0.3)), (values,), order=1, modes=["rev"]
        )
        gradients = jax.jit(jax.grad(lambda r, o: losses.value(values, r, o, clip=0.3).sum(), (0, 1)))(
            returns, old_values
        )
        assert all(np.all(np.asarray(gradient) == 0) for gradient in gradients)
        assert losses.value(values, returns).dtype == jnp.float64
    assert losses.value(jnp.ones((1, 2), jnp.bfloat16), jnp.ones((1, 2), jnp.bfloat16)).dtype == jnp.float32


def test_impossible_arguments_are_refused():
    one = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="clip needs old_values"):
        losses.value(one, one, clip=0.2)
    with pytest.raises(ValueError, match="clip must be above 0"):
        losses.value(one, one, one, clip=0.0)
    with pytest.raises(ValueError, match="returns must have the shape of values"):
        losses.value(one, jnp.zeros(2))
    with pytest.raises(ValueError, match="old_values must have the shape of values"):
        losses.value(one, one, jnp.zeros(2), clip=0.2)

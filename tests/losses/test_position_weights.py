import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses
from tests.advantages.compiled import all_compiled

losses = all_compiled(losses)


def test_weights_run_from_one_to_alpha_over_the_places_that_have_a_token():
    divergence = jnp.array([[0.0, 1.0, 2.0, 9.0], [3.0, 2.0, 7.0, 2.0]])
    mask = jnp.array([[1, 1, 1, 0], [1, 1, 0, 1]])
    found = losses.position_weights(divergence, mask, alpha=1.7)
    np.testing.assert_allclose(found, [[1.0, 1.35, 1.7, 1.0], [1.7, 1.0, 1.0, 1.0]], rtol=1e-6)


def test_equal_divergences_an_empty_mask_and_alpha_one_give_one():
    equal = jnp.full((1, 3), 0.3)
    for divergence, mask, alpha in (
        (equal, jnp.ones((1, 3)), 1.7),
        (jnp.array([[0.1, 5.0, jnp.nan]]), jnp.zeros((1, 3)), 1.7),
        (jnp.array([[0.1, 5.0, 2.0]]), jnp.ones((1, 3)), 1.0),
    ):
        np.testing.assert_array_equal(losses.position_weights(divergence, mask, alpha=alpha), jnp.ones((1, 3)))


def test_weights_are_constants_of_float32_or_wider():
    gradient = jax.jit(jax.grad(lambda d: jnp.sum(losses.position_weights(d, jnp.ones((1, 3))))))(
        jnp.array([[0.0, 1.0, 2.0]])
    )
    assert np.all(np.asarray(gradient) == 0)
    assert losses.position_weights(jnp.ones((1, 2), jnp.bfloat16), jnp.ones((1, 2))).dtype == jnp.float32
    with jax.enable_x64(True):
        assert losses.position_weights(np.ones((1, 2)), jnp.ones((1, 2))).dtype == jnp.float64


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="alpha must be at least 1, the weight of the least divergence"):
        losses.position_weights(jnp.ones((1, 2)), jnp.ones((1, 2)), alpha=0.5)
    with pytest.raises(ValueError, match=r"divergence must be \[P, N\], got shape \(2,\)"):
        losses.position_weights(jnp.ones(2), jnp.ones(2))
    with pytest.raises(ValueError, match="mask must have the shape of divergence"):
        losses.position_weights(jnp.ones((1, 2)), jnp.ones((1, 3)))

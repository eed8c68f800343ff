import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses
from jaxrl_post.losses.first_token import first_token_weights
from tests.advantages.compiled import all_compiled, compiled

losses = all_compiled(losses)
first_token_weights = compiled(first_token_weights)


def test_the_first_token_has_its_share_of_the_mean_whatever_the_length():
    loss = jnp.array([[9.0, 4.0, 1.0, 3.0], [9.0, 9.0, 5.0, 2.0], [9.0, 6.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
    mask = jnp.array([[0, 1, 1, 1], [0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
    weights = first_token_weights(mask, alpha=0.25)
    means = np.asarray(jnp.sum(weights * loss * mask, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1))
    np.testing.assert_allclose(means, [0.25 * 4 + 0.75 * 2, 0.25 * 5 + 0.75 * 2, 6, 0], rtol=1e-6)
    np.testing.assert_allclose(jnp.sum(weights, axis=1), [3, 2, 1, 0], rtol=1e-6)
    total = losses.aggregate(weights * loss, mask, "seq_mean_token_mean")
    np.testing.assert_allclose(total, means[:3].mean(), rtol=1e-6)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 2"):
        first_token_weights(jnp.ones((1, 2)), alpha=2)
    with pytest.raises(ValueError, match=r"mask must be \[B, T\], got shape \(2,\)"):
        first_token_weights(jnp.ones(2), alpha=0.5)

import jax
import jax.numpy as jnp
import pytest

from jaxrl_post import losses


def test_nll_is_the_negated_log_prob_in_float32_or_wider():
    assert losses.nll(jnp.array([[-1.5, 0.0]])).tolist() == [[1.5, 0.0]]
    assert losses.nll(jnp.ones((1, 2), jnp.bfloat16)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert losses.nll(jnp.ones((1, 2), jnp.float64)).dtype == jnp.float64
    with pytest.raises(ValueError, match="logp must be"):
        losses.nll(jnp.zeros(()))

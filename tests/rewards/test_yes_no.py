import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.rewards.yes_no import yes_probability


def test_the_judges_yes_is_weighed_against_its_no_alone():
    p = np.array([[0.6, 0.1], [0.05, 0.15], [1e-30, 1e-28], [0.3, 0.0], [0.0, 0.4], [0.0, 0.0]])
    with np.errstate(divide="ignore"):
        given = yes_probability(np.log(p[:, 0]), np.log(p[:, 1]))
    np.testing.assert_allclose(given, [6 / 7, 0.25, 1 / 101, 1, 0, 0], rtol=1e-5)


def test_gradients_are_finite_where_nothing_was_reported_and_dtypes_wide():
    nothing = jnp.full(2, -jnp.inf)
    assert np.isfinite(jax.jit(jax.grad(lambda x: jnp.sum(yes_probability(x, nothing))))(nothing)).all()
    assert yes_probability(jnp.zeros(2, jnp.bfloat16), jnp.zeros(2, jnp.bfloat16)).dtype == jnp.float32


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"no_logp must have the shape of yes_logp, \(2,\), got \(3,\)"):
        yes_probability(jnp.zeros(2), jnp.zeros(3))

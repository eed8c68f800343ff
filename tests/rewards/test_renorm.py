import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_post import rewards
from tests.rewards.compiled import compiled

renorm = compiled(rewards.renorm)
on_step_ends = compiled(rewards.on_step_ends)


def test_the_tables_numbers():
    found = renorm(jnp.array([[0.7], [0.7]]), jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(found, [[0.7], [-0.3]], rtol=1e-6)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(scores=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=6), outcome=st.sampled_from([0.0, 1.0]))
def test_no_score_outweighs_the_sign_of_the_outcome(scores, outcome):
    found = np.asarray(renorm(jnp.array([scores]), jnp.array([outcome])))
    assert (found >= 0).all() if outcome else (found <= 0).all()
    assert (np.abs(found) <= 1).all()


def test_an_unscored_step_has_half_the_outcomes_sign_and_one_that_is_not_there_earns_nothing():
    found = renorm(jnp.array([[jnp.nan, 0.2, jnp.nan]] * 2), jnp.array([1.0, 0.0]), jnp.array([[1, 1, 0]] * 2))
    np.testing.assert_allclose(found, [[0.5, 0.2, 0], [-0.5, -0.8, 0]], rtol=1e-6)
    low = renorm(jnp.array([[jnp.nan]]), jnp.array([1.0]), unscored=0.0)
    np.testing.assert_allclose(low, [[0.0]])


def test_a_reward_of_a_step_stands_on_its_last_trained_token_and_adds_up():
    step = jnp.array([[-1, 0, 0, -1, 1, 1, 1], [-1, 0, -1, -1, 2, 2, -1]])
    mask = jnp.array([[0, 1, 1, 0, 1, 1, 0], [0, 1, 0, 0, 1, 1, 0]])
    found = on_step_ends(jnp.array([[1.0, 2.0, 9.0], [3.0, 9.0, 4.0]]), step, mask)
    np.testing.assert_allclose(found, [[0, 0, 1, 0, 0, 2, 0], [0, 3, 0, 0, 0, 4, 0]])


def test_gradients_are_finite_where_nothing_is_there_and_half_precision_is_raised():
    def total(process, outcome):
        return jnp.sum(renorm(process, outcome, jnp.zeros((1, 2))))

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(jnp.array([[jnp.nan, 0.5]]), jnp.ones(1))
    assert all(bool(jnp.isfinite(g).all()) for g in gradients)
    assert renorm(jnp.ones((1, 2), jnp.bfloat16), jnp.ones(1, jnp.bfloat16)).dtype == jnp.float32


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="unscored must be in"):
        renorm(jnp.ones((1, 2)), jnp.ones(1), unscored=2.0)
    with pytest.raises(ValueError, match=r"outcome must be \[B\] = \(1,\), as process has rows, got shape \(2,\)"):
        renorm(jnp.ones((1, 2)), jnp.ones(2))
    with pytest.raises(ValueError, match=r"process must be \[B, S\]"):
        renorm(jnp.ones(2), jnp.ones(2))

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages


def test_as_groups_and_per_token_agree_on_prompt_major_rows():
    groups = advantages.as_groups(jnp.arange(1.0, 7.0), group_size=3)
    assert groups.tolist() == [[1, 2, 3], [4, 5, 6]]
    spread = advantages.per_token(groups, jnp.ones((6, 2)))
    assert spread.tolist() == [[x, x] for x in (1, 2, 3, 4, 5, 6)]


def test_per_token_is_zero_where_the_mask_is_whatever_the_advantage():
    given = advantages.per_token(jnp.array([[2.0, jnp.nan]]), jnp.array([[0, 1], [0, 0]]))
    assert given.tolist() == [[0, 2], [0, 0]]


def test_the_reward_goes_on_the_last_trained_token_of_a_row_with_holes():
    mask = jnp.array([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]])
    given = jax.jit(advantages.on_last_token)(jnp.array([[1.0, 2.0], [3.0, 4.0]]), mask)
    assert given.tolist() == [[0, 0, 0, 1, 0], [2, 0, 0, 0, 0], [0, 0, 0, 0, 3], [0, 0, 0, 0, 0]]


def test_as_groups_keeps_the_dtype_and_per_token_raises_it():
    assert advantages.as_groups(jnp.arange(4), 2).dtype == jnp.int32
    assert advantages.per_token(jnp.ones((1, 2), jnp.bfloat16), jnp.ones((2, 1))).dtype == jnp.float32
    with jax.enable_x64(True):
        assert advantages.per_token(jnp.ones((1, 2), jnp.float64), jnp.ones((2, 1))).dtype == np.float64


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="divide the number of rows, 7, got 2"):
        advantages.as_groups(jnp.zeros(7), 2)
    with pytest.raises(ValueError, match=r"x must be \[B\], got shape \(2, 3\)"):
        advantages.as_groups(jnp.zeros((2, 3)), 3)
    for function in (advantages.per_token, advantages.on_last_token):
        with pytest.raises(ValueError, match=r"mask must have P \* G = 4 rows .* got shape \(3, 5\)"):
            function(jnp.zeros((2, 2)), jnp.zeros((3, 5)))
        with pytest.raises(ValueError, match=r"must be \[P, G\], got shape \(4,\)"):
            function(jnp.zeros(4), jnp.zeros((4, 5)))

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages
from tests.advantages.compiled import all_compiled

advantages = all_compiled(advantages)


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


def test_turns_take_what_their_first_trained_token_holds_and_give_it_back_to_all_of_them():
    step = jnp.array([[-1, 0, 0, -1, 1, 1, 1], [-1, 1, -1, -1, -1, -1, 0]])
    mask = (step >= 0) & jnp.array([[1, 0, 1, 1, 1, 1, 1]] * 2, bool)  # token 1 is not trained
    x = jnp.arange(14).reshape(2, 7)
    turns, exists = advantages.to_turns(x, step, mask, num_turns=3)
    assert turns.tolist() == [[2, 4, 0], [13, 0, 0]]
    assert exists.tolist() == [[True, True, False], [True, False, False]]
    back = advantages.from_turns(turns, step, mask)
    assert back.tolist() == [[0, 0, 2, 0, 4, 4, 4], [0, 0, 0, 0, 0, 0, 13]]


def test_turns_beyond_the_last_are_left_out():
    step = jnp.array([[0, 1, 2]])
    turns, exists = advantages.to_turns(jnp.array([[1.0, 2.0, 4.0]]), step, step >= 0, num_turns=2)
    assert turns.tolist() == [[1, 2]]
    assert exists.all()
    assert advantages.from_turns(turns, step, step >= 0).tolist() == [[1, 2, 0]]


def test_turns_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"mask must be \[B, T\], got shape \(3,\)"):
        advantages.is_last(jnp.ones(3))
    with pytest.raises(ValueError, match=r"step must have the shape of x, \(2, 3\), got \(3,\)"):
        advantages.to_turns(jnp.zeros((2, 3)), jnp.zeros(3, int), jnp.ones((2, 3)), num_turns=2)
    with pytest.raises(ValueError, match="x must have one row per row of step, 2, got shape"):
        advantages.from_turns(jnp.zeros((3, 1)), jnp.zeros((2, 3), int), jnp.ones((2, 3)))

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.curation import success_rate
from tests.advantages.compiled import all_compiled

success_rate = all_compiled(success_rate)


def test_priority_is_the_share_of_failures():
    np.testing.assert_allclose(success_rate.priority_probs(jnp.array([0.0, 0.5, 1.0, 0.5])), [0.5, 0.25, 0, 0.25])
    available = jnp.array([0, 1, 1, 1])
    np.testing.assert_allclose(
        success_rate.priority_probs(jnp.array([0.0, 0.5, 1.0, 0.5]), available), [0, 0.5, 0, 0.5]
    )


def test_solved_prompts_are_drawn_evenly_and_none_if_none_is_there():
    np.testing.assert_allclose(success_rate.priority_probs(jnp.ones(4), jnp.array([1, 1, 0, 0])), [0.5, 0.5, 0, 0])
    np.testing.assert_array_equal(success_rate.priority_probs(jnp.ones(4), jnp.zeros(4)), np.zeros(4))


def test_the_shortest_right_answer_is_found_among_the_valid():
    lengths = jnp.array([[9, 5, 2, 5], [3, 4, 5, 6], [1, 2, 3, 4]])
    correct = jnp.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1]])
    valid = jnp.array([[1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    index, exists = jax.jit(success_rate.shortest_correct)(lengths, correct, valid)
    assert index.tolist() == [1, 0, 1]
    assert exists.tolist() == [True, False, True]


def test_long_answers_are_rejected_at_once_if_wrong_and_half_as_long_again_if_right():
    lengths = jnp.array([[100, 150, 151, 101, 90, 999], [10, 20, 30, 40, 50, 60]])
    correct = jnp.array([[1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    valid = jnp.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    pairs = success_rate.long2short_pairs(lengths, correct, valid)
    assert pairs.chosen.tolist() == [0, 0]
    assert pairs.rejected.tolist() == [[False, False, True, True, False, False], [False] * 6]


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"success_rate must be \[N\]"):
        success_rate.priority_probs(jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="length_ratio must be at least 1"):
        success_rate.long2short_pairs(jnp.ones((1, 2)), jnp.ones((1, 2)), length_ratio=0.5)
    with pytest.raises(ValueError, match="correct must have the shape"):
        success_rate.shortest_correct(jnp.ones((1, 2)), jnp.ones((1, 3)))

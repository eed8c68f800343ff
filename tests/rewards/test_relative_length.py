import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.rewards import relative_length
from tests.rewards.compiled import compiled

group_length = compiled(relative_length.group_length)


def test_short_right_answers_gain_and_short_wrong_ones_do_not():
    lengths, correct = jnp.array([[100, 200, 300], [100, 150, 300]]), jnp.array([[1, 1, 0], [0, 1, 1]])
    given = group_length(lengths, correct)
    np.testing.assert_allclose(given, [[0.5, 0, -0.5], [0, 0.25, -0.5]], atol=1e-6)


def test_wrong_answers_never_gain():
    lengths = jnp.array([[100, 200, 300, 250]])
    np.testing.assert_allclose(group_length(lengths, jnp.zeros((1, 4))), [[0, 0, -0.5, -0.25]], atol=1e-6)


def test_equal_lengths_single_answers_and_invalid_ones_give_zero():
    lengths = jnp.array([[7, 7, 9], [7, 9, 9], [jnp.nan, jnp.nan, jnp.nan]])
    valid = jnp.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(group_length(lengths, jnp.ones((3, 3)), valid), np.zeros((3, 3)))
    # An invalid answer moves neither end of the range.
    given = group_length(jnp.array([[5, 10, 15, 1000]]), jnp.ones((1, 4)), jnp.array([[1, 1, 1, 0]]))
    np.testing.assert_allclose(given, [[0.5, 0, -0.5, 0]])


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"lengths must be \[P, G\]"):
        group_length(jnp.ones(3), jnp.ones(3))
    with pytest.raises(ValueError, match="correct must have the shape of lengths"):
        group_length(jnp.ones((1, 3)), jnp.ones((1, 2)))


def test_much_shorter_than_the_right_answers_costs():
    lengths, correct = jnp.array([[40, 90, 110, 0], [1, 2, 3, 4]]), jnp.array([[0, 1, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(
        relative_length.too_short(lengths, correct), [[-0.25, 0, 0, -0.5], [0, 0, 0, 0]], atol=1e-6
    )
    valid = jnp.array([[1, 0, 1, 1], [1, 1, 1, 1]])
    found = relative_length.too_short(lengths, correct, valid, max_penalty=1.0, tolerance=1.0)
    np.testing.assert_allclose(found[0], [-7 / 11, 0, 0, -1], atol=1e-6)
    for options in ({"max_penalty": -1.0}, {"tolerance": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            relative_length.too_short(lengths, correct, **options)


def test_the_shortest_right_answer_earns_a_bonus_unless_it_is_short_enough():
    lengths = jnp.array([[300, 150, 90, 120], [300, 150, 150, 120], [5, 6, 7, 8]])
    correct = jnp.array([[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]])
    found = relative_length.shortest_bonus(lengths, correct)
    np.testing.assert_allclose(found, [[0] * 4, [0, 0.2, 0, 0], [0] * 4], atol=1e-6)
    valid = jnp.array([[1, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
    found = relative_length.shortest_bonus(lengths, correct, valid, bonus=1.0)
    np.testing.assert_allclose(found[0], [0, 1.0, 0, 0])

"""Cutting trajectories into steps, and sums and returns over them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages
from tests.advantages.compiled import all_compiled

advantages = all_compiled(advantages)


def test_a_delimiter_of_several_tokens_ends_a_step_also_across_what_a_tool_wrote():
    tokens = jnp.array([[5, 7, 8, 1, 7, 9, 9, 8, 2, 8]])
    mask = jnp.array([[0, 1, 1, 1, 1, 0, 0, 1, 1, 1]])
    step = advantages.segment_by_delimiter(tokens, mask, [[7, 8]])
    assert step.tolist() == [[-1, 0, 0, 1, 1, -1, -1, 1, 2, 2]]


def test_delimiters_in_a_row_end_one_step_and_none_at_all_leaves_one():
    tokens, mask = jnp.array([[3, 9, 9, 9, 4], [3, 3, 3, 3, 3]]), jnp.ones((2, 5))
    assert advantages.segment_by_delimiter(tokens, mask, [[9]]).tolist() == [[0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    assert advantages.segment_by_delimiter(tokens, mask, [[9], [3, 3]]).tolist()[1] == [0, 0, 0, 0, 0]


def test_delimiters_of_several_tokens_in_a_row_end_one_step():
    tokens = jnp.array([[1, 8, 9, 8, 9, 2], [8, 9, 1, 8, 2, 9]])
    step = advantages.segment_by_delimiter(tokens, jnp.ones((2, 6)), [[8, 9]])
    assert step.tolist() == [[0, 0, 0, 0, 0, 1], [0, 0, 1, 1, 1, 1]]


def test_a_row_that_begins_with_a_delimiter_and_one_without_trained_tokens_are_fine():
    tokens, mask = jnp.array([[9, 1, 2], [9, 1, 2]]), jnp.array([[1, 1, 1], [0, 0, 0]])
    assert advantages.segment_by_delimiter(tokens, mask, [[9]]).tolist() == [[0, 1, 1], [-1, -1, -1]]


@pytest.mark.parametrize("delimiters", [[], [[]], [[1], []]])
def test_no_delimiter_or_an_empty_one_is_refused(delimiters):
    with pytest.raises(ValueError, match="delimiters"):
        advantages.segment_by_delimiter(jnp.ones((1, 3), int), jnp.ones((1, 3)), delimiters)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 20])
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_steps_by_length_differ_by_at_most_one_token(count, steps):
    step = np.asarray(advantages.segment_by_length(jnp.arange(20)[None] < count, num_steps=steps))[0, :count]
    sizes = np.bincount(step, minlength=steps)
    assert sizes.sum() == count
    assert sizes.max() - sizes.min() <= 1
    assert (np.diff(step) >= 0).all()


def test_steps_by_entropy_hold_equally_many_uncertain_tokens_and_begin_at_them():
    entropy = np.full((1, 21), 0.1, np.float32)
    uncertain = [3, 5, 6, 11, 15, 19]
    entropy[0, uncertain] = [2.0, 3.0, 2.5, 2.2, 4.0, 2.1]
    mask = np.ones((1, 21), np.float32)
    mask[0, 0] = 0
    entropy[0, 0] = 99.0
    step = np.asarray(advantages.segment_by_entropy(entropy, mask, num_steps=3, fraction=6 / 20))[0]
    assert [step[place] for place in uncertain] == [0, 0, 1, 1, 2, 2]
    assert step[0] == -1
    assert step[1] == 0
    begins = np.flatnonzero(np.diff(step[1:])) + 2
    assert set(begins) <= set(uncertain)


def test_equal_entropies_make_every_token_a_candidate():
    step = advantages.segment_by_entropy(jnp.ones((1, 6)), jnp.ones((1, 6)), num_steps=3)
    assert step.tolist() == [[0, 0, 1, 1, 2, 2]]


def test_sums_ends_and_existence_skip_tool_tokens_and_steps_beyond_the_last():
    x = jnp.array([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]])
    step, mask = jnp.array([[0, 0, -1, 1, 3, 9]]), jnp.array([[1, 1, 0, 1, 1, 1]])
    assert advantages.step_sum(x, step, mask, num_steps=4).tolist() == [[3.0, 8.0, 0.0, 16.0]]
    assert advantages.step_exists(step, mask, num_steps=4).tolist() == [[True, True, False, True]]
    assert advantages.step_end(step, mask, num_steps=4).tolist() == [[1, 3, -1, 4]]


def test_what_a_step_has_comes_back_to_its_tokens():
    step, mask = jnp.array([[-1, 0, 0, -1, 1]]), jnp.array([[0, 1, 1, 0, 1]])
    sums = advantages.step_sum(jnp.ones((1, 5)), step, mask, num_steps=2)
    assert advantages.from_turns(sums, step, mask).tolist() == [[0.0, 2.0, 2.0, 0.0, 1.0]]


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_returns_are_discounted_sums_over_the_steps_that_exist(gamma):
    rng = np.random.default_rng(0)
    rewards, exists = rng.normal(size=(5, 6)), rng.random((5, 6)) < 0.7
    found = advantages.step_returns(jnp.asarray(rewards, jnp.float32), exists, gamma=gamma)
    expected = np.zeros_like(rewards)
    for row in range(5):
        places = np.flatnonzero(exists[row])
        for i, place in enumerate(places):
            expected[row, place] = sum(gamma**j * rewards[row, p] for j, p in enumerate(places[i:]))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_padding_and_the_order_of_rows_change_nothing():
    rng = np.random.default_rng(1)
    tokens, mask = rng.integers(0, 3, (4, 9)), (rng.random((4, 9)) < 0.8).astype(np.float32)
    entropy = rng.random((4, 9)).astype(np.float32)
    order = np.array([2, 0, 3, 1])

    def every(tokens, mask, entropy):
        return (
            advantages.segment_by_delimiter(tokens, mask, [[0]]),
            advantages.segment_by_length(mask, num_steps=3),
            advantages.segment_by_entropy(entropy, mask, num_steps=3, fraction=0.5),
        )

    plain = every(tokens, mask, entropy)
    wide = every(*(np.pad(x, ((0, 0), (0, 4))) for x in (tokens, mask, entropy)))
    moved = jax.jit(every)(tokens[order], mask[order], entropy[order])
    for one, padded, other in zip(plain, wide, moved, strict=True):
        np.testing.assert_array_equal(one, padded[:, :9])
        assert (np.asarray(padded)[:, 9:] == -1).all()
        np.testing.assert_array_equal(np.asarray(one)[order], other)


def test_too_few_steps_and_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="num_steps"):
        advantages.segment_by_length(jnp.ones((1, 3)), num_steps=0)
    with pytest.raises(ValueError, match="fraction"):
        advantages.segment_by_entropy(jnp.ones((1, 3)), jnp.ones((1, 3)), num_steps=2, fraction=0.0)
    with pytest.raises(ValueError, match="step"):
        advantages.step_sum(jnp.ones((1, 3)), jnp.zeros((1, 2), int), jnp.ones((1, 3)), num_steps=2)
    with pytest.raises(ValueError, match="exists"):
        advantages.step_returns(jnp.ones((1, 3)), jnp.ones((1, 2)))

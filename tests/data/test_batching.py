"""Padding, and rollouts of given completions."""

import jax
import numpy as np
import pytest

from jaxrl_post.data import pad_prompts, to_rollouts
from jaxrl_post.types import FINISH_NONE


def test_prompts_are_padded_on_the_right_and_their_lengths_kept():
    tokens, lengths = pad_prompts([[1, 2, 3], [4]], 4, pad_id=9)
    assert tokens.tolist() == [[1, 2, 3, 9], [4, 9, 9, 9]]
    assert lengths.tolist() == [3, 1]
    assert (tokens.dtype, lengths.dtype) == (np.int32, np.int32)


def test_no_prompts_give_an_empty_batch():
    tokens, lengths = pad_prompts([], 4)
    assert (tokens.shape, lengths.shape) == ((0, 4), (0,))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([[1], [1, 2, 3]], "prompt 1 has 3 tokens, more than length=2"), ([[1], []], "prompt 1 is empty")],
)
def test_a_prompt_that_is_too_long_or_empty_is_named(prompts, message):
    with pytest.raises(ValueError, match=message):
        pad_prompts(prompts, 2)


def test_completions_follow_their_prompt_and_alone_are_trained():
    rollouts = to_rollouts([[5], [6, 7]], [[[1, 2], [3]], [[], [4, 4]]], length=4, pad_id=9)
    assert rollouts.tokens.tolist() == [[5, 1, 2, 9], [5, 3, 9, 9], [6, 7, 9, 9], [6, 7, 4, 4]]
    mask = [[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]]
    assert rollouts.mask.tolist() == mask
    assert rollouts.step.tolist() == [[0 if m else -1 for m in row] for row in mask]
    assert rollouts.length.tolist() == [[3, 2], [2, 4]]
    assert (rollouts.num_prompts, rollouts.group_size) == (2, 2)


def test_what_no_policy_sampled_says_so():
    rollouts = to_rollouts([[5], [6]], [[[1]], [[2]]], length=2)
    assert np.all(rollouts.version == -1)
    assert np.all(rollouts.logp == 0)
    assert np.all(rollouts.finish == FINISH_NONE)
    assert np.all(rollouts.valid)
    assert rollouts.reward.tolist() == [[0.0], [0.0]]
    assert rollouts.prompt_id.tolist() == [0, 1]


def test_shapes_and_types_are_those_of_the_noun():
    rollouts = to_rollouts([[5], [6]], [[[1], [1], [1]]] * 2, length=3)
    per_token = {name: (getattr(rollouts, name).shape, str(getattr(rollouts, name).dtype)) for name in (
        "tokens", "mask", "logp", "step", "version")}  # fmt: skip
    assert per_token == {
        "tokens": ((6, 3), "int32"),
        "mask": ((6, 3), "float32"),
        "logp": ((6, 3), "float32"),
        "step": ((6, 3), "int32"),
        "version": ((6, 3), "int32"),
    }
    per_sequence = {name: (getattr(rollouts, name).shape, str(getattr(rollouts, name).dtype)) for name in (
        "reward", "valid", "length", "finish", "id")}  # fmt: skip
    assert per_sequence == {
        "reward": ((2, 3), "float32"),
        "valid": ((2, 3), "bool"),
        "length": ((2, 3), "int32"),
        "finish": ((2, 3), "int8"),
        "id": ((2, 3), "uint32"),
    }
    assert (rollouts.prompt_id.shape, str(rollouts.prompt_id.dtype)) == ((2,), "int32")
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(rollouts))


def test_rewards_prompt_ids_and_ids_are_taken_over():
    rollouts = to_rollouts(
        [[5], [6]], [[[1], [2]]] * 2, length=2, rewards=[[1, 0], [0.5, -1]], prompt_id=[7, 9], first_id=2**32 - 2
    )
    assert rollouts.reward.tolist() == [[1.0, 0.0], [0.5, -1.0]]
    assert rollouts.prompt_id.tolist() == [7, 9]
    assert rollouts.id.tolist() == [[2**32 - 2, 2**32 - 1], [0, 1]]


@pytest.mark.parametrize(
    ("prompts", "completions", "options", "message"),
    [
        ([[5]], [[[1], [1, 2, 3]]], {}, r"row 1 \(prompt 0, completion 1\) has 1 prompt and 3 completion tokens"),
        ([[5], []], [[[1]], [[1]]], {}, "prompt 1 is empty"),
        ([[5], [6]], [[[1]], [[1], [2]]], {}, "group 0 has 1, group 1 has 2"),
        ([[5]], [[]], {}, "at least one: group 0 has 0"),
        ([[5], [6]], [[[1]]], {}, "2 prompts and 1 groups"),
        ([], [], {}, "at least one prompt"),
        ([[5]], [[[1]]], {"rewards": [1.0]}, r"rewards must have shape \[1, 1\], got \[1\]"),
        ([[5]], [[[1]]], {"prompt_id": [1, 2]}, r"prompt_id must have shape \[1\], got \[2\]"),
    ],
)
def test_input_that_does_not_fit_is_named(prompts, completions, options, message):
    with pytest.raises(ValueError, match=message):
        to_rollouts(prompts, completions, length=3, **options)

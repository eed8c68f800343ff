"""Prompts by how often they are solved: which to sample next, and which of their answers to learn brevity from."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def priority_probs(success_rate: Array, available: Array | None = None) -> Array:
    r"""Prioritised sampling of prompts, $P(i) \propto 1 - s_i$.

    Args:
        success_rate: `[N]` float in [0, 1]; $s_i$, the tracked share of right answers.
        available: `[N]` bool, False for a prompt that must not be drawn; None for all.

    Returns:
        `[N]`, float32 or wider; sums to 1. Uniform over the available prompts if all of them are solved, and all zeros
        if there is none.

    Raises:
        ValueError: if `success_rate` is not `[N]` or `available` has another shape.

    Example:
        >>> [round(p, 4) for p in priority_probs(jnp.array([0.0, 0.5, 1.0])).tolist()]
        [0.6667, 0.3333, 0.0]

    Reference: Kimi k1.5: Scaling Reinforcement Learning with LLMs (arXiv 2501.12599).
    """
    success_rate = masked.as_float(success_rate)
    masked.check_axes("success_rate", success_rate, "[N]")
    available = jnp.ones(success_rate.shape, bool) if available is None else jnp.asarray(available) != 0
    masked.check_like("available", available, "success_rate", success_rate)
    failure = jnp.where(available, jnp.clip(1 - success_rate, 0, 1), 0.0)
    weight = jnp.where(jnp.sum(failure) > 0, failure, available.astype(failure.dtype))
    return weight / jnp.maximum(jnp.sum(weight), jnp.finfo(weight.dtype).tiny)


def _groups(lengths: Array, correct: Array, valid: Array | None) -> tuple[Array, Array, Array]:
    lengths, correct = masked.as_float(lengths), jnp.asarray(correct)
    masked.check_axes("lengths", lengths, "[P, G]", "reshape with as_groups(lengths, group_size=8)")
    masked.check_like("correct", correct, "lengths", lengths)
    valid = jnp.ones(lengths.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", valid, "lengths", lengths)
    return lengths, valid & (correct != 0), valid


def shortest_correct(lengths: Array, correct: Array, valid: Array | None = None) -> tuple[Array, Array]:
    """The shortest right answer of each prompt: the target of shortest rejection sampling.

    Args:
        lengths: `[P, G]` int or float, tokens of each answer.
        correct: `[P, G]`, nonzero where the answer is right.
        valid: `[P, G]` bool, False where the answer does not count; None for all.

    Returns:
        index: `[P]` int32, the first of the shortest; 0 where there is none.
        exists: `[P]` bool, whether any answer is right.

    Raises:
        ValueError: if the arrays are not `[P, G]` of one shape.

    Example:
        >>> index, exists = shortest_correct(jnp.array([[9, 5, 2], [3, 4, 5]]), jnp.array([[1, 1, 0], [0, 0, 0]]))
        >>> index.tolist(), exists.tolist()
        ([1, 0], [True, False])

    Reference: Kimi k1.5: Scaling Reinforcement Learning with LLMs (arXiv 2501.12599).
    """
    lengths, right, _ = _groups(lengths, correct, valid)
    exists = jnp.any(right, axis=1)
    index = jnp.argmin(jnp.where(right, lengths, jnp.inf), axis=1)
    return jnp.where(exists, index, 0).astype(jnp.int32), exists


class PreferencePairs(NamedTuple):
    """Pairs of answers to the same prompt.

    Attributes:
        chosen: `[P]` int32, index of the preferred answer in its group.
        rejected: `[P, G]` bool, the answers that it is preferred to; none where the prompt has no preferred one.
    """

    chosen: Array
    rejected: Array


def long2short_pairs(
    lengths: Array, correct: Array, valid: Array | None = None, *, length_ratio: float = 1.5
) -> PreferencePairs:
    """Preference pairs that teach brevity: the shortest right answer against longer ones.

    Rejected are wrong answers that are longer than the chosen one, and right ones more than `length_ratio` times as
    long.

    Args:
        lengths: `[P, G]` int or float, tokens of each answer.
        correct: `[P, G]`, nonzero where the answer is right.
        valid: `[P, G]` bool, False where the answer does not count; None for all.
        length_ratio: how much longer a right answer must be to be rejected, at least 1.

    Returns:
        `PreferencePairs(chosen, rejected)`.

    Raises:
        ValueError: if the arrays are not `[P, G]` of one shape, or `length_ratio` is below 1.

    Example:
        >>> pairs = long2short_pairs(jnp.array([[100, 140, 160, 120, 90]]), jnp.array([[1, 1, 1, 0, 0]]))
        >>> pairs.chosen.tolist(), pairs.rejected.tolist()
        ([0], [[False, False, True, True, False]])

    Reference: Kimi k1.5: Scaling Reinforcement Learning with LLMs (arXiv 2501.12599).
    """
    if length_ratio < 1:
        raise ValueError(f"length_ratio must be at least 1, got {length_ratio}")
    chosen, exists = shortest_correct(lengths, correct, valid)
    lengths, right, valid = _groups(lengths, correct, valid)
    shortest = jnp.take_along_axis(lengths, chosen[:, None], axis=1)
    longer = jnp.where(right, lengths > length_ratio * shortest, lengths > shortest)
    return PreferencePairs(chosen, valid & longer & exists[:, None])

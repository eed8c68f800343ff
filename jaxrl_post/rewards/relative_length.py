"""Rewards for the length of an answer relative to the other answers to the same prompt."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def group_length(lengths: Array, correct: Array, valid: Array | None = None) -> Array:
    r"""Kimi k1.5's length reward: short right answers gain, long answers lose, short wrong ones do not gain.

    $$\lambda_j = \frac12 - \frac{L_j - L_{min}}{L_{max} - L_{min}}, \qquad
    r_j = \lambda_j \text{ if right, } \min(0, \lambda_j) \text{ if wrong}$$

    It is added to the task's reward with a weight that is 0 at the start of training and warmed up.

    Args:
        lengths: `[P, G]` int or float, tokens of each answer.
        correct: `[P, G]`, nonzero where the answer is right.
        valid: `[P, G]` bool, False where the answer does not count; None for all.

    Returns:
        `[P, G]`, float32 or wider, in [-1/2, 1/2]; 0 where not valid and in a group whose lengths are equal.

    Raises:
        ValueError: if the arrays are not `[P, G]` of one shape.

    Example:
        >>> group_length(jnp.array([[100, 200, 300]]), jnp.array([[1, 1, 0]])).tolist()
        [[0.5, 0.0, -0.5]]

    Reference: Kimi k1.5: Scaling Reinforcement Learning with LLMs (arXiv 2501.12599).
    """
    lengths, correct = masked.as_float(lengths), jnp.asarray(correct)
    masked.check_axes("lengths", lengths, "[P, G]", "reshape with as_groups(lengths, group_size=8)")
    masked.check_like("correct", correct, "lengths", lengths)
    valid = jnp.ones(lengths.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", valid, "lengths", lengths)
    shortest = masked.min(lengths, valid, 1, keepdims=True)
    spread = masked.max(lengths, valid, 1, keepdims=True) - shortest
    share = 0.5 - (lengths - shortest) / jnp.where(spread > 0, spread, 1.0)
    share = jnp.where(correct != 0, share, jnp.minimum(share, 0.0))
    return jnp.where(valid & (spread > 0), share, 0.0)


def too_short(
    lengths: Array, correct: Array, valid: Array | None = None, *, max_penalty: float = 0.5, tolerance: float = 0.8
) -> Array:
    r"""A penalty for answers much shorter than the right ones of their group, $-P (1 - L / (\tau \bar L_+))$.

    It keeps a reward model that likes short answers from making them ever shorter.

    Args:
        lengths: `[P, G]` int or float, tokens of each answer.
        correct: `[P, G]`, nonzero where the answer is right; $\bar L_+$ is their mean length.
        valid: `[P, G]` bool, False where the answer does not count; None for all.
        max_penalty: $P$, at least 0: that of an empty answer.
        tolerance: $\tau$, above 0: nothing is taken from this share of the mean length on.

    Returns:
        `[P, G]`, float32 or wider, in $[-P, 0]$; 0 in a group without a right answer.

    Raises:
        ValueError: if the arrays are not `[P, G]` of one shape, or a number is out of its range.

    Example:
        >>> [round(float(r), 4) for r in too_short(jnp.array([[40, 90, 110]]), jnp.array([[0, 1, 1]]))[0]]
        [-0.25, 0.0, 0.0]

    Reference: Beyond Monolithic Rewards: A Hybrid and Multi-Aspect Reward Optimization for MLLM Alignment
    (arXiv 2510.05283). It describes a penalty that follows the right answers of the group; its form is ours.
    """
    if isinstance(max_penalty, float | int) and max_penalty < 0:
        raise ValueError(f"max_penalty must be at least 0, got {max_penalty}")
    if isinstance(tolerance, float | int) and not tolerance > 0:
        raise ValueError(f"tolerance must be above 0, got {tolerance}")
    lengths, correct = masked.as_float(lengths), jnp.asarray(correct)
    masked.check_axes("lengths", lengths, "[P, G]", "reshape with as_groups(lengths, group_size=8)")
    masked.check_like("correct", correct, "lengths", lengths)
    valid = jnp.ones(lengths.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", valid, "lengths", lengths)
    enough = tolerance * masked.mean(lengths, valid & (correct != 0), 1, keepdims=True)
    missing = lengths / jnp.where(enough > 0, enough, 1.0) - 1
    return jnp.where(valid & (enough > 0), max_penalty * jnp.minimum(missing, 0.0), 0.0)


def shortest_bonus(
    lengths: Array, correct: Array, valid: Array | None = None, *, bonus: float = 0.2, min_length: float = 100.0
) -> Array:
    """A bonus for the shortest right answer of a group, unless it is so short that there is little left to cut.

    Args:
        lengths: `[P, G]` int or float, tokens of each answer.
        correct: `[P, G]`, nonzero where the answer is right.
        valid: `[P, G]` bool, False where the answer does not count; None for all.
        bonus: what it earns.
        min_length: it must be longer than this.

    Returns:
        `[P, G]`, float32 or wider; of equally short ones the first has the bonus.

    Raises:
        ValueError: if the arrays are not `[P, G]` of one shape.

    Example:
        >>> found = shortest_bonus(jnp.array([[300, 150, 120]]), jnp.array([[1, 1, 0]]))
        >>> [round(float(r), 4) for r in found[0]]
        [0.0, 0.2, 0.0]

    Reference: Observe-R1: Unlocking Reasoning Abilities of MLLMs with Dynamic Progressive Reinforcement Learning
    (arXiv 2505.12432).
    """
    lengths, correct = masked.as_float(lengths), jnp.asarray(correct) != 0
    masked.check_axes("lengths", lengths, "[P, G]", "reshape with as_groups(lengths, group_size=8)")
    masked.check_like("correct", correct, "lengths", lengths)
    valid = jnp.ones(lengths.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", valid, "lengths", lengths)
    right = valid & correct
    shortest = jnp.argmin(jnp.where(right, lengths, jnp.inf), axis=1, keepdims=True)
    chosen = right & (jnp.arange(lengths.shape[1]) == shortest) & (lengths > min_length)
    return jnp.where(chosen, jnp.asarray(bonus, lengths.dtype), 0.0)

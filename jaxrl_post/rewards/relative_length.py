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

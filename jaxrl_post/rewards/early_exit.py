"""The reward of answers given at several points of one thought: the earlier a right one comes, the more it is worth."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def exit_decay(correct: Array, valid: Array | None = None, *, decay: float = 2.0) -> Array:
    r"""S-GRPO's reward: each right answer is worth less than the right ones that came before it.

    $$r_i = d^{-(N_i - 1)}\ \text{if right, else}\ 0, \qquad N_i = \#\{j \leq i : \text{answer } j \text{ is right}\}$$

    Args:
        correct: `[P, M]`, nonzero where the answer is right, in order of the exits, the earliest first.
        valid: `[P, M]` bool, False where the answer does not count: it earns 0 and makes none after it worth less.
        decay: $d$; 1 gives every right answer 1.

    Returns:
        `[P, M]` float32 or wider.

    Raises:
        ValueError: if `decay` is below 1, `correct` is not `[P, M]` or `valid` has another shape.

    Example:
        >>> exit_decay(jnp.array([[0, 1, 1, 0, 1]])).tolist()
        [[0.0, 1.0, 0.5, 0.0, 0.25]]

    Reference: S-GRPO: Early Exit via Reinforcement Learning in Reasoning Models (arXiv 2505.07686).
    """
    if decay < 1:
        raise ValueError(f"decay must be at least 1, got {decay}; below it, later answers would be worth more")
    masked.check_axes("correct", jnp.asarray(correct), "[P, M]", "one row per prompt, the earliest exit first")
    right = jnp.asarray(correct) != 0
    if valid is not None:
        valid = jnp.asarray(valid) != 0
        masked.check_like("valid", valid, "correct", right)
        right = right & valid
    dtype = masked.as_float(correct).dtype
    before = jnp.cumsum(right, axis=1).astype(dtype) - 1
    return jnp.where(right, jnp.asarray(decay, dtype) ** -jnp.maximum(before, 0), 0.0)

"""Rewards for training a critic: where the first error is, whether an action is right, and what would be."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def first_error(predicted: Array, truth: Array, num_steps: Array, parsed: Array | None = None) -> Array:
    r"""A critic's reward by how near to the first wrong step it points.

    $$r = \begin{cases} 1 & \hat t = t^\ast = -1 \\ -1 & \text{only one of them is} -1 \\
    1 - |\hat t - t^\ast| / n & \text{otherwise} \end{cases}$$

    Args:
        predicted: any shape, int: $\hat t$, the step from 0 that the critic names; -1 for "no error".
        truth: the same shape, int: $t^\ast$.
        num_steps: the same shape: $n$, steps of the reasoning, at least 1.
        parsed: the same shape, 0 where the critic's verdict could not be read, which earns -1; None for all read. A
            step that does not exist cannot be meant and earns -1 too.

    Returns:
        The shape of `predicted`, float32 or wider, in [-1, 1].

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> first_error(jnp.array([3, -1, -1]), jnp.array([5, 5, -1]), jnp.array([8, 8, 8])).tolist()
        [0.75, -1.0, 1.0]

    Reference: FAPO: Flawed-Aware Policy Optimization for Efficient and Reliable Reasoning (arXiv 2510.22543).
    """
    predicted, truth = jnp.asarray(predicted), jnp.asarray(truth)
    count = masked.as_float(num_steps)
    masked.check_like("truth", truth, "predicted", predicted)
    masked.check_like("num_steps", count, "predicted", predicted)
    known = (predicted >= -1) & (predicted < count)
    if parsed is not None:
        masked.check_like("parsed", jnp.asarray(parsed), "predicted", predicted)
        known &= jnp.asarray(parsed) != 0
    near = 1 - jnp.abs(predicted - truth) / jnp.maximum(count, 1)
    sound = jnp.where(predicted == -1, 1.0, -1.0)
    pointed = jnp.where(predicted == -1, -1.0, near)
    return jnp.where(known, jnp.where(truth == -1, sound, pointed), -1.0)


def critique(
    verdict: Array,
    truth: Array,
    suggestion: Array,
    parsed: Array,
    *,
    format_weight: float = 0.1,
    verdict_weight: float = 1.0,
    suggestion_weight: float = 1.0,
) -> Array:
    r"""A critic of actions earns for its form, its verdict and the action it suggests, $w_f + w_a r_a + w_s r_s$.

    Args:
        verdict: any shape, 1 where it calls the action right, else 0.
        truth: the same shape, what it is.
        suggestion: the same shape, 1 where the action it suggests is the right one, else 0.
        parsed: the same shape, 0 where its answer could not be read, which earns 0.
        format_weight: $w_f$.
        verdict_weight: $w_a$.
        suggestion_weight: $w_s$; 0 rewards the verdict alone.

    Returns:
        The shape of `verdict`, float32.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> ones = jnp.ones(2)
        >>> [round(float(r), 4) for r in critique(ones, ones, jnp.array([0, 1]), ones)]
        [1.1, 2.1]

    Reference: Look Before You Leap: A GUI-Critic-R1 Model for Pre-Operative Error Diagnosis in GUI Automation
    (arXiv 2506.04614). Its weights were not to be seen.
    """
    verdict = masked.as_float(verdict)
    parts = {"truth": masked.as_float(truth), "suggestion": masked.as_float(suggestion), "parsed": jnp.asarray(parsed)}
    for name, part in parts.items():
        masked.check_like(name, part, "verdict", verdict)
    right = ((verdict > 0) == (parts["truth"] > 0)).astype(verdict.dtype)
    earned = format_weight + verdict_weight * right + suggestion_weight * parts["suggestion"]
    return jnp.where(parts["parsed"] != 0, earned, 0.0)

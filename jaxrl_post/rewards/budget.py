"""The reward of an answer that was asked for with a token budget: it may use the budget up, and gains nothing below it.

Who gets which budget is a matter of sampling; how the sub-groups of one budget are compared is in
`advantages.subgroups`.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def _check_scale(max_length: float, scale: float) -> None:
    if max_length <= 0:
        raise ValueError(f"max_length must be above 0 tokens, got {max_length}")
    if scale <= 0:
        raise ValueError(f"scale must be above 0, got {scale}; it is the reward of a right answer of length 0")


def _quarter_wave(lengths: Array, max_length: float, scale: float) -> Array:
    return scale * jnp.cos(0.5 * jnp.pi * lengths / max_length)


def budget_level(budgets: Array, *, max_length: float = 4096, scale: float = 4.0) -> Array:
    r"""What an answer that keeps to its budget is worth, $g(b) = s \cos\frac{\pi b}{2 L}$.

    Args:
        budgets: any shape, int or float, tokens; 0 for none, which counts as `max_length`, and so does one above it.
        max_length: $L$, tokens of the longest answer.
        scale: $s$, in units of the reward.

    Returns:
        The shape of `budgets`, float32 or wider, in [0, `scale`).

    Raises:
        ValueError: if `max_length` or `scale` is not above 0.

    Example:
        >>> [round(g, 4) for g in budget_level(jnp.array([512, 1024, 2048])).tolist()]
        [3.9231, 3.6955, 2.8284]

    Reference: Hierarchical Budget Policy Optimization for Adaptive Reasoning (arXiv 2507.15844).
    """
    _check_scale(max_length, scale)
    budgets = masked.as_float(budgets)
    known = (budgets > 0) & (budgets < max_length)
    return jnp.where(known, _quarter_wave(jnp.where(known, budgets, 1.0), max_length, scale), 0.0)


def budget_cosine(
    lengths: Array,
    correct: Array,
    budgets: Array,
    well_formed: Array | None = None,
    *,
    max_length: float = 4096,
    scale: float = 4.0,
    malformed: float = -1.0,
    decimals: int | None = 2,
) -> Array:
    r"""HBPO's reward: right answers gain by being short, but no more than an answer as long as their budget.

    $$R = \min\Big(g(n) - \frac{|b - n|}{L},\ g(b)\Big), \qquad g(x) = s \cos\frac{\pi x}{2 L}$$

    for a right answer of $n \leq L$ tokens to a prompt with budget $b$; $R = g(n)$ without a budget; 0 for one that is
    wrong or longer than $L$. Below the budget the reward does not fall, so hard problems keep their long answers.

    Args:
        lengths: any shape, int or float, tokens of each answer: $n$.
        correct: of the same shape, nonzero where the answer is right.
        budgets: of the same shape, tokens; 0 where the prompt names none. Budgets above `max_length` count as that.
        well_formed: of the same shape, 0 where the answer cannot be read (no end of the thought, no answer); None: all
            can.
        max_length: $L$, tokens.
        scale: $s$.
        malformed: the reward of an answer that cannot be read.
        decimals: the reward without a budget is rounded to that many, as in the paper's code; None leaves it.

    Returns:
        The shape of `lengths`, float32 or wider.

    Raises:
        ValueError: if shapes differ, or `max_length` or `scale` is not above 0.

    Example:
        >>> lengths, right = jnp.array([900, 3000, 3000]), jnp.array([1, 1, 0])
        >>> [round(r, 4) for r in budget_cosine(lengths, right, jnp.array([1024, 1024, 1024])).tolist()]
        [3.6955, 1.1498, 0.0]

    Reference: Hierarchical Budget Policy Optimization for Adaptive Reasoning (arXiv 2507.15844), and its published code
    for the constants and what is malformed.
    """
    _check_scale(max_length, scale)
    lengths, correct = masked.as_float(lengths), jnp.asarray(correct) != 0
    masked.check_like("correct", correct, "lengths", lengths)
    budgets = jnp.asarray(budgets).astype(lengths.dtype)
    masked.check_like("budgets", budgets, "lengths", lengths, "give 0 where a prompt names no budget")
    within = lengths <= max_length
    short = jnp.where(within, lengths, max_length)
    own = _quarter_wave(short, max_length, scale)
    asked = jnp.minimum(budgets, max_length)
    level = budget_level(asked, max_length=max_length, scale=scale)
    limited = jnp.minimum(own - jnp.abs(asked - short) / max_length, level)
    free = own if decimals is None else jnp.round(own, decimals)
    found = jnp.where(correct & within, jnp.where(budgets > 0, limited, free), 0.0)
    if well_formed is None:
        return found
    well_formed = jnp.asarray(well_formed) != 0
    masked.check_like("well_formed", well_formed, "lengths", lengths)
    return jnp.where(well_formed, found, malformed)

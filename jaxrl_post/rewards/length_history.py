"""Rewards for the length of an answer compared with what was reached before, or with a budget that shrinks.

Pure numbers from lengths, which work inside `jit`; the history and the step are the caller's to keep. Lengths by
themselves are in `length`, compared with the other answers of the same step in `relative_length`.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array

HistoryForm = Literal["cosine", "linear"]
BudgetShape = Literal["triangle", "band"]


def history_length(
    lengths: Array,
    correct: Array,
    history: Array,
    *,
    form: HistoryForm = "cosine",
    floor: float = -0.7,
    tolerance: float = 0.1,
) -> Array:
    r"""HAPO's length reward: a right answer should be shorter than the record of its problem, a wrong one not longer.

    $$f = \cos\Big(\frac\pi2 \min(L / h, 2)\Big), \qquad
    r = \max(\mathrm{floor}, f) \text{ if right}, \quad \min(0, f) \text{ if wrong}$$

    With `form="linear"`, where $t$ is the tolerance, a right answer gets $1 - L/h$ below $h$, 0 up to $(1 + t) h$ and
    $\max(\mathrm{floor}, (1 + t) - L/h)$ above; a wrong one 0 up to $(1 + t) h$ and $\max(-1, (1 + t) - L/h)$ above. A
    problem that was never solved has $h = \infty$ and gives 0.

    Being short never pays for a wrong answer. Added to a correctness of 0 or 1 with a weight of at most 1, it leaves
    every right answer above every wrong one.

    Args:
        lengths: `[P, G]` int or float, tokens of each answer.
        correct: `[P, G]`, nonzero where the answer is right.
        history: `[P]` float, tokens: shortest, or mean, length of the problem's right answers so far; inf for none.
        form: `"cosine"` or `"linear"`.
        floor: the least that a right answer gets, at most 0.
        tolerance: $t$ of `"linear"`: share of $h$ by which an answer may be longer at no cost.

    Returns:
        `[P, G]`, float32 or wider, in [-1, 1].

    Raises:
        ValueError: if `lengths` and `correct` are not `[P, G]` of one shape or `history` is not `[P]`, `form` is
            unknown, `floor` is above 0 or `tolerance` is negative.

    Example:
        >>> lengths, correct = jnp.array([[50, 150, 150, 50, 250]]), jnp.array([[1, 1, 0, 0, 0]])
        >>> [round(r, 4) for r in history_length(lengths, correct, jnp.array([100.0]))[0].tolist()]
        [0.7071, -0.7, -0.7071, 0.0, -1.0]
        >>> [round(r, 4) for r in history_length(lengths, correct, jnp.array([100.0]), form="linear")[0].tolist()]
        [0.5, -0.4, -0.4, 0.0, -1.0]

    Reference: HAPO: Training Language Models to Reason Concisely via History-Aware Policy Optimization
    (arXiv 2505.11225); the linear form is of its released code.
    """
    if form not in get_args(HistoryForm):
        raise ValueError(f"form must be one of {', '.join(get_args(HistoryForm))}, got {form!r}")
    if floor > 0:
        raise ValueError(f"floor must be at most 0, got {floor}; it is what a long right answer gets")
    if tolerance < 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    lengths, correct = masked.as_float(lengths), jnp.asarray(correct) != 0
    masked.check_axes("lengths", lengths, "[P, G]", "reshape with as_groups(lengths, group_size=8)")
    masked.check_like("correct", correct, "lengths", lengths)
    history = masked.as_float(history).astype(lengths.dtype)
    masked.check_like("history", history, "one number per prompt of lengths", lengths[:, 0])
    known = (jnp.isfinite(history) & (history > 0))[:, None]
    share = lengths / jnp.where(known, history[:, None], 1.0)
    if form == "cosine":
        found = jnp.cos(0.5 * math.pi * jnp.clip(share, 0.0, 2.0))
        found = jnp.where(correct, jnp.maximum(found, floor), jnp.minimum(found, 0.0))
    else:
        over = jnp.minimum(1 + tolerance - share, 0.0)
        saved = jnp.maximum(1 - share, 0.0)
        found = jnp.where(correct, saved + jnp.maximum(over, floor), jnp.maximum(over, -1.0))
    return jnp.where(known, found, 0.0).astype(lengths.dtype)


def budget_schedule(step: Array | int, *, start: float = 256.0, decay: float = 0.7, every: int = 150) -> Array:
    r"""A token budget that shrinks in stages during training: $B(t) = \max(1, B_0 \gamma^{\lfloor t / T \rfloor})$.

    From $S_0$ to $S_f$ tokens in $n$ reductions over $N$ steps: `decay` $(S_f / S_0)^{1/n}$, `every` $N / (n + 1)$.

    Args:
        step: any shape, int; training steps done.
        start: $B_0$, tokens.
        decay: $\gamma$, what a reduction leaves; 1 for a fixed budget.
        every: $T$, steps between reductions.

    Returns:
        The shape of `step`, float32, tokens; not rounded.

    Raises:
        ValueError: if `start` is below 1, `decay` not in (0, 1] or `every` below 1.

    Example:
        >>> [round(b, 2) for b in budget_schedule(jnp.array([0, 149, 150, 300, 450])).tolist()]
        [256.0, 256.0, 179.2, 125.44, 87.81]

    Reference: Train Long, Think Short: Curriculum Learning for Efficient Reasoning (arXiv 2508.08940).
    """
    if start < 1:
        raise ValueError(f"start must be at least 1 token, got {start}")
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be above 0 and at most 1, got {decay}; 1 for a fixed budget")
    if every < 1:
        raise ValueError(f"every must be at least 1 step, got {every}")
    stage = jnp.asarray(step) // every
    return jnp.maximum(start * jnp.exp(stage.astype(jnp.float32) * math.log(decay)), 1.0)


def target_length(lengths: Array, budget: Array, *, shape: BudgetShape = "triangle", max_reward: float = 1.0) -> Array:
    r"""Length reward that peaks at a token budget and is gone at twice as many.

    $$r = R_{max} \begin{cases} L / B & L \leq B \\ 2 - L / B & B < L \leq 2 B \\ 0 & L > 2 B \end{cases}$$

    `shape="band"` pays $R_{max}$ for every answer within the budget: shorter answers, of lower accuracy in the paper.
    Wrong answers are paid too.

    Args:
        lengths: any shape, int or float, tokens of each answer.
        budget: $B$, of the same shape, tokens; 0 for no budget.
        shape: `"triangle"` or `"band"`.
        max_reward: $R_{max}$.

    Returns:
        The shape of `lengths`, float32 or wider, between 0 and `max_reward`; 0 where there is no budget.

    Raises:
        ValueError: if the shapes differ or `shape` is unknown.

    Example:
        >>> lengths = jnp.array([43.5, 87.0, 130.0, 174.0])
        >>> [round(r, 4) for r in target_length(lengths, jnp.full(4, 87.0)).tolist()]
        [0.5, 1.0, 0.5057, 0.0]
        >>> [round(r, 4) for r in target_length(lengths, jnp.full(4, 87.0), shape="band").tolist()]
        [1.0, 1.0, 0.5057, 0.0]

    Reference: Train Long, Think Short: Curriculum Learning for Efficient Reasoning (arXiv 2508.08940).
    """
    if shape not in get_args(BudgetShape):
        raise ValueError(f"shape must be one of {', '.join(get_args(BudgetShape))}, got {shape!r}")
    lengths, budget = masked.as_float(lengths), masked.as_float(budget)
    masked.check_like("budget", budget, "lengths", lengths, "repeat one budget with jnp.full_like(lengths, budget)")
    limited = budget > 0
    share = lengths / jnp.where(limited, budget, 1.0)
    below = jnp.ones_like(share) if shape == "band" else share
    found = max_reward * jnp.where(share <= 1, below, jnp.maximum(2 - share, 0.0))
    return jnp.where(limited, found, 0.0).astype(lengths.dtype)

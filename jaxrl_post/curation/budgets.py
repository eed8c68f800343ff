"""How many answers to sample to each prompt, and which prompts to sample, by how often they are solved."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array

Schedule: TypeAlias = Literal["equal", "hard"]


def extra_rollouts(
    success_rate: Array, count: int, *, max_count: int, schedule: Schedule = "equal", normalize_std: bool = False
) -> Array:
    r"""DARS: more answers to prompts that are solved less than half of the time.

    A group of $N$ has absolute advantages that add up to $N S(p)$, with $S = 2 p (1 - p)$, or $2 \sqrt{p (1 - p)}$ of
    normalised ones, most at $p = 1/2$. Hard prompts get as many more as bring them up to that.

    $$\Delta N = \left\lceil \frac{A - N S(p)}{S(p)} \right\rceil, \qquad A = N S(\tfrac12), \text{ times } 2 (1 - p)
    \text{ if schedule is hard}$$

    Args:
        success_rate: any shape, float in [0, 1], $p$; 0 counts as half an answer of $N$.
        count: $N$, answers so far.
        max_count: most answers in all; the paper takes 32 for `"equal"` and 64 for `"hard"`.
        schedule: `"equal"` or `"hard"`.
        normalize_std: advantages are divided by the standard deviation.

    Returns:
        The shape of `success_rate`, int32; 0 from one half on.

    Raises:
        ValueError: for an unknown schedule, or if `max_count` is below `count`, or that below 1.

    Example:
        >>> extra_rollouts(jnp.array([0.0, 0.125, 0.25, 0.375, 0.5]), 8, max_count=32).tolist()
        [24, 11, 3, 1, 0]

    Reference: Depth-Breadth Synergy in RLVR: Unlocking LLM Reasoning Gains with Adaptive Exploration
    (arXiv 2508.13755).
    """
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule must be one of {', '.join(get_args(Schedule))}, got {schedule!r}")
    if not 1 <= count <= max_count:
        raise ValueError(f"max_count must be at least count, and that 1, got {max_count} and {count}")
    p = jnp.clip(masked.as_float(success_rate), 0.0, 1.0)
    p = jnp.where(p > 1e-6, p, 0.5 / count)
    odds = p * (1 - p)
    each = 2 * (jnp.sqrt(odds) if normalize_std else odds)
    target = count * (1.0 if normalize_std else 0.5) * (2 * (1 - p) if schedule == "hard" else 1.0)
    hard = p < 0.5
    missing = (target - count * each) / jnp.where(hard, each, 1.0)
    # What float32 adds to a whole number must not round it up.
    more = jnp.minimum(jnp.ceil(missing - 1e-4), max_count - count)
    return jnp.where(hard, jnp.maximum(more, 0), 0).astype(jnp.int32)


def rollout_value(count: Array, success_rate: Array) -> Array:
    r"""What a prompt's answers are worth: the chance that they differ, times what one step may gain.

    $$V(n, p) = (1 - p^n - (1 - p)^n)\; p (1 - p)^2$$

    Args:
        count: any shape, $n$.
        success_rate: the same shape, or one that broadcasts with it, float in [0, 1], $p$.

    Returns:
        The broadcast shape, float32 or wider.

    Example:
        >>> round(float(rollout_value(jnp.array(8), jnp.array(0.1))), 6)
        0.046132

    Reference: Knapsack RL: Unlocking Exploration of LLMs via Optimizing Budget Allocation (arXiv 2509.25849).
    """
    n, p = masked.as_float(count), masked.as_float(success_rate)
    return (1 - p**n - (1 - p) ** n) * p * jnp.square(1 - p)


def knapsack(
    success_rate: Array,
    budget: int,
    *,
    low: int = 2,
    high: int = 128,
    confidence: float = 0.9,
) -> Array:
    r"""Answers to sample to each prompt so that their total `rollout_value` is largest.

    The value is concave in the number of answers, so that taking the best next answer, one by one, is exact. What
    prompts that are sometimes solved do not need to show both outcomes with some confidence goes to those that were
    never solved, in equal parts, and otherwise to those that always are.

    Args:
        success_rate: `[N]` float in [0, 1], as tracked.
        budget: answers in all, at least `N * low`; static.
        low: least of a prompt.
        high: most of a prompt.
        confidence: $a$: both outcomes are seen with it in $\log(1 - a) / \log \max(p, 1 - p)$ answers.

    Returns:
        `[N]` int32. It sums to `budget`, or to `N * high` where that is less.

    Raises:
        ValueError: if `success_rate` is not `[N]`, or the numbers do not fit.

    Example:
        >>> knapsack(jnp.array([0.0, 0.1, 0.5, 1.0]), 24, high=16).tolist()
        [2, 14, 6, 2]

    Reference: Knapsack RL: Unlocking Exploration of LLMs via Optimizing Budget Allocation (arXiv 2509.25849).
    """
    p = masked.as_float(success_rate)
    masked.check_axes("success_rate", p, "[N]")
    if not 1 <= low <= high:
        raise ValueError(f"low must be at least 1 and at most high, got {low} and {high}")
    if budget < low * len(p):
        raise ValueError(f"budget must be at least low for each of {len(p)} prompts, {low * len(p)}, got {budget}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    spare = min(budget, high * len(p)) - low * len(p)
    mixed, never = (p > 0) & (p < 1), p <= 0
    likelier = jnp.where(mixed, jnp.maximum(p, 1 - p), 0.5)
    needs = jnp.ceil(jnp.log1p(-confidence) / jnp.log(likelier))
    needs = jnp.where(mixed, jnp.clip(needs, low, high) - low, 0).astype(jnp.int32)
    of_mixed = jnp.where(jnp.any(never | (p >= 1)), jnp.minimum(jnp.sum(needs), spare), spare)

    n = jnp.arange(low, high)
    gain = (p[:, None] ** n * (1 - p[:, None]) + (1 - p[:, None]) ** n * p[:, None]) * (p * jnp.square(1 - p))[:, None]
    order = jnp.argsort(jnp.where(mixed[:, None], -gain, jnp.inf).reshape(-1), stable=True)
    rank = jnp.zeros(order.size, jnp.int32).at[order].set(jnp.arange(order.size, dtype=jnp.int32)).reshape(gain.shape)
    taken = jnp.sum((rank < of_mixed) & mixed[:, None], axis=1)
    for receivers in (never, p >= 1, mixed):
        room = jnp.where(receivers, high - low - taken, 0)
        taken = taken + _shared(room, spare - jnp.sum(taken))
    return (low + taken).astype(jnp.int32)


def _shared(room: Array, amount: Array) -> Array:
    """An amount shared out in equal parts to those that have room, the first of them getting what does not divide."""

    # The level to which all are filled, found by bisection over whole numbers.
    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high + 1) // 2
        fits = jnp.sum(jnp.minimum(room, middle)) <= amount
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle - 1)

    level, _ = jax.lax.fori_loop(0, 32, halve, (jnp.int32(0), jnp.max(room, initial=0).astype(jnp.int32)))
    even = jnp.minimum(room, level)
    wanting = room > level
    rest = jnp.minimum(amount - jnp.sum(even), jnp.sum(wanting))
    return even + (wanting & (jnp.cumsum(wanting) <= rest))


def variance_promotion(
    success_rate: Array, diversity: Array | None = None, *, outcome_weight: float = 0.8, diversity_weight: float = 0.2
) -> Array:
    r"""Weights of prompts that are solved half of the time, and whose answers vary, $a\, p (1 - p) + b\, D$, in [0, 1].

    Args:
        success_rate: `[N]` float in [0, 1], $p$.
        diversity: `[N]` float, $D$, of the answers to each prompt, such as `rewards.distinct_ngrams`; None for the
            outcome alone.
        outcome_weight: $a$.
        diversity_weight: $b$.

    Returns:
        `[N]`, float32 or wider, from 0 for the least to 1 for the most; 1 for all where they are equal.

    Raises:
        ValueError: if `success_rate` is not `[N]` or `diversity` has another shape.

    Example:
        >>> variance_promotion(jnp.array([0.0, 0.25, 0.5, 1.0])).tolist()
        [0.0, 0.75, 1.0, 0.0]

    Reference: MMR1: Enhancing Multimodal Reasoning with Variance-Aware Sampling and Open Resources (arXiv 2509.21268).
    """
    p = masked.as_float(success_rate)
    masked.check_axes("success_rate", p, "[N]")
    score = outcome_weight * p * (1 - p)
    if diversity is not None:
        diversity = masked.as_float(diversity)
        masked.check_like("diversity", diversity, "success_rate", p)
        score = score + diversity_weight * diversity
    low, high = jnp.min(score, initial=jnp.inf), jnp.max(score, initial=-jnp.inf)
    return jnp.where(high > low, (score - low) / jnp.where(high > low, high - low, 1.0), 1.0)


def promoted_prompts(key: Array, weights: Array, uniform: Array, *, share: float = 0.5) -> Array:
    """A batch of prompts of which a share is drawn by weight, with replacement, among others that are given.

    Args:
        key: for the draw.
        weights: `[N]` float at least 0; where all are 0 the draw is uniform.
        uniform: `[P]` int, the prompts whose turn it is.
        share: in [0, 1], of `P`, rounded down.

    Returns:
        `[P]` int32; the drawn ones take every other place, from the first.

    Raises:
        ValueError: if the shapes do not fit or `share` is outside [0, 1].

    Example:
        >>> promoted_prompts(jax.random.key(0), jnp.array([0.0, 0.0, 1.0]), jnp.array([0, 1, 0, 1])).tolist()
        [2, 0, 2, 1]

    Reference: MMR1: Enhancing Multimodal Reasoning with Variance-Aware Sampling and Open Resources (arXiv 2509.21268).
    """
    weights, uniform = masked.as_float(weights), jnp.asarray(uniform)
    masked.check_axes("weights", weights, "[N]")
    masked.check_axes("uniform", uniform, "[P]")
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    count, drawn = len(uniform), int(share * len(uniform))
    logits = jnp.where(jnp.any(weights > 0), jnp.log(weights), 0.0)
    found = jax.random.categorical(key, logits, shape=(drawn,))
    places = jnp.argsort(jnp.concatenate([2 * jnp.arange(drawn), 2 * jnp.arange(count - drawn) + 1]))
    return jnp.concatenate([found, uniform[: count - drawn]])[places].astype(jnp.int32)

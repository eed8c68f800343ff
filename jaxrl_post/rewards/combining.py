"""One reward from several, where a plain sum would let the easy ones outweigh what matters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array

Ladder: TypeAlias = Literal["linear", "amplified"]


def verified_score(score: Array, correct: Array, *, alpha: float = 0.5) -> Array:
    r"""A reward model's score within the verdict of a verifier, $r = \sigma(\alpha s) + (c - 1)$.

    Every right answer is in (0, 1) and every wrong one in (-1, 0), so that no score lifts a wrong answer above a right
    one; within each class the score ranks them, also in groups that are all wrong.

    Args:
        score: any shape, float, of a reward model.
        correct: the same shape, 1 where a verifier finds the answer right, else 0.
        alpha: $\alpha$, above 0, per unit of the score.

    Returns:
        The shape of `score`, float32 or wider.

    Raises:
        ValueError: if the shapes differ, or `alpha` is not above 0.

    Example:
        >>> [round(float(r), 5) for r in verified_score(jnp.array([2.0, 2.0]), jnp.array([1, 0]))]
        [0.73106, -0.26894]

    Reference: Qwen2.5-Math Technical Report: Toward Mathematical Expert Model via Self-Improvement (arXiv 2409.12122).
    """
    if isinstance(alpha, float | int) and not alpha > 0:
        raise ValueError(f"alpha must be above 0, got {alpha}; the report takes 0.5")
    score, correct = masked.as_float(score), masked.as_float(correct)
    masked.check_like("correct", correct, "score", score)
    # Of a wrong answer -sigmoid(-x), which does not round to 0 before the right ones do.
    return jnp.where(correct > 0, jax.nn.sigmoid(alpha * score), -jax.nn.sigmoid(-alpha * score))


def gated_sum(levels: Sequence[Array], gates: Sequence[float] | None = None) -> Array:
    r"""Rewards by priority: an easy one counts only where all that matter more have passed their gates.

    $$R = \sum_k o_k R_k, \qquad o_k = \prod_{j > k} [R_j > g_j]$$

    Args:
        levels: arrays of one shape, float, from the least important (the format, say) to the most (the outcome).
        gates: $g_j$ of each level, which is open above it; None for 0. That of the first plays no part.

    Returns:
        The shape of a level, float32 or wider. Each level is a sum over an episode, or, where the more important ones
        are the same at all its turns, of one turn.

    Raises:
        ValueError: if there is no level, the shapes differ, or there is not a gate for each.

    Example:
        >>> form, tool, outcome = jnp.array([0.2, 0.2]), jnp.array([0.3, 0.3]), jnp.array([0.0, 1.0])
        >>> gated_sum([form, tool, outcome]).tolist()
        [0.0, 1.5]

    Reference: Stabilizing Long-term Multi-turn Reinforcement Learning with Gated Rewards (arXiv 2508.10548).
    """
    if not levels:
        raise ValueError("levels must hold at least one array of rewards")
    gates = (0.0,) * len(levels) if gates is None else tuple(gates)
    if len(gates) != len(levels):
        raise ValueError(f"gates must hold one number for each of {len(levels)} levels, got {len(gates)}")
    rewards = [masked.as_float(level) for level in levels]
    for reward in rewards[:-1]:
        masked.check_like("levels", reward, "the last level", rewards[-1])
    total, is_open = jnp.zeros_like(rewards[-1]), jnp.ones(rewards[-1].shape, bool)
    for reward, gate in zip(reversed(rewards), reversed(gates), strict=True):
        total = total + jnp.where(is_open, reward, 0.0)
        is_open &= reward > gate
    return total


def sweet_spot(
    correct: Array, proximity: Array, *, zones: int = 4, alpha: float = 0.5, ladder: Ladder = "linear"
) -> Array:
    r"""A verdict, and a few steps of how near an answer came, so that small differences make none.

    $$r = c + \alpha S, \qquad z = \min(K - 1, \lfloor K s \rfloor), \quad S = \frac{z}{K - 1} \text{ or }
    \frac{2^z - 1}{2^{K - 1} - 1}$$

    Args:
        correct: any shape, 1 where the answer is right, else 0.
        proximity: the same shape, float in [0, 1], $s$: how near it came, of its steps the mean (of a point, say,
            $e^{-d^2 / 2}$ of its distance in sizes of the target; of a puzzle the share of blocks that match).
        zones: $K$; 1 leaves the verdict alone, many give a continuous reward.
        alpha: $\alpha$, at least 0; below 1 every right answer stays above every wrong one.
        ladder: `"linear"`, or `"amplified"`, whose steps double.

    Returns:
        The shape of `correct`, float32 or wider.

    Raises:
        ValueError: if the shapes differ, `zones` is below 1, `alpha` is below 0, or for an unknown ladder.

    Example:
        >>> for ladder in ("linear", "amplified"):
        ...     print(round(float(sweet_spot(jnp.zeros(()), jnp.float32(0.7), ladder=ladder)), 5))
        0.33333
        0.21429

    Reference: SSL: Sweet Spot Learning for Differentiated Guidance in Agentic Optimization (arXiv 2601.22491). The
    values of its zones were not to be seen: the ladders are those that it describes.
    """
    if zones < 1:
        raise ValueError(f"zones must be at least 1, got {zones}")
    if isinstance(alpha, float | int) and alpha < 0:
        raise ValueError(f"alpha must be at least 0, got {alpha}")
    if ladder not in get_args(Ladder):
        raise ValueError(f"ladder must be one of {', '.join(get_args(Ladder))}, got {ladder!r}")
    correct, proximity = masked.as_float(correct), masked.as_float(proximity)
    masked.check_like("proximity", proximity, "correct", correct)
    if zones == 1:
        return correct
    zone = jnp.clip(jnp.floor(zones * proximity), 0, zones - 1)
    share = zone / (zones - 1) if ladder == "linear" else (2.0**zone - 1) / (2.0 ** (zones - 1) - 1)
    return correct + alpha * share

"""One reward from several, where a plain sum would let the easy ones outweigh what matters."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


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

"""Rewards from embeddings: how near what is seen is to a goal that is described, without any training.

The embeddings are the caller's: of any pair of encoders into one space.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def _unit(x: Array) -> Array:
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def goal_similarity(state: Array, goal: Array, baseline: Array | None = None, *, alpha: float | Array = 0.0) -> Array:
    r"""Similarity to a goal, partly along the line from what is always there to the goal.

    $$R = 1 - \tfrac12 \|P_\alpha (x - g)\|^2, \qquad P_\alpha = \alpha \frac{u u^\top}{\|u\|^2} + (1 - \alpha) I, \quad
    u = g - b$$

    with $x$ of norm 1, and $g$ and $b$ means of embeddings of norm 1. With $\alpha = 0$ and one goal it is the cosine
    of $x$ and $g$; with $\alpha = 1$ only what tells the goal from the baseline counts, and what both descriptions
    share does not.

    Args:
        state: `[..., D]` float, embeddings of what is seen.
        goal: `[N, D]` float, of descriptions of the goal.
        baseline: `[M, D]` float, of descriptions of the scene without the goal; None for none.
        alpha: $\alpha$ in [0, 1]; 0.3 to 0.8 are typical.

    Returns:
        `[...]`, float32 or wider, in [-1, 1] for one goal. Where goal and baseline are the same, that of $\alpha = 0$.

    Raises:
        ValueError: if the shapes do not fit, `alpha` is not in [0, 1], or it is not 0 without a baseline.

    Example:
        >>> state, goal, baseline = jnp.array([1.0, 0.0]), jnp.array([[0.0, 1.0]]), jnp.array([[0.0, -1.0]])
        >>> float(goal_similarity(state, goal)), float(goal_similarity(state, goal, baseline, alpha=1.0))
        (0.0, 0.5)

    Reference: Vision-Language Models are Zero-Shot Reward Models for Reinforcement Learning (arXiv 2310.12921).
    """
    if isinstance(alpha, float | int) and not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    state, goal = masked.as_float(state), masked.as_float(goal)
    _check_embeddings("goal", goal, state)
    g = jnp.mean(_unit(goal), axis=0)
    away = _unit(state) - g
    if baseline is None:
        if not isinstance(alpha, float | int) or alpha != 0:
            raise ValueError("alpha needs a baseline; give embeddings of the scene without the goal")
        return 1 - jnp.sum(jnp.square(away), axis=-1) / 2
    baseline = masked.as_float(baseline)
    _check_embeddings("baseline", baseline, state)
    u = g - jnp.mean(_unit(baseline), axis=0)
    square = jnp.sum(jnp.square(u))
    share = jnp.where(square > 0, alpha, 0.0)
    along = jnp.sum(away * u, axis=-1, keepdims=True) * u / jnp.where(square > 0, square, 1.0)
    return 1 - jnp.sum(jnp.square(share * along + (1 - share) * away), axis=-1) / 2


def _check_embeddings(name: str, x: Array, state: Array) -> None:
    masked.check_axes(name, x, "[N, D]")
    if state.ndim == 0 or state.shape[-1] != x.shape[1]:
        raise ValueError(f"{name} must be [N, D] with the D of state [..., D], got {x.shape} and {state.shape}")


def pearson_distance(first: Array, second: Array, valid: Array | None = None) -> Array:
    r"""How far two rewards are from being the same up to scale and offset, $\sqrt{(1 - \rho) / 2}$.

    It is EPIC's distance of rewards from which potentials have been taken out, and chooses $\alpha$ of
    `goal_similarity` on a few states of known reward.

    Args:
        first: `[B]` float.
        second: `[B]` float.
        valid: `[B]` bool, False where a state does not count; None for all.

    Returns:
        Scalar, float32 or wider, in [0, 1]: 0 for equal, 1 for opposite rewards, and $\sqrt{1/2}$ where one of them is
        constant.

    Raises:
        ValueError: if the arrays are not `[B]` of one length.

    Example:
        >>> x = jnp.array([0.0, 1.0, 2.0])
        >>> [round(float(pearson_distance(x, y)), 4) for y in (3 * x + 1, -x, 0 * x)]
        [0.0, 1.0, 0.7071]

    Reference: Quantifying Differences in Reward Functions (arXiv 2006.13900).
    """
    first, second = masked.as_float(first), masked.as_float(second)
    masked.check_axes("first", first, "[B]")
    masked.check_like("second", second, "first", first)
    counts = jnp.ones(first.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", counts, "first", first)
    one, two = (masked.whiten(x, counts, eps=0.0) for x in (first, second))
    scale = jnp.sqrt(jnp.sum(jnp.square(one)) * jnp.sum(jnp.square(two)))
    rho = jnp.where(scale > 0, jnp.sum(one * two) / jnp.where(scale > 0, scale, 1.0), 0.0)
    return jnp.sqrt(jnp.clip((1 - rho) / 2, 0.0, 1.0))

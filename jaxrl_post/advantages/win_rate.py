"""Rewards from comparisons: how often an answer beats the others of its group."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.advantages.layout import check_rewards
from jaxrl_post.types import Array


def win_rate(wins: Array, valid: Array | None = None) -> Array:
    r"""Probability of beating another answer of the group, $r_i = \frac{1}{k - 1} \sum_{j \ne i} P(i \succ j)$.

    The reward of self-play: no scale and no transitivity is asked of the preference.

    Args:
        wins: `[P, G, G]` float in [0, 1], `wins[p, i, j]` the probability that `i` is preferred to `j`. The diagonal is
            not read.
        valid: `[P, G]` bool, False where the answer does not count; None for all.

    Returns:
        `[P, G]`, float32 or wider; 1/2 for an answer without others, 0 where not valid.

    Raises:
        ValueError: if `wins` is not `[P, G, G]`, or `valid` not `[P, G]`.

    Example:
        >>> win_rate(jnp.array([[[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]]])).tolist()  # a cycle
        [[0.5, 0.5, 0.5]]

    Reference: A Minimaximalist Approach to Reinforcement Learning from Human Feedback (arXiv 2401.04056).
    """
    wins = masked.as_float(wins)
    masked.check_axes("wins", wins, "[P, G, G]")
    if wins.shape[1] != wins.shape[2]:
        raise ValueError(f"wins must be [P, G, G], each answer against each, got {wins.shape}")
    there = jnp.ones(wins.shape[:2], bool) if valid is None else jnp.asarray(valid) != 0
    if there.shape != wins.shape[:2]:
        raise ValueError(f"valid must be [P, G], {wins.shape[:2]}, got {there.shape}")
    others = there[:, :, None] & there[:, None, :] & ~jnp.eye(wins.shape[1], dtype=bool)
    rate = masked.mean(wins, others, 2)
    return jnp.where(there, jnp.where(jnp.any(others, axis=2), rate, 0.5), 0.0)


def order_wins(rewards: Array, valid: Array | None = None, *, scale: float | None = None) -> Array:
    r"""Comparisons of rewards: who has more, or Bradley and Terry's $\sigma((r_i - r_j) / s)$.

    Args:
        rewards: `[P, G]` float.
        valid: `[P, G]` bool, False where the answer does not count; None for all.
        scale: $s$, in units of the reward; None for 1, 0 and, of equal rewards, 1/2.

    Returns:
        `[P, G, G]`, float32 or wider, without gradient; 1/2 where either is not valid.

    Raises:
        ValueError: if `rewards` is not `[P, G]`, `valid` has another shape, or `scale` is not above 0.

    Example:
        >>> win_rate(order_wins(jnp.array([[0.3, 7.0, -2.0]]))).tolist()
        [[0.5, 1.0, 0.0]]

    Reference: A Minimaximalist Approach to Reinforcement Learning from Human Feedback (arXiv 2401.04056).
    """
    if isinstance(scale, float | int) and not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}; None compares the rewards' order alone")
    rewards, there = check_rewards(rewards, valid)
    gap = rewards[:, :, None] - rewards[:, None, :]
    wins = (jnp.sign(gap) + 1) / 2 if scale is None else jax.nn.sigmoid(gap / scale)
    return jax.lax.stop_gradient(jnp.where(there[:, :, None] & there[:, None, :], wins, 0.5))

"""Choosing groups of rollouts: pure data in, pure data out, with static shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array, Rollouts


def informative(reward: Array, valid: Array, *, eps: float = 1e-6) -> Array:
    """Which groups have valid rewards that differ; all others have zero advantage under a group baseline.

    Args:
        reward: `[P, G]`.
        valid: `[P, G]` bool.
        eps: smallest difference between the largest and the smallest reward that counts.

    Returns:
        `[P]` bool.

    Raises:
        ValueError: if `reward` is not `[P, G]` or `valid` has another shape.

    Example:
        >>> informative(jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.ones((2, 2), bool)).tolist()
        [True, False]
    """
    reward, valid = masked.as_float(reward), jnp.asarray(valid) != 0
    masked.check_axes("reward", reward, "[P, G]")
    masked.check_like("valid", valid, "reward", reward)
    highest = jnp.max(jnp.where(valid, reward, -jnp.inf), axis=1)
    lowest = jnp.min(jnp.where(valid, reward, jnp.inf), axis=1)
    return highest - lowest > eps


def within_accuracy(reward: Array, valid: Array, *, low: float = 0.2, high: float = 0.8) -> Array:
    """Which groups have a mean reward from `low` to `high`: prompts that are neither too hard nor too easy.

    Args:
        reward: `[P, G]`, 1 for a right answer and 0 for a wrong one.
        valid: `[P, G]` bool.
        low: the least mean.
        high: the largest mean.

    Returns:
        `[P]` bool; False for a group without valid answers.

    Raises:
        ValueError: if `reward` is not `[P, G]`, `valid` has another shape, or `low` is above `high`.

    Example:
        >>> within_accuracy(jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.ones((2, 2), bool)).tolist()
        [True, False]

    Reference: Process Reinforcement through Implicit Rewards (arXiv 2502.01456).
    """
    if low > high:
        raise ValueError(f"low must be at most high, got {low} and {high}; no group would be left")
    reward, valid = masked.as_float(reward), jnp.asarray(valid) != 0
    masked.check_axes("reward", reward, "[P, G]")
    masked.check_like("valid", valid, "reward", reward)
    mean = masked.mean(reward, valid, 1)
    return jnp.any(valid, axis=1) & (mean >= low - 1e-6) & (mean <= high + 1e-6)


def spread_first(reward: Array, valid: Array, keep: int, *, eps: float = 1e-6) -> Array:
    """Indices of `keep` groups: the informative ones first, each kind in its own order.

    DAPO samples prompts until enough groups are informative; with a fixed budget of prompts, this keeps the shapes
    static and fills up with groups that carry no policy gradient.

    Args:
        reward: `[P, G]`.
        valid: `[P, G]` bool.
        keep: number of groups, at most `P`; static.
        eps: see `informative`.

    Returns:
        `[keep]` int32.

    Raises:
        ValueError: as `informative`, or if `keep` is not in `[1, P]`.

    Example:
        >>> reward = jnp.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
        >>> spread_first(reward, jnp.ones((4, 2), bool), 3).tolist()
        [1, 3, 0]

    Reference:
        DAPO: An Open-Source LLM Reinforcement Learning System at Scale, arXiv 2503.14476.
    """
    differ = informative(reward, valid, eps=eps)
    if not 1 <= keep <= len(differ):
        raise ValueError(f"keep must be between 1 and P={len(differ)}, got {keep}")
    return jnp.argsort(~differ, stable=True)[:keep].astype(jnp.int32)


def take_groups(rollouts: Rollouts, groups: Array) -> Rollouts:
    """The rollouts of the given groups, in the given order.

    Args:
        rollouts: `P` groups.
        groups: `[Q]` int32 in `[0, P)`.

    Returns:
        `Rollouts` of `Q` groups.

    Example:
        >>> from jaxrl_post.data import to_rollouts
        >>> batch = to_rollouts([[2], [3]], [[[4]], [[5]]], length=2)
        >>> take_groups(batch, jnp.array([1])).tokens.tolist()
        [[3, 5]]
    """
    prompts, size = rollouts.num_prompts, rollouts.group_size
    rows = (groups[:, None] * size + jnp.arange(size)).reshape(-1)

    def pick(x: Array) -> Array:
        return x[groups] if x.shape[0] == prompts else x[rows]

    return jax.tree.map(pick, rollouts)


def select_groups(rollouts: Rollouts, keep: int) -> Rollouts:
    """`keep` of the groups, those whose rewards vary first: `take_groups` of `spread_first`."""
    return take_groups(rollouts, spread_first(rollouts.reward, rollouts.valid, keep))

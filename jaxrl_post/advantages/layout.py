"""Between the shapes of advantages: flat rows, groups of rows, and tokens."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def as_groups(x: Array, group_size: int) -> Array:
    """Fold rows into groups, `[B] -> [P, G]`; rows are prompt-major (row `p * G + g`).

    Args:
        x: `[B]`, any dtype.
        group_size: `G`, rollouts per prompt.

    Returns:
        `[B / G, G]`, `x`'s dtype.

    Raises:
        ValueError: if `x` is not `[B]` or `G` does not divide `B`.

    Example:
        >>> as_groups(jnp.arange(6), group_size=3).tolist()
        [[0, 1, 2], [3, 4, 5]]
    """
    x = jnp.asarray(x)
    masked.check_axes("x", x, "[B]")
    if group_size < 1 or x.shape[0] % group_size:
        raise ValueError(
            f"group_size must be at least 1 and divide the number of rows, {x.shape[0]}, got {group_size}; "
            "rows of one prompt must be complete and adjacent"
        )
    return x.reshape(-1, group_size)


def per_token(advantages: Array, mask: Array) -> Array:
    """Give every trained token its sequence's advantage, `[P, G] -> [B, T]`; zero where the mask is.

    Args:
        advantages: `[P, G]` float.
        mask: `[B, T]`, nonzero where the policy chose the token; `B = P * G`, prompt-major.

    Returns:
        `[B, T]`, float32 or wider.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> per_token(jnp.array([[1.0, -1.0]]), jnp.array([[0, 1, 1], [0, 1, 0]])).tolist()
        [[0.0, 1.0, 1.0], [0.0, -1.0, 0.0]]
    """
    advantages, mask = masked.as_float(advantages), jnp.asarray(mask)
    check_groups_fit("advantages", advantages, mask)
    return jnp.where(mask != 0, advantages.reshape(-1, 1), 0.0)


def on_last_token(rewards: Array, mask: Array) -> Array:
    """Put every sequence's reward on its last trained token, `[P, G] -> [B, T]`; zero elsewhere.

    Args:
        rewards: `[P, G]` float.
        mask: `[B, T]`, nonzero where the policy chose the token; `B = P * G`, prompt-major.

    Returns:
        `[B, T]`, float32 or wider. A row without a trained token has nowhere to put its reward and is all zero.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> on_last_token(jnp.array([[1.0, 2.0]]), jnp.array([[0, 1, 1], [0, 1, 0]])).tolist()
        [[0.0, 0.0, 1.0], [0.0, 2.0, 0.0]]
    """
    rewards, mask = masked.as_float(rewards), jnp.asarray(mask)
    check_groups_fit("rewards", rewards, mask)
    acts = mask != 0
    still_to_come = jnp.cumsum(acts[:, ::-1], axis=1)[:, ::-1]
    return jnp.where(acts & (still_to_come == 1), rewards.reshape(-1, 1), 0.0)


def check_groups_fit(name: str, x: Array, mask: Array) -> None:
    """Raise unless `x` is `[P, G]` and `mask` is `[P * G, T]`."""
    masked.check_axes(name, x, "[P, G]", f"reshape with as_groups({name}, group_size=8)")
    masked.check_axes("mask", mask, "[B, T]")
    if mask.shape[0] != x.size:
        raise ValueError(
            f"mask must have P * G = {x.size} rows for {name} of shape {x.shape}, got shape {mask.shape}; "
            "one row per rollout, prompt-major"
        )

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
    return jnp.where(is_last(mask), rewards.reshape(-1, 1), 0.0)


def is_last(mask: Array) -> Array:
    """Where each row's last trained token is, `[B, T]` bool; rows without a trained token have none.

    Args:
        mask: `[B, T]`, nonzero where the policy chose the token.

    Returns:
        `[B, T]` bool.

    Raises:
        ValueError: if `mask` is not `[B, T]`.

    Example:
        >>> is_last(jnp.array([[0, 1, 1, 0], [0, 0, 0, 0]])).tolist()
        [[False, False, True, False], [False, False, False, False]]
    """
    acts = jnp.asarray(mask) != 0
    masked.check_axes("mask", acts, "[B, T]")
    still_to_come = jnp.cumsum(acts[:, ::-1], axis=1)[:, ::-1]
    return acts & (still_to_come == 1)


def to_turns(x: Array, step: Array, mask: Array, *, num_turns: int) -> tuple[Array, Array]:
    """What each turn's first trained token holds, `[B, T] -> [B, K]`, and which turns there are.

    Args:
        x: `[B, T]`, any dtype; what is constant within a turn, e.g. its agent, or the state it answers to.
        step: `[B, T]` int, the turn of the token, from 0; -1 elsewhere.
        mask: `[B, T]`, nonzero where the policy chose the token.
        num_turns: `K`; tokens of later turns are ignored.

    Returns:
        turns: `[B, K]`, `x`'s dtype; 0 where there is no such turn.
        exists: `[B, K]` bool.

    Raises:
        ValueError: if the arrays are not `[B, T]` of one shape.

    Example:
        >>> agent, step = jnp.array([[9, 4, 4, 9, 5]]), jnp.array([[-1, 0, 0, -1, 1]])
        >>> turns, exists = to_turns(agent, step, step >= 0, num_turns=3)
        >>> turns.tolist(), exists.tolist()
        ([[4, 5, 0]], [[True, True, False]])
    """
    x, step, mask = jnp.asarray(x), jnp.asarray(step), jnp.asarray(mask)
    _check_turns(x, "x", step, mask)
    rows, steps = jnp.arange(x.shape[0])[:, None], x.shape[1]
    turn = jnp.where((mask != 0) & (step >= 0), step, num_turns)
    first = jnp.full((x.shape[0], num_turns), steps).at[rows, turn].min(jnp.arange(steps), mode="drop")
    exists = first < steps
    found = jnp.take_along_axis(x, jnp.minimum(first, steps - 1), axis=1)
    return jnp.where(exists, found, jnp.zeros((), x.dtype)), exists


def from_turns(x: Array, step: Array, mask: Array) -> Array:
    """Give every trained token what its turn has, `[B, K] -> [B, T]`; zero where the mask is.

    Args:
        x: `[B, K]` float, one number per turn.
        step: `[B, T]` int, the turn of the token, from 0; -1 elsewhere.
        mask: `[B, T]`, nonzero where the policy chose the token.

    Returns:
        `[B, T]`, float32 or wider; 0 also for tokens of no turn, or of one beyond `K`.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> step = jnp.array([[-1, 0, 0, -1, 1]])
        >>> from_turns(jnp.array([[0.5, -1.0]]), step, step >= 0).tolist()
        [[0.0, 0.5, 0.5, 0.0, -1.0]]
    """
    x, step, mask = masked.as_float(x), jnp.asarray(step), jnp.asarray(mask)
    _check_turns(step, "step", step, mask)
    masked.check_axes("x", x, "[B, K]")
    if x.shape[0] != step.shape[0]:
        raise ValueError(f"x must have one row per row of step, {step.shape[0]}, got shape {x.shape}")
    there = (mask != 0) & (step >= 0) & (step < x.shape[1])
    return jnp.where(there, jnp.take_along_axis(x, jnp.clip(step, 0, x.shape[1] - 1), axis=1), 0.0)


def _check_turns(x: Array, name: str, step: Array, mask: Array) -> None:
    masked.check_axes(name, x, "[B, T]")
    masked.check_like("step", step, name, x)
    masked.check_like("mask", mask, name, x)


def check_rewards(rewards: Array, valid: Array | None) -> tuple[Array, Array]:
    """Rewards as `[P, G]` float and `valid` as bool of that shape (all True for None), or a ValueError."""
    rewards = masked.as_float(rewards)
    masked.check_axes("rewards", rewards, "[P, G]", "reshape with as_groups(rewards, group_size=8)")
    if valid is None:
        return rewards, jnp.ones(rewards.shape, bool)
    valid = jnp.asarray(valid)
    masked.check_like("valid", valid, "rewards", rewards, "reshape with as_groups(valid, group_size=8)")
    return rewards, valid != 0


def check_groups_fit(name: str, x: Array, mask: Array) -> None:
    """Raise unless `x` is `[P, G]` and `mask` is `[P * G, T]`."""
    masked.check_axes(name, x, "[P, G]", f"reshape with as_groups({name}, group_size=8)")
    masked.check_axes("mask", mask, "[B, T]")
    if mask.shape[0] != x.size:
        raise ValueError(
            f"mask must have P * G = {x.size} rows for {name} of shape {x.shape}, got shape {mask.shape}; "
            "one row per rollout, prompt-major"
        )

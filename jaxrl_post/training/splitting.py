"""How a batch is cut into micro-batches without cutting what a method calls its smallest unit."""

from __future__ import annotations

from typing import get_args

import jax
import jax.numpy as jnp

from jaxrl_post.types import PyTree, Rollouts, Unit

UNITS: tuple[Unit, ...] = get_args(Unit)
"""From the smallest piece to the largest."""


def coarsest(*units: Unit) -> Unit:
    """The largest of several units: what keeps it whole keeps the others whole.

    Example:
        >>> coarsest("token", "group", "sequence")
        'group'
    """
    return max(units, key=UNITS.index)


def ungroup(rollouts: Rollouts) -> Rollouts:
    """The same sequences as `B` groups of one, so that they can be cut between any two."""
    batch = rollouts.batch_size
    return rollouts.replace(
        reward=rollouts.reward.reshape(batch, 1),
        rewards={
            name: value.reshape(batch, 1) if value.shape == rollouts.reward.shape else value
            for name, value in rollouts.rewards.items()
        },
        valid=rollouts.valid.reshape(batch, 1),
        length=rollouts.length.reshape(batch, 1),
        finish=rollouts.finish.reshape(batch, 1),
        id=rollouts.id.reshape(batch, 1),
        prompt_id=jnp.repeat(rollouts.prompt_id, rollouts.group_size),
        extras={name: _per_row(value, rollouts) for name, value in rollouts.extras.items()},
    )


def _per_row(value: jax.Array, rollouts: Rollouts) -> jax.Array:
    """`[P, G]` as `[B, 1]`, an array with a leading axis of `P` repeated for each row, one with `B` as it is."""
    if value.shape == rollouts.reward.shape:
        return value.reshape(rollouts.batch_size, 1)
    if value.ndim and value.shape[0] == rollouts.num_prompts != rollouts.batch_size:
        return jnp.repeat(value, rollouts.group_size, axis=0)
    return value


def split(rollouts: Rollouts, others: PyTree, count: int, unit: Unit) -> tuple[Rollouts, PyTree]:
    """Cut a batch into `count` micro-batches, stacked along a new leading axis.

    Pieces are strided (piece `i` takes units `i, i + count, ...`), so that each spreads over all devices of a batch
    split along its leading axis. Scalars are repeated.

    Args:
        rollouts: the batch.
        others: a pytree of arrays with a leading axis of `B` or `P`, or scalars (targets, stats); `[P, G]` speaks of
            sequences, as it does in `rollouts.extras`.
        count: number of micro-batches.
        unit: `"token"` and `"sequence"` may be cut between any two sequences, `"group"` between prompts only,
            `"batch"` not at all.

    Returns:
        `(rollouts, others)` with leading axes `[count, B / count, ...]` and `[count, P / count, ...]`. For units below
        the group, the micro-batches hold groups of one.

    Raises:
        ValueError: if the units cannot be dealt out evenly, or an array has another leading axis.

    Example:
        >>> from jaxrl_post import data
        >>> batch = data.to_rollouts([[2]] * 2, [[[3], [4]], [[5], [6]]], length=2)
        >>> split(batch, {}, 2, "group")[0].tokens[:, :, 1].tolist()
        [[3, 4], [5, 6]]
        >>> split(batch, {}, 2, "token")[0].tokens[:, :, 1].tolist()
        [[3, 5], [4, 6]]
    """
    if unit == "batch" and count > 1:
        raise ValueError("this method needs the whole batch at once (unit='batch'); use micro_batches=1")
    if unit in ("token", "sequence"):
        others = jax.tree.map(lambda x: _per_row(x, rollouts), others)
        rollouts = ungroup(rollouts)
    prompts, group = rollouts.num_prompts, rollouts.group_size
    if prompts % count:
        kind = "sequences" if unit in ("token", "sequence") else "groups"
        raise ValueError(f"{count} micro-batches do not divide {prompts} {kind}; choose a divisor")

    def cut(x: jax.Array) -> jax.Array:
        if x.ndim == 0:
            return jnp.broadcast_to(x, (count,))
        if x.shape[0] == prompts:
            return jnp.moveaxis(x.reshape(prompts // count, count, *x.shape[1:]), 1, 0)
        if x.shape[0] == prompts * group:
            pieces = jnp.moveaxis(x.reshape(prompts // count, count, group, *x.shape[1:]), 1, 0)
            return pieces.reshape(count, prompts // count * group, *x.shape[1:])
        raise ValueError(
            f"an array of shape {x.shape} has a leading axis of neither P={prompts} nor B={prompts * group}"
        )

    return jax.tree.map(cut, rollouts), jax.tree.map(cut, others)


def unsplit_rows(x: jax.Array, group: int) -> jax.Array:
    """The inverse of `split` for an array with a leading axis of rows: `[count, B / count, ...] -> [B, ...]`."""
    count, rows = x.shape[:2]
    pieces = x.reshape(count, rows // group, group, *x.shape[2:])
    return jnp.moveaxis(pieces, 0, 1).reshape(count * rows, *x.shape[2:])

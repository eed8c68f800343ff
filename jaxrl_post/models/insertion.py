"""Rows of a cache for other rows: how a sequence takes the place of one that has ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_post.types import Array


def insert_rows(
    cache: Any, rows: Any, source: Array | int, slots: Array | None = None, *, axes: Mapping[str, tuple[int, int]]
) -> Any:
    """Put rows of a prefilled cache into a larger one.

    The columns of all rows are written in turn, whatever stands in them, and round again from the last to the first:
    what is inserted comes to stand in the columns before the next one. A token is found by its position, not by its
    column, so that the order does not matter; what the slot held before is forgotten.

    Args:
        cache: a NamedTuple with `positions` `[B, S]` (-1 where there is no token) and `index`, a scalar, the number of
            columns written so far.
        rows: the same of `[n, L]`, `L <= S`, all of whose columns have been written.
        source: `[R]` int32, which of the rows goes into each of the slots; or a number `k`: each row `k` times, in
            order, into all slots of a cache that is empty.
        slots: `[R]` int32; one that does not exist is left out. None if `source` is a number.
        axes: of each array by its name, the axis of rows and that of columns.

    Returns:
        The cache, with the new rows.

    Example:
        >>> from jaxrl_post.models.recompute import RecomputeCache
        >>> empty = RecomputeCache(jnp.zeros((2, 3), int), jnp.full((2, 3), -1), jnp.asarray(0))
        >>> read = RecomputeCache(jnp.array([[7, 8]]), jnp.array([[0, 1]]), jnp.asarray(2))
        >>> axes = {"tokens": (0, 1), "positions": (0, 1)}
        >>> full = insert_rows(empty, read, 2, axes=axes)
        >>> full.tokens.tolist(), int(full.index)
        ([[7, 8, 0], [7, 8, 0]], 2)
        >>> insert_rows(full, read, jnp.array([0]), jnp.array([1]), axes=axes).positions.tolist()
        [[0, 1, -1], [0, 1, -1]]
    """
    capacity, length = cache.positions.shape[1], rows.positions.shape[1]
    if length > capacity:
        raise ValueError(f"rows of {length} columns do not fit a cache of capacity {capacity}")

    def filled(old: Array, new: Array, axis: int) -> Array:
        new = jnp.repeat(new, source, axis=axis) if source != 1 else new
        new = jax.lax.slice_in_dim(new, 0, old.shape[axis], axis=axis).astype(old.dtype)
        return jax.lax.dynamic_update_slice(old, new, (0,) * old.ndim)

    index = jnp.maximum(cache.index, length)

    def replaced(old: Array, new: Array, axis: int, columns: int, nothing: int) -> Array:
        room = [(0, 0)] * new.ndim
        room[columns] = (0, capacity - length)
        new = jnp.pad(jnp.take(new, source, axis=axis), room, constant_values=nothing)
        new = jnp.roll(new, index - length, axis=columns).astype(old.dtype)
        return old.at[(*(slice(None),) * axis, slots)].set(new, mode="drop")

    def inserted(name: str) -> Array:
        old, new, (axis, columns) = getattr(cache, name), getattr(rows, name), axes[name]
        if slots is None:
            return filled(old, new, axis)
        return replaced(old, new, axis, columns, -1 if name == "positions" else 0)

    return cache._replace(index=index, **{name: inserted(name) for name in axes})

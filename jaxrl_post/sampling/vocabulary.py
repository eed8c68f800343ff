"""A vocabulary that lies on several devices: each looks at its own part, where the compiler would collect the whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxrl_post.mesh import spread
from jaxrl_post.types import Array

_AXES = ("batch", "act_vocab")


def devices_of_vocabulary(values: Array) -> int:
    """How many devices of the ambient mesh share a row of `[B, V]`."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in spread(_AXES, values.shape)[1])


def where_it_lies(of_part: Callable[..., Any], values: Array, *others: Array) -> Any:
    """`of_part(part, first, vocab, *others)` of the part of `[B, V]` that a device has, from place `first` on.

    Args:
        of_part: gets the axes of the mesh in `vocab`, and gives arrays of `[B, ...]` that are the same on all of them.
        values: `[B, V]`.
        others: `[B, ...]`.
    """
    rows, vocab = spread(_AXES, values.shape)

    def on_device(values: Array, *others: Array) -> Any:
        return of_part(values, jax.lax.axis_index(vocab) * values.shape[1], vocab, *others)

    by_row = PartitionSpec(rows or None)
    specs = (PartitionSpec(rows or None, vocab), *(by_row for _ in others))
    return jax.shard_map(on_device, in_specs=specs, out_specs=by_row, check_vma=False)(values, *others)


def highest(values: Array, k: int) -> tuple[Array, Array]:
    """The `k` highest of each row, the highest first, and their places; of equal ones the smaller place.

    Args:
        values: `[B, V]`; NaN is above all.
        k: how many, static.

    Returns:
        `[B, k]` of each, the places int32.

    Example:
        >>> value, place = highest(jnp.array([[0.5, 2.0, 0.5, 1.0]]), 3)
        >>> value.tolist(), place.tolist()
        ([[2.0, 1.0, 0.5]], [[1, 3, 0]])
    """
    if devices_of_vocabulary(values) == 1:
        return _highest(values, k)

    def of_part(values: Array, first: Array, vocab: tuple[str, ...]) -> tuple[Array, Array]:
        value, place = _highest(values, min(k, values.shape[1]))
        # In the order of the parts, so that the first of equal ones is still the smaller place.
        both = jax.tree.map(lambda x: jax.lax.all_gather(x, vocab, axis=1, tiled=True), (value, first + place))
        value, chosen = _highest(both[0], k)
        return value, jnp.take_along_axis(both[1], chosen, axis=1).astype(jnp.int32)

    return where_it_lies(of_part, values)


def _highest(values: Array, k: int) -> tuple[Array, Array]:
    value, place = jax.lax.top_k(values, k)
    return value, place.astype(jnp.int32)

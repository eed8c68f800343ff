"""What the implementations agree on: where the completions of a row lie, and how attention lies on a mesh."""

from __future__ import annotations

import itertools
import math

import jax
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from jaxrl_post.mesh import spec
from jaxrl_post.types import Array

# A query of splash brings one int32: its place and the start of its completion.
MAX_COMPLETION_BITS = 31


def own_start(length: int, completion_starts: tuple[int, ...]) -> np.ndarray:
    """`[T]` int32: where the completion that holds each place starts, 0 in the prefix.

    Example:
        >>> own_start(6, (2, 5)).tolist()
        [0, 0, 2, 2, 2, 5]
    """
    bounds = np.array((0, *completion_starts), np.int32)
    return bounds[np.searchsorted(bounds, np.arange(length), side="right") - 1]


def common_power(completion_starts: tuple[int, ...]) -> int:
    """The largest power of two that divides all starts.

    Example:
        >>> common_power((256, 384, 640))
        128
    """
    together = math.gcd(*completion_starts)
    return together & -together


def completion_bits(length: int, completion_starts: tuple[int, ...]) -> int:
    """Bits that hold a place and the start of its completion, counted in units of the starts' common power.

    Example:
        >>> completion_bits(1024, (256, 512))
        12
    """
    return (length - 1).bit_length() + (completion_starts[-1] // common_power(completion_starts)).bit_length()


def are_even(length: int, completion_starts: tuple[int, ...]) -> bool:
    """Whether all completions have the same room.

    Example:
        >>> are_even(8, (2, 4, 6)), are_even(9, (2, 4, 6))
        (True, False)
    """
    bounds = (*completion_starts, length)
    return len({end - start for start, end in itertools.pairwise(bounds)}) == 1


def shared_row(prefix: int, completion: int, count: int, multiple: int = 1) -> tuple[int, tuple[int, ...]]:
    """Length and completion starts of a row with room for a prefix and `count` completions of one size.

    Only a very long row gets more room than is asked for: so much that its starts are multiples of a power of two that
    lets every implementation hold them. And one whose parts are to have lengths that `multiple` divides.

    Example:
        >>> shared_row(100, 20, 3), shared_row(2047, 8191, 16)[1][:2]
        ((160, (100, 120, 140)), (2048, 10240))
        >>> shared_row(5, 3, 2, multiple=2)
        (14, (6, 10))
    """
    unit = multiple
    while True:
        first, each = (-(-size // unit) * unit for size in (prefix, completion))
        length, starts = first + count * each, tuple(first + i * each for i in range(count))
        if completion_bits(length, starts) <= MAX_COMPLETION_BITS:
            return length, starts
        unit *= 2


def automatic_axes() -> dict[str, int]:
    """Sizes of the axes of the ambient mesh that the compiler spreads arrays over."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {}
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in axes if kind == AxisType.Auto}


def placement(query: Array | np.ndarray) -> PartitionSpec:
    """How `[B, T, H, K]` lies on the automatic axes of the ambient mesh.

    Example:
        >>> tuple(placement(np.zeros((2, 3, 4, 5))))
        (None, None, None, None)
    """
    return spec(("batch", "length", "act_heads", None), query.shape, automatic_axes())


def length_parts(where: PartitionSpec) -> int:
    """Into how many parts a `placement` splits the queries.

    Example:
        >>> length_parts(PartitionSpec(None, None, None, None))
        1
    """
    return 1 if where[1] is None else automatic_axes()[where[1]]


def whole_rows(x: Array, where: PartitionSpec) -> Array:
    """`[B, S, kv_heads, K]` with all places of a row on every device, otherwise as `where` says of the queries.

    Example:
        >>> whole_rows(np.zeros((2, 3, 4, 5)), PartitionSpec(None, None, None, None)).shape
        (2, 3, 4, 5)
    """
    if where[1] is None:
        return x
    heads = spec((None, None, "act_heads", None), x.shape, automatic_axes())[2]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(where[0], None, heads, None))

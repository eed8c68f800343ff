"""A key-value cache of pages that rows take from a pool as they grow, and give back when they end.

How attention reads a page is in `cache`; who waits when the pool is empty is for the loop over tokens to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxrl_post.kernels.platform import current_device
from jaxrl_post.mesh import LogicalAxes, spread
from jaxrl_post.models.cache import CACHE_AXES, KVCache, arrays, block_sizes, empty_cache, in_order
from jaxrl_post.types import Array


class PagedCache(NamedTuple):
    """Keys and values in pages of `width` columns: a row takes memory for the tokens that it has, page by page.

    The token at position `p` of a row stands in column `p % width` of the page `table[row, p // width]`; a row's
    positions count from 0 without a gap. A page is `2 * layers * kv_heads * width * head_dim` numbers. Attention brings
    the pages of a block together before it multiplies them: a step costs a little more than with columns of a row's
    own, which lie so. Where rows lie on several devices, each device has a part of the pool for its own rows.

    Attributes:
        k: `[layers, pages, kv_heads, width, head_dim]`, rotated.
        v: the same shape.
        table: `[B, blocks]` int32, the page of each block of `width` positions of a row; -1 for none.
        length: `[B]` int32, tokens of each row.
        k_scale: `[layers, pages, kv_heads, width]` bfloat16 if `k` is int8, as in `KVCache`, else None.
        v_scale: the same of `v`.

    Reference: Efficient Memory Management for Large Language Model Serving with PagedAttention, arXiv 2309.06180.
    """

    k: Array
    v: Array
    table: Array
    length: Array
    k_scale: Array | None = None
    v_scale: Array | None = None

    @property
    def positions(self) -> Array:
        """`[B, S]` int32, what a row has in each of its columns, one for each position; -1 for nothing."""
        width = self.k.shape[3]
        places = jnp.arange(self.table.shape[1] * width, dtype=jnp.int32)
        there = jnp.repeat(self.table >= 0, width, axis=1) & (places < self.length[:, None])
        return jnp.where(there, places, -1)


def page_width(capacity: int) -> int:
    """Columns of a page, where rows have at most `capacity`: as many as attention reads at a time.

    Args:
        capacity: `S`, positions of a row.

    Returns:
        `width`; a row of `n` tokens takes `ceil(n / width)` pages.

    Example:
        >>> page_width(5)
        5
    """
    return block_sizes(capacity)[1]


def pool_parts(rows: int) -> int:
    """In how many parts the ambient mesh splits the pool of so many rows: the devices along which these lie."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in spread(("batch",), (rows,))[0])


def empty_pages(
    layers: int, batch: int, capacity: int, pages: int, kv_heads: int, head_dim: int, dtype: DTypeLike
) -> PagedCache:
    """A pool of pages, and rows that have none.

    Args:
        layers: layers in the pool.
        batch: `B`.
        capacity: `S`, the most positions of a row.
        pages: of the pool, for all rows together.
        kv_heads: key-value heads.
        head_dim: size of a head.
        dtype: a float type or int8.

    Raises:
        ValueError: for fewer than one page, another dtype, or pages that the devices which share the rows cannot share
            evenly.

    Example:
        >>> cache = empty_pages(2, 3, 8, 4, 1, 6, jnp.float32)
        >>> cache.k.shape, cache.table.shape
        ((2, 4, 1, 8, 6), (3, 1))
    """
    if pages < 1:
        raise ValueError(f"a paged cache needs at least one page, got {pages}")
    parts = pool_parts(batch)
    if pages % parts:
        raise ValueError(
            f"{parts} devices share the rows, and each has a part of the pool for its own: {pages} pages must be a "
            f"multiple of {parts}"
        )
    blocks, width = block_sizes(capacity)
    pool = empty_cache(layers, pages, width, kv_heads, head_dim, dtype)
    table, length = jnp.full((batch, blocks), -1, jnp.int32), jnp.zeros(batch, jnp.int32)
    return PagedCache(pool.k, pool.v, table, length, pool.k_scale, pool.v_scale)


def release_pages(cache: PagedCache, rows: Array) -> PagedCache:
    """Rows give all their pages back.

    Args:
        cache: the pool.
        rows: `[B]` bool.

    Example:
        >>> cache = empty_pages(1, 2, 4, 2, 1, 2, jnp.float32)
        >>> new = jnp.ones((1, 2, 1, 1, 2))
        >>> cache = write_pages(cache, new, new, jnp.zeros((2, 1), jnp.int32))
        >>> cache.table.tolist()
        [[0], [1]]
        >>> release_pages(cache, jnp.array([True, False])).table.tolist()
        [[-1], [1]]
    """
    return cache._replace(table=jnp.where(rows[:, None], -1, cache.table), length=jnp.where(rows, 0, cache.length))


def write_pages(cache: PagedCache, k: Array, v: Array, positions: Array) -> PagedCache:
    """The next `T` tokens of all rows, which take the pages that they need.

    What there is no page for, and what is beyond a row's capacity, is lost.

    Args:
        cache: the pool.
        k: `[layers, B, T, kv_heads, head_dim]`.
        v: the same shape.
        positions: `[B, T]` int32, -1 for padding.
    """
    new: LogicalAxes = ("layers", "batch", None, "kv_heads", None)
    return _in_parts(_written, cache, (k, v, positions), (new, new, ("batch", None)))


def _written(cache: PagedCache, _: Array | int, k: Array, v: Array, positions: Array) -> PagedCache:
    pages, width, blocks = cache.k.shape[1], cache.k.shape[3], cache.table.shape[1]
    cache = _grown(cache, jnp.maximum(cache.length, jnp.max(positions, axis=1).astype(jnp.int32) + 1))
    block = jnp.where(positions < 0, blocks, positions // width)
    page = jnp.take_along_axis(cache.table, jnp.minimum(block, blocks - 1), axis=1)
    page = jnp.where((page < 0) | (block >= blocks), pages, page)  # which does not exist
    column = positions % width

    def put(old: Array, new: Array) -> Array:
        new = new.astype(old.dtype)
        if current_device().platform != "tpu":
            # Layers and heads at once: where heads lie on several devices, these need not tell each other of theirs.
            new = jnp.moveaxis(new, 0, 2)
            return in_order(old.at[:, page, :, column].set(new, mode="drop"))
        # By all four numbers: what was written over layers or heads at once, the compiler would lay beside each other.
        layers, heads = (jnp.arange(old.shape[axis]) for axis in (0, 2))
        where = (layers[:, None, None, None], page[:, None], heads[:, None], column[:, None])
        return in_order(old.at[where].set(jnp.swapaxes(new, 2, 3), mode="drop"))

    return cache._replace(**{name: put(getattr(cache, name), x) for name, x in arrays(cache, k, v).items()})


def insert_pages(cache: PagedCache, rows: KVCache, source: Array | int, slots: Array | None = None) -> PagedCache:
    """Put prefilled rows in the place of what slots held, whose pages go back first.

    Args:
        cache: the pool, with pages enough.
        rows: whose tokens stand in the columns of their positions, as `prefill` leaves prompts padded on the right.
        source: as in `insert_rows`.
        slots: as in `insert_rows`.

    Raises:
        ValueError: if the rows have more columns than a row of the cache has positions.
    """
    (batch, blocks), width = cache.table.shape, cache.k.shape[3]
    read, columns = rows.positions.shape
    if columns > blocks * width:
        raise ValueError(f"rows of {columns} columns do not fit a cache of capacity {blocks * width}")
    if slots is None:
        source, slots = jnp.repeat(jnp.arange(read), source)[:batch], jnp.arange(batch)
    source = jnp.asarray(source, jnp.int32)
    added = jnp.sum(rows.positions >= 0, axis=1, dtype=jnp.int32)[source]
    names = ("k", "v") if cache.k_scale is None else ("k", "v", "k_scale", "v_scale")
    new = {name: getattr(rows, name) for name in names}
    whole = {name: ("layers", None, *CACHE_AXES[2 : x.ndim]) for name, x in new.items()}
    return _in_parts(_inserted, cache, (new, source, added, slots), (whole, (None,), (None,), (None,)))


def _inserted(
    cache: PagedCache, part: Array | int, rows: dict[str, Array], source: Array, added: Array, slots: Array
) -> PagedCache:
    (batch, _), width, columns = cache.table.shape, cache.k.shape[3], rows["k"].shape[3]
    slots = slots - part * batch
    slots = jnp.where((slots < 0) | (slots >= batch), batch, slots)  # which does not exist
    gone = jnp.zeros(batch, bool).at[slots].set(True, mode="drop")
    cache = release_pages(cache, gone)
    cache = _grown(cache, cache.length.at[slots].set(added, mode="drop"))
    pieces = -(-columns // width)
    page = cache.table.at[slots, :pieces].get(mode="fill", fill_value=-1).reshape(-1)
    first = jnp.argsort(page < 0)  # those that there are

    def padded(x: Array) -> Array:
        room = [(0, 0)] * x.ndim
        room[3] = (0, pieces * width - columns)
        return jnp.pad(x, room)

    given = {name: padded(x) for name, x in rows.items()}

    def put(state: tuple[Array, dict[str, Array]]) -> tuple[Array, dict[str, Array]]:
        at, pool = state
        number = first[at]

        def one(old: Array, new: Array) -> Array:
            new = jax.lax.dynamic_slice_in_dim(new, source[number // pieces], 1, axis=1)
            new = jax.lax.dynamic_slice_in_dim(new, number % pieces * width, width, axis=3).astype(old.dtype)
            return in_order(jax.lax.dynamic_update_slice_in_dim(old, new, page[number], axis=1))

        return at + 1, {name: one(pool[name], given[name]) for name in given}

    # Page by page: a scatter of whole pages would have a TPU's compiler turn the pool over. The second bound says
    # nothing new, but is a constant: whoever counts a program's rounds can read it.
    count = jnp.sum(page >= 0, dtype=jnp.int32)
    state = (jnp.zeros((), jnp.int32), {name: getattr(cache, name) for name in given})
    pool = jax.lax.while_loop(lambda state: (state[0] < count) & (state[0] < len(page)), put, state)[1]
    return cache._replace(**pool)


def _in_parts(
    run: Callable[..., PagedCache], cache: PagedCache, given: tuple[Any, ...], axes: tuple[Any, ...]
) -> PagedCache:
    """`run(cache, part, *given)` on each device for its own rows and pages, which it counts from 0.

    Args:
        run: see there; `part` is the number of the device along those that share the rows.
        cache: the whole pool.
        given: arrays, or dicts of them.
        axes: logical axes of each.
    """
    over = spread(("batch",), (len(cache.table),))[0]
    if not over:
        return run(cache, 0, *given)

    def lies(x: Array, axes: LogicalAxes) -> PartitionSpec:
        return PartitionSpec(*(along or None for along in spread(axes, x.shape)))

    def moved(cache: PagedCache, first: Array) -> PagedCache:
        return cache._replace(table=jnp.where(cache.table < 0, -1, cache.table + first))

    def own(cache: PagedCache, *given: Any) -> PagedCache:
        part = jax.lax.axis_index(over)
        first = part * cache.k.shape[1]
        return moved(run(moved(cache, -first), part, *given), first)

    heads = spread((None, None, "kv_heads"), cache.k.shape[:3])[2] or None
    pool = jax.tree.map(lambda x: PartitionSpec(over) if x.ndim < 3 else PartitionSpec(None, over, heads), cache)
    specs = tuple(jax.tree.map(lies, x, names) for x, names in zip(given, axes, strict=True))
    return jax.shard_map(own, in_specs=(pool, *specs), out_specs=pool, check_vma=False)(cache, *given)


def _grown(cache: PagedCache, length: Array) -> PagedCache:
    """Rows of these lengths `[B]`, with free pages for the blocks that had none; -1 where there is no page left."""
    pages, width = cache.k.shape[1], cache.k.shape[3]
    table = cache.table
    begins = width * jnp.arange(table.shape[1], dtype=jnp.int32)
    missing = (begins < length[:, None]) & (table < 0)
    free = jnp.ones(pages, bool).at[jnp.where(table < 0, pages, table)].set(False, mode="drop")
    found = jnp.nonzero(free, size=pages, fill_value=-1)[0].astype(jnp.int32)
    number = jnp.cumsum(missing.reshape(-1), dtype=jnp.int32).reshape(missing.shape) - 1
    taken = found.at[number].get(mode="fill", fill_value=-1)
    return cache._replace(table=jnp.where(missing, taken, table), length=length)

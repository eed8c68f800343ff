"""What the cache of a decoder is put together from: one stack of layers, one for each reach, or a part that is shared.

Which kind a cache is shows in its type, so that a program holds the code of one only. How a stack is read is in
`cache`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxrl_post.kernels.platform import current_device
from jaxrl_post.models.cache import KVCache, Read, arrays, empty_cache, in_order, reach, reach_unordered, write
from jaxrl_post.models.insertion import insert_rows
from jaxrl_post.models.layers import DecoderConfig
from jaxrl_post.models.paged_cache import PagedCache, empty_pages, insert_pages, release_pages, write_pages
from jaxrl_post.types import Array, Policy


class WindowedCache(NamedTuple):
    """The cache of a model some of whose layers see the newest tokens only: these layers keep no others.

    Attributes:
        whole: of the layers that see all tokens; `S` columns, or pages.
        near: of the local layers; `W` columns, as many as the window has tokens. The token at position `p` stands in
            column `p % W`, whatever else has been written, so that each row keeps its own last tokens; `index` says
            nothing.
    """

    whole: KVCache | PagedCache
    near: KVCache

    @property
    def positions(self) -> Array:
        """`[B, S]`, of the layers that see all."""
        return self.whole.positions


class SharedCache(NamedTuple):
    """The cache of groups of sequences with a prompt in common, which is kept and read once for each group.

    Attributes:
        prompt: `P` rows, which nothing is written to any more.
        own: `B = P * G` rows, of what follows the prompts.
    """

    prompt: KVCache | WindowedCache
    own: KVCache | WindowedCache

    @property
    def positions(self) -> Array:
        """`[B, S]`, of the sequences' own tokens."""
        return self.own.positions


Cache: TypeAlias = KVCache | PagedCache | WindowedCache | SharedCache


def new_cache(
    config: DecoderConfig, batch: int, capacity: int, dtype: DTypeLike | None = None, *, pages: int | None = None
) -> Cache:
    """A decoder's cache without a token.

    Args:
        config: sizes of the model; its local layers keep `window` columns, if these are fewer than `capacity`.
        batch: `B`.
        capacity: `S`, columns of layers that see all tokens.
        dtype: a float type, or int8; None for that of the model.
        pages: for the layers that see all tokens a pool of so many, of `page_width(capacity)` columns each, that rows
            take as they grow; None for `S` columns of their own for each row.

    Returns:
        A `KVCache` or a `PagedCache`, or a `WindowedCache` of one if local layers keep less.

    Raises:
        ValueError: for another dtype, and as `empty_pages`.

    Example:
        >>> from jaxrl_post import models
        >>> local = (True, True, False)
        >>> policy = models.decoder(vocab_size=8, width=8, layers=3, heads=2, window=4, local_layers=local)
        >>> cache = policy.init_cache(2, 10)
        >>> cache.whole.k.shape, cache.near.k.shape
        ((1, 2, 2, 10, 4), (2, 2, 2, 4, 4))
    """
    dtype = config.dtype if dtype is None else dtype
    near = sum(config.local_layers)

    def stack(layers: int, columns: int) -> KVCache:
        return empty_cache(layers, batch, columns, config.kv_heads, config.head_dim, dtype)

    def whole(layers: int) -> KVCache | PagedCache:
        if pages is None:
            return stack(layers, capacity)
        return empty_pages(layers, batch, capacity, pages, config.kv_heads, config.head_dim, dtype)

    if config.window is None or not near or config.window >= capacity:
        return whole(config.layers)
    if pages is not None and near == config.layers:
        raise ValueError(f"pages do not apply to a model all of whose layers keep {config.window} tokens; leave it out")
    return WindowedCache(whole(config.layers - near), stack(near, config.window))


def cache_bytes(
    policy: Policy, batch: int, capacity: int, dtype: DTypeLike | None = None, *, pages: int | None = None
) -> int:
    """Memory of a policy's cache.

    A decoder's takes `2 * layers * kv_heads * head_dim * itemsize` bytes for each column of a row, in int8
    `2 * layers * kv_heads * (head_dim + 2)`, and 4 for its position. Local layers have `min(window, capacity)` columns,
    with positions of their own, and the others `capacity`. Both have an `index` of 4 bytes. `rollout.generate` takes
    less than for all its rows where sequences of a group share their prompt, see `share_prompts`.

    In pages, the layers that are not local take as many columns as `pages * page_width(capacity)`, whatever the number
    of rows, and for each row 4 bytes for each page of `capacity` and 4 for its length in the place of positions and
    `index`: a sequence of `n` tokens costs `ceil(n / page_width(capacity))` pages while it lasts.

    Args:
        policy: the model.
        batch: rows.
        capacity: columns.
        dtype: as in `Policy.init_cache`.
        pages: of the pool; None for a cache without.

    Returns:
        Bytes of all arrays, on all devices together.

    Example:
        >>> from jaxrl_post import models
        >>> policy = models.decoder(vocab_size=8, width=64, layers=2, heads=1)
        >>> [cache_bytes(policy, 10, 100, dtype) // 1000 for dtype in (jnp.bfloat16, jnp.int8)]
        [516, 268]
    """
    pooled = {} if pages is None else {"pages": pages}
    made = jax.eval_shape(lambda: policy.init_cache(batch, capacity, dtype, **pooled))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(made))


def write_layers(cache: Cache, k: Array, v: Array, positions: Array, local_layers: Sequence[bool]) -> Cache:
    """The next `T` tokens of all rows and layers.

    Args:
        cache: of any kind.
        k: `[layers, B, T, kv_heads, head_dim]`.
        v: the same shape.
        positions: `[B, T]` int32, -1 for padding.
        local_layers: for each layer, whether it is local.

    Returns:
        The cache, with the tokens.
    """
    if isinstance(cache, SharedCache):
        return cache._replace(own=write_layers(cache.own, k, v, positions, local_layers))
    if isinstance(cache, PagedCache):
        return write_pages(cache, k, v, positions)
    if isinstance(cache, KVCache):
        return write(cache, k, v, positions)
    near, whole = _numbers(local_layers)
    new = {name: jnp.swapaxes(x, 2, 3) for name, x in arrays(cache.near, k[near], v[near]).items()}
    put = write_pages if isinstance(cache.whole, PagedCache) else write
    return WindowedCache(
        put(cache.whole, k[whole], v[whole], positions),  # type: ignore[arg-type]
        _write_by_position(cache.near, new, positions),
    )


def _numbers(local_layers: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the local layers, and of the others."""
    return np.flatnonzero(local_layers), np.flatnonzero(~np.asarray(local_layers))


def _write_by_position(ring: KVCache, new: dict[str, Array], positions: Array) -> KVCache:
    """`T` tokens in the columns that belong to their positions; of each row the newest, as many as there are columns.

    Args:
        ring: `WindowedCache.near`.
        new: the arrays by their names, `[layers, B, kv_heads, T, ...]`.
        positions: `[B, T]` int32, -1 for padding.
    """
    size = ring.positions.shape[1]
    newest = jnp.max(positions, axis=1, keepdims=True)
    kept = (positions >= 0) & (positions > newest - size)
    columns = jnp.where(kept, positions % size, size)  # which does not exist
    scatter = _by_numbers if current_device().platform == "tpu" else _by_rows

    def put(old: Array, new: Array) -> Array:
        return in_order(scatter(old, columns, new.astype(old.dtype)))

    found = scatter(ring.positions[None, :, None], columns, positions[None, :, None])[0, :, 0]
    return ring._replace(positions=found, **{name: put(getattr(ring, name), x) for name, x in new.items()})


def _by_numbers(old: Array, columns: Array, new: Array) -> Array:
    """`[layers, B, heads, S, ...]` with `new` `[layers, B, heads, T, ...]` in columns `[B, T]`; no other is touched."""
    # By all four numbers: what was written over layers or heads at once, a TPU's compiler would lay beside each other.
    layers, rows, heads = (jnp.arange(size) for size in old.shape[:3])
    where = (layers[:, None, None, None], rows[:, None, None], heads[:, None], columns[:, None])
    return old.at[where].set(new, mode="drop")


def _by_rows(old: Array, columns: Array, new: Array) -> Array:
    """The same, row by row: where rows lie on several devices, these need not tell each other what is theirs."""

    def put(old: Array, columns: Array, new: Array) -> Array:
        return old.at[columns].set(new, mode="drop")

    heads = jax.vmap(put, in_axes=(0, None, 0))
    return jax.vmap(jax.vmap(heads), in_axes=(0, None, 0))(old, columns, new)


def reads(
    cache: Cache, positions: Array, window: int | None, local_layers: Sequence[bool]
) -> Callable[[Array], list[Read]]:
    """What a layer reads of a cache, by its number.

    Args:
        cache: of any kind, without the new tokens.
        positions: `[B, T]` int32, of the new tokens.
        window: of the layers in question; None for those that see all.
        local_layers: for each layer, whether it is local.

    Returns:
        From a layer's number (int32 scalar) to its parts of the cache.
    """
    if not isinstance(cache, SharedCache):
        part = _part(cache, positions, window, local_layers)
        return lambda layer: [part(layer)]
    grouped = positions.reshape(len(cache.prompt.positions), -1)
    prompt = _part(cache.prompt, grouped, window, local_layers, complete=True)
    own = _part(cache.own, positions, window, local_layers)
    return lambda layer: [prompt(layer), own(layer)]


def _part(
    cache: KVCache | PagedCache | WindowedCache,
    positions: Array,
    window: int | None,
    local_layers: Sequence[bool],
    *,
    complete: bool = False,
) -> Callable[[Array], Read]:
    """What a layer reads of one of the caches; `complete` if no new tokens are written to it."""
    numbers = None
    if isinstance(cache, WindowedCache):
        local = window is not None
        numbers = np.cumsum(np.asarray(local_layers) == local) - 1
        complete |= local
        cache = cache.near if local else cache.whole
    table = cache.table if isinstance(cache, PagedCache) else None
    if complete or isinstance(cache, PagedCache):
        where = reach_unordered(cache.positions, positions, window)
    else:
        where = reach(cache, positions, window)
    return lambda layer: Read(cache, layer if numbers is None else jnp.asarray(numbers, jnp.int32)[layer], where, table)


def insert(
    cache: Cache, rows: Cache, source: Array | int, slots: Array | None = None, *, local_layers: Sequence[bool]
) -> Cache:
    """`insert_rows` of a decoder's cache; both are of one policy and dtype.

    Args:
        cache: that the rows come into.
        rows: prefilled.
        source: as in `insert_rows`.
        slots: as in `insert_rows`.
        local_layers: for each layer, whether it is local.

    Returns:
        The cache, with the new rows.

    Raises:
        ValueError: where prompts are shared, which have no rows to be replaced, where one is int8 and the other is not,
            or if the rows have more columns than the cache.
    """
    if isinstance(cache, SharedCache) or isinstance(rows, SharedCache):
        raise ValueError("a cache with shared prompts takes no rows and gives none; use init_cache and insert without")
    if _in_pages(rows):
        raise ValueError("rows are prefilled in a cache of their own columns; make it with init_cache without pages")
    _check_alike(cache, rows)

    def inserted(cache: Any, rows: KVCache) -> Any:
        if isinstance(cache, PagedCache):
            return insert_pages(cache, rows, source, slots)
        return insert_rows(cache, rows, source, slots, axes=_axes(cache))

    if not isinstance(cache, WindowedCache):
        return inserted(cache, rows)  # type: ignore[arg-type]
    if isinstance(rows, KVCache):  # so few columns that none is out of reach
        rows = _windowed(rows, cache.near.positions.shape[1], local_layers)
    return WindowedCache(inserted(cache.whole, rows.whole), inserted(cache.near, rows.near))  # type: ignore[arg-type]


def release(cache: Cache, rows: Array) -> Cache:
    """Rows that have ended give their pages back; a cache without pages stays as it is.

    Args:
        cache: of a decoder.
        rows: `[B]` bool, those that have ended.

    Returns:
        The cache, whose free pages the next `decode` or `insert` may give to other rows.

    Example:
        >>> from jaxrl_post import models
        >>> policy = models.decoder(vocab_size=8, width=8, layers=1, heads=2)
        >>> cache = policy.init_cache(2, 10, pages=2)
        >>> release(cache, jnp.array([True, False])).table.tolist()
        [[-1], [-1]]
    """
    if isinstance(cache, PagedCache):
        return release_pages(cache, rows)
    if isinstance(cache, WindowedCache) and isinstance(cache.whole, PagedCache):
        return cache._replace(whole=release_pages(cache.whole, rows))
    return cache


def share_prompts(cache: Cache, rows: Cache) -> SharedCache:
    """A cache for groups of sequences that leaves their prompts where they are.

    Args:
        cache: empty, a row for each of `B = P * G` sequences, and columns for what each adds to its prompt.
        rows: of the `P` prompts, prefilled.

    Returns:
        A cache for `Policy.decode`; row `p * G + g` goes on with prompt `p`.

    Raises:
        ValueError: if there are not equally many sequences for each prompt, or one is int8 and the other is not.

    Example:
        >>> from jaxrl_post import models
        >>> policy = models.decoder(vocab_size=8, width=8, layers=1, heads=2)
        >>> cache = share_prompts(policy.init_cache(6, 4), policy.init_cache(2, 100))
        >>> cache.prompt.k.shape, cache.own.k.shape
        ((1, 2, 2, 100, 4), (1, 6, 2, 4, 4))

    Reference: Hydragen: High-Throughput LLM Inference with Shared Prefixes, arXiv 2402.05099.
    """
    if isinstance(cache, SharedCache) or isinstance(rows, SharedCache):
        raise ValueError("neither cache may have shared prompts already; make both with init_cache")
    if _in_pages(cache) or _in_pages(rows):
        raise ValueError("shared prompts are not kept in pages; make both caches with init_cache without pages")
    sequences, prompts = len(cache.positions), len(rows.positions)
    if sequences % prompts:
        raise ValueError(f"{sequences} sequences are not equally many for each of {prompts} prompts")
    _check_alike(cache, rows)
    return SharedCache(rows, cache)  # type: ignore[arg-type]


def _windowed(rows: KVCache, columns: int, local_layers: Sequence[bool]) -> WindowedCache:
    """Rows of all layers, with the last tokens of local ones in the columns of their positions."""
    near, whole = _numbers(local_layers)
    parts = {name: getattr(rows, name) for name in _axes(rows) if name != "positions"}
    ring = KVCache(
        positions=jnp.full((len(rows.positions), columns), -1, jnp.int32),
        index=rows.index,
        **{name: jnp.zeros((len(near), *x.shape[1:3], columns, *x.shape[4:]), x.dtype) for name, x in parts.items()},
    )
    ring = _write_by_position(ring, {name: x[near] for name, x in parts.items()}, rows.positions)
    return WindowedCache(rows._replace(**{name: x[whole] for name, x in parts.items()}), ring)


def _axes(cache: KVCache) -> dict[str, tuple[int, int]]:
    """Of each array the axis of rows and that of columns."""
    scales = {} if cache.k_scale is None else {"k_scale": (1, 3), "v_scale": (1, 3)}
    return {"k": (1, 3), "v": (1, 3), "positions": (0, 1), **scales}


def _in_pages(cache: Cache) -> bool:
    return isinstance(cache.whole if isinstance(cache, WindowedCache) else cache, PagedCache)


def _check_alike(cache: KVCache | PagedCache | WindowedCache, rows: KVCache | PagedCache | WindowedCache) -> None:
    a, b = ((x.whole if isinstance(x, WindowedCache) else x).k.dtype for x in (cache, rows))
    if (a == jnp.int8) != (b == jnp.int8):
        raise ValueError(f"a cache of {a.name} takes no rows of {b.name}; give init_cache the same dtype for both")

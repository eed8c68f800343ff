"""The key-value cache of the decoder, and attention that reads of it what is in use.

The layers' scan does not carry the cache: each layer attends to what stands in it and to its own new tokens, and the
new keys and values of all layers are written at once, afterwards. So nothing copies the cache, and it is read once.
What a model's cache is put together from is in `cache_kinds`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxrl_post.kernels.attention.xla import MASKED_SCORE
from jaxrl_post.kernels.platform import current_device
from jaxrl_post.mesh import LogicalAxes, constrain, spread
from jaxrl_post.types import Array

if TYPE_CHECKING:
    from jaxrl_post.models.paged_cache import PagedCache

CACHE_AXES: LogicalAxes = ("layers", "batch", "kv_heads", "cache_length", "head_dim")

BLOCKS = {"cpu": 32, "other": 256}
"""Columns that are read at a time: what a step costs grows with the columns in use, not with the capacity.

An accelerator has more to do for each block than to read it.
"""


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far: `2 * layers * kv_heads * head_dim` numbers for each column of a row.

    In int8 each token's key and value have a scale for each layer and head: they stand for `scale * values`.

    Attributes:
        k: `[layers, B, kv_heads, S, head_dim]`, rotated.
        v: the same shape.
        positions: `[B, S]` int32, position of the token in each column, -1 where it is empty or holds padding.
        index: int32 scalar, number of columns written so far, the same for all rows; they are written round and round.
        k_scale: `[layers, B, kv_heads, S]` bfloat16 if `k` is int8, else None.
        v_scale: the same of `v`.
    """

    k: Array
    v: Array
    positions: Array
    index: Array
    k_scale: Array | None = None
    v_scale: Array | None = None


class Reach(NamedTuple):
    """Which columns new tokens attend to.

    Attributes:
        positions: `[B, S]` int32, of what stands in the cache.
        first: int32 scalar, the first block with a column that is seen.
        count: int32 scalar, number of blocks from there to the last, round the end.
    """

    positions: Array
    first: Array
    count: Array


class Read(NamedTuple):
    """A part of what a layer attends to.

    Attributes:
        cache: without the new tokens. Where it has fewer rows than there are queries, each of its rows belongs to as
            many of theirs, one after the other.
        layer: int32 scalar, which of the cache's layers.
        where: from `reach` or `reach_unordered`.
        table: `[B, blocks]` int32 of a `PagedCache`; None where a row's columns are its own.
    """

    cache: KVCache | PagedCache
    layer: Array
    where: Reach
    table: Array | None = None


def empty_cache(layers: int, batch: int, capacity: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> KVCache:
    """A cache without a token.

    Raises:
        ValueError: for a dtype that is neither a float type nor int8.

    Example:
        >>> empty_cache(2, 3, 8, 1, 4, jnp.float32).k.shape
        (2, 3, 1, 8, 4)
        >>> empty_cache(2, 3, 8, 1, 4, jnp.int8).k_scale.shape
        (2, 3, 1, 8)
    """
    dtype = jnp.dtype(dtype)
    if dtype != jnp.int8 and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"the cache's dtype must be a float type or int8, got {dtype.name}")
    shape = (layers, batch, kv_heads, capacity, head_dim)
    k, v = (constrain(jnp.zeros(shape, dtype), CACHE_AXES) for _ in range(2))
    cache = KVCache(k, v, jnp.full((batch, capacity), -1, jnp.int32), jnp.zeros((), jnp.int32))
    if dtype != jnp.int8:
        return cache
    k, v = (constrain(jnp.zeros(shape[:-1], jnp.bfloat16), CACHE_AXES[:-1]) for _ in range(2))
    return cache._replace(k_scale=k, v_scale=v)


def quantize_heads(x: Array) -> tuple[Array, Array]:
    r"""Vectors in int8: $q = \mathrm{round}(x / s)$ with $s = \max|x| / 127$.

    The scale is rounded before it is divided by, so that no element is off by more than `s / 2`.

    Args:
        x: `[..., head_dim]`, float.

    Returns:
        `q`, int8 of the same shape, and `s` `[...]`, bfloat16, 0 for zeros; `q * s` is `x` again, rounded.

    Example:
        >>> q, scale = quantize_heads(jnp.array([[127.0, -63.4, 1.0], [0.0, 0.0, 0.0]]))
        >>> q.tolist(), scale.tolist()
        ([[127, -63, 1], [0, 0, 0]], [1.0, 0.0])
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = (jnp.max(jnp.abs(x), axis=-1) / 127).astype(jnp.bfloat16)
    step = jnp.where(scale == 0, 1, scale).astype(x.dtype)[..., None]
    return jnp.clip(jnp.round(x / step), -127, 127).astype(jnp.int8), scale


def arrays(cache: KVCache | PagedCache, k: Array, v: Array) -> dict[str, Array]:
    """New keys and values by the names of the cache's arrays, as these hold them."""
    if cache.k_scale is None:
        return {"k": k, "v": v}
    (k, k_scale), (v, v_scale) = quantize_heads(k), quantize_heads(v)
    return {"k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale}


def write(cache: KVCache, k: Array, v: Array, positions: Array) -> KVCache:
    """The next `T` columns of all rows, written in place where the cache is donated or a loop's.

    Args:
        cache: of capacity `S`.
        k: `[layers, B, T, kv_heads, head_dim]`, as the layers make it.
        v: the same shape.
        positions: `[B, T]` int32.
    """
    column = cache.index % cache.positions.shape[1]

    def put(old: Array, new: Array) -> Array:
        new = jnp.swapaxes(new, 2, 3).astype(old.dtype)
        return in_order(jax.lax.dynamic_update_slice_in_dim(old, new, column, axis=3))

    positions = jax.lax.dynamic_update_slice_in_dim(cache.positions, positions.astype(jnp.int32), column, axis=1)
    written = {name: put(getattr(cache, name), new) for name, new in arrays(cache, k, v).items()}
    return cache._replace(positions=positions, index=cache.index + k.shape[2], **written)


def in_order(x: Array) -> Array:
    """An array of a cache, laid out and spread over the mesh as what reads it wants it."""
    # Columns before heads would suit the write: a TPU's compiler then turns the whole cache over for each token, as
    # what reads it wants it the other way. Elsewhere nobody does, and a program with a constraint may return its other
    # results in an order of axes that JAX does not know of (0.10, on a CPU).
    if current_device().platform == "tpu":
        x = with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    return constrain(x, CACHE_AXES[: x.ndim])


def reach(cache: KVCache, query: Array, window: int | None) -> Reach:
    """What the next tokens see of a cache, with their positions `[B, T]`.

    Columns that they are going to be written to count as empty.
    """
    size = cache.positions.shape[1]
    columns = jnp.arange(size, dtype=jnp.int32)
    written = (columns - cache.index) % size >= query.shape[1]
    positions = jnp.where(written, cache.positions, -1)
    seen = _seen(positions, query, window)
    newest = (cache.index - 1) % size
    age = jnp.max(jnp.where(seen, (newest - columns) % size, -1))
    blocks, width = block_sizes(size)
    first, last = (newest - age) % size // width, newest // width
    round_the_end = age > newest
    count = jnp.where(age < 0, 0, jnp.where(round_the_end, blocks, 0) + last - first + 1)
    return Reach(positions, first, jnp.minimum(count, blocks))


def reach_unordered(positions: Array, query: Array, window: int | None) -> Reach:
    """What tokens see of columns in which newer ones need not stand behind older ones, and of those all count.

    Args:
        positions: `[B, S]` int32, of what stands in the columns.
        query: `[B, T]` int32, positions of the tokens.
        window: a token sees none that is so many positions or more before it; None for all.
    """
    columns = jnp.arange(positions.shape[1], dtype=jnp.int32)
    seen = _seen(positions, query, window)
    _, width = block_sizes(positions.shape[1])
    first = jnp.min(jnp.where(seen, columns, positions.shape[1])) // width
    last = jnp.max(jnp.where(seen, columns, -1))
    return Reach(positions, first, jnp.where(last < 0, 0, last // width - first + 1))


def _seen(positions: Array, query: Array, window: int | None) -> Array:
    """`[B, S]` bool: whether a column may be seen by one of the row's tokens, none of which is before it."""
    lowest = jnp.min(jnp.where(query < 0, jnp.iinfo(jnp.int32).max, query), axis=1, keepdims=True)
    seen = (positions >= 0) & (jnp.max(query, axis=1, keepdims=True) >= 0)
    if window is not None:
        seen &= positions > lowest - window
    return seen


def block_sizes(size: int) -> tuple[int, int]:
    """How many blocks a cache of so many columns is read in, and their columns."""
    width = min(BLOCKS.get(current_device().platform, BLOCKS["other"]), size)
    return -(-size // width), width


def attend_cached(
    query: Array,
    key: Array,
    value: Array,
    positions: Array,
    reads: Sequence[Read],
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Array:
    """`kernels.attention` of new tokens to parts of a layer's cache and to themselves, by positions.

    The softmax is taken over one block of columns after the other, with its maximum and sum so far. Which columns a
    token stands in says nothing: it is found by its position. What an int8 cache holds is not widened as a whole:
    scores are multiplied by the keys' scales, and weights by the values'.

    With `e = max|scale| max|query|_1 max(k_scale) / 2`, which bounds the error of a score, attention to an int8 cache
    is off by at most `max(v_scale) / 2 + (exp(2 e) - 1) max|value|` in each element.

    Args:
        query: `[B, T, H, K]`.
        key: `[B, T, kv_heads, K]`, of the new tokens.
        value: the same shape.
        positions: `[B, T]` int32, of the new tokens.
        reads: what they attend to beside themselves.
        window: a token sees none that is so many positions or more before it; None for all.
        scale: None for `1 / sqrt(K)`.
        softcap: scores become `softcap * tanh(scores / softcap)`.

    Returns:
        `[B, T, H, K]`.

    Reference: Online normalizer calculation for softmax, arXiv 1805.02867.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    # As the product of matrices that it is, for each row and key-value head: [B, kv_heads, (H / kv_heads) T, K].
    q = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, -1, head_dim)
    places = jnp.tile(positions, (1, heads // kv_heads))[:, None, :, None]

    def scores(q: Array, places: Array, keys: Array, key_places: Array, scales: Array | None = None) -> Array:
        keys = keys.astype(q.dtype).swapaxes(2, 3)
        if current_device().platform == "cpu":
            # The product with keys that lie the other way is a tenth as fast there: they are turned first.
            keys = jax.lax.optimization_barrier(keys)
        z = jnp.einsum("bhqk,bhks->bhqs", q, keys, preferred_element_type=wide)
        if scales is not None:
            z = z * scales[:, :, None].astype(wide)
        z = z / math.sqrt(head_dim) if scale is None else z * scale
        if softcap is not None:
            z = softcap * jnp.tanh(z / softcap)
        other = key_places[:, None, None]
        mask = (other >= 0) & (other <= places)
        if window is not None:
            mask &= other > places - window
        return jnp.where(mask, z, MASKED_SCORE)

    def mix(weights: Array, values: Array, scales: Array | None = None) -> Array:
        if scales is not None:
            weights = weights * scales[:, :, None].astype(wide)
        return jnp.einsum(
            "bhqs,bhsk->bhqk", weights.astype(q.dtype), values.astype(q.dtype), preferred_element_type=wide
        )

    def add(read: Read, q: Array, places: Array, number: Array, state: _Softmax) -> _Softmax:
        """A block of columns to what there is."""
        cache, where = read.cache, read.where
        size = where.positions.shape[1]
        blocks, width = block_sizes(size)
        wanted = (where.first + number) % blocks * width
        begin = jnp.minimum(wanted, size - width)  # the last block has columns of the one before it too

        def block(x: Array) -> Array:
            if read.table is not None:
                page = jax.lax.dynamic_index_in_dim(read.table, wanted // width, axis=1, keepdims=False)
                return _pages(x, read.layer, page)
            shape = (1, *x.shape[1:3], width, *x.shape[4:])
            none = jnp.zeros_like(begin)
            return jax.lax.dynamic_slice(x, (read.layer, none, none, begin, none)[: x.ndim], shape)[0]

        keys, values = block(cache.k), block(cache.v)
        k_scale, v_scale = (None if x is None else block(x) for x in (cache.k_scale, cache.v_scale))
        key_places = jax.lax.dynamic_slice_in_dim(where.positions, begin, width, axis=1)
        if size % width:
            key_places = jnp.where(begin + jnp.arange(width) >= wanted, key_places, -1)
        if read.table is not None:
            # What stood in a page before may be no number, which a weight of 0 would not remove.
            empty = key_places[:, None] < 0
            values = jnp.where(empty[..., None], 0, values)
            v_scale = None if v_scale is None else jnp.where(empty, 0, v_scale)
        z = scores(q, places, keys, key_places, k_scale)
        higher = jnp.maximum(state.highest, jnp.max(z, axis=-1, keepdims=True))
        weights, kept = jnp.exp(z - higher), jnp.exp(state.highest - higher)
        total = state.total * kept + jnp.sum(weights, axis=-1, keepdims=True)
        return _Softmax(higher, total, state.mixed * kept + mix(weights, values, v_scale))

    z = scores(q, places, key.swapaxes(1, 2), positions)
    highest = jnp.max(z, axis=-1, keepdims=True)
    weights = jnp.exp(z - highest)
    state = _Softmax(highest, jnp.sum(weights, axis=-1, keepdims=True), mix(weights, value.swapaxes(1, 2)))
    for read in reads:
        group = batch // len(read.where.positions)
        with_block = functools.partial(add, read, _joined(q, group), _joined(places, group))
        joined = _Softmax(*(_joined(x, group) for x in state))
        joined = _over_blocks(with_block, joined, read.where.count, block_sizes(read.where.positions.shape[1])[0])
        state = _Softmax(*(_parted(x, group) for x in joined))
    out = (state.mixed / state.total).astype(query.dtype)
    out = out.reshape(batch, kv_heads, heads // kv_heads, length, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(query.shape)


def _pages(pool: Array, layer: Array, page: Array) -> Array:
    """`[B, kv_heads, width, ...]`: of a layer the page of each row, which lies on the row's device."""
    over = spread(("batch",), page.shape)[0]
    if not over:
        return pool.at[layer, page].get(mode="clip")
    heads = spread((None, None, "kv_heads"), pool.shape[:3])[2] or None

    def own(pool: Array, layer: Array, page: Array) -> Array:
        return pool.at[layer, page - jax.lax.axis_index(over) * pool.shape[1]].get(mode="clip")

    specs = (PartitionSpec(None, over, heads), PartitionSpec(), PartitionSpec(over))
    return jax.shard_map(own, in_specs=specs, out_specs=PartitionSpec(over, heads), check_vma=False)(pool, layer, page)


class _Softmax(NamedTuple):
    """A softmax over what has been read so far, with the highest score, and the sum and the mean before division."""

    highest: Array
    total: Array
    mixed: Array


def _over_blocks(add: Callable[[Array, _Softmax], _Softmax], state: _Softmax, count: Array, blocks: int) -> _Softmax:
    if blocks == 1:
        return add(jnp.zeros((), jnp.int32), state)
    # The second bound says nothing new, but is a constant: whoever counts a program's rounds can read it.
    return jax.lax.while_loop(
        lambda at: (at[0] < count) & (at[0] < blocks),
        lambda at: (at[0] + 1, add(at[0], at[1])),
        (jnp.zeros((), jnp.int32), state),
    )[1]


def _joined(x: Array, group: int) -> Array:
    """`[P * G, heads, R, ...]` as `[P, heads, G * R, ...]`: the queries of a group beside each other."""
    if group == 1:
        return x
    rows, heads, queries, *rest = x.shape
    x = x.reshape(rows // group, group, heads, queries, *rest).swapaxes(1, 2)
    return x.reshape(rows // group, heads, group * queries, *rest)


def _parted(x: Array, group: int) -> Array:
    """`_joined` undone."""
    if group == 1:
        return x
    rows, heads, queries, *rest = x.shape
    x = x.reshape(rows, heads, group, queries // group, *rest).swapaxes(1, 2)
    return x.reshape(rows * group, heads, queries // group, *rest)

"""The key-value cache of the decoder, and attention that reads of it what is in use.

The layers' scan does not carry the cache: each layer attends to what stands in it and to its own new tokens, and the
new keys and values of all layers are written at once, afterwards. So nothing copies the cache, and it is read once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from jaxrl_post.kernels.attention.xla import MASKED_SCORE
from jaxrl_post.kernels.platform import current_device
from jaxrl_post.mesh import LogicalAxes, constrain
from jaxrl_post.types import Array

CACHE_AXES: LogicalAxes = ("layers", "batch", "kv_heads", "cache_length", "head_dim")
IN_ORDER = Layout(tuple(range(len(CACHE_AXES))))

BLOCKS = {"cpu": 32, "other": 256}
"""Columns that are read at a time: what a step costs grows with the columns in use, not with the capacity.

An accelerator has more to do for each block than to read it.
"""


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far: `2 * layers * kv_heads * head_dim` numbers for each column of a row.

    Attributes:
        k: `[layers, B, kv_heads, S, head_dim]`, rotated.
        v: the same shape.
        positions: `[B, S]` int32, position of the token in each column, -1 where it is empty or holds padding.
        index: int32 scalar, number of columns written so far, the same for all rows; they are written round and round.
    """

    k: Array
    v: Array
    positions: Array
    index: Array


class Reach(NamedTuple):
    """Which columns new tokens attend to.

    Attributes:
        query: `[B, T]` int32, positions of the new tokens.
        positions: `[B, S]` int32, of what stands in the cache.
        window: a token sees none that is so many positions or more before it; None for all.
        first: int32 scalar, the first block with a column that is seen.
        count: int32 scalar, number of blocks from there to the newest column, round the end.
    """

    query: Array
    positions: Array
    window: int | None
    first: Array
    count: Array


def empty_cache(layers: int, batch: int, capacity: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> KVCache:
    """A cache without a token.

    Example:
        >>> empty_cache(2, 3, 8, 1, 4, jnp.float32).k.shape
        (2, 3, 1, 8, 4)
    """
    shape = (layers, batch, kv_heads, capacity, head_dim)
    k, v = (constrain(jnp.zeros(shape, dtype), CACHE_AXES) for _ in range(2))
    return KVCache(k, v, jnp.full((batch, capacity), -1, jnp.int32), jnp.zeros((), jnp.int32))


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
        whole = jax.lax.dynamic_update_slice(old, new, (0, 0, 0, column, 0))
        # Columns before heads would suit the write: a TPU's compiler then turns the whole cache over for each token, as
        # what reads it wants it the other way.
        return constrain(with_layout_constraint(whole, IN_ORDER), CACHE_AXES)

    positions = jax.lax.dynamic_update_slice(cache.positions, positions.astype(jnp.int32), (0, column))
    return KVCache(put(cache.k, k), put(cache.v, v), positions, cache.index + k.shape[2])


def reach(cache: KVCache, query: Array, window: int | None) -> Reach:
    """What the next tokens see of a cache, with their positions `[B, T]`.

    Columns that they are going to be written to count as empty.
    """
    size = cache.positions.shape[1]
    columns = jnp.arange(size, dtype=jnp.int32)
    written = (columns - cache.index) % size >= query.shape[1]
    positions = jnp.where(written, cache.positions, -1)
    lowest = jnp.min(jnp.where(query < 0, jnp.iinfo(jnp.int32).max, query), axis=1, keepdims=True)
    seen = (positions >= 0) & (jnp.max(query, axis=1, keepdims=True) >= 0)
    if window is not None:
        seen &= positions > lowest - window
    newest = (cache.index - 1) % size
    age = jnp.max(jnp.where(seen, (newest - columns) % size, -1))
    blocks, width = _blocks(size)
    first, last = (newest - age) % size // width, newest // width
    round_the_end = age > newest
    count = jnp.where(age < 0, 0, jnp.where(round_the_end, blocks, 0) + last - first + 1)
    return Reach(query, positions, window, first, jnp.minimum(count, blocks))


def _blocks(size: int) -> tuple[int, int]:
    """How many blocks a cache is read in, and their columns."""
    width = min(BLOCKS.get(current_device().platform, BLOCKS["other"]), size)
    return -(-size // width), width


def attend_cached(
    query: Array,
    key: Array,
    value: Array,
    k: Array,
    v: Array,
    layer: Array,
    where: Reach,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Array:
    """`kernels.attention` of new tokens to a layer's cache and to themselves, by positions.

    The softmax is taken over one block of columns after the other, with its maximum and sum so far. Which columns a
    token stands in says nothing: it is found by its position.

    Args:
        query: `[B, T, H, K]`.
        key: `[B, T, kv_heads, K]`, of the new tokens.
        value: the same shape.
        k: `KVCache.k`, without the new tokens.
        v: `KVCache.v`.
        layer: int32 scalar.
        where: from `reach`.
        scale: None for `1 / sqrt(K)`.
        softcap: scores become `softcap * tanh(scores / softcap)`.

    Returns:
        `[B, T, H, K]`.

    Reference: Online normalizer calculation for softmax, arXiv 1805.02867.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads, size = k.shape[2], k.shape[3]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    # As the product of matrices that it is, for each row and key-value head: [B, kv_heads, (H / kv_heads) T, K].
    q = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, -1, head_dim)
    positions = jnp.tile(where.query, (1, heads // kv_heads))[:, None, :, None]

    def scores(keys: Array, key_positions: Array) -> Array:
        z = jnp.einsum("bhqk,bhsk->bhqs", q, keys.astype(q.dtype), preferred_element_type=wide)
        z = z / math.sqrt(head_dim) if scale is None else z * scale
        if softcap is not None:
            z = softcap * jnp.tanh(z / softcap)
        other = key_positions[:, None, None]
        mask = (other >= 0) & (other <= positions)
        if where.window is not None:
            mask &= other > positions - where.window
        return jnp.where(mask, z, MASKED_SCORE)

    def mix(weights: Array, values: Array) -> Array:
        return jnp.einsum(
            "bhqs,bhsk->bhqk", weights.astype(q.dtype), values.astype(q.dtype), preferred_element_type=wide
        )

    z = scores(key.swapaxes(1, 2), where.query)
    highest = jnp.max(z, axis=-1, keepdims=True)
    weights = jnp.exp(z - highest)
    total, mixed = jnp.sum(weights, axis=-1, keepdims=True), mix(weights, value.swapaxes(1, 2))

    blocks, width = _blocks(size)

    def add(number: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, mixed = state
        wanted = (where.first + number) % blocks * width
        begin = jnp.minimum(wanted, size - width)  # the last block has columns of the one before it too
        keys, values = (
            jax.lax.dynamic_slice(x, (layer, 0, 0, begin, 0), (1, batch, kv_heads, width, head_dim))[0] for x in (k, v)
        )
        key_positions = jax.lax.dynamic_slice(where.positions, (0, begin), (batch, width))
        if size % width:
            key_positions = jnp.where(begin + jnp.arange(width) >= wanted, key_positions, -1)
        z = scores(keys, key_positions)
        higher = jnp.maximum(highest, jnp.max(z, axis=-1, keepdims=True))
        weights, kept = jnp.exp(z - higher), jnp.exp(highest - higher)
        total = total * kept + jnp.sum(weights, axis=-1, keepdims=True)
        return higher, total, mixed * kept + mix(weights, values)

    state = (highest, total, mixed)
    if blocks == 1:
        state = add(jnp.zeros((), jnp.int32), state)
    else:
        # The second bound says nothing new, but is a constant: whoever counts a program's rounds can read it.
        _, state = jax.lax.while_loop(
            lambda at: (at[0] < where.count) & (at[0] < blocks),
            lambda at: (at[0] + 1, add(at[0], at[1])),
            (jnp.zeros((), jnp.int32), state),
        )
    out = (state[2] / state[1]).astype(query.dtype)
    out = out.reshape(batch, kv_heads, heads // kv_heads, length, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(query.shape)

"""Splash attention, which JAX ships for TPU, in our layout, for shared prefixes and across a mesh.

Splash is given its mask as an object that it asks, before compiling, which tiles hold anything, and, in the kernel,
what a partly filled tile holds. What comes with the data, segments and padding, goes in as segment ids.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
    splash_attention_mask_info,
)
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_post.kernels.attention.layout import automatic_axes, common_power, length_parts, own_start, placement
from jaxrl_post.types import Array

BLOCKS = (512, 256, 128)


@dataclasses.dataclass(frozen=True)
class SharedPrefixMask(splash_attention_mask.Mask):
    """`[prefix | C_1 | ... | C_G]`: causal, and no completion sees another.

    It derives from the public base of masks. Beyond that base, splash reads two attributes where a mask has both:
    `mask_function`, by which it computes partly filled tiles instead of loading them, and `q_sequence`, what that
    function gets for each query. A splash that did not know them would load the tiles: slower, and as right.

    Attributes:
        length: number of places in the row.
        completion_starts: as in `attention`.
    """

    length: int
    completion_starts: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Queries and keys."""
        return self.length, self.length

    @functools.cached_property
    def q_sequence(self) -> np.ndarray:
        """`[T]` int32: place and start of the own completion, in one number, since a query brings only one."""
        place_bits, unit = (self.length - 1).bit_length(), common_power(self.completion_starts)
        start = own_start(self.length, self.completion_starts) // unit
        return (start << place_bits | np.arange(self.length)).astype(np.int32)

    def mask_function(self, query: Any, key: Any) -> Any:
        """Which of the places `key` the queries of `q_sequence` see."""
        place_bits, unit = (self.length - 1).bit_length(), common_power(self.completion_starts)
        place, start = query & ((1 << place_bits) - 1), (query >> place_bits) * unit
        return (key <= place) & ((key < self.completion_starts[0]) | (key >= start))

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, columns = (np.arange(self.length, dtype=np.int32)[i] for i in index)
        return self.mask_function(self.q_sequence[rows][:, None], columns[None])


@functools.lru_cache(maxsize=16)
def make_mask(
    length: int, completion_starts: tuple[int, ...] | None, window: int | None = None
) -> splash_attention_mask.Mask:
    """The mask of one head; the same object every time, so that what was traced with it is found again."""
    if window is not None:
        return splash_attention_mask.LocalMask((length, length), window_size=(window - 1, 0), offset=0)
    if completion_starts is None:
        return splash_attention_mask.CausalMask((length, length))
    return SharedPrefixMask(length, completion_starts)


def padded_length(length: int, ways: int = 1) -> tuple[int, int]:
    """The length to pad to, so that each of `ways` devices has a whole number of tiles, and the tile to use.

    The largest tile that adds at most an eighth: small tiles leave the matrix unit waiting, large ones compute what
    nobody reads.

    Example:
        >>> padded_length(4000), padded_length(1152), padded_length(300), padded_length(1152, 2)
        ((4096, 512), (1280, 256), (384, 128), (1280, 128))
    """
    for block in BLOCKS:
        padded = -(-length // (block * ways)) * block * ways
        if padded - length <= length // 8:
            return padded, block
    return padded, block


def make_masks(
    length: int, heads: int, completion_starts: tuple[int, ...] | None, window: int | None
) -> splash_attention_mask.MultiHeadMask:
    """The same mask for every head."""
    return splash_attention_mask.MultiHeadMask([make_mask(length, completion_starts, window)] * heads)


def make_kernel(
    length: int,
    block: int,
    heads: int,
    completion_starts: tuple[int, ...] | None,
    window: int | None,
    softcap: float | None,
    interpret: bool,
    ways: int = 1,
) -> splash_attention_kernel.SplashAttentionKernel:
    """Splash for one row of `length` places: `(query[H, T, K], key, value, SegmentIds | None) -> [H, T, K]`.

    With `ways` it has the masks of so many devices, each for its part of the queries and all keys.
    """
    # Not the fused backward pass: it holds the query's gradient once for every tile of keys.
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash_attention_kernel.make_splash_mha(
        make_masks(length, heads, completion_starts, window),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=ways,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )


def computed_tiles(mask: splash_attention_mask.MultiHeadMask, block: int, ways: int = 1) -> int:
    """How many tiles of a head's scores the kernel computes on all devices; it skips those that are masked altogether.

    Example:
        >>> masks = make_masks(1024, 2, None, None)
        >>> computed_tiles(masks, 256), computed_tiles(masks, 256, 2)
        (10, 10)
    """
    # The very call that makes the kernel, whose result is kept.
    options = {"downcast_smem_data": True, "head_shards": 1, "q_seq_shards": ways}
    tiles = splash_attention_mask_info.process_mask(mask, (block, block), **options)[0].block_mask
    return mask.shape[1] // block * (mask.shape[2] // block) if tiles is None else int(np.count_nonzero(tiles[0]))


@jax.custom_vjp
def _of_rows(kernel: Any, query: Array, key: Array, value: Array, ids: Any) -> Array:
    return jax.vmap(kernel)(query, key, value, ids)


def _forward(kernel: Any, query: Array, key: Array, value: Array, ids: Any) -> tuple[Array, Any]:
    out, pull = jax.vjp(lambda *given: jax.vmap(kernel)(*given, ids), query, key, value)
    # The kernel writes the log-sum of a query 128 times. Without a barrier XLA keeps them all, float32 and twice the
    # size of the states, until the backward pass takes one of each.
    return jax.lax.optimization_barrier((out, pull))


def _backward(pull: Any, cotangent: Array) -> tuple[None, Array, Array, Array, None]:
    return (None, *pull(cotangent), None)


_of_rows.defvjp(_forward, _backward)


def attention_splash(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array | None = None,
    key_segment_ids: Array | None = None,
    *,
    completion_starts: tuple[int, ...] | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> Array:
    """`attention` in the order of the row; the arguments are those of `attention`.

    Args:
        query: `[B, T, H, K]`, float32 or bfloat16.
        key: `[B, T, kv_heads, K]`.
        value: `[B, T, kv_heads, K]`.
        segment_ids: `[B, T]`.
        key_segment_ids: `[B, T]`.
        completion_starts: as in `attention`.
        window: as in `attention`.
        scale: None for `1 / sqrt(K)`.
        softcap: as in `attention`.
        interpret: whether to interpret the kernel, on a device that is no TPU.

    Returns:
        `[B, T, H, K]`.
    """
    length, heads, head_dim = query.shape[1:]
    # In float32: a factor rounded to bfloat16 would move all scores the same way.
    scaled = query.astype(jnp.float32) * (1 / math.sqrt(head_dim) if scale is None else scale)
    query = scaled.astype(query.dtype)
    axes, where = automatic_axes(), placement(query)
    parts = length_parts(where)
    padded, block = padded_length(length, parts)
    # Where key-value heads are too few to be split like the heads, every device has them all and takes what its own
    # heads read.
    split = (where[2],) if isinstance(where[2], str) else where[2] or ()
    ways, kv_heads = math.prod(axes[name] for name in split), key.shape[2]
    taken = math.lcm(kv_heads, ways) // ways
    options = (heads // ways, completion_starts, window)
    kernel = make_kernel(padded, block, *options, softcap, interpret, parts)
    tiles = computed_tiles(make_masks(padded, *options), block, parts)
    # What is added at the end of a row is later than all that is asked for.
    query, key, value = (jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))) for x in (query, key, value))
    # Padding sees padding, itself at least: a query that saw nothing would get gradients of no scale.
    segment_ids, key_segment_ids = (
        None if x is None else jnp.pad(jnp.maximum(x, -1), ((0, 0), (0, padded - length)), constant_values=-1)
        for x in (segment_ids, key_segment_ids)
    )

    def own_heads(x: Array) -> Array:
        first = jax.lax.axis_index(split) * taken
        heads = (first + jnp.arange(taken)) * kv_heads // (taken * ways)
        return jnp.take(x, heads, axis=2, mode="clip")

    def rows(kernel: Any, query: Array, key: Array, value: Array, segments: Any, key_segments: Any) -> Array:
        if kv_heads % ways:
            key, value = own_heads(key), own_heads(value)
        if parts > 1:
            # Gathered here and not by the compiler, so that gradients are scattered again, not added up whole.
            key, value, key_segments = jax.tree.map(
                lambda x: jax.lax.all_gather(x, where[1], axis=1, tiled=True), (key, value, key_segments)
            )
        query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
        ids = None
        if segments is not None and key_segments is not None:
            ids = splash_attention_kernel.SegmentIds(segments.astype(jnp.int32), key_segments.astype(jnp.int32))
        # Compilers do not see what the kernel skips: whoever counts operations reads it in the name.
        with jax.named_scope(f"attention_tiles_{tiles}_of_{(padded // block) ** 2}"):
            out = _of_rows(kernel, query, key, value, ids)
        return out.swapaxes(1, 2)

    given = (kernel, query, key, value, segment_ids, key_segment_ids)
    if math.prod(axes.values()) == 1:
        return rows(*given)[:, :length]
    # The compiler cannot split a kernel: each device is handed what it holds. Axes that split nothing repeat the work.
    mesh = jax.sharding.get_abstract_mesh()
    masks = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, where[1])))
    kv = PartitionSpec(where[0], where[1], None if kv_heads % ways else where[2], None)
    ids = PartitionSpec(where[0], where[1])
    run = jax.shard_map(
        rows, in_specs=(masks, where, kv, kv, ids, ids), out_specs=where, axis_names=set(axes), check_vma=False
    )
    return run(*given)[:, :length]

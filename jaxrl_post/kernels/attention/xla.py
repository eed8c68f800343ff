"""Attention as plain array operations: any backend, any positions, all scores at once."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxrl_post.kernels.attention.layout import own_start
from jaxrl_post.types import Array

# Finite, so that a query that may see nothing gets a uniform distribution instead of NaN.
MASKED_SCORE = -1e30


def attention_mask(
    query_positions: Array,
    key_positions: Array,
    segment_ids: Array | None = None,
    key_segment_ids: Array | None = None,
    completion_starts: tuple[int, ...] | None = None,
) -> Array:
    """`[B or 1, T, S]` bool: which keys a query sees; the arguments are those of `attention`, positions required.

    Example:
        >>> positions = jnp.array([[0, 1, -1]])
        >>> attention_mask(positions, positions)[0].astype(int).tolist()
        [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    """
    query, key = query_positions[:, :, None], key_positions[:, None, :]
    mask = (key >= 0) & (key <= query)
    if segment_ids is not None and key_segment_ids is not None:
        segment = key_segment_ids[:, None, :]
        mask &= (segment >= 0) & (segment_ids[:, :, None] == segment)
    if completion_starts is not None:
        start = own_start(query_positions.shape[1], completion_starts)[None, :, None]
        mask &= (key < completion_starts[0]) | (key >= start)
    return mask


def attention_xla(
    query: Array, key: Array, value: Array, mask: Array, *, scale: float | None = None, softcap: float | None = None
) -> Array:
    """`softmax(softcap(scale * query key^T)) value` with the scores in float32 or wider.

    Args:
        query: `[B, T, H, K]`; head `h` reads key-value head `h // (H / kv_heads)`.
        key: `[B, S, kv_heads, K]`.
        value: `[B, S, kv_heads, K]`.
        mask: `[B or 1, T, S]` bool. A row without a True gives the mean of the values: finite, and of no meaning.
        scale: None for `1 / sqrt(K)`.
        softcap: scores become `softcap * tanh(scores / softcap)`.

    Returns:
        `[B, T, H, K]`.

    Reference: GQA: Training Generalized Multi-Query Transformer Models, arXiv 2305.13245.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    query = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bthgk,bshk->bhgts", query, key.astype(query.dtype), preferred_element_type=wide)
    scores = scores / math.sqrt(head_dim) if scale is None else scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, None, None], scores, MASKED_SCORE)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    out = jnp.einsum("bhgts,bshk->bthgk", weights, value.astype(query.dtype))
    return out.reshape(batch, length, heads, head_dim)

"""Attention as plain array operations: any backend, any positions, all scores at once."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxrl_post.kernels.attention.layout import own_start
from jaxrl_post.types import Array

# Finite, so that a query that may see nothing gets a uniform distribution instead of NaN.
MASKED_SCORE = -1e30
# Beyond every position and segment.
_FAR = 1 << 30


def attention_mask(
    query_positions: Array,
    key_positions: Array,
    segment_ids: Array | None = None,
    key_segment_ids: Array | None = None,
    completion_starts: tuple[int, ...] | None = None,
    window: int | None = None,
) -> Array:
    """`[B or 1, T, S]` bool: which keys a query sees; the arguments are those of `attention`, positions required.

    Example:
        >>> positions = jnp.array([[0, 1, -1]])
        >>> attention_mask(positions, positions)[0].astype(int).tolist()
        [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    """
    # One comparison of integers: the LLVM of a CPU takes seconds over several joined by "and" where the positions are
    # known when it compiles.
    query, key = (x.astype(jnp.int32) for x in (query_positions[:, :, None], key_positions[:, None, :]))
    excess = jnp.where(key < 0, _FAR, key) - query
    if window is not None:
        excess = jnp.maximum(excess, query - window + 1 - key)
    if segment_ids is not None and key_segment_ids is not None:
        segment, own = key_segment_ids.astype(jnp.int32), segment_ids.astype(jnp.int32)
        segment = jnp.where(segment < 0, _FAR, segment)
        excess = jnp.maximum(excess, jnp.abs(own[:, :, None] - segment[:, None, :]))
    if completion_starts is not None:
        start = own_start(query_positions.shape[1], completion_starts)[None, :, None]
        excess = jnp.maximum(excess, jnp.minimum(key - completion_starts[0] + 1, start - key))
    return excess <= 0


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
    scores = _scores("bthgk,bshk->bhgts", _by_kv_head(query, key), key, mask[:, None, None], scale, softcap)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    return _mix("bhgts,bshk->bthgk", weights, value).reshape(query.shape)


def attention_xla_shared(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array | None = None,
    key_segment_ids: Array | None = None,
    *,
    completion_starts: tuple[int, ...],
    scale: float | None = None,
    softcap: float | None = None,
) -> Array:
    """`attention` over completions of one length, without the scores of one completion for another.

    The prefix attends to itself; all completions attend to the prefix at once and each to itself, under one softmax.
    For a prefix of `N` places and `G` completions of `L` that is `N^2 + G L (N + L)` scores instead of `(N + G L)^2`.

    Args:
        query: `[B, T, H, K]`.
        key: `[B, T, kv_heads, K]`.
        value: `[B, T, kv_heads, K]`.
        segment_ids: `[B, T]`.
        key_segment_ids: `[B, T]`.
        completion_starts: as in `attention`, each as far from the next (the last from the end of the row).
        scale: None for `1 / sqrt(K)`.
        softcap: as in `attention`.

    Returns:
        `[B, T, H, K]`.

    Reference: Prefix Grouper: Efficient GRPO Training through Shared-Prefix Forward, arXiv 2506.05433.
    """
    batch, length, heads, head_dim = query.shape
    first, count = completion_starts[0], len(completion_starts)
    each = (length - first) // count

    def parts(x: Array) -> tuple[Array, Array]:
        return x[:, :first], x[:, first:].reshape(batch, count, each, *x.shape[2:])

    def sees(before: Array, queries: Array | None, keys: Array | None) -> Array:
        if queries is None or keys is None:
            return before
        return before & (keys[..., None, :] >= 0) & (queries[..., :, None] == keys[..., None, :])

    (prefix_query, own_query), (prefix_key, own_key), (prefix_value, own_value) = map(parts, (query, key, value))
    (prefix_ids, own_ids), (prefix_key_ids, own_key_ids) = (
        (None, None) if ids is None else parts(ids) for ids in (segment_ids, key_segment_ids)
    )
    causal = jnp.tril(jnp.ones((1, first, first), bool))
    prefix = attention_xla(
        prefix_query, prefix_key, prefix_value, sees(causal, prefix_ids, prefix_key_ids), scale=scale, softcap=softcap
    )
    grouped = _by_kv_head(own_query, own_key)
    # [B, C, L, N] and [B, C, L, L]
    to_prefix = sees(
        jnp.ones((1, 1, each, first), bool), own_ids, None if prefix_key_ids is None else prefix_key_ids[:, None]
    )
    to_own = sees(jnp.tril(jnp.ones((1, 1, each, each), bool)), own_ids, own_key_ids)
    scores = [
        _scores("bcthgk,bshk->bhgcts", grouped, prefix_key, to_prefix[:, None, None], scale, softcap),
        _scores("bcthgk,bcshk->bhgcts", grouped, own_key, to_own[:, None, None], scale, softcap),
    ]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(query.dtype)
    own = _mix("bhgcts,bshk->bcthgk", weights[..., :first], prefix_value)
    own += _mix("bhgcts,bcshk->bcthgk", weights[..., first:], own_value)
    return jnp.concatenate([prefix, own.reshape(batch, count * each, heads, head_dim)], axis=1)


def _by_kv_head(query: Array, key: Array) -> Array:
    """`[..., H, K]` as `[..., kv_heads, H / kv_heads, K]`."""
    *leading, heads, head_dim = query.shape
    return query.reshape(*leading, key.shape[-2], heads // key.shape[-2], head_dim)


def _scores(pattern: str, query: Array, key: Array, mask: Array, scale: float | None, softcap: float | None) -> Array:
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum(pattern, query, key.astype(query.dtype), preferred_element_type=wide)
    scores = scores / math.sqrt(query.shape[-1]) if scale is None else scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return jnp.where(mask, scores, MASKED_SCORE)


def _mix(pattern: str, weights: Array, value: Array) -> Array:
    return jnp.einsum(pattern, weights, value.astype(weights.dtype))

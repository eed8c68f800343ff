"""The public function, which picks an implementation or takes the one it is told."""

from __future__ import annotations

import itertools
import logging

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from jaxrl_post.kernels.attention.layout import (
    MAX_COMPLETION_BITS,
    are_even,
    common_power,
    completion_bits,
    length_parts,
    placement,
    whole_rows,
)
from jaxrl_post.kernels.attention.xla import attention_mask, attention_xla, attention_xla_shared
from jaxrl_post.kernels.platform import current_device
from jaxrl_post.types import Array

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("xla", "splash")

# The smallest tile of splash. A shorter sequence would be padded to it, and has no tile to skip.
MIN_SPLASH_LENGTH = 128


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    query_positions: Array | None = None,
    key_positions: Array | None = None,
    segment_ids: Array | None = None,
    key_segment_ids: Array | None = None,
    completion_starts: tuple[int, ...] | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> Array:
    """Causal attention with grouped heads, over packed, padded, cached or prefix-sharing sequences.

    `softmax(softcap(scale * query key^T)) value`, the softmax in float32 or wider, over the keys that a query sees:
    those not later than itself, of its own segment, that are not padding. "Later" is a matter of the places in the row,
    unless positions are given: then it is a matter of positions, and queries and keys may be different tokens.

    Rows may share a prefix: with `completion_starts = (s_1, ..., s_G)` a row is laid out `[prefix | C_1 | ... | C_G]`,
    completion `i` from `s_i` on, and a completion sees the prefix and itself but no other completion. Its tokens then
    get what they would get in a row of their own, if their rotary positions go on from the real length of the prefix
    in each of them. Prefix and completions that are shorter than their room are filled up with padding. Where all rooms
    of completions are alike, `"xla"` too forms no scores between completions.

    `"splash"` is the attention kernel that JAX ships for TPU: no array of queries by keys, forward or backward, and
    tiles that nothing is seen in are skipped. It scales the query and rounds it to its dtype, where `"xla"` scales the
    scores. Across the devices of the ambient mesh (`jax.set_mesh`) it runs on the rows and the heads that each holds.

    Args:
        query: `[B, T, H, K]`; head `h` reads key-value head `h // (H / kv_heads)`.
        key: `[B, S, kv_heads, K]`, `kv_heads` a divisor of `H`.
        value: `[B, S, kv_heads, K]`.
        query_positions: `[B, T]` int; together with `key_positions`. Without them `S = T`.
        key_positions: `[B, S]` int, negative for padding and empty slots of a cache.
        segment_ids: `[B, T]` int, the sequence that each query belongs to; negative for padding.
        key_segment_ids: `[B, S]` int; None for those of the queries.
        completion_starts: where each completion starts, increasing; what precedes the first is the shared prefix.
        window: a query sees no key that is this many places (or positions) or more before it; None for all. Not with
            `completion_starts`, where places do not tell how far apart tokens are.
        scale: None for `1 / sqrt(K)`.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        implementation: `"xla"`: everything, anywhere. `"splash"`: no positions, for TPU; on a CPU it is interpreted,
            which is right and very slow. None: splash on a TPU where it can do the call and `T` fills a tile of every
            device that it is split over.

    Returns:
        `[B, T, H, K]` in the query's dtype. At padding it is finite, and of no meaning.

    Raises:
        ValueError: for shapes that do not fit, half of the positions, completion starts that do not increase within
            the row, an unknown implementation, or one that cannot do the call.

    Example:
        >>> query = key = jnp.zeros((1, 3, 2, 4))
        >>> value = jnp.broadcast_to(jnp.array([1.0, 3.0, 8.0])[None, :, None, None], key.shape)
        >>> attention(query, key, value)[0, :, 0, 0].tolist()
        [1.0, 2.0, 4.0]
        >>> attention(query, key, value, segment_ids=jnp.array([[0, 1, 1]]))[0, :, 0, 0].tolist()
        [1.0, 3.0, 5.5]

    Reference: GQA: Training Generalized Multi-Query Transformer Models, arXiv 2305.13245.
    """
    _check_shapes(query, key, value, query_positions, key_positions, segment_ids, key_segment_ids)
    if completion_starts is not None:
        completion_starts = tuple(map(int, completion_starts))
        _check_starts(completion_starts, query.shape[1], query_positions is not None)
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, or None for no cap, got {softcap}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, a query sees itself, or None for no window, got {window}")
    if window is not None and completion_starts is not None:
        raise ValueError("window and completion_starts cannot be combined: give completions rows of their own")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"unknown implementation {implementation!r}; there are {list(IMPLEMENTATIONS)}")

    key, value = key.astype(query.dtype), value.astype(query.dtype)
    if segment_ids is not None and key_segment_ids is None:
        key_segment_ids = segment_ids
    obstacle = _splash_obstacle(query, query_positions is not None, completion_starts)
    if implementation is None:
        long_enough = query.shape[1] >= MIN_SPLASH_LENGTH * length_parts(placement(query))
        suits = obstacle is None and long_enough and current_device().platform == "tpu"
        implementation = "splash" if suits else "xla"
        logger.debug("attention: %s for query %s, key %s", implementation, query.shape, key.shape)
    elif implementation == "splash" and obstacle is not None:
        raise ValueError(f"splash attention {obstacle}; implementation='xla' or None can")

    if implementation == "splash":
        from jaxrl_post.kernels.attention.splash import attention_splash

        return attention_splash(
            query,
            key,
            value,
            segment_ids,
            key_segment_ids,
            completion_starts=completion_starts,
            window=window,
            scale=scale,
            softcap=softcap,
            interpret=current_device().platform == "cpu",
        )
    length, where = query.shape[1], placement(query)
    # Where places are split over the mesh, each device has the scores of its own queries alone.
    key, value = whole_rows(key, where), whole_rows(value, where)
    if completion_starts is not None and where[1] is None and are_even(length, completion_starts):
        return attention_xla_shared(
            query,
            key,
            value,
            segment_ids,
            key_segment_ids,
            completion_starts=completion_starts,
            scale=scale,
            softcap=softcap,
        )
    slots = jnp.arange(length, dtype=jnp.int32)[None]
    mask = attention_mask(
        slots if query_positions is None else query_positions,
        slots if key_positions is None else key_positions,
        segment_ids,
        key_segment_ids,
        completion_starts,
        window,
    )
    return attention_xla(query, key, value, mask, scale=scale, softcap=softcap)


def _check_shapes(
    query: Array,
    key: Array,
    value: Array,
    query_positions: Array | None,
    key_positions: Array | None,
    segment_ids: Array | None,
    key_segment_ids: Array | None,
) -> None:
    if query.ndim != 4 or key.ndim != 4 or key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        raise ValueError(
            f"query must be [B, T, H, K] and key [B, S, kv_heads, K], got shapes {query.shape} and {key.shape}"
        )
    if value.shape != key.shape:
        raise ValueError(f"value must have the shape of key {key.shape}, got {value.shape}")
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"key-value heads must divide heads, got {query.shape[2]} heads and {key.shape[2]} of key")
    batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
    if (query_positions is None) != (key_positions is None):
        raise ValueError("query_positions and key_positions come together or not at all")
    if query_positions is None and queries != keys:
        raise ValueError(
            f"without positions queries and keys are the same tokens, got {queries} queries and {keys} keys; "
            "give query_positions and key_positions"
        )
    if segment_ids is None and key_segment_ids is not None:
        raise ValueError("key_segment_ids needs segment_ids, those of the queries")
    if segment_ids is not None and key_segment_ids is None and queries != keys:
        raise ValueError(f"{queries} queries and {keys} keys need key_segment_ids beside segment_ids")
    for name, array, shape in (
        ("query_positions", query_positions, (batch, queries)),
        ("key_positions", key_positions, (batch, keys)),
        ("segment_ids", segment_ids, (batch, queries)),
        ("key_segment_ids", key_segment_ids, (batch, keys)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} must be [{shape[0]}, {shape[1]}] like its tokens, got shape {array.shape}")


def _check_starts(starts: tuple[int, ...], length: int, has_positions: bool) -> None:
    if has_positions:
        raise ValueError("completion_starts speaks of places in the row and cannot be combined with positions")
    bounds = (0, *starts, length)
    if not starts or any(a >= b for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"completion_starts must increase within (0, T) = (0, {length}), got {starts}")


def _splash_obstacle(query: Array, has_positions: bool, starts: tuple[int, ...] | None) -> str | None:
    """Why splash cannot do a call, as the end of a sentence; None if it can."""
    length = query.shape[1]
    if has_positions:
        return "orders tokens by their place in the row and takes no positions"
    if query.dtype not in (jnp.float32, jnp.bfloat16):
        return f"computes in float32 and bfloat16, not in {query.dtype}"
    if (platform := current_device().platform) not in ("tpu", "cpu"):
        return f"runs on TPU, and interpreted on CPU, not on {platform}"
    if starts is not None and completion_bits(length, starts) > MAX_COMPLETION_BITS:
        return (
            f"holds a place and the start of its completion in {MAX_COMPLETION_BITS} bits: {length} places and starts "
            f"that are multiples of {common_power(starts)} need {completion_bits(length, starts)}; make the starts "
            "multiples of a larger power of two"
        )
    mesh = jax.sharding.get_abstract_mesh()
    kinds = () if mesh.empty else zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    if explicit := [name for name, size, kind in kinds if kind == AxisType.Explicit and size > 1]:
        return f"needs automatic or manual mesh axes, and {explicit} are explicit"
    return None

"""A cache for models that have none: it keeps tokens and positions and runs the whole model again at every step.

Right for any causal model and slow: the work of a completion grows with the square of its length. A model that is to
generate more than a few tokens should bring its own cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_post.mesh import constrain
from jaxrl_post.types import Array, Params


class RecomputeCache(NamedTuple):
    """What has been seen so far.

    Attributes:
        tokens: `[B, S]` int32.
        positions: `[B, S]` int32, -1 where the slot is empty or holds padding.
        index: int32 scalar, number of slots written so far, the same for all rows.
    """

    tokens: Array
    positions: Array
    index: Array


CacheFunctions = tuple[Callable[..., Any], Callable[..., tuple[Array, Any]], Callable[..., tuple[Array, Any]]]


def recompute_cache(hidden: Callable[..., tuple[Array, dict[str, Array]]]) -> CacheFunctions:
    """`init_cache`, `prefill` and `decode` of a `Policy` that knows only `hidden`.

    The valid tokens of each row are moved to its left before the model runs, so that the model sees one contiguous
    sequence with padding after it; a causal model gives every token the state that it would have alone.

    Args:
        hidden: `Policy.hidden` of a causal model.

    Returns:
        The three functions, with a `RecomputeCache`. Slots beyond the capacity overwrite the last ones.

    Example:
        >>> init_cache, prefill, decode = recompute_cache(lambda params, tokens, positions: (tokens[..., None], {}))
        >>> cache = init_cache(1, 4)
        >>> _, cache = prefill(None, jnp.array([[7, 0]]), jnp.array([[0, -1]]), cache)
        >>> state, cache = decode(None, jnp.array([[5]]), jnp.array([[1]]), cache)
        >>> state.tolist()
        [[[5]]]
    """

    def init_cache(batch: int, capacity: int, dtype: Any = None) -> RecomputeCache:
        if dtype is not None:
            raise ValueError(f"a cache of token ids has no other dtype, got {dtype}; leave cache_dtype out")
        tokens = constrain(jnp.zeros((batch, capacity), jnp.int32), ("batch", "cache_length"))
        return RecomputeCache(tokens, jnp.full_like(tokens, -1), jnp.zeros((), jnp.int32))

    def states(params: Params, tokens: Array, positions: Array) -> tuple[Array, Array]:
        """The states of all valid tokens, moved to the left, and where the token of each slot went."""
        batch, length = tokens.shape
        positions = jnp.asarray(positions, jnp.int32)
        valid = positions >= 0
        rank = jnp.cumsum(valid, axis=1) - 1
        row = jnp.arange(batch)[:, None]
        target = jnp.where(valid, rank, length)  # padding goes beyond the end and is dropped
        compact = jnp.zeros_like(tokens).at[row, target].set(tokens, mode="drop")
        places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), positions.shape)
        places = places.at[row, target].set(positions, mode="drop")
        return hidden(params, compact, places)[0], jnp.maximum(rank, 0)

    def write(tokens: Array, positions: Array, cache: RecomputeCache) -> RecomputeCache:
        length, capacity = tokens.shape[1], cache.tokens.shape[1]
        if length > capacity:
            raise ValueError(
                f"{length} tokens do not fit a cache of capacity {capacity}; "
                "make it with init_cache(batch, capacity) for prompt and completion together"
            )
        start = (0, cache.index)
        return RecomputeCache(
            jax.lax.dynamic_update_slice(cache.tokens, tokens.astype(jnp.int32), start),
            jax.lax.dynamic_update_slice(cache.positions, positions.astype(jnp.int32), start),
            cache.index + length,
        )

    def prefill(params: Params, tokens: Array, positions: Array, cache: RecomputeCache) -> tuple[Array, RecomputeCache]:
        cache = write(tokens, positions, cache)
        out, rank = states(params, tokens, positions)
        return jnp.take_along_axis(out, rank[:, :, None], axis=1), cache

    def decode(params: Params, tokens: Array, positions: Array, cache: RecomputeCache) -> tuple[Array, RecomputeCache]:
        start = cache.index
        cache = write(tokens, positions, cache)
        out, rank = states(params, cache.tokens, cache.positions)
        new = jax.lax.dynamic_slice_in_dim(rank, start, tokens.shape[1], axis=1)
        return jnp.take_along_axis(out, new[:, :, None], axis=1), cache

    return init_cache, prefill, decode

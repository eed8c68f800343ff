"""Tokens in chunks: how many at a time, and the loop over them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_post.kernels.ambient import vary_alike
from jaxrl_post.kernels.platform import current_device
from jaxrl_post.types import Array, PyTree

CHUNK_BYTES = {"cpu": 32 * 2**20}  # of float32 logits held at once: what stays near a CPU's caches,
# and for accelerators 1024 tokens of a vocabulary of 262144: the unembedding is read and its gradient read and written
# once a chunk, and with fewer tokens a matrix unit waits for that.
CHUNK_BYTES_ACCELERATOR = 2**30
LANES = 128  # of a matrix unit


def rows_per_chunk(num_tokens: int, row_bytes: int, chunk_bytes: int | None = None) -> int:
    """How many tokens at a time: a power of two within `chunk_bytes`, or less if that spreads them evenly.

    Args:
        num_tokens: how many tokens there are.
        row_bytes: bytes of the float32 logits of one token.
        chunk_bytes: bound on a chunk's logits; None for the device's own.

    Example:
        >>> rows_per_chunk(16384, 4 * 151936, 2**30)
        1024
        >>> rows_per_chunk(1100, 4 * 151936, 2**30), rows_per_chunk(7, 4 * 39)
        (640, 7)
    """
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES.get(current_device().platform, CHUNK_BYTES_ACCELERATOR)
    rows = 2 ** int(math.log2(max(1, chunk_bytes // row_bytes)))
    if num_tokens <= rows:
        return num_tokens
    even = math.ceil(num_tokens / math.ceil(num_tokens / rows))
    return min(rows, math.ceil(even / LANES) * LANES) if rows >= LANES else even


def scan_chunks(step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, tokens: PyTree, rows: int) -> tuple[Any, Any]:
    """`jax.lax.scan` of `step` over chunks `[rows, ...]` of arrays `[n, ...]`; the last is filled up with zeros."""
    num_tokens = jax.tree.leaves(tokens)[0].shape[0]
    count = math.ceil(num_tokens / rows)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, count * rows - num_tokens), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(count, rows, *x.shape[1:])

    carry, tokens = vary_alike((carry, tokens))
    carry, found = jax.lax.scan(step, carry, jax.tree.map(cut, tokens))
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_tokens], found)


def shards(axes: tuple[str, ...]) -> int:
    """Into how many parts axes of the ambient mesh split an array."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in axes)

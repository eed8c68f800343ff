"""XLA implementation: a scan over chunks of tokens, with a backward pass that recomputes each chunk's logits.

Never holds more than `chunk * V` logits, forward or backward, and accumulates the unembedding's gradient in float32.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_post.kernels.token_logprob.reference import (
    TokenLogprob,
    stats_of_logits,
    temper,
    token_logprob_reference,
)
from jaxrl_post.types import Array

CHUNK_BYTES = 128 * 2**20  # of float32 logits held at once


def chunk_count(num_tokens: int, vocab_size: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """How many chunks keep a chunk's float32 logits within `chunk_bytes`.

    The tokens of a chunk are a power of two, so that the devices of a mesh share them evenly.

    Example:
        >>> chunk_count(16384, 151936)
        128
        >>> chunk_count(256, 39)
        1
    """
    fitting = max(1, chunk_bytes // (4 * vocab_size))
    return max(1, math.ceil(num_tokens / 2 ** int(math.log2(fitting))))


def _chunks(x: Array, count: int) -> Array:
    # Strided: chunk i holds tokens i, i + count, ... so that a batch split over devices stays where it is.
    return jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)


def _unchunk(x: Array) -> Array:
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def token_logprob_chunked(
    hidden: Array,
    unembedding: Array,
    targets: Array,
    *,
    temperature: Array | float = 1.0,
    softcap: float | None = None,
    bias: Array | None = None,
    outputs: tuple[str, ...] = ("logp",),
    chunks: int | None = None,
) -> TokenLogprob:
    """`token_logprob` over `chunks` chunks of tokens (by default as many as keep a chunk's logits in 128 MiB)."""
    num_tokens = hidden.shape[0]
    count = chunk_count(num_tokens, unembedding.shape[0]) if chunks is None else chunks
    padding = -num_tokens % count
    hidden = jnp.pad(hidden, ((0, padding), (0, 0)))
    targets = jnp.pad(targets, (0, padding))
    bias = jnp.zeros((unembedding.shape[0],), unembedding.dtype) if bias is None else bias
    temperature = jnp.asarray(temperature, jnp.promote_types(hidden.dtype, jnp.float32))
    result: Any = _chunked(hidden, unembedding, bias, temperature, targets, softcap, outputs, count)
    return TokenLogprob(*(None if field is None else field[:num_tokens] for field in result))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _chunked(hidden, unembedding, bias, temperature, targets, softcap, outputs, count) -> Any:
    def body(_, chunk):
        chunk_hidden, chunk_targets = chunk
        return None, token_logprob_reference(
            chunk_hidden,
            unembedding,
            chunk_targets,
            temperature=temperature,
            softcap=softcap,
            bias=bias,
            outputs=outputs,
        )

    _, result = jax.lax.scan(body, None, (_chunks(hidden, count), _chunks(targets, count)))
    return jax.tree.map(_unchunk, result)


def _forward(hidden, unembedding, bias, temperature, targets, softcap, outputs, count):
    result: Any = _chunked(hidden, unembedding, bias, temperature, targets, softcap, outputs, count)
    return result, (hidden, unembedding, bias, temperature, targets)


def _backward(softcap, outputs, count, residuals, cotangents):
    hidden, unembedding, bias, temperature, targets = residuals
    real = tuple(name for name in outputs if name != "argmax")
    wide = jnp.promote_types(jnp.promote_types(hidden.dtype, unembedding.dtype), jnp.float32)
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=wide)

    def body(sums, chunk):
        chunk_hidden, chunk_targets, chunk_cotangents = chunk
        # Differentiated up to the raw logits only: JAX would round each chunk's share of the unembedding's gradient to
        # the unembedding's dtype before it is added up.
        _, pullback = jax.vjp(
            lambda raw, b, t: stats_of_logits(temper(raw, b, t, softcap), chunk_targets, real),
            dot(chunk_hidden, unembedding, (((1,), (1,)), ((), ()))),
            bias.astype(wide),
            temperature,
        )
        d_raw, d_bias, d_temperature = pullback(chunk_cotangents)
        d_hidden = dot(d_raw, unembedding, (((1,), (0,)), ((), ())))
        d_unembedding = dot(d_raw, chunk_hidden, (((0,), (0,)), ((), ())))
        totals = (sums[0] + d_unembedding, sums[1] + d_bias, sums[2] + d_temperature)
        return totals, d_hidden.astype(chunk_hidden.dtype)

    chunked_cotangents = jax.tree.map(lambda c: _chunks(c, count), cotangents._replace(argmax=None))
    sums, d_hidden = jax.lax.scan(
        body,
        (jnp.zeros(unembedding.shape, wide), jnp.zeros(bias.shape, wide), jnp.zeros((), temperature.dtype)),
        (_chunks(hidden, count), _chunks(targets, count), chunked_cotangents),
    )
    d_unembedding, d_bias, d_temperature = sums
    return (
        _unchunk(d_hidden),
        d_unembedding.astype(unembedding.dtype),
        d_bias.astype(bias.dtype),
        d_temperature,
        None,
    )


_chunked.defvjp(_forward, _backward)

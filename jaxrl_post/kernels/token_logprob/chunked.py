"""XLA implementation: a scan over chunks of the vocabulary, with a backward pass that recomputes each chunk's logits.

Never holds more than a chunk of logits, forward or backward. A chunk of the vocabulary meets all tokens before the
next one comes, so that its share of the unembedding's gradient is summed in float32 and written once.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_post.kernels.ambient import vary_alike
from jaxrl_post.kernels.platform import current_device
from jaxrl_post.kernels.token_logprob.reference import matmul, soft_cap
from jaxrl_post.kernels.token_logprob.statistics import LOWEST, Gradients, PerToken, Sums, Wanted, join_two, nothing
from jaxrl_post.types import Array

CHUNK_BYTES = {"cpu": 16 * 2**20}  # of float32 logits held at once: what stays near a CPU's caches,
CHUNK_BYTES_ACCELERATOR = 512 * 2**20  # and what keeps a matrix unit busy
MAX_ROWS = 16384  # more tokens than this go through a chunk of the vocabulary in turn


class Plan(NamedTuple):
    """How the logits are cut: `rows` tokens by `columns` of the vocabulary at a time."""

    rows: int
    columns: int


def plan(num_tokens: int, vocab_size: int, chunk_bytes: int | None = None) -> Plan:
    """Pieces whose float32 logits stay within `chunk_bytes`, as many tokens at a time as there are up to `MAX_ROWS`.

    Example:
        >>> plan(16384, 151936, chunk_bytes=512 * 2**20)
        Plan(rows=16384, columns=8192)
        >>> plan(256, 39)
        Plan(rows=256, columns=39)
    """
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES.get(current_device().platform, CHUNK_BYTES_ACCELERATOR)
    tiles = max(1, math.ceil(num_tokens / MAX_ROWS))
    rows = math.ceil(num_tokens / tiles)
    columns = max(1, chunk_bytes // (4 * max(rows, 1)))
    return Plan(rows, vocab_size if columns >= vocab_size else 2 ** int(math.log2(columns)))


def _tiles(x: Array, rows: int) -> Array:
    count = -(-x.shape[0] // rows) if rows else 1
    x = jnp.pad(x, ((0, count * rows - x.shape[0]), *((0, 0),) * (x.ndim - 1)))
    return x.reshape(count, rows, *x.shape[1:])


def _untile(x: Array, num_tokens: int) -> Array:
    return x.reshape(-1, *x.shape[2:])[:num_tokens]


class _Chunk(NamedTuple):
    weight: Array  # [columns, D]
    bias: Array | None  # [columns]
    index: Array  # [columns], place in the vocabulary
    fresh: Array | None  # [columns] bool: False for a token that the chunk before held already


def _chunks(unembedding: Array, bias: Array | None, columns: int) -> tuple[Array, Any]:
    """Where the chunks start, and a function from a start to the chunk."""
    vocab_size = unembedding.shape[0]
    starts = jnp.arange(0, vocab_size, columns)

    def take(start: Array) -> _Chunk:
        # The last chunk is moved back to be as long as the others.
        first = jnp.minimum(start, vocab_size - columns)
        index = first + jnp.arange(columns)
        return _Chunk(
            jax.lax.dynamic_slice_in_dim(unembedding, first, columns),
            None if bias is None else jax.lax.dynamic_slice_in_dim(bias, first, columns),
            index,
            None if vocab_size % columns == 0 else index >= start,
        )

    return starts, take


def _capped(hidden: Array, chunk: _Chunk, softcap: float | None) -> Array:
    z = matmul(hidden, chunk.weight, ((1,), (1,)))
    if chunk.bias is not None:
        z = z + chunk.bias.astype(z.dtype)
    return soft_cap(z, softcap)


def sums_of_logits(
    z: Array, index: Array, targets: Array, temperature: Array, fields: frozenset[str], fresh: Array | None = None
) -> Sums:
    """`Sums` of capped logits `[N, columns]` of the tokens `index`."""
    is_target = index == targets[:, None]
    left_out = is_target if fresh is None else is_target | ~fresh
    others = jnp.where(left_out, -jnp.inf, z)
    best = jnp.argmax(others, axis=-1) if "best" in fields else None
    top = jnp.maximum(jnp.max(others, axis=-1), LOWEST)
    # Not of `others`: an infinity, though it counts nothing, would be in second derivatives.
    x = jnp.where(left_out, 0.0, (z - top[:, None])) / temperature
    e = jnp.where(left_out, 0.0, jnp.exp(x))

    def over(name: str, value: Any) -> Array | None:
        return jnp.sum(value(), axis=-1, dtype=z.dtype) if name in fields else None

    return Sums(
        top=top,
        total=jnp.sum(e, axis=-1),
        # The chunk that holds a token last would count it twice, but a maximum does not mind.
        target=jnp.max(jnp.where(is_target, z, -jnp.inf), axis=-1),
        weighted=over("weighted", lambda: e * jnp.where(e > 0, x, 0.0)),
        squares=over("squares", lambda: e * e),
        shifted=over("shifted", lambda: x),
        count=over("count", lambda: ~left_out),
        best=None if best is None else index[best].astype(jnp.int32),
    )


def sums(
    hidden: Array,
    unembedding: Array,
    bias: Array | None,
    temperature: Array,
    targets: Array,
    *,
    softcap: float | None,
    fields: frozenset[str],
    keep: bool = False,
    chunk_bytes: int | None = None,
) -> tuple[Sums, None]:
    """`Sums` over the whole of `unembedding`; nothing is kept for the backward pass."""
    del keep
    num_tokens, vocab_size = hidden.shape[0], unembedding.shape[0]
    cut = plan(num_tokens, vocab_size, chunk_bytes)
    starts, take = _chunks(unembedding, bias, cut.columns)

    def one_tile(tile):
        tile_hidden, tile_targets = tile

        def piece(start: Array) -> Sums:
            chunk = take(start)
            z = _capped(tile_hidden, chunk, softcap)
            return sums_of_logits(z, chunk.index, tile_targets, temperature, fields, chunk.fresh)

        start, _ = vary_alike((nothing(tile_targets.shape[0], temperature.dtype, fields), tile_hidden))
        whole, _ = jax.lax.scan(lambda s, start: (join_two(s, piece(start), temperature), None), start, starts)
        return whole

    tiled = jax.lax.map(one_tile, (_tiles(hidden, cut.rows), _tiles(targets, cut.rows)))
    return jax.tree.map(lambda x: _untile(x, num_tokens), tiled), None


def logit_gradient(
    z: Array, index: Array, token: PerToken, temperature: Array, softcap: float | None
) -> tuple[Array, Array]:
    """Gradients `[N, columns]` of the tempered and of the raw logits, from capped logits `z`."""
    x = (z - token.top[:, None]) / temperature
    p = jnp.exp(x - token.log_total[:, None])
    s = jax.tree.map(lambda c: c[:, None], token.slopes)
    factor = s.constant
    if s.linear is not None:
        factor = factor + s.linear * jnp.where(p > 0, x, 0.0)
    if s.square is not None:
        factor = factor + s.square * p
    tempered = p * factor
    if s.uniform is not None:
        tempered = tempered + s.uniform
    if s.at_best is not None and token.best is not None:
        tempered = tempered + jnp.where(index == token.best[:, None], s.at_best, 0.0)
    tempered = jnp.where(index == token.targets[:, None], s.at_target, tempered)
    raw = tempered / temperature
    if softcap is not None:
        raw = raw * (1 - (z / softcap) ** 2)
    return tempered, raw


def gradients(
    hidden: Array,
    unembedding: Array,
    bias: Array | None,
    temperature: Array,
    token: PerToken,
    *,
    softcap: float | None,
    wanted: Wanted,
    kept: None = None,
    chunk_bytes: int | None = None,
) -> Gradients:
    """Gradients of the inputs that are wanted; the temperature's without `top / temperature^2` of logsumexp's share.

    The logits' gradients add up to that cotangent, and to zero for every other output: measured from `top`, a common
    offset costs no digits.
    """
    del kept
    num_tokens, vocab_size = hidden.shape[0], unembedding.shape[0]
    cut = plan(num_tokens, vocab_size, chunk_bytes)
    starts, take = _chunks(unembedding, bias, cut.columns)
    narrow = jnp.promote_types(hidden.dtype, unembedding.dtype)
    wide = jnp.promote_types(narrow, jnp.float32)
    tiles = jax.tree.map(lambda x: _tiles(x, cut.rows), (hidden, token))

    def one_chunk(carry: Any, start: Array) -> Any:
        d_hidden, d_unembedding, d_bias, d_temperature = carry
        chunk = take(start)

        def one_tile(shares: Any, tile: Any) -> Any:
            (tile_hidden, tile_token), tile_d_hidden = tile
            z = _capped(tile_hidden, chunk, softcap)
            tempered, raw = logit_gradient(z, chunk.index, tile_token, temperature, softcap)
            weight_share, bias_share, temperature_share = shares
            # Rounded once to what the matrix unit takes; the sums are float32.
            rounded = raw.astype(narrow)
            if weight_share is not None:
                weight_share = weight_share + matmul(rounded, tile_hidden, ((0,), (0,)))
            if bias_share is not None:
                bias_share = bias_share + jnp.sum(raw, axis=0)
            again = None if chunk.fresh is None else ~chunk.fresh
            if temperature_share is not None:
                share = jnp.where(tempered == 0, 0.0, tempered * (z - tile_token.top[:, None]))
                share = share if again is None else jnp.where(again, 0.0, share)
                temperature_share = temperature_share - jnp.sum(share) / temperature**2
            if tile_d_hidden is not None:
                rounded = rounded if again is None else jnp.where(again, jnp.zeros((), narrow), rounded)
                tile_d_hidden = tile_d_hidden + matmul(rounded, chunk.weight, ((1,), (0,)))
            return (weight_share, bias_share, temperature_share), tile_d_hidden

        no_shares: Any = (
            None if d_unembedding is None else jnp.zeros(chunk.weight.shape, wide),
            None if d_bias is None else jnp.zeros((cut.columns,), wide),
            d_temperature,
        )
        no_shares, _ = vary_alike((no_shares, hidden))
        (weight_share, bias_share, d_temperature), d_hidden = jax.lax.scan(one_tile, no_shares, (tiles, d_hidden))
        if d_unembedding is not None:
            d_unembedding = jax.lax.dynamic_update_slice_in_dim(
                d_unembedding, weight_share.astype(d_unembedding.dtype), chunk.index[0], 0
            )
        if d_bias is not None:
            d_bias = jax.lax.dynamic_update_slice_in_dim(d_bias, bias_share, chunk.index[0], 0)
        return (d_hidden, d_unembedding, d_bias, d_temperature), None

    start: Any = (
        jnp.zeros(tiles[0].shape, wide) if wanted.hidden else None,
        jnp.zeros(unembedding.shape, wanted.unembedding) if wanted.unembedding else None,
        jnp.zeros((vocab_size,), wide) if wanted.bias else None,
        jnp.zeros((), temperature.dtype) if wanted.temperature else None,
    )
    start, _ = vary_alike((start, hidden))
    (d_hidden, *rest), _ = jax.lax.scan(one_chunk, start, starts)
    return Gradients(None if d_hidden is None else _untile(d_hidden, num_tokens), *rest)

"""A forward kernel of the published kind, kept to compare with: matrix product first, softmax statistics after it.

Logsumexp and target logit of every token on a grid (token tiles, vocabulary tiles, width tiles): the logits of a tile
are accumulated in VMEM over the width, and a block of its own then folds them into a running maximum and sum. The
matrix unit waits while that block runs. Forward only; neither temperature nor soft-cap.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tests.kernels.schedule import Work


def _kernel(
    hidden: Array,
    unembedding: Array,
    targets: Array,
    logsumexp: Array,
    target_logit: Array,
    logits: Array,
    maximum: Array,
    total: Array,
    *,
    vocabulary: int,
):
    tile, step = pl.program_id(1), pl.program_id(2)
    last_tile, last_step = pl.num_programs(1) - 1, pl.num_programs(2) - 1
    tile_vocabulary = unembedding.shape[0]

    @pl.when((tile == 0) & (step == 0))
    def _():
        maximum[...] = jnp.full_like(maximum, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        target_logit[...] = jnp.zeros_like(target_logit)

    @pl.when(step == 0)
    def _():
        logits[...] = jnp.zeros_like(logits)

    logits[...] += lax.dot_general(
        hidden[...], unembedding[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )

    def fold(ragged: bool):
        x = logits[...]
        columns = lax.broadcasted_iota(jnp.int32, x.shape, 1)
        if ragged:
            x = jnp.where(columns < vocabulary % tile_vocabulary, x, -jnp.inf)
        chosen = columns == targets[...] - tile * tile_vocabulary
        target_logit[...] += jnp.sum(jnp.where(chosen, x, 0.0), axis=1, keepdims=True)
        new = jnp.maximum(maximum[...], jnp.max(x, axis=1, keepdims=True))
        total[...] = total[...] * jnp.exp(maximum[...] - new) + jnp.sum(jnp.exp(x - new), axis=1, keepdims=True)
        maximum[...] = new

    is_ragged = vocabulary % tile_vocabulary != 0

    @pl.when((step == last_step) & ((tile < last_tile) | (not is_ragged)))
    def _():
        fold(ragged=False)

    if is_ragged:

        @pl.when((step == last_step) & (tile == last_tile))
        def _():
            fold(ragged=True)

    @pl.when((step == last_step) & (tile == last_tile))
    def _():
        logsumexp[...] = maximum[...] + jnp.log(total[...])


def serial_logsumexp(
    hidden: Array,
    unembedding: Array,
    targets: Array,
    *,
    tile_tokens: int = 1024,
    tile_vocabulary: int = 1024,
    tile_width: int | None = None,
    vmem_limit: int | None = 100 << 20,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """Logsumexp over the vocabulary and the logit of the target, `[T]` each.

    Args:
        hidden: `[T, D]`.
        unembedding: `[V, D]`.
        targets: int32 `[T]`.
        tile_tokens: divides T.
        tile_vocabulary: need not divide V.
        tile_width: divides D; None takes all of D.
        vmem_limit: bytes that the kernel may use.
        interpret: as `pallas_call` takes it.
    """
    (tokens, width), vocabulary = hidden.shape, unembedding.shape[0]
    tile_width = tile_width or width
    if tokens % tile_tokens or width % tile_width:
        raise ValueError(f"tiles {tile_tokens} x {tile_width} must divide tokens x width, got {tokens} x {width}")
    row = pl.BlockSpec((tile_tokens, 1), lambda i, j, k: (i, 0))
    column = jax.ShapeDtypeStruct((tokens, 1), jnp.float32)
    logsumexp, target_logit = pl.pallas_call(
        functools.partial(_kernel, vocabulary=vocabulary),
        grid=(tokens // tile_tokens, pl.cdiv(vocabulary, tile_vocabulary), width // tile_width),
        in_specs=[
            pl.BlockSpec((tile_tokens, tile_width), lambda i, j, k: (i, k)),
            pl.BlockSpec((tile_vocabulary, tile_width), lambda i, j, k: (j, k)),
            row,
        ],
        out_specs=[row, row],
        out_shape=[column, column],
        scratch_shapes=[
            pltpu.VMEM((tile_tokens, tile_vocabulary), jnp.float32),
            pltpu.VMEM((tile_tokens, 1), jnp.float32),
            pltpu.VMEM((tile_tokens, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=vmem_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * width * vocabulary,
            transcendentals=tokens * vocabulary,
            bytes_accessed=(vocabulary * (tokens // tile_tokens) + tokens) * width * hidden.dtype.itemsize,
        ),
        interpret=interpret,
        name="serial_logsumexp",
    )(hidden, unembedding, targets[:, None])
    return logsumexp[:, 0], target_logit[:, 0]


def build(tokens: int = 16384, width: int = 4096, vocabulary: int = 151936, dtype: str = "bfloat16", **tiles):
    """For `tests.kernels.schedule`: the function, its arguments and its work."""
    arguments = (
        jax.ShapeDtypeStruct((tokens, width), dtype),
        jax.ShapeDtypeStruct((vocabulary, width), dtype),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    )
    return (
        functools.partial(serial_logsumexp, **tiles),
        arguments,
        Work(flops=2.0 * tokens * width * vocabulary),
    )

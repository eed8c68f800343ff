"""TPU implementation: Mosaic kernels that keep every logit in the chip's vector memory.

Three kernels, each a loop over tiles of tokens and of the vocabulary (bodies in `mosaic`, tile sizes in `tiles`):

* `forward`: `Sums` per token. While the matrix unit works on one slice of logits, the vector unit goes through the
  slice before it. Running maxima and sums are kept per lane, and lanes are joined once, at the end.
* `forward_keeping`: the same sums with one maximum per token, and `sum_v e_v W_v` beside them as flash attention would
  have it: for cotangents of log-prob and logsumexp the states' gradient is a scaling of that row, at no second pass.
* `d_unembedding` and `d_hidden`: logits again, their gradient from `Slopes`, and the product with the other factor. The
  former works on transposed logits, so that what is per token lies along lanes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrl_post.kernels.token_logprob import mosaic
from jaxrl_post.kernels.token_logprob.statistics import LOWEST, Gradients, PerToken, Sums, Wanted
from jaxrl_post.kernels.token_logprob.tiles import LANES, Tiles, chip, choose_tiles, round_up
from jaxrl_post.types import Array


def unsupported(hidden: Any, unembedding: Any, bias: Any) -> str | None:
    """Why the kernels cannot do a call, or None."""
    if hidden.dtype != unembedding.dtype:
        return f"hidden and unembedding must have one dtype, got {hidden.dtype} and {unembedding.dtype}"
    if hidden.dtype not in (jnp.bfloat16, jnp.float32):
        return f"hidden must be bfloat16 or float32, got {hidden.dtype}"
    if hidden.shape[1] % LANES:
        return f"the width must be a multiple of {LANES}, got {hidden.shape[1]}"
    if bias is not None:
        return "a bias is not supported"
    return None


def _compiler_params() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=int(0.99 * chip().vmem))


def _cost(
    products: int, hidden: Array, unembedding: Array, tiles: Tiles, outer: str, out_bytes: int
) -> pl.CostEstimate:
    tokens, width = hidden.shape
    vocab = unembedding.shape[0]
    again = -(-tokens // tiles.tokens), -(-vocab // tiles.vocab)
    read = (tokens + vocab * again[0]) if outer == "tokens" else (vocab + tokens * again[1])
    return pl.CostEstimate(
        flops=2 * products * tokens * vocab * width,
        transcendentals=tokens * vocab,
        bytes_accessed=read * width * hidden.dtype.itemsize + out_bytes,
    )


def _like(x: Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """A result that varies over the mesh axes that `x` varies over, if the caller is per device."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def _padded(x: Array, count: int, axis: int) -> Array:
    if count == x.shape[axis]:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count - x.shape[axis])
    return jnp.pad(x, widths)


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
    tiles: Tiles | None = None,
) -> tuple[Sums, Array | None]:
    """`Sums` over the whole of `unembedding`; with `keep`, `[N, D]` sums of `e_v W_v` (times the soft-cap's slope)."""
    del bias, chunk_bytes
    (num_tokens, width), vocab_size = hidden.shape, unembedding.shape[0]
    kernel = "forward_keeping" if keep else "forward"
    if tiles is None:
        tiles = choose_tiles(kernel, num_tokens, vocab_size, width, hidden.dtype.itemsize, chip())
    padded = round_up(num_tokens, tiles.tokens)
    names = tuple(name for name in mosaic.FIELDS if name in {"top", "total", "target"} | fields)
    per_token = pl.BlockSpec((1, tiles.tokens), lambda t, v: (0, t))
    out_shape = [_like(hidden, (8, padded), jnp.float32)]
    out_specs = [pl.BlockSpec((8, tiles.tokens), lambda t, v: (0, t))]
    if keep:
        out_shape.append(_like(hidden, (padded, width), jnp.float32))
        out_specs.append(pl.BlockSpec((tiles.tokens, width), lambda t, v: (t, 0)))
    found = pl.pallas_call(
        functools.partial(
            mosaic.forward_kernel, tiles=tiles, vocab_size=vocab_size, softcap=softcap, fields=names, keep=keep
        ),
        name=f"token_logprob_{kernel}",
        grid=(padded // tiles.tokens, pl.cdiv(vocab_size, tiles.vocab)),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            per_token,
            pl.BlockSpec((tiles.tokens, width), lambda t, v: (t, 0)),
            pl.BlockSpec((tiles.vocab, width), lambda t, v: (v, 0)),
        ],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[
            pltpu.VMEM((2, tiles.tokens, tiles.slice), jnp.float32),
            pltpu.VMEM((tiles.tokens, width), hidden.dtype),
            pltpu.VMEM((tiles.tokens, LANES), jnp.int32),
            *(pltpu.VMEM((tiles.tokens, LANES), jnp.float32) for _ in names),
        ],
        compiler_params=_compiler_params(),
        cost_estimate=_cost(
            2 if keep else 1, hidden, unembedding, tiles, "tokens", 32 * padded + keep * 4 * padded * width
        ),
    )(
        (mosaic.LOG2_E / temperature).reshape(1, 1),
        _padded(targets.astype(jnp.int32)[None], padded, 1),
        _padded(hidden, padded, 0),
        unembedding,
    )
    rows = {name: found[0][mosaic.FIELDS.index(name), :num_tokens] for name in names}
    rows["target"] = jnp.where(rows["target"] > LOWEST, rows["target"], -jnp.inf)
    for name in ("weighted", "shifted"):  # the kernel leaves the temperature out
        if name in rows:
            rows[name] = rows[name] / temperature
    if "best" in rows:
        rows["best"] = rows["best"].astype(jnp.int32)
    return Sums(**rows), found[1][:num_tokens] if keep else None


def gradients(
    hidden: Array,
    unembedding: Array,
    bias: Array | None,
    temperature: Array,
    token: PerToken,
    *,
    softcap: float | None,
    wanted: Wanted,
    kept: tuple[Array, Array] | None = None,
    chunk_bytes: int | None = None,
) -> Gradients:
    """Gradients of the inputs that are wanted."""
    del bias, chunk_bytes
    d_hidden = d_unembedding = None
    if wanted.hidden and kept is not None and all(s is None for s in token.slopes[2:]):
        d_hidden = _d_hidden_from_kept(unembedding, temperature, token, softcap, *kept)
    elif wanted.hidden:
        d_hidden = _product_with_gradient("d_hidden", hidden, unembedding, temperature, token, softcap, jnp.float32)
    if wanted.unembedding is not None:
        d_unembedding = _product_with_gradient(
            "d_unembedding", hidden, unembedding, temperature, token, softcap, wanted.unembedding
        )
    return Gradients(d_hidden, d_unembedding, None, None)


GATHERED_BYTES = 16 * 2**20


def _d_hidden_from_kept(
    unembedding: Array, temperature: Array, token: PerToken, softcap: float | None, kept: Array, share: Array
) -> Array:
    """`at_target W_target + constant share kept`: two rows a token, scaled."""
    here = (token.targets >= 0) & (token.targets < unembedding.shape[0])
    at_target = jnp.where(here, token.slopes.at_target, 0.0)
    if softcap is not None:
        at_target = at_target * jnp.where(here, 1 - jnp.square(token.target_z / softcap), 0.0)
    rows = jnp.where(here, token.targets, 0)

    def scaled(some: tuple[Array, ...]) -> Array:
        row, at_target, constant, kept = some
        return (at_target * unembedding[row] + constant * kept) / temperature

    # In pieces, or the gathered rows would be one more array of the size of the states.
    piece = 2 ** int(math.log2(GATHERED_BYTES // (4 * unembedding.shape[1])))
    return jax.lax.map(scaled, (rows, at_target, share * token.slopes.constant, kept), batch_size=piece)


def _product_with_gradient(
    kernel: str,
    hidden: Array,
    unembedding: Array,
    temperature: Array,
    token: PerToken,
    softcap: float | None,
    dtype: Any,
    tiles: Tiles | None = None,
) -> Array:
    (num_tokens, width), vocab_size = hidden.shape, unembedding.shape[0]
    if tiles is None:
        tiles = choose_tiles(kernel, num_tokens, vocab_size, width, hidden.dtype.itemsize, chip())
    padded = round_up(num_tokens, tiles.tokens)
    scale, share = 1 / temperature, jnp.exp(-token.log_total)
    s = token.slopes
    rows = {"top": token.top, "constant": s.constant * share * scale, "at_target": s.at_target * scale}
    if s.linear is not None:
        rows["linear"] = s.linear * share * scale * scale
    if s.square is not None:
        rows["square"] = s.square * share * share * scale
    if s.uniform is not None:
        rows["uniform"] = s.uniform * scale
    if s.at_best is not None and token.best is not None:
        rows |= {"at_best": s.at_best * scale, "best": token.best.astype(jnp.float32)}
    stacked = jnp.stack([*rows.values(), *[jnp.zeros_like(token.top)] * (8 - len(rows))])
    of_tokens, of_vocab = (0, 1) if kernel == "d_hidden" else (1, 0)
    counts = (padded // tiles.tokens, pl.cdiv(vocab_size, tiles.vocab))

    def at(axis: int) -> Callable[..., tuple[int, int]]:
        return lambda *step: (step[axis], 0)

    token_spec = lambda count: pl.BlockSpec((count, tiles.tokens), lambda *step: (0, step[of_tokens]))  # noqa: E731
    hidden_spec = pl.BlockSpec((tiles.tokens, width), at(of_tokens))
    weight_spec = pl.BlockSpec((tiles.vocab, width), at(of_vocab))
    settings: dict[str, Any] = {"tiles": tiles, "softcap": softcap, "names": tuple(rows)}
    if kernel == "d_hidden":
        body = functools.partial(mosaic.d_hidden_kernel, vocab_size=vocab_size, **settings)
        out = _like(hidden, (padded, width), dtype)
        scratch = [
            pltpu.VMEM((2, tiles.tokens, tiles.slice), jnp.float32),
            pltpu.VMEM((tiles.tokens, LANES), jnp.int32),
            *(pltpu.VMEM((tiles.tokens, LANES), jnp.float32) for _ in rows),
        ]
    else:
        body = functools.partial(mosaic.d_unembedding_kernel, **settings)
        out = _like(hidden, (vocab_size, width), dtype)
        scratch = [pltpu.VMEM((2, tiles.slice, tiles.tokens), jnp.float32)]
        if dtype != jnp.float32:
            scratch.append(pltpu.VMEM((tiles.vocab, width), jnp.float32))
    found = pl.pallas_call(
        body,
        name=f"token_logprob_{kernel}",
        grid=counts if kernel == "d_hidden" else counts[::-1],
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), token_spec(1), token_spec(8), hidden_spec, weight_spec],
        out_specs=hidden_spec if kernel == "d_hidden" else weight_spec,
        out_shape=out,
        scratch_shapes=scratch,
        compiler_params=_compiler_params(),
        cost_estimate=_cost(
            2,
            hidden,
            unembedding,
            tiles,
            "tokens" if kernel == "d_hidden" else "vocab",
            math.prod(out.shape) * jnp.dtype(dtype).itemsize,
        ),
    )(
        (mosaic.LOG2_E / temperature).reshape(1, 1),
        _padded(token.targets.astype(jnp.int32)[None], padded, 1),
        _padded(stacked, padded, 1),
        _padded(hidden, padded, 0),
        unembedding,
    )
    return found[:num_tokens] if kernel == "d_hidden" else found

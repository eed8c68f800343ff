"""TPU implementation: Mosaic kernels that keep every logit in the chip's vector memory.

Three kernels, each a loop over tiles of tokens and of the vocabulary:

* `_forward`: `Sums` per token. While the matrix unit works on one slice of logits, the vector unit goes through the
  slice before it: both stand in one basic block, so the compiler's scheduler interleaves them. Running maxima and sums
  are kept per lane, and lanes are joined once, at the end.
* `_forward_keeping`: the same sums with one maximum per token, and `sum_v e_v W_v` beside them as flash attention would:
  the gradient of the states for any cotangent of the log-prob is a scaling of that row, at no second pass.
* `_d_unembedding` and `_d_hidden`: logits again, their gradient from `Slopes`, and the product with the other factor.
  The former works on transposed logits, so that what is per token lies along lanes.

The target's column never enters the sums (`statistics`). Temperature and soft-cap are applied to slices in place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrl_post.kernels.platform import current_device
from jaxrl_post.kernels.token_logprob.statistics import LOWEST, Gradients, PerToken, Sums, Wanted
from jaxrl_post.types import Array

LANES = 128
ABSENT = 2 * LOWEST
"""The logit of a column that is not there: its exponential is 0 above any maximum, `LOWEST` itself included."""
LOG2_E = math.log2(math.e)
FIELDS = Sums._fields
SLICE = {"forward": 256, "forward_keeping": 512, "d_hidden": 512, "d_unembedding": 512}


class Tiles(NamedTuple):
    """Tokens and vocabulary rows of a grid step, and vocabulary rows of a slice."""

    tokens: int
    vocab: int
    slice: int


def _product(a: Array, b: Array, contracting: tuple[int, int]) -> Array:
    precision = None if a.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    dimensions = (((contracting[0],), (contracting[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _along_sublanes(row: Array) -> Array:
    """`[1, N]`, one number a token along lanes, to `[N, 128]`, the same in every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _slices(columns: int, width: int) -> list[tuple[int, int]]:
    """Starts and widths, whole lanes each, that cover `columns`."""
    whole = -(-columns // LANES) * LANES
    return [(start, min(width, whole - start)) for start in range(0, whole, width)]


def _forward_kernel(
    scale_ref,  # [1, 1] in SMEM: log2(e) / temperature
    targets_ref,  # [1, tokens]
    hidden_ref,  # [tokens, D]
    weight_ref,  # [vocab, D]
    out_ref,  # [8, tokens]
    *refs,  # if keeping, [tokens, D]; then scratch: slices, states, targets, one [tokens, 128] for each field
    tiles: Tiles,
    vocab_size: int,
    softcap: float | None,
    fields: tuple[str, ...],
    keep: bool,
):
    kept_ref = refs[0] if keep else None
    z_ref, states_ref, target_lanes_ref, *stat_refs = refs[keep:]
    stats = dict(zip(fields, stat_refs, strict=True))
    step, steps = pl.program_id(1), pl.cdiv(vocab_size, tiles.vocab)
    scale = scale_ref[0, 0]
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)

    @pl.when(step == 0)
    def _():
        target_lanes_ref[...] = _along_sublanes(targets_ref[...])
        # Operands arrive in the layout of main memory; every slice would have the states rearranged again.
        states_ref[...] = hidden_ref[...]
        for name, ref in stats.items():
            start = {"top": LOWEST, "target": ABSENT}.get(name, 0)
            ref[...] = jnp.full(ref.shape, start, ref.dtype)
        if keep:
            kept_ref[...] = jnp.zeros(kept_ref.shape, kept_ref.dtype)
        else:  # what the first step finds as "the slice before"
            z_ref[...] = jnp.full(z_ref.shape, ABSENT, z_ref.dtype)

    def make(slot: int, start: int, width: int) -> None:
        z_ref[slot, :, :width] = _product(states_ref[...], weight_ref[start : start + width, :], (1, 1))

    def absorb(slot: int, width: int, first: Array | int, present: int | None = None) -> tuple[Array, list[Array]]:
        """Add a slice of logits, of the tokens from `first`, to the statistics; the weights of its columns."""
        new: dict[str, Array] = {name: ref[...] for name, ref in stats.items()}
        top, running, found = new["top"], new["top"], []
        for start in range(0, width, LANES):
            column = lane + (first + start)
            z = _cap(z_ref[slot, :, start : start + LANES], softcap)
            if softcap is not None and not keep:
                z = jnp.where(column < 0, ABSENT, z)
            if present is not None and start + LANES > present:
                z = jnp.where(lane < present - start, z, ABSENT)
            is_target = target_lanes_ref[...] == column
            new["target"] = jnp.where(is_target, z, new["target"])
            z = jnp.where(is_target, ABSENT, z)
            if "best" in stats:
                new["best"] = jnp.where(z > running, column.astype(jnp.float32), new["best"])
            running = jnp.maximum(running, z)
            found.append(z)
        if keep:
            if "best" in stats:
                # One maximum for all lanes from here on, so one place for it too.
                highest = jnp.max(running, axis=1, keepdims=True)
                place = jnp.where(running == highest, new["best"], jnp.inf)
                new["best"] = jnp.broadcast_to(jnp.min(place, axis=1, keepdims=True), running.shape)
            running = jnp.broadcast_to(jnp.max(running, axis=1, keepdims=True), running.shape)
        moved = top - running
        alpha = jnp.exp2(moved * scale)
        if "weighted" in stats:
            new["weighted"] = alpha * (new["weighted"] + new["total"] * moved)
        if "squares" in stats:
            new["squares"] = alpha * alpha * new["squares"]
        if "shifted" in stats:
            new["shifted"] += new["count"] * moved
        new["top"], new["total"] = running, alpha * new["total"]
        weights = []
        for z in found:
            x = z - running
            e = jnp.exp2(x * scale)
            new["total"] += e
            if "weighted" in stats:
                new["weighted"] += e * x
            if "squares" in stats:
                new["squares"] += e * e
            if "shifted" in stats:
                here = z > LOWEST
                new["shifted"] += jnp.where(here, x, 0.0)
                new["count"] += here.astype(jnp.float32)
            weights.append(e if softcap is None else e * (1 - jnp.square(jnp.maximum(z, -softcap) * (1 / softcap))))
        for name, ref in stats.items():
            ref[...] = new[name]
        return alpha, weights

    def go_through(columns: int) -> None:
        """Make the slices of a tile, absorbing each while the next is made; the last one is left to the next step."""
        cut = _slices(columns, tiles.slice)
        for number, (start, width) in enumerate(cut):
            before = cut[number - 1][1] if number else tiles.slice
            make(number % 2, start, width)
            absorb(1 - number % 2, before, step * tiles.vocab + start - before)

    def go_through_keeping(columns: int) -> None:
        cut = _slices(columns, tiles.slice)
        make(0, *cut[0])
        for number, (start, width) in enumerate(cut):
            present = columns - start if columns < start + width else None
            weight = _present_rows(weight_ref[start : start + width, :], present)
            if number + 1 < len(cut):
                make((number + 1) % 2, *cut[number + 1])
            alpha, weights = absorb(number % 2, width, step * tiles.vocab + start, present)
            narrow = jnp.concatenate([e.astype(weight_ref.dtype) for e in weights], axis=1)
            share = _product(narrow, weight, (1, 0))
            for at in range(0, share.shape[1], LANES):
                here = slice(at, at + LANES)
                kept_ref[:, here] = alpha * kept_ref[:, here] + share[:, here]

    rest = vocab_size - (steps - 1) * tiles.vocab
    work = go_through_keeping if keep else go_through
    if steps > 1:
        pl.when(step < steps - 1)(lambda: work(tiles.vocab))

    @pl.when(step == steps - 1)
    def _():
        work(rest)
        if not keep:
            cut = _slices(rest, tiles.slice)
            start, width = cut[-1]
            absorb((len(cut) - 1) % 2, width, step * tiles.vocab + start, present=rest - start)
        # Lanes are joined after a transposition, by which they become sublanes, and tokens lie along lanes.
        rows = {name: ref[...].T for name, ref in stats.items()}
        top = jnp.max(rows["top"], axis=0, keepdims=True)
        moved = rows["top"] - top
        alpha = jnp.exp2(moved * scale)
        out = {"top": top, "target": jnp.max(rows["target"], axis=0, keepdims=True)}
        joined = {"total": alpha * rows["total"]}
        if "weighted" in rows:
            joined["weighted"] = alpha * (rows["weighted"] + rows["total"] * moved)
        if "squares" in rows:
            joined["squares"] = alpha * alpha * rows["squares"]
        if "shifted" in rows:
            joined |= {"shifted": rows["shifted"] + rows["count"] * moved, "count": rows["count"]}
        out |= {name: jnp.sum(x, axis=0, keepdims=True) for name, x in joined.items()}
        if "best" in rows:
            out["best"] = jnp.min(jnp.where(rows["top"] == top, rows["best"], jnp.inf), axis=0, keepdims=True)
        for name, x in out.items():
            out_ref[FIELDS.index(name) : FIELDS.index(name) + 1, :] = x


def _logit_gradient(
    z: Array, column: Array, target: Array, token: dict[str, Array], scale: Array, softcap: float | None
) -> Array:
    """The gradient of raw logits; `token` holds `top` and the scaled `Slopes`, shaped to broadcast against `z`."""
    z = _cap(z, softcap)
    x = z - token["top"]
    e = jnp.exp2(x * scale)
    factor = token["constant"]
    if "linear" in token:
        factor = factor + token["linear"] * x
    if "square" in token:
        factor = factor + token["square"] * e
    d = e * factor
    if "uniform" in token:
        d = d + token["uniform"]
    if "at_best" in token:
        d = jnp.where(column == token["best"].astype(jnp.int32), d + token["at_best"], d)
    d = jnp.where(column == target, token["at_target"], d)
    return d if softcap is None else d * (1 - jnp.square(z * (1 / softcap)))


def _d_hidden_kernel(
    scale_ref,  # [1, 1] in SMEM
    targets_ref,  # [1, tokens]
    token_ref,  # [8, tokens]
    hidden_ref,  # [tokens, D]
    weight_ref,  # [vocab, D]
    out_ref,  # [tokens, D] float32
    z_ref,  # [2, tokens, slice]
    target_lanes_ref,  # [tokens, 128]
    *token_lanes_refs,  # [tokens, 128] for each name
    tiles: Tiles,
    vocab_size: int,
    softcap: float | None,
    names: tuple[str, ...],
):
    step, steps = pl.program_id(1), pl.cdiv(vocab_size, tiles.vocab)
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)

    @pl.when(step == 0)
    def _():
        out_ref[...] = jnp.zeros(out_ref.shape, out_ref.dtype)
        target_lanes_ref[...] = _along_sublanes(targets_ref[...])
        for row, ref in enumerate(token_lanes_refs):
            ref[...] = _along_sublanes(token_ref[row : row + 1, :])

    def make(slot: int, start: int, width: int) -> None:
        z_ref[slot, :, :width] = _product(hidden_ref[...], weight_ref[start : start + width, :], (1, 1))

    def go_through(columns: int) -> None:
        cut = _slices(columns, tiles.slice)
        make(0, *cut[0])
        for number, (start, width) in enumerate(cut):
            if number + 1 < len(cut):
                make((number + 1) % 2, *cut[number + 1])
            present = columns - start if columns < start + width else None
            found = []
            for at in range(0, width, LANES):
                token = {name: ref[...] for name, ref in zip(names, token_lanes_refs, strict=True)}
                z = z_ref[number % 2, :, at : at + LANES]
                column = lane + (step * tiles.vocab + start + at)
                d = _logit_gradient(z, column, target_lanes_ref[...], token, scale_ref[0, 0], softcap)
                if present is not None and at + LANES > present:
                    d = jnp.where(lane < present - at, d, 0.0)
                found.append(d.astype(weight_ref.dtype))
            rows = _present_rows(weight_ref[start : start + width, :], present)
            out_ref[...] += _product(jnp.concatenate(found, axis=1), rows, (1, 0))

    if steps > 1:
        pl.when(step < steps - 1)(lambda: go_through(tiles.vocab))
    pl.when(step == steps - 1)(lambda: go_through(vocab_size - (steps - 1) * tiles.vocab))


def _d_unembedding_kernel(
    scale_ref,  # [1, 1] in SMEM
    targets_ref,  # [1, tokens]
    token_ref,  # [8, tokens]
    hidden_ref,  # [tokens, D]
    weight_ref,  # [vocab, D]
    out_ref,  # [vocab, D]
    z_ref,  # [2, slice, tokens]
    *sum_refs,  # [vocab, D] float32, unless out_ref is
    tiles: Tiles,
    softcap: float | None,
    names: tuple[str, ...],
):
    step = pl.program_id(1)
    sum_ref = sum_refs[0] if sum_refs else out_ref
    row = jax.lax.broadcasted_iota(jnp.int32, (tiles.slice, 1), 0)
    token = {name: token_ref[at : at + 1, :] for at, name in enumerate(names)}

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros(sum_ref.shape, sum_ref.dtype)

    def make(slot: int, start: int) -> None:
        z_ref[slot] = _product(weight_ref[start : start + tiles.slice, :], hidden_ref[...], (1, 1))

    starts = range(0, tiles.vocab, tiles.slice)
    make(0, 0)
    for number, start in enumerate(starts):
        if number + 1 < len(starts):
            make((number + 1) % 2, starts[number + 1])
        column = row + (pl.program_id(0) * tiles.vocab + start)
        d = _logit_gradient(z_ref[number % 2], column, targets_ref[...], token, scale_ref[0, 0], softcap)
        sum_ref[start : start + tiles.slice, :] += _product(d.astype(hidden_ref.dtype), hidden_ref[...], (1, 0))

    if sum_refs:

        @pl.when(step == pl.num_programs(1) - 1)
        def _():
            out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _cap(z: Array, softcap: float | None) -> Array:
    return z if softcap is None else softcap * jnp.tanh(z * (1 / softcap))


def _present_rows(rows: Array, present: int | None) -> Array:
    """The rows, with those beyond the vocabulary's end (which hold anything) zeroed."""
    if present is None or present >= rows.shape[0]:
        return rows
    row = jax.lax.broadcasted_iota(jnp.int32, (rows.shape[0], 1), 0)
    return jnp.where(row < present, rows, jnp.zeros((), rows.dtype))


# Two things bound a tile: vector memory, and the length of the program, which is one basic block without loops and has to
# be fetched and compiled. Large token tiles come first: the vocabulary is read again for each of them, and below 1024
# tokens a v6e waits for its memory. In order of preference:
CANDIDATES = (
    *((1024, 1024), (1024, 512), (512, 1024), (1024, 256), (512, 512), (512, 256)),
    *((256, 512), (256, 256), (128, 256), (128, 128)),
)
VMEM_SHARE = 0.9  # of vector memory that a kernel may claim
MAX_BUNDLES = 40_000  # instructions of a grid step, if the matrix unit never waits
FLOAT32_PASSES = 6  # products of bfloat16 parts that make one of float32


class Chip(NamedTuple):
    """What tiles depend on: bytes of vector memory of a core, and floating-point operations per cycle."""

    vmem: int
    flops: int


CHIPS = {
    "TPU v4": Chip(16 * 2**20, 131072),
    "TPU v5 lite": Chip(128 * 2**20, 131072),
    "TPU v5": Chip(64 * 2**20, 131072),
    "TPU v5p": Chip(64 * 2**20, 131072),
    "TPU v6 lite": Chip(128 * 2**20, 524288),
    "TPU7x": Chip(64 * 2**20, 524288),
}


def chip(kind: str | None = None) -> Chip:
    """The chip of that name, by default the one being traced for; of one not known, the least of today's."""
    return CHIPS.get(current_device().kind if kind is None else kind, Chip(64 * 2**20, 131072))


def _footprint(kernel: str, tokens: int, vocab: int, slice_width: int, width: int, itemsize: int) -> int:
    """Bytes of vector memory: operands come in twice, since the next tile's arrive during this one's work."""
    operands = 2 * (tokens + vocab) * width * itemsize
    slices = 2 * tokens * slice_width * 4 + tokens * slice_width * itemsize
    per_token = 10 * tokens * LANES * 4
    sums = {
        "forward": tokens * width * itemsize,
        "forward_keeping": tokens * width * (itemsize + 3 * 4),
        "d_hidden": 3 * tokens * width * 4,
        "d_unembedding": vocab * width * (4 + 2 * itemsize) + slice_width * width * 4,
    }
    return operands + slices + per_token + sums[kernel]


def choose_tiles(kernel: str, num_tokens: int, vocab_size: int, width: int, itemsize: int, chip: Chip) -> Tiles:
    """The first of `CANDIDATES` that fits, cut down to what there is.

    Raises:
        ValueError: if none fits.
    """
    products = (1 if kernel == "forward" else 2) * (FLOAT32_PASSES if itemsize == 4 else 1)
    for tokens, vocab in CANDIDATES:
        tokens = min(tokens, _round_up(-(-num_tokens // -(-num_tokens // tokens)), LANES))
        vocab = min(vocab, _round_up(vocab_size, 2 * LANES))
        slice_width = min(SLICE[kernel], vocab // 2)
        bundles = 2 * products * tokens * vocab * width // chip.flops
        footprint = _footprint(kernel, tokens, vocab, slice_width, width, itemsize)
        if footprint <= VMEM_SHARE * chip.vmem and bundles <= MAX_BUNDLES:
            return Tiles(tokens, vocab, slice_width)
    raise ValueError(
        f"pallas_tpu has no tile for states of width {width} in {chip.vmem >> 20} MiB of vector memory; "
        "use implementation='chunked'"
    )


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


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
    padded = _round_up(num_tokens, tiles.tokens)
    names = tuple(name for name in FIELDS if name in {"top", "total", "target"} | fields)
    per_token = pl.BlockSpec((1, tiles.tokens), lambda t, v: (0, t))
    out_shape = [jax.ShapeDtypeStruct((8, padded), jnp.float32)]
    out_specs = [pl.BlockSpec((8, tiles.tokens), lambda t, v: (0, t))]
    if keep:
        out_shape.append(jax.ShapeDtypeStruct((padded, width), jnp.float32))
        out_specs.append(pl.BlockSpec((tiles.tokens, width), lambda t, v: (t, 0)))
    found = pl.pallas_call(
        functools.partial(
            _forward_kernel, tiles=tiles, vocab_size=vocab_size, softcap=softcap, fields=names, keep=keep
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
        (LOG2_E / temperature).reshape(1, 1),
        _padded(targets.astype(jnp.int32)[None], padded, 1),
        _padded(hidden, padded, 0),
        unembedding,
    )
    rows = {name: found[0][FIELDS.index(name), :num_tokens] for name in names}
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
    padded = _round_up(num_tokens, tiles.tokens)
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
        body = functools.partial(_d_hidden_kernel, vocab_size=vocab_size, **settings)
        out = jax.ShapeDtypeStruct((padded, width), dtype)
        scratch = [
            pltpu.VMEM((2, tiles.tokens, tiles.slice), jnp.float32),
            pltpu.VMEM((tiles.tokens, LANES), jnp.int32),
            *(pltpu.VMEM((tiles.tokens, LANES), jnp.float32) for _ in rows),
        ]
    else:
        body = functools.partial(_d_unembedding_kernel, **settings)
        out = jax.ShapeDtypeStruct((vocab_size, width), dtype)
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
        (LOG2_E / temperature).reshape(1, 1),
        _padded(token.targets.astype(jnp.int32)[None], padded, 1),
        _padded(stacked, padded, 1),
        _padded(hidden, padded, 0),
        unembedding,
    )
    return found[:num_tokens] if kernel == "d_hidden" else found

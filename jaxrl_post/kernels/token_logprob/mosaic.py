"""The bodies of the Mosaic kernels, each one grid step. `pallas_tpu` launches them.

A body is one basic block for every tile but the last, so that the compiler's scheduler can interleave the matrix unit's
work on one slice of logits with the vector unit's on another. The last tile of the vocabulary has a body of its own,
cut to the rows that are there. The target's column never enters the sums (`statistics`).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxrl_post.kernels.token_logprob.statistics import LOWEST, Sums
from jaxrl_post.kernels.token_logprob.tiles import LANES, Tiles
from jaxrl_post.types import Array

ABSENT = 2 * LOWEST
"""The logit of a column that is not there: its exponential is 0 above any maximum, `LOWEST` itself included."""
LOG2_E = math.log2(math.e)
FIELDS = Sums._fields


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


def forward_kernel(
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
    """Sums over the vocabulary, and the sum of `e_v W_v` if `keep`; grid: tiles of tokens, tiles of the vocabulary."""
    kept_ref = refs[0]  # looked at only if keeping
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


def d_hidden_kernel(
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
    """Gradient of the states; grid: tiles of tokens, tiles of the vocabulary."""
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


def d_unembedding_kernel(
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
    """Gradient of the unembedding; grid: tiles of the vocabulary, tiles of tokens."""
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

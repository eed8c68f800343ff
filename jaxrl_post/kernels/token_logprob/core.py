"""The differentiable function that the implementations share, on one device or over a mesh.

An implementation gives the sums over the vocabulary rows that it holds and, going back, the gradients of its inputs.
Everything else is here: joining the sums of devices, finishing the outputs, the rule of differentiation. On a mesh
(`jax.set_mesh`) tokens are split over every axis but `tensor`, the vocabulary stays split over `tensor` and is never
gathered; an unembedding split over `fsdp` is gathered once a pass and its gradient scattered once, a piece of the
vocabulary after the other where the whole would be large.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType, PartitionSpec

from jaxrl_post import mesh as meshes
from jaxrl_post.kernels.token_logprob import chunked, pallas_tpu
from jaxrl_post.kernels.token_logprob.reference import TokenLogprob
from jaxrl_post.kernels.token_logprob.statistics import (
    Distribution,
    Gradients,
    Sums,
    Wanted,
    finish,
    join,
    join_two,
    needed,
    nothing,
    per_token,
)
from jaxrl_post.kernels.token_logprob.tiles import LANES, SUBLANES
from jaxrl_post.types import Array

MODULES = {"chunked": chunked, "pallas_tpu": pallas_tpu}

GATHERED_BYTES = 64 * 2**20
"""How much of an unembedding that is split over `fsdp` a device gathers at a time."""


class Layout(NamedTuple):
    """Mesh axes (longer than one) that tokens, vocabulary and width are split over, and how many shards tokens have."""

    rows: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    row_shards: int = 1


def layout(vocab_size: int, width: int) -> Layout:
    """How the ambient mesh splits the work; `Layout()` without a mesh, or where the caller is per device already."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind == AxisType.Manual for kind in mesh.axis_types):
        return Layout()
    sizes = {name: size for name, size in zip(mesh.axis_names, mesh.axis_sizes, strict=True) if size > 1}

    def axes(entry: Any) -> tuple[str, ...]:
        return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)

    vocab, embed = (axes(entry) for entry in meshes.spec(("vocab", "embed"), (vocab_size, width), sizes))
    rows = tuple(name for name in sizes if name not in vocab)
    return Layout(rows, vocab, embed, math.prod(sizes[name] for name in rows))


class Problem(NamedTuple):
    """What is known when a call is traced."""

    outputs: tuple[str, ...]
    softcap: float | None
    implementation: str
    vocab_size: int
    layout: Layout = Layout()
    chunk_bytes: int | None = None


class _Residuals(NamedTuple):
    hidden: Array
    unembedding: Array
    bias: Array | None
    temperature: Array
    targets: Array
    distribution: Distribution
    kept: Any  # what the implementation kept for itself, one for each shard of the vocabulary
    wanted: Wanted


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_logprob(
    problem: Problem, hidden: Array, unembedding: Array, bias: Array | None, temperature: Array, targets: Array
) -> TokenLogprob:
    """The asked-for outputs of `[N, D]` states; `N` must be a multiple of the layout's row shards."""
    return _run(problem, hidden, unembedding, bias, temperature, targets, keep=False)[0]


class Specs(NamedTuple):
    """How each kind of argument lies on the mesh; `kept` has one leading axis for the vocabulary's shards."""

    hidden: PartitionSpec
    unembedding: PartitionSpec
    bias: PartitionSpec
    scalar: PartitionSpec
    token: PartitionSpec
    kept: PartitionSpec


def specs(at: Layout) -> Specs:
    """The `Specs` of a layout."""
    rows, vocab, width = (axes or None for axes in at[:3])
    spec = PartitionSpec
    return Specs(spec(rows, None), spec(vocab, width), spec(vocab), spec(), spec(rows), spec(vocab, rows))


def per_device(at: Layout, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """The function run by each device on its own parts; itself where there is nothing to split."""
    if not at.rows and not at.vocab:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def piece_rows(at: Layout, unembedding: Array) -> int:
    """How many of a device's rows are gathered at a time: all, or so many that there are pieces of one size."""
    rows, row_bytes = unembedding.shape[0], unembedding.shape[1] * unembedding.dtype.itemsize
    if not at.width:
        return rows
    shards = math.prod(jax.lax.axis_size(name) for name in at.width)
    count = max(1, math.ceil(rows * row_bytes * shards / GATHERED_BYTES))
    count = next((n for n in range(count, 2 * count) if rows % n == 0), count)
    return math.ceil(rows / count)


def over_pieces(
    at: Layout, unembedding: Array, bias: Array | None, visit: Callable[..., tuple[Any, Any]], carry: Any
) -> tuple[Any, Any]:
    """`visit(carry, weight, bias, first) -> (carry, out)` of each piece of a device's rows.

    Args:
        at: the layout.
        unembedding: the device's part, `[V / vocab shards, D / width shards]`.
        bias: of the same rows.
        visit: takes a piece's rows, whole, and the place of the first in the vocabulary.
        carry: what the first piece is given; None where `visit` has no use for it if there is but one.

    Returns:
        The last carry, and the `out`s, whose leading axes are those of rows, one after the other.
    """
    held, rows = unembedding.shape[0], piece_rows(at, unembedding)
    first = jax.lax.axis_index(at.vocab) * held if at.vocab else 0

    def piece(carry: Any, start: Any, count: int) -> tuple[Any, Any]:
        part, part_bias = (
            x if x is None or count == held else jax.lax.dynamic_slice_in_dim(x, start, count)
            for x in (unembedding, bias)
        )
        whole = jax.lax.all_gather(part, at.width, axis=1, tiled=True) if at.width else part
        return visit(carry, whole, part_bias, first + start)

    if rows == held:
        return piece(carry, 0, held)
    full = held // rows
    carry, outs = jax.lax.scan(lambda carry, n: piece(carry, n * rows, rows), carry, jnp.arange(full))
    outs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outs)
    if full * rows < held:
        carry, last = piece(carry, full * rows, held - full * rows)
        outs = jax.tree.map(lambda *x: jnp.concatenate(x), outs, last)
    return carry, outs


def gradient_specs(where: Any) -> Gradients:
    """How the gradients lie: as the inputs do."""
    return Gradients(where.hidden, where.unembedding, where.bias, where.scalar)


def join_over(axes: tuple[str, ...], sums: Sums, temperature: Array) -> Sums:
    """The sums over the vocabulary of all devices along mesh axes."""
    if not axes:
        return sums
    add, highest, lowest = (functools.partial(f, axis_name=axes) for f in (jax.lax.psum, jax.lax.pmax, jax.lax.pmin))
    return join(sums, temperature, add=add, highest=highest, lowest=lowest)


def scatter(at: Layout, d_unembedding: Array | None) -> Array | None:
    """The device's columns of the gradient of rows that were gathered, summed over those that gathered them."""
    if d_unembedding is None or not at.width:
        return d_unembedding
    rows, width = d_unembedding.shape
    columns = width // math.prod(jax.lax.axis_size(name) for name in at.width)
    # XLA's TPU compiler scatters columns only where a device's are whole tiles, and eight or a multiple of them: else
    # every device is sent the sum of all, which is twice the bytes. A copy lays a device's columns in one place.
    if columns % LANES == 0 and math.ceil(rows / SUBLANES) * (columns // LANES) % 8 == 0:
        return jax.lax.psum_scatter(d_unembedding, at.width, scatter_dimension=1, tiled=True)
    parts = d_unembedding.reshape(rows, -1, columns).swapaxes(0, 1)
    return jax.lax.psum_scatter(parts, at.width, scatter_dimension=0)


def add_up(at: Layout, found: Gradients) -> Gradients:
    """The gradients of a device's parts (`scatter`ed) with the shares of all devices that have the same part."""

    def add(x: Array | None, axes: tuple[str, ...]) -> Array | None:
        return x if x is None or not axes else jax.lax.psum(x, axes)

    return Gradients(
        add(found.hidden, at.vocab),
        add(found.unembedding, tuple(name for name in at.rows if name not in at.width)),
        add(found.bias, at.rows),
        add(found.temperature, at.rows + at.vocab),
    )


def _run(problem, hidden, unembedding, bias, temperature, targets, keep) -> Any:
    at = problem.layout
    where = specs(at)

    def local(hidden, unembedding, bias, temperature, targets):
        fields = needed(problem.outputs)

        def visit(before, weight, bias, first):
            sums, kept = MODULES[problem.implementation].sums(
                hidden,
                weight,
                bias,
                temperature,
                targets - first,
                softcap=problem.softcap,
                fields=fields,
                keep=keep,
                chunk_bytes=problem.chunk_bytes,
            )
            if sums.best is not None:
                sums = sums._replace(best=sums.best + first)
            if before is None:
                return (sums, kept), None
            both = join_two(before[0], sums, temperature)
            if kept is not None:
                older, newer = (jnp.exp((s.top - both.top) / temperature)[:, None] for s in (before[0], sums))
                kept = older * before[1] + newer * kept
            return (both, kept), None

        start = None
        if piece_rows(at, unembedding) < unembedding.shape[0]:
            kept = keep and problem.implementation == "pallas_tpu"
            start = (
                nothing(targets.shape[0], temperature.dtype, fields),
                jnp.zeros(hidden.shape, jnp.float32) if kept else None,
            )
        (sums, kept), _ = over_pieces(at, unembedding, bias, visit, start)
        whole = join_over(at.vocab, sums, temperature)
        result, distribution = finish(whole, targets, problem.vocab_size, temperature, problem.outputs)
        if kept is not None:
            # From sums of exponentials above this shard's maximum to sums of probabilities.
            share = jnp.exp((sums.top - distribution.top) / temperature - distribution.log_total)
            kept = (kept[None], share[None])
        return result, distribution, kept

    run = per_device(
        at,
        local,
        (where.hidden, where.unembedding, where.bias, where.scalar, where.token),
        (where.token, where.token, where.kept),
    )
    return run(hidden, unembedding, bias, temperature, targets)


def _forward(problem, hidden, unembedding, bias, temperature, targets):
    dtype = unembedding.value.dtype
    summed_over_devices = problem.layout.row_shards > 1
    wanted = Wanted(
        hidden=hidden.perturbed,
        # Devices' shares are added up before they are rounded.
        unembedding=(jnp.promote_types(dtype, jnp.float32) if summed_over_devices else dtype)
        if unembedding.perturbed
        else None,
        bias=bias is not None and bias.perturbed,
        temperature=temperature.perturbed,
    )
    if problem.implementation == "pallas_tpu" and wanted.temperature:
        raise ValueError("pallas_tpu has no gradient of the temperature; use implementation='chunked'")
    values = hidden.value, unembedding.value, None if bias is None else bias.value, temperature.value, targets.value
    keep = wanted.hidden and bool({"logp", "logsumexp"} & set(problem.outputs))
    result, distribution, kept = _run(problem, *values, keep=keep)
    return result, _Residuals(*values, distribution, kept, wanted)


def _backward(problem, saved: _Residuals, cotangents: TokenLogprob):
    at = problem.layout
    where = specs(at)
    wanted = saved.wanted
    cotangents = TokenLogprob(*(None if isinstance(c, SymbolicZero) else c for c in cotangents))._replace(argmax=None)

    def local(hidden, unembedding, bias, temperature, targets, distribution, kept, cotangents):
        kept = None if kept is None else (kept[0][0], kept[1][0])

        def visit(before, weight, bias, first):
            token = per_token(cotangents, distribution, targets, problem.vocab_size, first, temperature)
            # What was kept is of all pieces, so that only one of them may count it.
            share = None if kept is None else kept[1] if before is None else jnp.where(before[0], kept[1], 0.0)
            found = MODULES[problem.implementation].gradients(
                hidden,
                weight,
                bias,
                temperature,
                token,
                softcap=problem.softcap,
                wanted=wanted,
                kept=None if kept is None else (kept[0], share),
                chunk_bytes=problem.chunk_bytes,
            )
            summed = found.hidden, found.temperature
            if before is not None:
                summed = jax.tree.map(jnp.add, before[1], summed)
            return (jnp.zeros((), bool), summed), (scatter(at, found.unembedding), found.bias)

        start = None
        if piece_rows(at, unembedding) < unembedding.shape[0]:
            wide = jnp.promote_types(jnp.promote_types(hidden.dtype, unembedding.dtype), jnp.float32)
            summed = (
                jnp.zeros(hidden.shape, wide) if wanted.hidden else None,
                jnp.zeros((), temperature.dtype) if wanted.temperature else None,
            )
            start = (jnp.ones((), bool), summed)
        (_, (d_hidden, d_temperature)), (d_weight, d_bias) = over_pieces(at, unembedding, bias, visit, start)
        return add_up(at, Gradients(d_hidden, d_weight, d_bias, d_temperature))

    run = per_device(
        at,
        local,
        (
            where.hidden,
            where.unembedding,
            where.bias,
            where.scalar,
            where.token,
            where.token,
            where.kept,
            where.token,
        ),
        gradient_specs(where),
    )
    found: Gradients = run(*saved[:7], cotangents)
    if found.temperature is not None and cotangents.logsumexp is not None:
        found = found._replace(
            temperature=found.temperature
            - jnp.sum(saved.distribution.top * cotangents.logsumexp) / saved.temperature**2
        )
    inputs = (saved.hidden, saved.unembedding, saved.bias, saved.temperature)
    return (*(None if x is None or d is None else d.astype(x.dtype) for d, x in zip(found, inputs, strict=True)), None)


token_logprob.defvjp(_forward, _backward, symbolic_zeros=True)

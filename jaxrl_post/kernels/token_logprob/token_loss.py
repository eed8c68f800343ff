"""A per-token loss differentiated while its logits are at hand: one pass over them gives the value and all gradients.

`token_logprob` must compute every logit a second time to go back, because only then it is told what each log-prob is
worth. Here the loss itself is known, so that a chunk of tokens goes from logits through the loss to the gradients of
states and unembedding at once: three matrix products instead of four, at the price of a float32 accumulator of the
unembedding's size and of losses that treat each token by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Jaxpr
from jax.sharding import AxisType

from jaxrl_post.kernels.ambient import vary_alike, without_typed_shardings
from jaxrl_post.kernels.token_logprob import core, exchange
from jaxrl_post.kernels.token_logprob.arguments import check_arguments
from jaxrl_post.kernels.token_logprob.chunked import logit_gradient, sums_of_logits
from jaxrl_post.kernels.token_logprob.independence import check_independent
from jaxrl_post.kernels.token_logprob.reference import TokenLogprob, matmul, raise_to_float32, soft_cap
from jaxrl_post.kernels.token_logprob.selection import Selection
from jaxrl_post.kernels.token_logprob.statistics import Gradients, Wanted, finish, needed, per_token
from jaxrl_post.kernels.token_logprob.token_chunks import rows_per_chunk, scan_chunks, shards
from jaxrl_post.types import Array, PyTree


def token_loss(
    hidden: Array,
    unembedding: Array,
    targets: Array,
    aux: PyTree,
    loss_fn: Callable[[TokenLogprob, Any], Array],
    *,
    mask: Array | None = None,
    max_tokens: int | None = None,
    temperature: Array | float = 1.0,
    softcap: float | None = None,
    bias: Array | None = None,
    outputs: tuple[str, ...] = ("logp",),
    chunk_bytes: int | None = None,
) -> tuple[Array, TokenLogprob]:
    r"""Sum of a loss over tokens, differentiated in the pass over the logits that computes it.

    $$L = \sum_{t:\ \mathrm{mask}_t \neq 0} \ell(\mathrm{stats}_t, \mathrm{aux}_t)$$

    where `stats` are those of `token_logprob`. Exact gradients of `hidden`, `unembedding`, `bias`, `temperature` and
    the float leaves of `aux`, for a third less arithmetic than differentiating through `token_logprob`; what is not
    differentiated (a frozen unembedding) costs nothing. Sums are float32 or wider; gradients of logits are rounded
    once, to the dtype of the states, before they are multiplied.

    For means, divide the total by its denominator or bring weights in `aux`; both must be known beforehand. On a mesh
    (`jax.set_mesh`) the vocabulary is split over `tensor` and `fsdp` and tokens over all axes but `tensor`; those of
    devices along `fsdp` are gathered a chunk at a time, and no device has the whole unembedding or gradient of it.

    Args:
        hidden: `[N, D]`, bfloat16, float32 or float64.
        unembedding: `[V, D]`.
        targets: `[N]` int32 in `[0, V)`; inside `jit` the log-prob of any other unmasked target is NaN.
        aux: pytree of arrays `[N, ...]`: old log-probs, advantages, weights.
        loss_fn: the loss of each of `n` tokens, `[n]` float. It is called with a `TokenLogprob` of `[n]` fields and
            with `aux` as `[n, ...]`, for chunks of any `n`, so it must treat each token by itself; this is checked
            when it is traced. The functions of `jaxrl_post.losses` take such arrays as they stand. It may close over
            numbers that are the same for all tokens, but not over ones that are differentiated.
        mask: `[N]`; where it is 0 the loss does not count, statistics are 0 and no gradient flows, whatever the other
            arguments hold there.
        max_tokens: static bound on the number of unmasked tokens; given together with `mask`, masked tokens cost
            nothing, as far as the bound is below a device's number of tokens. If more tokens than that are unmasked,
            the total and its gradients are NaN.
        temperature: positive scalar, may be traced.
        softcap: logits become `softcap * tanh(logits / softcap)`.
        bias: `[V]`.
        outputs: statistics to compute, of `logp, entropy, logsumexp, argmax, max_prob, mean_logp, sum_p_squared`.
        chunk_bytes: bound on the float32 logits held at once, per device; None for 32 MiB on CPU, else 1 GiB.

    Returns:
        The total, a scalar in float32 or wider, and the `TokenLogprob` with the asked-for fields `[N]`. The latter is
        for metrics: no gradient flows through it.

    Raises:
        ValueError: for wrong ranks or sizes, an unknown output, `max_tokens` without `mask` or below 1, a `loss_fn`
            that does not return `[n]`, mixes tokens, or closes over a value that is differentiated, and outside `jit`
            for a target that is no token.

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> total, stats = token_loss(
        ...     hidden, weight, jnp.array([0, 0]), jnp.array([1.0, 2.0]), lambda stats, weights: -weights * stats.logp
        ... )
        >>> print(total.round(4), stats.logp.round(4))
        3.6543 [-0.5514 -1.5514]

    Reference: gradients within the forward pass follow Liger Kernel: Efficient Triton Kernels for LLM Training
    (arXiv 2410.10989).
    """
    targets = jnp.asarray(targets)
    check_arguments(hidden, unembedding, targets, mask, max_tokens, bias, temperature, softcap, outputs, chunk_bytes)
    _check_aux(hidden, aux)
    aux = jax.tree.map(jnp.asarray, aux)
    wide = jnp.promote_types(jnp.promote_types(hidden.dtype, unembedding.dtype), jnp.float32)
    check_independent(loss_fn, (_stats_structs(1, wide, outputs), _structs(1, aux)), "loss_fn")
    run = functools.partial(
        _in_chunks,
        loss_fn=loss_fn,
        max_tokens=max_tokens,
        softcap=None if softcap is None else float(softcap),
        outputs=tuple(outputs),
        chunk_bytes=chunk_bytes,
    )
    given = vary_alike(
        (hidden, unembedding, targets.astype(jnp.int32), mask, bias, jnp.asarray(temperature, wide), aux)
    )
    return without_typed_shardings(run, given[5], targets)(*given)


def _in_chunks(
    hidden: Array,
    unembedding: Array,
    targets: Array,
    mask: Array | None,
    bias: Array | None,
    temperature: Array,
    aux: PyTree,
    *,
    loss_fn: Callable[[TokenLogprob, Any], Array],
    max_tokens: int | None,
    softcap: float | None,
    outputs: tuple[str, ...],
    chunk_bytes: int | None,
) -> tuple[Array, TokenLogprob]:
    num_tokens, (vocab_size, width) = hidden.shape[0], unembedding.shape
    (at,) = exchange.layouts(vocab_size, width)
    chosen = Selection(num_tokens, mask, max_tokens, at)
    wide = temperature.dtype
    if num_tokens == 0:
        structs = _stats_structs(0, wide, outputs)
        return jnp.zeros((), wide), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), structs)

    tokens = chosen.zero_masked(hidden), targets, chosen.mask, jax.tree.leaves(aux)
    hidden, targets, keep, aux_leaves = chosen.take(tokens)
    local_tokens, local_vocab = hidden.shape[0] // at.row_shards, vocab_size // shards(at.vocab)
    rows = rows_per_chunk(local_tokens, 4 * local_vocab, chunk_bytes)
    together = rows * shards(at.width)
    loss, closed_over = _trace(loss_fn, at, _stats_structs(together, wide, outputs), _structs(together, aux))
    problem = _Problem(loss, outputs, softcap, vocab_size, rows, at)
    constants = vary_alike((list(closed_over), hidden))[0]
    result: Any = _token_loss(problem, hidden, unembedding, bias, temperature, targets, keep, aux_leaves, constants)
    total, stats = result
    stats = jax.tree.map(lambda x: chosen.put_back(jax.lax.stop_gradient(x)), stats)
    left_out = jnp.sum(keep, dtype=jnp.int32) < jnp.sum(chosen.mask, dtype=jnp.int32)
    return total * jnp.where(left_out, jnp.nan, 1.0).astype(wide), stats


def _check_aux(hidden: Array, aux: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
        if jnp.shape(leaf)[:1] != hidden.shape[:1]:
            raise ValueError(
                f"aux{jax.tree_util.keystr(path)} must be [N, ...] with N = {hidden.shape[0]}, got shape "
                f"{jnp.shape(leaf)}; what is the same for all tokens may stand in loss_fn itself"
            )


def _structs(n: int, tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype), tree)


def _stats_structs(n: int, dtype: Any, outputs: tuple[str, ...]) -> TokenLogprob:
    fields: dict[str, Any] = {
        name: jax.ShapeDtypeStruct((n,), jnp.int32 if name == "argmax" else dtype) for name in outputs
    }
    return TokenLogprob(**fields)


def _trace(loss_fn: Callable, at: core.Layout, *arguments: Any) -> tuple[Jaxpr, list[Any]]:
    """The loss, and the values it closes over: a rule of differentiation cannot close over what is traced."""
    mesh = jax.sharding.get_abstract_mesh()
    if at.rows or at.vocab:  # it will run on each device by itself
        mesh = mesh.update(axis_types=(AxisType.Manual,) * len(mesh.axis_names))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.make_jaxpr(loss_fn)(*arguments)
    return traced.jaxpr, traced.consts


class _Problem(NamedTuple):
    """What is known when a call is traced."""

    loss: Jaxpr  # leaves of stats and aux, `[n, ...]`, to `[n]`, for the `n` tokens that a device sees at a time
    outputs: tuple[str, ...]
    softcap: float | None
    vocab_size: int
    rows: int  # of them its own
    layout: core.Layout


class _Found(NamedTuple):
    """Results of a pass: per token, then the gradients that were wanted of the total."""

    losses: Array
    stats: TokenLogprob
    gradients: Gradients
    aux: list[Array | None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_loss(problem, hidden, unembedding, bias, temperature, targets, keep, aux, constants):
    values = (hidden, unembedding, bias, temperature, targets, keep, aux, constants)
    found = _run(problem, *values, Wanted(False, None, False, False), [False] * len(aux))
    return jnp.sum(found.losses), found.stats


def _forward(problem, hidden, unembedding, bias, temperature, targets, keep, aux, constants):
    if any(x.perturbed for x in constants):
        raise ValueError(
            "loss_fn closes over a value that is differentiated; hand it in through aux, broadcast to [N, ...], or "
            "stop its gradient before"
        )
    wanted = Wanted(
        hidden=hidden.perturbed,
        unembedding=unembedding.value.dtype if unembedding.perturbed else None,
        bias=bias is not None and bias.perturbed,
        temperature=temperature.perturbed,
    )
    wanted_aux = [x.perturbed and jnp.issubdtype(x.value.dtype, jnp.floating) for x in aux]
    found = _run(
        problem,
        hidden.value,
        unembedding.value,
        None if bias is None else bias.value,
        temperature.value,
        targets.value,
        keep.value,
        [x.value for x in aux],
        [x.value for x in constants],
        wanted,
        wanted_aux,
    )
    return (jnp.sum(found.losses), found.stats), (found.gradients, found.aux)


def _backward(problem, saved: tuple[Gradients, list[Array | None]], cotangents):
    del problem
    total = cotangents[0]

    def scaled(x: Array) -> Array:
        if isinstance(total, SymbolicZero):
            return jnp.zeros_like(x)
        return (raise_to_float32(x) * total).astype(x.dtype)

    gradients, aux = jax.tree.map(scaled, saved)
    return (*gradients, None, None, aux, None)


_token_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _run(problem, hidden, unembedding, bias, temperature, targets, keep, aux, constants, wanted, wanted_aux) -> _Found:
    at = problem.layout
    specs: Any = core.specs(at)
    differentiated = wanted.hidden or wanted.unembedding is not None or wanted.bias or wanted.temperature
    narrow = jnp.promote_types(hidden.dtype, unembedding.dtype)
    wide = temperature.dtype

    def local(hidden, unembedding, bias, temperature, targets, keep, aux, constants) -> _Found:
        weight, first = exchange.rows_of(at, unembedding)
        if bias is not None:
            bias = exchange.own(at, bias)
        axes = exchange.vocabulary(at)
        index = jnp.arange(weight.shape[0])
        loss_fn = functools.partial(eval_jaxpr, problem.loss, constants)

        def step(carry, chunk):
            hidden, targets, keep, aux = exchange.gather(at, chunk)
            z = matmul(hidden, weight, ((1,), (1,)))
            z = soft_cap(z if bias is None else z + bias.astype(z.dtype), problem.softcap)
            sums = sums_of_logits(z, index, targets - first, temperature, needed(problem.outputs))
            if sums.best is not None:
                sums = sums._replace(best=sums.best + first)
            whole = core.join_over(axes, sums, temperature)
            stats, distribution = finish(whole, targets, problem.vocab_size, temperature, problem.outputs)

            def loss_of(real: TokenLogprob, floats: list[Array | None]) -> Array:
                full = real._replace(argmax=stats.argmax)
                leaves = [x if f is None else f for x, f in zip(aux, floats, strict=True)]
                return raise_to_float32(loss_fn(*jax.tree.leaves(full), *leaves)[0])

            real = stats._replace(argmax=None)
            floats = [x if is_wanted else None for x, is_wanted in zip(aux, wanted_aux, strict=True)]
            if not differentiated and not any(wanted_aux):
                losses = jnp.where(keep, loss_of(real, floats), 0.0)
                return carry, exchange.own(at, _Found(losses, stats, Gradients(*(None,) * 4), []))
            losses, pull = jax.vjp(loss_of, real, floats)
            # Twice masked, since what stands at a masked token may turn a zero into NaN on the way.
            slope, d_aux = jax.tree.map(lambda x: _where(keep, x), pull(keep.astype(losses.dtype)))
            d_hidden = None
            if differentiated:
                token = per_token(slope, distribution, targets, problem.vocab_size, first, temperature)
                tempered, raw = logit_gradient(z, index, token, temperature, problem.softcap)
                # Rounded once to what the matrix unit takes; the sums are float32.
                rounded = raw.astype(narrow)
                d_weight, d_bias, d_temperature = carry
                if d_weight is not None:
                    d_weight = d_weight + matmul(rounded, hidden, ((0,), (0,)))
                if d_bias is not None:
                    d_bias = d_bias + jnp.sum(raw, axis=0)
                if d_temperature is not None:
                    # From top, as in `chunked.gradients`; the rest of it once, not on every device of the vocabulary.
                    share = jnp.where(tempered == 0, 0.0, tempered * (z - distribution.top[:, None]))
                    rest = 0.0 if slope.logsumexp is None else jnp.sum(distribution.top * slope.logsumexp)
                    d_temperature -= (jnp.sum(share) + rest / shards(axes)) / temperature**2
                carry = (d_weight, d_bias, d_temperature)
                if wanted.hidden:
                    d_hidden = exchange.add_own(at, matmul(rounded, weight, ((1,), (0,)))).astype(hidden.dtype)
            losses, stats, d_aux = exchange.own(at, (jnp.where(keep, losses, 0.0), stats, d_aux))
            return carry, _Found(losses, stats, Gradients(d_hidden, None, None, None), d_aux)

        start = (
            None if wanted.unembedding is None else jnp.zeros(weight.shape, wide),
            jnp.zeros(weight.shape[:1], wide) if wanted.bias else None,
            jnp.zeros((), wide) if wanted.temperature else None,
        )
        (d_weight, d_bias, d_temperature), found = scan_chunks(step, start, (hidden, targets, keep, aux), problem.rows)
        dtype = wanted.unembedding
        gradients = Gradients(
            found.gradients.hidden,
            None if d_weight is None or dtype is None else exchange.d_unembedding(at, d_weight, dtype),
            None if d_bias is None or bias is None else exchange.d_bias(at, d_bias, bias.dtype),
            None if d_temperature is None else exchange.add(d_temperature, at.rows + at.vocab),
        )
        return found._replace(gradients=gradients)

    run = core.per_device(
        at,
        local,
        (
            specs.hidden,
            specs.unembedding,
            specs.bias,
            specs.scalar,
            specs.token,
            specs.token,
            specs.token,
            specs.scalar,
        ),
        _Found(
            specs.token,
            specs.token,
            core.gradient_specs(specs),
            specs.token,
        ),
    )
    return run(hidden, unembedding, bias, temperature, targets, keep, aux, constants)


def _where(keep: Array, x: Array) -> Array:
    return jnp.where(keep.reshape(keep.shape + (1,) * (x.ndim - 1)), x, jnp.zeros((), x.dtype))

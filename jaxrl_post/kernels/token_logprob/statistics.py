"""What an implementation adds up over the vocabulary, how parts are joined, and the slope of each output.

An implementation goes through logits in pieces and hands back `Sums`; `join` makes one of the sums of several pieces or
devices, `finish` the outputs. Going back, `slopes` turns the outputs' cotangents into a few numbers per token, from
which an implementation forms the gradient of every logit. The target is kept apart from all other tokens throughout:
`1 - p(target)`, the gradient of a confident token, would otherwise be lost to cancellation.

Notation: `z` are capped logits before temperature, `x = (z - top) / temperature`, `e = exp(x)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_post.kernels.token_logprob.reference import TokenLogprob
from jaxrl_post.types import Array

LOWEST = -1e30
"""Stands for minus infinity in `top`, finite so that differences are not NaN."""


class Sums(NamedTuple):
    """Sums over the tokens `v` of a piece of the vocabulary that are not the target; `[N]` each, None if not needed.

    Attributes:
        top: `max_v z_v`, at least `LOWEST`.
        total: `sum_v e_v`.
        target: `z` of the target, `-inf` if it lies in another piece.
        weighted: `sum_v e_v x_v`.
        squares: `sum_v e_v^2`.
        shifted: `sum_v x_v`.
        count: how many tokens the sums are over.
        best: index of the largest `z_v`, the first of several.
    """

    top: Array
    total: Array
    target: Array
    weighted: Array | None = None
    squares: Array | None = None
    shifted: Array | None = None
    count: Array | None = None
    best: Array | None = None


def needed(outputs: tuple[str, ...]) -> frozenset[str]:
    """Optional fields of `Sums` that `outputs` are made of."""
    found: set[str] = set()
    if "entropy" in outputs:
        found |= {"weighted"}
    if "sum_p_squared" in outputs:
        found |= {"squares"}
    if "mean_logp" in outputs:
        found |= {"shifted", "count"}
    if "argmax" in outputs or "max_prob" in outputs:
        found |= {"best"}
    return frozenset(found)


def nothing(num_tokens: int, dtype: Any, fields: frozenset[str]) -> Sums:
    """The `Sums` over no tokens at all."""

    def start(value: float) -> Array:
        return jnp.full((num_tokens,), value, dtype)

    zeros = {name: start(0.0) for name in fields - {"best"}}
    best = jnp.full((num_tokens,), jnp.iinfo(jnp.int32).max, jnp.int32) if "best" in fields else None
    return Sums(start(LOWEST), start(0.0), start(-jnp.inf), best=best, **zeros)


def rebase(sums: Sums, top: Array, temperature: Array) -> Sums:
    """The same sums relative to a `top` that is no lower."""
    step = (sums.top - top) / temperature
    scale = jnp.exp(step)
    weighted, squares, shifted = sums.weighted, sums.squares, sums.shifted
    if weighted is not None:
        weighted = scale * (weighted + sums.total * step)
    if squares is not None:
        squares = scale * scale * squares
    if shifted is not None and sums.count is not None:
        shifted = shifted + sums.count * step
    return sums._replace(top=top, total=scale * sums.total, weighted=weighted, squares=squares, shifted=shifted)


def join(
    sums: Sums,
    temperature: Array,
    *,
    add: Callable[[Array], Array],
    highest: Callable[[Array], Array],
    lowest: Callable[[Array], Array],
) -> Sums:
    """One `Sums` of several, by reductions over pieces (an axis of arrays, or the devices of a mesh axis)."""
    top = highest(sums.top)
    moved = rebase(sums, top, temperature)
    best = sums.best
    if best is not None:
        best = lowest(jnp.where(sums.top == top, best, jnp.iinfo(jnp.int32).max))

    def maybe(x: Array | None) -> Array | None:
        return None if x is None else add(x)

    return Sums(
        top,
        add(moved.total),
        highest(sums.target),
        maybe(moved.weighted),
        maybe(moved.squares),
        maybe(moved.shifted),
        maybe(moved.count),
        best,
    )


def join_two(a: Sums, b: Sums, temperature: Array) -> Sums:
    """One `Sums` of two pieces."""
    both: Sums = jax.tree.map(lambda *pieces: jnp.stack(pieces), a, b)
    return join(
        both,
        temperature,
        add=lambda x: jnp.sum(x, 0, dtype=x.dtype),
        highest=lambda x: jnp.max(x, 0),
        lowest=lambda x: jnp.min(x, 0),
    )


class Distribution(NamedTuple):
    """A token's distribution in the few numbers that its gradients need; `[N]` each.

    Attributes:
        top: `max_v z_v`, the target included.
        log_total: `log sum_v e_v`.
        target_x: `x` of the target.
        p_target: its probability.
        p_others: one minus that, to full relative precision.
        entropy: nats, None if not asked for.
        sum_p_squared: None if not asked for.
        max_prob: the largest probability.
        best: where it lies, None if not asked for.
    """

    top: Array
    log_total: Array
    target_x: Array
    p_target: Array
    p_others: Array
    entropy: Array | None
    sum_p_squared: Array | None
    max_prob: Array
    best: Array | None


def finish(
    sums: Sums, targets: Array, vocab_size: int, temperature: Array, outputs: tuple[str, ...]
) -> tuple[TokenLogprob, Distribution]:
    """The asked-for outputs, and what their gradients need, from the sums over the whole vocabulary."""
    target = sums.target
    top = jnp.maximum(sums.top, target)
    others = rebase(sums, top, temperature)
    x = (target - top) / temperature
    e = jnp.exp(x)
    total = others.total + e
    # Where the target is the most probable token its own share is exactly 1, and log1p keeps a tiny rest.
    log_total = jnp.where(target >= sums.top, jnp.log1p(others.total), jnp.log(total))
    entropy = squares = best = None
    fields: dict[str, Array] = {"logsumexp": top / temperature + log_total}
    # Without this a target that is no token would pass for one of probability zero.
    is_token = (targets >= 0) & (targets < vocab_size)
    fields["logp"] = jnp.where(is_token, x - log_total, jnp.nan)
    if others.weighted is not None:
        entropy = log_total - (others.weighted + e * jnp.where(e > 0, x, 0.0)) / total
        fields["entropy"] = entropy
    if others.squares is not None:
        squares = (others.squares + e * e) / (total * total)
        fields["sum_p_squared"] = squares
    if others.shifted is not None:
        fields["mean_logp"] = (others.shifted + jnp.where(is_token, x, 0.0)) / vocab_size - log_total
    if sums.best is not None:
        ahead = (target > sums.top) | ((target == sums.top) & (targets < sums.best))
        best = jnp.where(ahead, targets, sums.best)
        fields["argmax"] = best
    fields["max_prob"] = 1.0 / total
    distribution = Distribution(
        top, log_total, x, e / total, others.total / total, entropy, squares, fields["max_prob"], best
    )
    return TokenLogprob(**{name: fields[name] for name in outputs}), distribution


class Slopes(NamedTuple):
    """Gradient of the tempered logits of a token: `p (constant + linear x + square p) + uniform`, but at the target.

    `[N]` each; None where it is zero for every token.

    Attributes:
        constant: the coefficient of `p`.
        at_target: the gradient of the target's own logit.
        linear: the coefficient of `p x`.
        square: the coefficient of `p^2`.
        uniform: what every logit gets.
        at_best: what the most probable token gets besides, unless it is the target.
    """

    constant: Array
    at_target: Array
    linear: Array | None = None
    square: Array | None = None
    uniform: Array | None = None
    at_best: Array | None = None


def slopes(cotangents: TokenLogprob, d: Distribution, targets: Array, vocab_size: int) -> Slopes:
    """Per-token coefficients of the gradient, for the cotangents that are not None."""
    zero = jnp.zeros_like(d.top)
    constant, peak = zero, zero
    linear = square = uniform = at_best = None
    is_token = (targets >= 0) & (targets < vocab_size)
    if (c := cotangents.logp) is not None:
        peak = jnp.where(is_token, c, 0.0)
        constant -= peak
    if (c := cotangents.logsumexp) is not None:
        constant += c
    if (c := cotangents.entropy) is not None and d.entropy is not None:
        # d H / d logit_v = -p_v (log p_v + H)
        constant += c * (d.log_total - d.entropy)
        linear = -c
    if (c := cotangents.mean_logp) is not None:
        constant -= c
        uniform = c / vocab_size
    if (c := cotangents.sum_p_squared) is not None and d.sum_p_squared is not None:
        constant -= 2 * c * d.sum_p_squared
        square = 2 * c
    if (c := cotangents.max_prob) is not None and d.best is not None:
        at_best = c * d.max_prob
        constant -= at_best
    # At the target: peak (1 - p) + p (constant + peak + ...), in which nothing cancels.
    rest = constant + peak
    if linear is not None:
        rest += jnp.where(d.p_target > 0, linear * d.target_x, 0.0)
    if square is not None:
        rest += square * d.p_target
    at_target = peak * d.p_others + d.p_target * rest
    if uniform is not None:
        at_target += uniform
    if at_best is not None:
        at_target += jnp.where(d.best == targets, at_best, 0.0)
    return Slopes(constant, at_target, linear, square, uniform, at_best)


class PerToken(NamedTuple):
    """What the backward pass needs of each token, `[N]` each; `targets` and `best` count from the piece's first row."""

    targets: Array
    target_z: Array
    top: Array
    log_total: Array
    slopes: Slopes
    best: Array | None


def per_token(
    cotangents: TokenLogprob,
    d: Distribution,
    targets: Array,
    vocab_size: int,
    first: Array | int,
    temperature: Array,
) -> PerToken:
    """For the piece of the vocabulary whose first row is `first`."""
    return PerToken(
        targets=targets - first,
        target_z=d.top + d.target_x * temperature,
        top=d.top,
        log_total=d.log_total,
        slopes=slopes(cotangents, d, targets, vocab_size),
        best=None if d.best is None else d.best - first,
    )


@jax.tree_util.register_static
class Wanted(NamedTuple):
    """Which inputs need a gradient; for the unembedding, the dtype to hand it over in or None."""

    hidden: bool
    unembedding: Any
    bias: bool
    temperature: bool


class Gradients(NamedTuple):
    """Gradients of the inputs, in float32 or wider but for `unembedding`; None where not wanted."""

    hidden: Array | None
    unembedding: Array | None
    bias: Array | None
    temperature: Array | None

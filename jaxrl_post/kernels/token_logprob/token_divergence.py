"""Divergences between the next-token distributions of two heads, over the whole vocabulary, for distillation.

Tokens go through in chunks with the whole vocabulary at hand: the mixture of JSD needs both distributions normalised,
which a single pass over chunks of the vocabulary cannot do and a second pass would pay for with both heads' products
again. The divergence of a token is one number, so its gradient with respect to the token's state is known up to a
factor in the forward pass and is formed there; only the unembedding's needs the logits again. In products of tokens,
vocabulary and width: 2 for values, 3 with a frozen unembedding, 6 with a trained one (4 if all logits were stored).
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxrl_post.kernels.ambient import vary_alike, without_typed_shardings
from jaxrl_post.kernels.token_logprob import core, exchange
from jaxrl_post.kernels.token_logprob.arguments import check_logit_arguments
from jaxrl_post.kernels.token_logprob.reference import matmul, raise_to_float32, soft_cap
from jaxrl_post.kernels.token_logprob.selection import Selection, check_mask
from jaxrl_post.kernels.token_logprob.token_chunks import rows_per_chunk, scan_chunks, shards
from jaxrl_post.types import Array

DivergenceKind: TypeAlias = Literal["forward_kl", "reverse_kl", "jsd"]


def token_divergence(
    hidden: Array,
    unembedding: Array,
    teacher_hidden: Array,
    teacher_unembedding: Array,
    mask: Array | None = None,
    *,
    kind: DivergenceKind,
    beta: float | None = None,
    max_tokens: int | None = None,
    temperature: Array | float = 1.0,
    teacher_temperature: Array | float | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    chunk_bytes: int | None = None,
) -> Array:
    r"""Divergence of a student's from a teacher's distribution at every token, never holding tokens by vocabulary.

    With student $q$ and teacher $p$, each `softmax(softcap(hidden @ unembedding.T) / temperature)`:

    $$\mathrm{forward\_kl} = \sum_v p_v \log\frac{p_v}{q_v}, \qquad
    \mathrm{reverse\_kl} = \sum_v q_v \log\frac{q_v}{p_v},$$
    $$\mathrm{jsd} = \beta\,\mathrm{KL}(p \,\|\, m) + (1 - \beta)\,\mathrm{KL}(q \,\|\, m), \qquad
    m = \beta p + (1 - \beta) q$$

    Exact gradients of the student's `hidden`, `unembedding` and `temperature` for any per-token cotangent. The teacher
    is a constant: no gradient flows into its arguments, nor through `temperature` where it stands for the teacher's.
    Sums are float32 or wider, of terms that are never negative, so that divergences near 0 keep their digits.

    On a mesh (`jax.set_mesh`) the vocabulary is split over `tensor` and `fsdp` and tokens over all axes but `tensor`;
    those of devices along `fsdp` are gathered a chunk at a time, and no device has a whole unembedding or gradient of
    it, unless one width can be split over `fsdp` and the other not.

    Args:
        hidden: `[N, D]`, bfloat16, float32 or float64; the student's states.
        unembedding: `[V, D]`.
        teacher_hidden: `[N, Dt]`; any width, the same tokens.
        teacher_unembedding: `[V, Dt]`; the same vocabulary.
        mask: `[N]`; where it is 0 the divergence is 0 and no gradient flows, whatever the states hold.
        kind: `"forward_kl"` (mass-covering), `"reverse_kl"` (mode-seeking) or `"jsd"`.
        beta: weight of the teacher in the mixture of `"jsd"`, between 0 and 1; 0.5 by default. As `beta` goes to 0,
            `jsd / beta` goes to the forward KL; as it goes to 1, `jsd / (1 - beta)` goes to the reverse KL.
        max_tokens: static bound on the number of unmasked tokens; given together with `mask`, masked tokens cost
            nothing, as far as the bound is below a device's number of tokens. If more tokens than that are unmasked,
            the surplus ones come out as NaN.
        temperature: positive scalar, may be traced. Nothing is multiplied by its square.
        teacher_temperature: the teacher's; None for the same.
        softcap: logits become `softcap * tanh(logits / softcap)`.
        teacher_softcap: the teacher's; None for none.
        chunk_bytes: bound on both heads' float32 logits held at once, per device; None for 32 MiB on CPU, else 1 GiB.

    Returns:
        `[N]` float32 or wider, nats.

    Raises:
        ValueError: for wrong ranks or sizes, two vocabularies, an unknown kind, a `beta` for another kind than
            `"jsd"` or not between 0 and 1, `max_tokens` without `mask` or below 1.

    Example:
        >>> student, teacher = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.9, 0.1]]))
        >>> [
        ...     round(float(token_divergence(student, jnp.eye(2), teacher, jnp.eye(2), kind=kind)[0]), 4)
        ...     for kind in ("forward_kl", "reverse_kl", "jsd")
        ... ]
        [0.3681, 0.5108, 0.1017]

    Reference: On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes (arXiv 2306.13649).
    """
    beta = _check_arguments(hidden, unembedding, teacher_hidden, teacher_unembedding, kind, beta, chunk_bytes)
    check_logit_arguments(temperature, softcap)
    check_logit_arguments(1.0 if teacher_temperature is None else teacher_temperature, teacher_softcap, "teacher_")
    check_mask(hidden.shape[0], mask, max_tokens)
    run = functools.partial(
        _in_chunks,
        kind=kind,
        beta=beta,
        max_tokens=max_tokens,
        softcap=None if softcap is None else float(softcap),
        teacher_softcap=None if teacher_softcap is None else float(teacher_softcap),
        chunk_bytes=chunk_bytes,
    )
    given = vary_alike(
        (
            hidden,
            unembedding,
            teacher_hidden,
            teacher_unembedding,
            jnp.ones(hidden.shape[:1], bool) if mask is None else mask,
            temperature,
            temperature if teacher_temperature is None else teacher_temperature,
        )
    )
    return without_typed_shardings(run, given[4])(*given)


def _in_chunks(
    hidden: Array,
    unembedding: Array,
    teacher_hidden: Array,
    teacher_unembedding: Array,
    mask: Array,
    temperature: Array | float,
    teacher_temperature: Array | float,
    *,
    kind: DivergenceKind,
    beta: float,
    max_tokens: int | None,
    softcap: float | None,
    teacher_softcap: float | None,
    chunk_bytes: int | None,
) -> Array:
    (num_tokens, width), vocab_size = hidden.shape, unembedding.shape[0]
    student_at, teacher_at = exchange.layouts(vocab_size, width, teacher_unembedding.shape[1])
    chosen = Selection(num_tokens, mask, max_tokens, student_at)
    wide = functools.reduce(
        jnp.promote_types, (x.dtype for x in (unembedding, teacher_hidden, teacher_unembedding)), hidden.dtype
    )
    wide = jnp.promote_types(wide, jnp.float32)
    if num_tokens == 0:
        return jnp.zeros((0,), wide)

    states, teacher_states = chosen.take((chosen.zero_masked(hidden), chosen.zero_masked(teacher_hidden)))
    local_tokens, local_vocab = states.shape[0] // student_at.row_shards, vocab_size // shards(student_at.vocab)
    rows = rows_per_chunk(local_tokens, 2 * 4 * local_vocab, chunk_bytes)
    problem = _Problem(kind, beta, softcap, teacher_softcap, rows, student_at, teacher_at)
    teacher = jax.lax.stop_gradient(
        (
            teacher_states,
            teacher_unembedding,
            jnp.asarray(teacher_temperature, wide),
        )
    )
    values: Array = _token_divergence(problem, states, unembedding, jnp.asarray(temperature, wide), teacher)
    return chosen.put_back(values)


def _check_arguments(hidden, unembedding, teacher_hidden, teacher_unembedding, kind, beta, chunk_bytes) -> float:
    for prefix, states, weight in (("", hidden, unembedding), ("teacher_", teacher_hidden, teacher_unembedding)):
        if states.ndim != 2 or weight.ndim != 2 or states.shape[1] != weight.shape[1]:
            raise ValueError(
                f"{prefix}hidden must be [N, D] and {prefix}unembedding [V, D], got shapes {states.shape} and "
                f"{weight.shape}"
            )
    if hidden.shape[0] != teacher_hidden.shape[0]:
        raise ValueError(
            f"hidden and teacher_hidden must be of the same N tokens, got {hidden.shape[0]} and "
            f"{teacher_hidden.shape[0]}"
        )
    if unembedding.shape[0] != teacher_unembedding.shape[0]:
        raise ValueError(
            f"unembedding and teacher_unembedding must be of the same V tokens, got {unembedding.shape[0]} and "
            f"{teacher_unembedding.shape[0]}; cut off rows of padding, or map one vocabulary to the other"
        )
    if kind not in get_args(DivergenceKind):
        raise ValueError(f"kind must be one of {', '.join(get_args(DivergenceKind))}, got {kind!r}")
    if beta is not None and kind != "jsd":
        raise ValueError(f"beta is for kind='jsd', not {kind!r}; leave it out")
    if beta is not None and not 0 < beta < 1:
        raise ValueError(
            f"beta must be between 0 and 1, got {beta}; at 0 and 1 jsd is 0: use kind='forward_kl' or 'reverse_kl'"
        )
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be at least 1, got {chunk_bytes}")
    return 0.5 if beta is None else beta


class _Problem(NamedTuple):
    """What is known when a call is traced."""

    kind: str
    beta: float
    softcap: float | None
    teacher_softcap: float | None
    rows: int
    student_at: core.Layout
    teacher_at: core.Layout


class _Normalizer(NamedTuple):
    """`log p = (z - top) / temperature - log_total`, per token; two numbers, so that large logits cost no digits."""

    top: Array
    log_total: Array


class _Known(NamedTuple):
    """What the forward pass knows of each token."""

    value: Array
    student: _Normalizer
    teacher: _Normalizer
    center: Array  # mean under the student of what the gradients of its log-probs are measured from
    d_hidden: Array | None  # gradients of value
    d_temperature: Array | None


class _Saved(NamedTuple):
    hidden: Array
    unembedding: Array
    temperature: Array
    teacher: tuple[Array, Array, Array] | None  # None if no logits are needed again
    known: _Known


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_divergence(problem, hidden, unembedding, temperature, teacher):
    return _run(problem, hidden, unembedding, temperature, teacher, False, False).value


def _forward(problem, hidden, unembedding, temperature, teacher):
    values = hidden.value, unembedding.value, temperature.value, tuple(x.value for x in teacher)
    known = _run(problem, *values, hidden.perturbed, temperature.perturbed)
    saved = _Saved(*values, known)
    return known.value, saved if unembedding.perturbed else saved._replace(teacher=None)


def _backward(problem, saved: _Saved, cotangent):
    if isinstance(cotangent, SymbolicZero):
        cotangent = jnp.zeros_like(saved.known.value)
    known = saved.known
    d_hidden = d_temperature = d_unembedding = None
    if known.d_hidden is not None:
        d_hidden = (raise_to_float32(known.d_hidden) * cotangent[:, None]).astype(saved.hidden.dtype)
    if known.d_temperature is not None:
        d_temperature = jnp.sum(known.d_temperature * cotangent)
    if saved.teacher is not None:
        d_unembedding = _gradient_of_unembedding(problem, saved, cotangent)
    return d_hidden, d_unembedding, d_temperature, None


_token_divergence.defvjp(_forward, _backward, symbolic_zeros=True)


def _run(problem, hidden, unembedding, temperature, teacher, want_hidden, want_temperature) -> _Known:
    at = problem.student_at
    axes = exchange.vocabulary(at)
    specs, teacher_specs = core.specs(at), core.specs(problem.teacher_at)
    narrow = jnp.promote_types(hidden.dtype, unembedding.dtype)

    def local(hidden, unembedding, temperature, teacher) -> _Known:
        teacher_hidden, teacher_unembedding, teacher_temperature = teacher
        weight, _ = exchange.rows_of(at, unembedding)
        teacher_weight, _ = exchange.rows_of(problem.teacher_at, teacher_unembedding)

        def step(_, chunk):
            hidden, teacher_hidden = exchange.gather(at, chunk)
            z = _logits(hidden, weight, problem.softcap)
            teacher_z = _logits(teacher_hidden, teacher_weight, problem.teacher_softcap)
            tops = jnp.stack([jnp.max(z, axis=-1), jnp.max(teacher_z, axis=-1)]).astype(temperature.dtype)
            top, teacher_top = jax.lax.pmax(tops, axes) if axes else tops
            x, teacher_x = (z - top[:, None]) / temperature, (teacher_z - teacher_top[:, None]) / teacher_temperature
            log_total, teacher_log_total = jnp.log(_add_stacked((jnp.exp(x), jnp.exp(teacher_x)), axes))
            log_q, log_p = x - log_total[:, None], teacher_x - teacher_log_total[:, None]
            value, center = _value(problem, log_p, log_q, axes)
            d_hidden = d_temperature = None
            if want_hidden or want_temperature:
                tempered, raw = _slope(problem, log_p, log_q, center, z, temperature)
            if want_temperature:
                d_temperature = -exchange.add(jnp.sum(tempered * (z - top[:, None]), axis=-1), axes) / temperature**2
            if want_hidden:
                d_hidden = exchange.add_own(at, matmul(raw.astype(narrow), weight, ((1,), (0,)))).astype(hidden.dtype)
            student, of_teacher = _Normalizer(top, log_total), _Normalizer(teacher_top, teacher_log_total)
            known = exchange.own(at, _Known(value, student, of_teacher, center, None, d_temperature))
            return None, known._replace(d_hidden=d_hidden)

        return scan_chunks(step, None, (hidden, teacher_hidden), problem.rows)[1]

    run = core.per_device(
        at,
        local,
        (specs.hidden, specs.unembedding, specs.scalar, (specs.hidden, teacher_specs.unembedding, specs.scalar)),
        specs.token,
    )
    return run(hidden, unembedding, temperature, teacher)


def _gradient_of_unembedding(problem: _Problem, saved: _Saved, cotangent: Array) -> Array:
    at = problem.student_at
    specs, teacher_specs = core.specs(at), core.specs(problem.teacher_at)
    dtype = saved.unembedding.dtype
    narrow = jnp.promote_types(saved.hidden.dtype, dtype)

    def local(hidden, unembedding, temperature, teacher, known: _Known, cotangent) -> Array:
        teacher_hidden, teacher_unembedding, teacher_temperature = teacher
        weight, _ = exchange.rows_of(at, unembedding)
        teacher_weight, _ = exchange.rows_of(problem.teacher_at, teacher_unembedding)

        def step(d_weight, chunk):
            hidden, teacher_hidden, known, cotangent = exchange.gather(at, chunk)
            z = _logits(hidden, weight, problem.softcap)
            teacher_z = _logits(teacher_hidden, teacher_weight, problem.teacher_softcap)
            log_q = _log_probs(z, known.student, temperature)
            log_p = _log_probs(teacher_z, known.teacher, teacher_temperature)
            _, raw = _slope(problem, log_p, log_q, known.center, z, temperature)
            # Rounded once to what the matrix unit takes; the sums are float32.
            rounded = (raw * cotangent[:, None]).astype(narrow)
            return d_weight + matmul(rounded, hidden, ((0,), (0,))), None

        start = jnp.zeros(weight.shape, jnp.promote_types(dtype, jnp.float32))
        d_weight, _ = scan_chunks(step, start, (hidden, teacher_hidden, known, cotangent), problem.rows)
        return exchange.d_unembedding(at, d_weight, dtype)

    run = core.per_device(
        at,
        local,
        (
            specs.hidden,
            specs.unembedding,
            specs.scalar,
            (specs.hidden, teacher_specs.unembedding, specs.scalar),
            specs.token,
            specs.token,
        ),
        specs.unembedding,
    )
    known = saved.known._replace(d_hidden=None, d_temperature=None)
    return run(saved.hidden, saved.unembedding, saved.temperature, saved.teacher, known, cotangent)


def _logits(hidden: Array, weight: Array, softcap: float | None) -> Array:
    return soft_cap(matmul(hidden, weight, ((1,), (1,))), softcap)


def _log_probs(z: Array, normalizer: _Normalizer, temperature: Array) -> Array:
    return (z - normalizer.top[:, None]) / temperature - normalizer.log_total[:, None]


def _kl_terms(p: Array, q: Array, gap: Array) -> Array:
    """Terms, none negative, of `KL(p || q)` with `gap = log p - log q`: `p gap - p + q`, as the masses add up to 1."""
    small = jnp.clip(gap, -1.0, 1.0)
    return jnp.where(small == gap, p * (jnp.expm1(-small) + small), p * gap - p + q)


def _mixture(gap: Array, beta: float) -> tuple[Array, Array]:
    """`log m - log q` and `log m - log p` of `m = beta p + (1 - beta) q`, from `gap = log p - log q`."""
    above = gap > 0
    rest = jnp.expm1(-jnp.abs(gap))  # of the smaller probability over the larger one, minus 1
    over_larger = jnp.log1p(jnp.where(above, 1 - beta, beta) * rest)
    return jnp.where(above, over_larger + gap, over_larger), jnp.where(above, over_larger, over_larger - gap)


def _value(problem: _Problem, log_p: Array, log_q: Array, axes: tuple[str, ...]) -> tuple[Array, Array]:
    """The divergence of each token, and `_Known.center`."""
    p, q, gap = jnp.exp(log_p), jnp.exp(log_q), log_p - log_q
    if problem.kind == "jsd":
        log_m_q, log_m_p = _mixture(gap, problem.beta)
        m = jnp.exp(log_q + log_m_q)
        from_p, from_q = _add_stacked((_kl_terms(p, m, -log_m_p), _kl_terms(q, m, -log_m_q)), axes)
        return problem.beta * from_p + (1 - problem.beta) * from_q, from_q
    terms = _kl_terms(p, q, gap) if problem.kind == "forward_kl" else _kl_terms(q, p, -gap)
    value = exchange.add(jnp.sum(terms, axis=-1), axes)
    return value, value


def _slope(
    problem: _Problem, log_p: Array, log_q: Array, center: Array, z: Array, temperature: Array
) -> tuple[Array, Array]:
    """Gradients `[rows, columns]` of a divergence with respect to the student's tempered and raw logits."""
    gap, q = log_p - log_q, jnp.exp(log_q)
    if problem.kind == "forward_kl":
        small = jnp.clip(gap, -1.0, 1.0)
        p = jnp.exp(log_p)
        tempered = jnp.where(small == gap, p * jnp.expm1(-small), q - p)
    elif problem.kind == "reverse_kl":
        tempered = q * (-gap - center[:, None])
    else:
        log_m_q, _ = _mixture(gap, problem.beta)
        tempered = (1 - problem.beta) * q * (-log_m_q - center[:, None])
    raw: Any = tempered / temperature
    return tempered, raw if problem.softcap is None else raw * (1 - (z / problem.softcap) ** 2)


def _add_stacked(parts: tuple[Array, ...], axes: tuple[str, ...]) -> Array:
    """Sums over the vocabulary of several `[rows, columns]` arrays, in one reduction between devices."""
    return exchange.add(jnp.stack([jnp.sum(part, axis=-1) for part in parts]), axes)

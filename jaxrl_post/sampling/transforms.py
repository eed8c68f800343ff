"""Pure functions `logits -> logits`: penalties, bans, temperature, top-k, top-p and min-p. Nothing here draws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post.sampling.stop_strings import StopStrings
from jaxrl_post.types import Array


class SamplingParams(NamedTuple):
    """How tokens are drawn.

    A number that is a Python value is static, and costs nothing where it turns its option off. All but the tuples may
    be arrays too, traced ones among them: a scalar for all sequences, or, in `rollout.generate`, one for each prompt
    `[P]` or sequence `[P, G]`. Changing what is in an array compiles nothing anew.

    Attributes:
        temperature: logits are divided by it; at least 1e-6.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of most probable tokens whose probabilities sum to at least this, in (0, 1].
        min_p: keep tokens at least this fraction as probable as the most probable one, in [0, 1).
        greedy: take the most probable token; temperature and truncations are then without effect on the choice.
        stop_tokens: ids that end a sequence; a tuple, or an array `[K]` (-1 for none), or of each prompt `[P, K]` or
            sequence `[P, G, K]`.
        repetition_penalty: see `transform`; 1 is none.
        presence_penalty: see `transform`; 0 is none.
        frequency_penalty: see `transform`; 0 is none.
        min_tokens: no stop token is drawn before so many tokens, and a stop sequence or string that is complete by then
            ends nothing.
        stop_sequences: token ids that end a sequence where they have been sampled one after the other.
        stop_strings: texts that end a sequence where they have come up, whatever their tokens, from
            `sampling.stop_strings`; the token that completes one is the last. None for none.
        logit_bias: array that is added to the logits, `[V]`, or of each prompt `[P, V]` or sequence `[P, G, V]`; None
            for none.
        allowed: bool array of the same shapes, the tokens that may be drawn; None for all.
    """

    temperature: Array | float = 1.0
    top_k: Array | int = 0
    top_p: Array | float = 1.0
    min_p: Array | float = 0.0
    greedy: Array | bool = False
    stop_tokens: Array | tuple[int, ...] = ()
    repetition_penalty: Array | float = 1.0
    presence_penalty: Array | float = 0.0
    frequency_penalty: Array | float = 0.0
    min_tokens: Array | int = 0
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    stop_strings: StopStrings | None = None
    logit_bias: Array | None = None
    allowed: Array | None = None


class SamplingState(NamedTuple):
    """What has been said so far, for the options that depend on it.

    Attributes:
        counts: `[..., V]` int32, how often each token has been sampled.
        prompt: `[..., V]` bool, the tokens that the prompt holds.
        number: `[...]` int32, number of tokens sampled.
    """

    counts: Array
    prompt: Array
    number: Array


NEUTRAL = SamplingParams()

_LEAST_TEMPERATURE = 1e-6

NUMBERS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "greedy",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
)
"""The fields of `SamplingParams` that are a number for all sequences, or one for each."""

OVER_VOCABULARY = ("logit_bias", "allowed")
"""Those that are a number for each token of the vocabulary."""


def is_off(name: str, value: Any) -> bool:
    """Whether an option is known to do nothing: what is in an array is not known.

    Example:
        >>> is_off("top_p", 1.0), is_off("top_p", 0.9), is_off("top_p", jnp.ones(()))
        (True, False, False)
    """
    return value is None or (isinstance(value, int | float | tuple) and value == getattr(NEUTRAL, name))


def needs_state(params: SamplingParams) -> bool:
    """Whether what may be drawn depends on what was sampled before.

    Example:
        >>> needs_state(SamplingParams(top_k=3)), needs_state(SamplingParams(presence_penalty=0.5))
        (False, True)
    """
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens")
    return not all(is_off(name, getattr(params, name)) for name in names)


def is_truncating(params: SamplingParams) -> bool:
    """Whether the sampled distribution may differ from the tempered one.

    Example:
        >>> is_truncating(SamplingParams(temperature=0.7)), is_truncating(SamplingParams(top_k=5))
        (False, True)
    """
    names = ("top_k", "top_p", "min_p", *OVER_VOCABULARY)
    return needs_state(params) or not all(is_off(name, getattr(params, name)) for name in names)


def check(params: SamplingParams) -> None:
    """Raise ValueError for a value of another type or outside its range.

    Values inside arrays, traced ones among them, are not read.
    """

    def known(value: Any) -> bool:
        return isinstance(value, int | float | np.number | np.bool_)

    def whole(value: Any) -> bool:
        kind = getattr(value, "dtype", type(value))
        return jnp.issubdtype(kind, jnp.integer) or kind in (int, bool)

    p = params
    for name in NUMBERS:
        value = getattr(p, name)
        if not (known(value) or hasattr(value, "ndim")):
            raise ValueError(f"{name} must be a number, or an array [P] or [P, G], got {value!r}")
        if known(value) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
        if name in ("top_k", "min_tokens") and not whole(value):
            raise ValueError(f"{name} must be an integer, or integers, got {value!r}")
    if not isinstance(p.stop_tokens, tuple) and not getattr(p.stop_tokens, "ndim", 0):
        raise ValueError(f"stop_tokens must be a tuple, or an array [K], [P, K] or [P, G, K], got {p.stop_tokens!r}")
    if not all(isinstance(sequence, tuple) for sequence in (p.stop_sequences, *p.stop_sequences)):
        raise ValueError(f"stop_sequences must be a tuple of tuples of token ids, got {p.stop_sequences!r}")
    for name in OVER_VOCABULARY:
        if not (getattr(p, name) is None or hasattr(getattr(p, name), "ndim")):
            raise ValueError(f"{name} must be an array, got {getattr(p, name)!r}")
    stops = p.stop_tokens if isinstance(p.stop_tokens, tuple) else (p.stop_tokens,)
    if not all(map(whole, (*stops, *itertools.chain(*p.stop_sequences)))):
        raise ValueError(f"stop tokens are integers, got {p.stop_tokens!r} and {p.stop_sequences!r}")
    if known(p.temperature) and not p.temperature > 0:
        raise ValueError(f"temperature must be positive, got {p.temperature}; use greedy=True for the argmax")
    if known(p.temperature) and p.temperature < _LEAST_TEMPERATURE:
        raise ValueError(
            f"temperature must be at least {_LEAST_TEMPERATURE}, got {p.temperature}, which leaves nothing of float32 "
            "logits but their rounding; use greedy=True for the argmax"
        )
    if known(p.top_p) and not 0 < p.top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {p.top_p}; 1.0 turns it off")
    if known(p.top_k) and p.top_k < 0:
        raise ValueError(f"top_k must be 0 (off) or positive, got {p.top_k}")
    if known(p.min_p) and not 0 <= p.min_p < 1:
        raise ValueError(f"min_p must be in [0, 1), got {p.min_p}; 0.0 turns it off")
    if known(p.repetition_penalty) and not p.repetition_penalty > 0:
        raise ValueError(f"repetition_penalty must be positive, got {p.repetition_penalty}; 1.0 turns it off")
    if known(p.min_tokens) and p.min_tokens < 0:
        raise ValueError(f"min_tokens must be 0 (off) or positive, got {p.min_tokens}")
    if any(not sequence for sequence in p.stop_sequences):
        raise ValueError(f"stop_sequences must not hold an empty one, got {p.stop_sequences}")
    if not isinstance(p.stop_strings, StopStrings | None):
        raise ValueError(
            "stop_strings must be what sampling.stop_strings makes of texts and a vocabulary (data.token_bytes), got "
            f"{p.stop_strings!r}"
        )


def transform(
    logits: Array,
    state: SamplingState | None = None,
    *,
    temperature: Array | float = 1.0,
    top_k: Array | int = 0,
    top_p: Array | float = 1.0,
    min_p: Array | float = 0.0,
    repetition_penalty: Array | float = 1.0,
    presence_penalty: Array | float = 0.0,
    frequency_penalty: Array | float = 0.0,
    min_tokens: Array | int = 0,
    stop_tokens: Array | tuple[int, ...] = (),
    logit_bias: Array | None = None,
    allowed: Array | None = None,
) -> Array:
    r"""Tempered logits with -inf where a truncation or a ban forbids the token.

    In this order, as vLLM has it: `logit_bias` is added; a token seen in prompt or completion has its logit divided by
    `repetition_penalty` if positive and multiplied if negative; $z_v$ loses `frequency_penalty` $\cdot\, n_v +$
    `presence_penalty` $\cdot\, [n_v > 0]$, where $n_v$ counts the completion's tokens; what is banned becomes -inf;
    then temperature; then top-k; then top-p on what top-k left, renormalised, as transformers and vLLM do; min-p
    compares with the most probable token. A token is kept if every truncation keeps it, the most probable one always.

    Nothing is sorted: the least logit that a truncation keeps is found exactly, by a search between bounds that takes
    some fifteen sums over the vocabulary, more where many logits are equal.

    Args:
        logits: `[..., V]`, any real dtype.
        state: what was sampled before, for the penalties and `min_tokens`; None if there are none.
        temperature: positive; like all numbers here a scalar or `[...]`, one for each row.
        top_k: tokens to keep, ties with the k-th included; 0 keeps all.
        top_p: nucleus mass in (0, 1]; 1 keeps all.
        min_p: in [0, 1); 0 keeps all.
        repetition_penalty: positive; 1 is none.
        presence_penalty: nats; 0 is none.
        frequency_penalty: nats for each time; 0 is none.
        min_tokens: `stop_tokens` are banned until the completion has so many tokens.
        stop_tokens: ids `[K]` or `[..., K]`, for `min_tokens`; negative ones are ignored.
        logit_bias: `[V]` or `[..., V]`.
        allowed: bool, `[V]` or `[..., V]`; what is False is banned.

    Returns:
        `[..., V]` float32 or wider.

    Raises:
        ValueError: if a static value is out of range, an array has another shape, or an option needs
            `state` and there is none.

    Example:
        >>> logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
        >>> jnp.isfinite(transform(logits, top_p=0.7)).tolist()
        [True, True, False, False]
        >>> rows = transform(jnp.stack([logits, logits]), top_k=jnp.array([1, 3]))
        >>> jnp.isfinite(rows).sum(axis=-1).tolist()
        [1, 3]

    References:
        top-p: The Curious Case of Neural Text Degeneration, arXiv 1904.09751; min-p: Turning Up the Heat, arXiv
        2407.01082; repetition penalty: CTRL: A Conditional Transformer Language Model, arXiv 1909.05858.
    """
    given = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        min_tokens=min_tokens,
        stop_tokens=stop_tokens,
        logit_bias=logit_bias,
        allowed=allowed,
    )
    check(given)
    rows, size = logits.shape[:-1], logits.shape[-1]
    for name in NUMBERS:
        found = jnp.shape(getattr(given, name))
        if found not in ((), rows):
            raise ValueError(f"{name} must be a number, or {list(rows)} for each row, got shape {found}")
    shape = getattr(stop_tokens, "shape", ())
    if shape[:-1] not in ((), rows):
        raise ValueError(f"stop_tokens must be [K] or {[*rows, 'K']}, got shape {shape}")
    for name in OVER_VOCABULARY:
        value = getattr(given, name)
        if value is not None and jnp.shape(value) not in ((size,), logits.shape):
            raise ValueError(f"{name} must be {[size]} or {list(logits.shape)}, got shape {jnp.shape(value)}")
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if logit_bias is not None:
        logits = logits + jnp.asarray(logit_bias, logits.dtype)
    if needs_state(given):
        if state is None:
            raise ValueError("penalties and min_tokens depend on what was sampled before: give state")
        logits = _penalized(logits, state, given)
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    logits = logits / _column(temperature, logits.dtype)
    cuts: list[tuple[Any, Any, Callable[[Array], Array]]] = []
    if not is_off("top_k", top_k):
        cuts.append((top_k, _column(top_k) > 0, lambda keep: _within_top_k(logits, top_k)))
    if not is_off("top_p", top_p):
        mass = _column(top_p, logits.dtype)
        cuts.append((top_p, mass < 1, lambda keep: _within_top_p(logits, keep, mass)))
    highest = jnp.max(logits, axis=-1, keepdims=True)
    keep = jnp.ones(logits.shape, bool)
    for value, on, cut in cuts:
        if isinstance(value, int | float):
            keep &= cut(keep)
        else:  # what no row asks for is not computed
            keep = jax.lax.cond(jnp.any(on), lambda k, on=on, cut=cut: k & (cut(k) | ~on), lambda k: k, keep)
    if not is_off("min_p", min_p):
        keep &= logits >= highest + jnp.log(_column(min_p, logits.dtype))
    return jnp.where(keep | (logits == highest), logits, -jnp.inf)


def _column(value: Array | float, dtype: Any = None) -> Any:
    """A number, or one for each row, so that it goes with `[..., V]` of a dtype, which it does not widen."""
    if not hasattr(value, "ndim"):
        return value
    value = jnp.asarray(value, dtype)
    return value[..., None] if value.ndim else value


def _penalized(logits: Array, state: SamplingState, params: SamplingParams) -> Array:
    counts, prompt, number = state
    if not is_off("repetition_penalty", params.repetition_penalty):
        factor = _column(params.repetition_penalty, logits.dtype)
        seen = prompt | (counts > 0)
        logits = jnp.where(seen, jnp.where(logits > 0, logits / factor, logits * factor), logits)
    if not is_off("frequency_penalty", params.frequency_penalty):
        logits = logits - _column(params.frequency_penalty, logits.dtype) * counts
    if not is_off("presence_penalty", params.presence_penalty):
        logits = logits - _column(params.presence_penalty, logits.dtype) * (counts > 0)
    if not is_off("min_tokens", params.min_tokens):
        size = logits.shape[-1]

        def among(stops: Array) -> Array:
            return jnp.zeros(size, bool).at[jnp.where(stops < 0, size, stops)].set(True, mode="drop")

        banned = jnp.vectorize(among, signature="(k)->(v)")(jnp.asarray(params.stop_tokens, jnp.int32))
        early = jnp.asarray(number < params.min_tokens)[..., None]
        logits = jnp.where(early & banned, -jnp.inf, logits)
    return logits


def _within_top_k(logits: Array, top_k: Array | int) -> Array:
    if isinstance(top_k, int):
        top_k = min(top_k, logits.shape[-1])
    return _highest(logits, jnp.ones((), logits.dtype), _column(top_k))


def _within_top_p(logits: Array, keep: Array, top_p: Any) -> Array:
    left = jnp.where(keep, logits, -jnp.inf)
    best = jnp.max(left, axis=-1, keepdims=True)
    # What is less probable than this weighs less than 1 - top_p, all of it together, and is never needed.
    rest = jnp.log(jnp.maximum(1 - jnp.asarray(top_p, logits.dtype), 0) / logits.shape[-1])
    return _highest(logits, jax.nn.softmax(left, axis=-1), top_p, best + rest - 1)


class _Search(NamedTuple):
    """Where the least value that is kept may be; all `[..., 1]`.

    Attributes:
        low: int, in the order of `_in_order`: what is not below it weighs enough.
        high: int, what is not below it does not.
        weight_low: of what is not below `low`.
        weight_high: of what is not below `high`.
        number_low: int32, values not below `low`, or more than there are.
        number_high: int32, values not below `high`.
        narrowed: bool, whether the last step left fewer values between the two.
    """

    low: Array
    high: Array
    weight_low: Array
    weight_high: Array
    number_low: Array
    number_high: Array
    narrowed: Array


def _highest(values: Array, weight: Array, wanted: Any, floor: Array | None = None) -> Array:
    """`[..., V]` bool: the fewest of the highest values whose weights sum to what is wanted, and what ties with them.

    Args:
        values: `[..., V]`.
        weight: the same shape, or a scalar; not negative.
        wanted: scalar or `[..., 1]`.
        floor: `[..., 1]`, a value that is known to be low enough; None if none is.
    """
    # What is kept is a choice, through which no gradient goes.
    values, weight, wanted, floor = jax.lax.stop_gradient((values, weight, wanted, floor))
    places = _in_order(values)

    def above(least: Array) -> tuple[Array, Array]:
        inside = places >= least
        pairs = (jnp.where(inside, weight, jnp.zeros((), weight.dtype)), inside.astype(jnp.int32))
        # Two sums would go through the vocabulary twice, which takes three times as long as this on a CPU.
        nothing = tuple(jnp.zeros((), x.dtype) for x in pairs)
        total, number = jax.lax.reduce(pairs, nothing, lambda a, b: (a[0] + b[0], a[1] + b[1]), (values.ndim - 1,))
        return total[..., None], number[..., None]

    def is_open(state: _Search) -> Array:
        # With one value left between the bounds, nothing that is still open matters.
        return (state.high - 1 > state.low) & (state.number_low - state.number_high > 1)

    def narrow(state: _Search) -> _Search:
        middle = _between(state, wanted)
        total, number = above(middle)
        enough = total >= wanted
        low, weight_low, number_low = (
            jnp.where(enough, new, old)
            for new, old in ((middle, state.low), (total, state.weight_low), (number, state.number_low))
        )
        high, weight_high, number_high = (
            jnp.where(enough, old, new)
            for new, old in ((middle, state.high), (total, state.weight_high), (number, state.number_high))
        )
        narrowed = number_low - number_high < state.number_low - state.number_high
        return _Search(low, high, weight_low, weight_high, number_low, number_high, narrowed)

    low = jnp.min(places, axis=-1, keepdims=True)
    high = jnp.max(places, axis=-1, keepdims=True) + 1
    if floor is not None:
        low = jnp.clip(_in_order(floor), low, high - 1)
    start = _Search(
        low=low,
        high=high,
        weight_low=jnp.broadcast_to(jnp.sum(jnp.broadcast_to(weight, values.shape), axis=-1, keepdims=True), low.shape),
        weight_high=jnp.zeros(low.shape, weight.dtype),
        number_low=jnp.full_like(low, values.shape[-1], dtype=jnp.int32),
        number_high=jnp.zeros_like(low, dtype=jnp.int32),
        narrowed=jnp.ones(low.shape, bool),
    )
    return places >= jax.lax.while_loop(lambda state: jnp.any(is_open(state)), narrow, start).low


def _between(state: _Search, wanted: Any) -> Array:
    """A place between the bounds, nearer to the one whose weight is nearer to what is wanted.

    Where the last step did not help, as with ties, half-way between them in the order of the numbers: that ends.
    """
    low, high = state.low, state.high
    bottom, top = _in_order_inverse(low), _in_order_inverse(high - 1)
    share = (state.weight_low - wanted) / (state.weight_low - state.weight_high)
    guess = bottom + (0.25 + 0.5 * share) * (top - bottom)
    half = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
    middle = jnp.where(state.narrowed & jnp.isfinite(guess), _in_order(guess), half)
    return jnp.clip(middle, low + 1, high - 1)


def _in_order(values: Array) -> Array:
    """Integers in the order of the floating-point numbers: next to each other where those are."""
    kind = {4: jnp.int32, 8: jnp.int64}[values.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, jnp.zeros((), values.dtype), values), kind)
    return jnp.where(bits < 0, bits ^ jnp.iinfo(kind).max, bits)


def _in_order_inverse(places: Array) -> Array:
    """The floating-point numbers at these places."""
    kind = {4: jnp.float32, 8: jnp.float64}[places.dtype.itemsize]
    bits = jnp.where(places < 0, places ^ jnp.iinfo(places.dtype).max, places)
    return jax.lax.bitcast_convert_type(bits, kind)

"""Pure functions `logits -> logits`: temperature, top-k, top-p and min-p. Nothing here draws."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_post.types import Array


class SamplingParams(NamedTuple):
    """How tokens are drawn. The truncations are static: one that is off costs nothing.

    Attributes:
        temperature: logits are divided by it; positive.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of most probable tokens whose probabilities sum to at least this, in (0, 1].
        min_p: keep tokens at least this fraction as probable as the most probable one, in [0, 1).
        greedy: take the most probable token; the other fields are then without effect on the choice.
        stop_tokens: ids that end a sequence.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    greedy: bool = False
    stop_tokens: tuple[int, ...] = ()


def check(temperature: Array | float, top_k: int, top_p: Array | float, min_p: Array | float) -> None:
    """Raise ValueError for a value outside its range; values inside arrays (traced ones among them) are not read."""
    if not isinstance(temperature, jax.Array) and not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}; use greedy=True for the argmax")
    if not isinstance(top_p, jax.Array) and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}; 1.0 turns it off")
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (off) or positive, got {top_k}")
    if not isinstance(min_p, jax.Array) and not 0 <= min_p < 1:
        raise ValueError(f"min_p must be in [0, 1), got {min_p}; 0.0 turns it off")


def is_truncating(params: SamplingParams) -> bool:
    """Whether some token may be forbidden, so that the sampled distribution is not the tempered one.

    Example:
        >>> is_truncating(SamplingParams(temperature=0.7)), is_truncating(SamplingParams(top_k=5))
        (False, True)
    """
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def transform(
    logits: Array,
    state: None = None,
    *,
    temperature: Array | float = 1.0,
    top_k: int = 0,
    top_p: Array | float = 1.0,
    min_p: Array | float = 0.0,
) -> Array:
    """Tempered logits with -inf where a truncation forbids the token.

    Temperature first; then top-k; then top-p on what top-k left, renormalised, as transformers and vLLM do; min-p
    compares with the most probable token. A token is kept if every one of them keeps it, the most probable one always.

    Args:
        logits: `[..., V]`, any real dtype.
        state: reserved for transformations that depend on what was sampled before; None.
        temperature: positive scalar.
        top_k: tokens to keep, ties with the k-th included; 0 keeps all.
        top_p: nucleus mass in (0, 1]; 1 keeps all.
        min_p: in [0, 1); 0 keeps all.

    Returns:
        `[..., V]` float32 or wider.

    Raises:
        ValueError: if `state` is not None, or a static value is out of range.

    Example:
        >>> logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
        >>> jnp.isfinite(transform(logits, top_p=0.7)).tolist()
        [True, True, False, False]

    References:
        top-p: The Curious Case of Neural Text Degeneration, arXiv 1904.09751; min-p: Turning Up the Heat, arXiv
        2407.01082.
    """
    if state is not None:
        raise ValueError("state is reserved and must be None")
    check(temperature, top_k, top_p, min_p)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature
    highest = jnp.max(logits, axis=-1, keepdims=True)
    keep = jnp.ones(logits.shape, bool)
    if top_k > 0:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        keep &= logits >= kth
    if not (isinstance(top_p, float | int) and top_p >= 1):
        probs = jax.nn.softmax(jnp.where(keep, logits, -jnp.inf), axis=-1)
        descending = jnp.flip(jnp.sort(probs, axis=-1), axis=-1)
        before = jnp.cumsum(descending, axis=-1) - descending
        # The least probable token still needed to reach the mass; everything at least as probable stays.
        inside = before < top_p
        threshold = jnp.min(jnp.where(inside, descending, jnp.inf), axis=-1, keepdims=True)
        keep &= probs >= threshold
    if not (isinstance(min_p, float | int) and min_p <= 0):
        keep &= logits >= highest + jnp.log(min_p)
    return jnp.where(keep | (logits == highest), logits, -jnp.inf)

"""Corrections for a sampler whose log-probs differ from the trained model's, by name.

All are rows of `losses.importance_weights` and `losses.rejection_mask`, with the bounds of those who published them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxrl_post import losses
from jaxrl_post.losses.mismatch import RatioLevel, RejectionReduction, RejectionStatistic
from jaxrl_post.methods.choices import Choice, choose
from jaxrl_post.types import Array

Correction = Callable[[Array, Array, Array], tuple[Array, Array]]
"""`(old_logp, sampler_logp, mask) -> (weights, mask)`, each `[B, T]`."""


def weighting(
    old_logp: Array,
    sampler_logp: Array,
    mask: Array,
    *,
    level: RatioLevel = "token",
    low: float | None = None,
    high: float | None = 2.0,
    outside: Literal["clamp", "zero"] = "clamp",
    bounds_on: RatioLevel | None = None,
    batch_normalize: bool = False,
) -> tuple[Array, Array]:
    """Tokens weigh by `losses.importance_weights` and all of them stay in the denominator."""
    options = {"level": level, "low": low, "high": high, "outside": outside, "bounds_on": bounds_on}
    weights = losses.importance_weights(old_logp, sampler_logp, mask, **options, batch_normalize=batch_normalize)
    return weights, mask


def rejection(
    old_logp: Array,
    sampler_logp: Array,
    mask: Array,
    *,
    statistic: RejectionStatistic = "k1",
    reduce: RejectionReduction = "seq_mean",
    low: float | None = None,
    high: float | None = 2.0,
) -> tuple[Array, Array]:
    """Tokens that `losses.rejection_mask` drops leave loss and denominator; the others weigh as before."""
    options = {"statistic": statistic, "reduce": reduce, "low": low, "high": high}
    return jnp.ones_like(old_logp), losses.rejection_mask(old_logp, sampler_logp, mask, **options)


CORRECTIONS: dict[str, Callable[..., tuple[Array, Array]]] = {
    "icepop": functools.partial(weighting, low=0.5, high=5.0, outside="zero"),
    "mis": functools.partial(weighting, level="sequence", high=3.0, outside="zero"),
    "rejection": rejection,
    "seq_mask_tis": functools.partial(weighting, bounds_on="geometric", low=0.999, high=1.002, outside="zero"),
    "tis": weighting,
}
"""Corrections by name; each takes the keywords of its function, over which its own bounds are set."""


def as_corrections(choice: Choice | list | tuple | None) -> list[Correction]:
    """The corrections that a choice, a list of choices or None means.

    Raises:
        ValueError: for an unknown name or keyword, or one out of its range.

    Example:
        >>> as_corrections(None)
        []
        >>> as_corrections({"name": "tis", "level": "word"})
        Traceback (most recent call last):
            ...
        ValueError: correction: level must be one of token, sequence, geometric, got 'word'
    """
    if choice is None:
        return []
    many: list[Any] = list(choice) if isinstance(choice, list | tuple) else [choice]
    found = [choose("correction", one, CORRECTIONS, {}) for one in many]
    shape = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    for correction in found:
        try:
            jax.eval_shape(correction, shape, shape, shape)
        except ValueError as error:
            raise ValueError(f"correction: {error}") from error
    return found

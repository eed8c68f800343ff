"""Keywords of methods that have no meaning are errors where the method is made, not ignored where it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from jaxrl_post.types import AggregationMode


def one_of(name: str, value: Any, literal: Any) -> None:
    """Raise ValueError unless `value` is among the choices of a `Literal` type.

    Example:
        >>> one_of("aggregation", "mean", AggregationMode)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: aggregation must be one of token_mean, seq_mean_token_sum, ..., got 'mean'
    """
    choices = get_args(literal)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def within(name: str, value: float | None, low: float, high: float = float("inf")) -> None:
    """Raise ValueError unless `value` is None or a number in `[low, high]`; True and False are none.

    Example:
        >>> within("gamma", 2.0, 0, 1)
        Traceback (most recent call last):
            ...
        ValueError: gamma must be between 0 and 1, got 2.0
    """
    if isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {value}")
    if value is not None and not low <= value <= high:
        wanted = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
        raise ValueError(f"{name} must be {wanted}, got {value}")


def above(name: str, value: float | None, low: float) -> None:
    """Raise ValueError unless `value` is None or a number larger than `low`.

    Example:
        >>> above("beta", 0.0, 0)
        Traceback (most recent call last):
            ...
        ValueError: beta must be above 0, got 0.0
    """
    if isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {value}")
    if value is not None and not value > low:
        raise ValueError(f"{name} must be above {low}, got {value}")


def applies(condition: bool, otherwise: str, **given: Any) -> None:
    """Raise ValueError if a keyword is given (not None) and the condition under which it is read does not hold.

    Args:
        condition: the keywords are read.
        otherwise: what the user chose, by which they are not.
        **given: the keywords.

    Example:
        >>> applies(False, "loss='dpo'", gamma=1.0)
        Traceback (most recent call last):
            ...
        ValueError: gamma=1.0 does not apply to loss='dpo'; leave it out
    """
    for name, value in given.items():
        if value is not None and not condition:
            raise ValueError(f"{name}={value!r} does not apply to {otherwise}; leave it out")


def kl_in_loss(options: Mapping[str, Any], why: str) -> None:
    """Raise ValueError for `kl_in="reward"`, which would change a reward that a method reads as a judgement.

    Example:
        >>> kl_in_loss({"kl_in": "reward"}, "answers are told right by their reward")
        Traceback (most recent call last):
            ...
        ValueError: kl_in='reward' does not apply: answers are told right by their reward
    """
    if options.get("kl_in", "loss") != "loss":
        raise ValueError(f"kl_in={options['kl_in']!r} does not apply: {why}")


def reduction(aggregation: str, horizon: int | None) -> None:
    """Raise ValueError unless the aggregation exists and `horizon` is given exactly where it is used."""
    one_of("aggregation", aggregation, AggregationMode)
    fixed = aggregation == "seq_mean_token_sum_norm"
    if fixed and horizon is None:
        raise ValueError("aggregation='seq_mean_token_sum_norm' divides by horizon; give e.g. the limit of new tokens")
    applies(fixed, f"aggregation={aggregation!r}", horizon=horizon)
    within("horizon", horizon, 1)


def clipping(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    """Raise ValueError for bounds that clip nothing or everything."""
    within("clip_low", clip_low, 0, 1)
    within("clip_high", clip_high, 0)
    within("dual_clip", dual_clip, 1)

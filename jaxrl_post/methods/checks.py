"""Keywords of methods that have no meaning are errors where the method is made, not ignored where it is used."""

from __future__ import annotations

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
    """Raise ValueError unless `value` is None or in `[low, high]`.

    Example:
        >>> within("gamma", 2.0, 0, 1)
        Traceback (most recent call last):
            ...
        ValueError: gamma must be between 0 and 1, got 2.0
    """
    if value is not None and not low <= value <= high:
        wanted = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
        raise ValueError(f"{name} must be {wanted}, got {value}")


def reduction(aggregation: str, horizon: int | None) -> None:
    """Raise ValueError unless the aggregation exists and `horizon` is given exactly where it is used."""
    one_of("aggregation", aggregation, AggregationMode)
    fixed = aggregation == "seq_mean_token_sum_norm"
    if fixed and horizon is None:
        raise ValueError("aggregation='seq_mean_token_sum_norm' divides by horizon; give e.g. the limit of new tokens")
    if not fixed and horizon is not None:
        raise ValueError(f"horizon={horizon} does not apply to aggregation={aggregation!r}; leave it out")
    within("horizon", horizon, 1)


def clipping(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    """Raise ValueError for bounds that clip nothing or everything."""
    within("clip_low", clip_low, 0, 1)
    within("clip_high", clip_high, 0)
    within("dual_clip", dual_clip, 1)

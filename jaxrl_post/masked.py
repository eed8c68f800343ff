"""Statistics under a mask, and what an empty mask, a single element or a zero spread gives.

Every mean, variance, quantile and normalisation of the library is taken here, so that the edge cases have one answer:
an empty mask gives 0, one element has variance 0, and gradients are finite in both cases. The float32-or-wider rule
and the shape checks that losses and advantages share live here too.

A mask is 1 (or True) where an element counts and 0 elsewhere; masked elements may hold anything, NaN included, and
receive zero gradient. Other values are frequency weights: 2 counts an element twice, 0.5 half.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import chex
import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxrl_post.types import Array

__all__ = [
    "as_float",
    "center",
    "check_axes",
    "check_indices",
    "check_like",
    "max",
    "mean",
    "min",
    "quantile",
    "std",
    "sum",
    "var",
    "whiten",
]

Axis: TypeAlias = int | tuple[int, ...] | None


def as_float(x: Any) -> Array:
    """`x` as an array of float32 or wider: integers and 16-bit floats are raised, float64 stays float64.

    Args:
        x: array-like of any shape and dtype.

    Returns:
        The same numbers as float32, or in `x`'s own dtype if that is wider.

    Example:
        >>> as_float(jnp.ones(2, jnp.bfloat16)).dtype
        dtype('float32')
    """
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_axes(name: str, x: Array, axes: str, hint: str = "") -> None:
    """Raise unless `x` has one dimension per symbol of `axes`.

    Args:
        name: the argument's name, for the message.
        x: array.
        axes: the expected axes, e.g. `"[P, G]"`; alternatives are separated by `" or "`.
        hint: what to change, appended to the message.

    Raises:
        ValueError: if the rank is another.

    Example:
        >>> check_axes("rewards", jnp.zeros(64), "[P, G]", "reshape with as_groups(rewards, group_size=8)")
        Traceback (most recent call last):
            ...
        ValueError: rewards must be [P, G], got shape (64,); reshape with as_groups(rewards, group_size=8)
    """
    ranks = {option.count(",") + 1 for option in axes.split(" or ")}
    try:
        chex.assert_rank(x, ranks)
    except AssertionError:
        raise ValueError(f"{name} must be {axes}, got shape {jnp.shape(x)}" + (f"; {hint}" if hint else "")) from None


def check_like(name: str, x: Array, like_name: str, like: Array, hint: str = "") -> None:
    """Raise unless `x` has the shape of `like`; nothing is ever broadcast silently.

    Args:
        name: the argument's name, for the message.
        x: array.
        like_name: the name of the argument whose shape is expected.
        like: that argument.
        hint: what to change, appended to the message.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> check_like("mask", jnp.zeros(2), "logp", jnp.zeros((2, 3)))
        Traceback (most recent call last):
            ...
        ValueError: mask must have the shape of logp, (2, 3), got (2,)
    """
    try:
        chex.assert_equal_shape([x, like])
    except AssertionError:
        message = f"{name} must have the shape of {like_name}, {jnp.shape(like)}, got {jnp.shape(x)}"
        raise ValueError(message + (f"; {hint}" if hint else "")) from None


def check_indices(name: str, indices: Array, size: int, counted: Array | None = None) -> None:
    """Raise unless indices are within a table, where their values are known: not those of a traced array.

    Args:
        name: the argument's name, for the message.
        indices: any shape, int.
        size: of the table.
        counted: bool, of the shape of `indices`, those that matter; None for all.

    Raises:
        ValueError: for an index below 0, or not below `size`.

    Example:
        >>> check_indices("role", jnp.array([0, 2]), 2)
        Traceback (most recent call last):
            ...
        ValueError: role must be in [0, 2), got 2
    """
    if isinstance(indices, Tracer) or isinstance(counted, Tracer):
        return
    wrong = (indices < 0) | (indices >= size)
    if counted is not None:
        wrong &= counted
    if jnp.any(wrong):
        raise ValueError(f"{name} must be in [0, {size}), got {indices[wrong][0]}")


def _prepare(x: Any, mask: Any) -> tuple[Array, Array]:
    x, mask = as_float(x), jnp.asarray(mask)
    fits = x.ndim == mask.ndim and all(m in (1, n) for m, n in zip(mask.shape, x.shape, strict=True))
    if not fits:
        raise ValueError(
            f"mask must have the shape of x, {x.shape}, or 1 along some of its axes, got {mask.shape}; "
            "add the missing axes with mask[:, None]"
        )
    weight = jnp.broadcast_to(mask, x.shape).astype(x.dtype)
    return jnp.where(weight != 0, x, 0.0), weight


def _divide(numerator: Array, denominator: Array) -> Array:
    positive = denominator > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1.0), 0.0)


def sum(x: Array, mask: Array, axis: Axis = None, *, keepdims: bool = False) -> Array:
    r"""Sum under a mask, $\sum_i m_i x_i$; an empty mask gives 0.

    Args:
        x: any shape, float.
        mask: of `x`'s shape, or 1 along some axes; 1 where `x` counts.
        axis: axes to reduce; None for all.
        keepdims: keep the reduced axes with length one.

    Returns:
        The reduced array, float32 or wider.

    Raises:
        ValueError: if `mask` does not fit `x`.

    Example:
        >>> float(sum(jnp.array([1.0, 2.0, jnp.nan]), jnp.array([1, 1, 0])))
        3.0
    """
    x, weight = _prepare(x, mask)
    return jnp.sum(x * weight, axis=axis, keepdims=keepdims)


def mean(x: Array, mask: Array, axis: Axis = None, *, keepdims: bool = False) -> Array:
    r"""Mean under a mask, $\sum_i m_i x_i / \sum_i m_i$; an empty mask gives 0.

    The mean of equal numbers is exactly that number: a second pass adds the mean of the residuals, which removes the
    rounding of the first.

    Args:
        x: any shape, float.
        mask: of `x`'s shape, or 1 along some axes; 1 where `x` counts.
        axis: axes to reduce; None for all.
        keepdims: keep the reduced axes with length one.

    Returns:
        The reduced array, float32 or wider.

    Raises:
        ValueError: if `mask` does not fit `x`.

    Example:
        >>> float(mean(jnp.array([1.0, 2.0, 9.0]), jnp.array([1, 1, 0])))
        1.5
        >>> float(mean(jnp.array([5.0]), jnp.array([0])))
        0.0
    """
    x, weight = _prepare(x, mask)
    count = jnp.sum(weight, axis=axis, keepdims=True)
    first = _divide(jnp.sum(x * weight, axis=axis, keepdims=True), count)
    # The residual is a constant to the gradient, which the first pass already carries in full. It is left out where
    # the mean is infinite, as inf - inf would turn it into NaN.
    residual = _divide(jnp.sum((x - first) * weight, axis=axis, keepdims=True), count)
    residual = jax.lax.stop_gradient(jnp.where(jnp.isfinite(residual), residual, 0.0))
    result = first + residual
    return result if keepdims else jnp.squeeze(result, axis=axis)


def center(x: Array, mask: Array, axis: Axis = None) -> Array:
    r"""Difference from the mean under a mask, $m_i \neq 0 : x_i - \bar{x}$, and 0 where the mask is.

    Equal numbers, and a single one, give exactly 0.

    Args:
        x: any shape, float.
        mask: of `x`'s shape, or 1 along some axes; 1 where `x` counts.
        axis: axes over which the mean is taken; None for all.

    Returns:
        `x`'s shape, float32 or wider.

    Raises:
        ValueError: if `mask` does not fit `x`.

    Example:
        >>> center(jnp.array([1.0, 3.0, 9.0]), jnp.array([1, 1, 0])).tolist()
        [-1.0, 1.0, 0.0]
    """
    x, weight = _prepare(x, mask)
    return jnp.where(weight != 0, x - mean(x, weight, axis, keepdims=True), 0.0)


def var(x: Array, mask: Array, axis: Axis = None, *, ddof: int = 1, keepdims: bool = False) -> Array:
    r"""Variance under a mask, $\sum_i m_i (x_i - \bar{x})^2 / (n - \mathrm{ddof})$ with $n = \sum_i m_i$.

    Two passes: the mean is subtracted before squaring, because $E[x^2] - E[x]^2$ leaves a residue of the size of the
    float's resolution where the variance is zero, and a division by its root then explodes. An empty mask and a single
    element give 0.

    Args:
        x: any shape, float.
        mask: of `x`'s shape, or 1 along some axes; 1 where `x` counts.
        axis: axes to reduce; None for all.
        ddof: 1 for the unbiased estimate, 0 for the population variance.
        keepdims: keep the reduced axes with length one.

    Returns:
        The reduced array, float32 or wider.

    Raises:
        ValueError: if `mask` does not fit `x`.

    Example:
        >>> float(var(jnp.array([1.0, 3.0, 9.0]), jnp.array([1, 1, 0])))
        2.0
        >>> float(var(jnp.array([1.0, 3.0]), jnp.array([1, 0])))
        0.0
    """
    x, weight = _prepare(x, mask)
    count = jnp.sum(weight, axis=axis, keepdims=keepdims)
    squares = jnp.sum(jnp.square(center(x, weight, axis)) * weight, axis=axis, keepdims=keepdims)
    return _divide(squares, count - ddof)  # one element with ddof=0 gives 0 by itself


def std(x: Array, mask: Array, axis: Axis = None, *, ddof: int = 1, keepdims: bool = False) -> Array:
    r"""Standard deviation under a mask, the root of `var`; its gradient where it is zero is zero.

    Args:
        x: any shape, float.
        mask: of `x`'s shape, or 1 along some axes; 1 where `x` counts.
        axis: axes to reduce; None for all.
        ddof: 1 for the root of the unbiased variance, 0 for the population's.
        keepdims: keep the reduced axes with length one.

    Returns:
        The reduced array, float32 or wider.

    Raises:
        ValueError: if `mask` does not fit `x`.

    Example:
        >>> round(float(std(jnp.array([1.0, 3.0, 9.0]), jnp.array([1, 1, 0]))), 6)
        1.414214
    """
    variance = var(x, mask, axis, ddof=ddof, keepdims=keepdims)
    none = variance <= 0  # not of NaN, which stays
    return jnp.where(none, 0.0, jnp.sqrt(jnp.where(none, 1.0, variance)))


def whiten(x: Array, mask: Array, *, shift_mean: bool = True, eps: float = 1e-8, axis: Axis = None) -> Array:
    r"""Zero mean and unit (unbiased) variance under a mask, $(x_i - \bar{x}) / \sqrt{\mathrm{var} + \epsilon}$.

    0 where the mask is. One element, or equal ones, have variance 0 and give $x - \bar{x} = 0$.

    Args:
        x: any shape, float.
        mask: of `x`'s shape, or 1 along some axes; 1 where `x` counts.
        shift_mean: False scales without moving the mean: it is added back.
        eps: added to the variance.
        axis: axes over which mean and variance are taken; None for all.

    Returns:
        `x`'s shape, float32 or wider.

    Raises:
        ValueError: if `mask` does not fit `x`.

    Example:
        >>> [round(y, 4) for y in whiten(jnp.array([1.0, 3.0, 9.0]), jnp.array([1, 1, 0])).tolist()]
        [-0.7071, 0.7071, 0.0]
    """
    x, weight = _prepare(x, mask)
    variance = var(x, weight, axis, keepdims=True) + eps
    positive = variance > 0  # False only for eps=0
    scaled = center(x, weight, axis) * jnp.where(positive, jax.lax.rsqrt(jnp.where(positive, variance, 1.0)), 0.0)
    if shift_mean:
        return scaled
    return jnp.where(weight != 0, scaled + mean(x, weight, axis, keepdims=True), 0.0)


def max(x: Array, mask: Array, axis: Axis = None, *, keepdims: bool = False) -> Array:
    """Largest element under a mask; an empty mask gives 0.

    Args:
        x: any shape, float.
        mask: of `x`'s shape, or 1 along some axes; nonzero where `x` counts.
        axis: axes to reduce; None for all.
        keepdims: keep the reduced axes with length one.

    Returns:
        The reduced array, float32 or wider.

    Raises:
        ValueError: if `mask` does not fit `x`.

    Example:
        >>> float(max(jnp.array([-2.0, -1.0, 9.0]), jnp.array([1, 1, 0])))
        -1.0
    """
    x, weight = _prepare(x, mask)
    counts = weight != 0
    largest = jnp.max(jnp.where(counts, x, -jnp.inf), axis=axis, keepdims=keepdims)
    return jnp.where(jnp.any(counts, axis=axis, keepdims=keepdims), largest, 0.0)


def min(x: Array, mask: Array, axis: Axis = None, *, keepdims: bool = False) -> Array:
    """Smallest element under a mask; an empty mask gives 0.

    Args:
        x: any shape, float.
        mask: of `x`'s shape, or 1 along some axes; nonzero where `x` counts.
        axis: axes to reduce; None for all.
        keepdims: keep the reduced axes with length one.

    Returns:
        The reduced array, float32 or wider.

    Raises:
        ValueError: if `mask` does not fit `x`.

    Example:
        >>> float(min(jnp.array([2.0, 1.0, -9.0]), jnp.array([1, 1, 0])))
        1.0
    """
    return -max(-as_float(x), mask, axis, keepdims=keepdims)


def quantile(
    x: Array,
    mask: Array,
    q: float | Array,
    axis: int | None = None,
    *,
    method: Literal["linear", "lower"] = "linear",
    keepdims: bool = False,
) -> Array:
    r"""Quantile under a mask: of $n$ counted elements in order, the one at position $q (n - 1)$.

    Works inside `jit`: the number of counted elements may be traced. An empty mask gives 0, a NaN that counts gives
    NaN. Weights other than 0 and 1 do not apply here: nonzero counts once.

    Args:
        x: any shape, float.
        mask: of `x`'s shape, or 1 along some axes; nonzero where `x` counts.
        q: scalar in [0, 1].
        axis: the axis to reduce; None for all.
        method: between two elements, `"linear"` interpolates and `"lower"` takes the smaller one (an element of `x`
            always; with `q=0.5` the lower median).
        keepdims: keep the reduced axis with length one.

    Returns:
        The reduced array, float32 or wider.

    Raises:
        ValueError: if `mask` does not fit `x`, `q` is outside [0, 1] or not a scalar, or `method` is unknown.

    Example:
        >>> float(quantile(jnp.array([4.0, 1.0, 2.0, 99.0]), jnp.array([1, 1, 1, 0]), 0.5))
        2.0
    """
    if method not in ("linear", "lower"):
        raise ValueError(f'method must be "linear" or "lower", got {method!r}')
    if isinstance(q, float | int) and not 0 <= q <= 1:
        raise ValueError(f"q must be in [0, 1], got {q}; divide per cent by 100")
    if jnp.ndim(q) != 0:
        raise ValueError(f"q must be a scalar, got shape {jnp.shape(q)}; use jax.vmap for several quantiles")
    x, weight = _prepare(x, mask)
    shape = x.shape
    if axis is None:
        x, weight = x.reshape(-1), weight.reshape(-1)
    along = 0 if axis is None else axis
    counts = weight != 0
    ordered = jnp.sort(jnp.where(counts, x, jnp.inf), axis=along)
    count = jnp.sum(counts, axis=along, keepdims=True)
    position = jnp.asarray(q, x.dtype) * jnp.maximum(count - 1, 0).astype(x.dtype)
    below = jnp.floor(position)
    low = jnp.take_along_axis(ordered, below.astype(jnp.int32), axis=along)
    result = low
    if method == "linear":
        high = jnp.take_along_axis(ordered, jnp.ceil(position).astype(jnp.int32), axis=along)
        fraction = position - below
        between = fraction > 0
        # inf - inf is NaN, so equal neighbours are not subtracted.
        result = jnp.where(between & (low != high), low + fraction * (high - low), low)
    unknown = jnp.any(counts & jnp.isnan(x), axis=along, keepdims=True)
    result = jnp.where(unknown, jnp.nan, jnp.where(count > 0, result, 0.0))
    if keepdims:
        return result.reshape((1,) * len(shape)) if axis is None else result
    return jnp.squeeze(result, axis=along)

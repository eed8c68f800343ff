"""Division by a standard deviation that may be zero: the one rule for every estimator.

Rewards that are equal on paper may differ in their last bits (0.1 + 0.2 and 0.3). A spread below the resolution of the
numbers carries no information, and dividing by it would turn rounding into advantages of order one; it counts as zero,
and what would be divided by it becomes zero.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def spread(x: Array, mask: Array, axis: masked.Axis = None, *, ddof: int = 1, keepdims: bool = True) -> Array:
    r"""Standard deviation under a mask; exactly 0 where the numbers differ by no more than their rounding.

    Args:
        x: any shape, float.
        mask: of `x`'s shape, or 1 along some axes; 1 where `x` counts, other values are frequency weights.
        axis: axes to reduce; None for all.
        ddof: 1 for the root of the unbiased variance, 0 for the population's.
        keepdims: keep the reduced axes with length one.

    Returns:
        The reduced array, float32 or wider.

    Raises:
        ValueError: if `ddof` is neither 0 nor 1, or `mask` does not fit `x`.

    Example:
        >>> round(float(spread(jnp.array([1.0, 3.0, 9.0]), jnp.array([1, 1, 0]), keepdims=False)), 4)
        1.4142
        >>> float(spread(jnp.array([0.1 + 0.2, 0.3]), jnp.ones(2), keepdims=False))
        0.0
    """
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 1 (unbiased) or 0 (population), got {ddof}")
    x = masked.as_float(x)
    std = masked.std(x, mask, axis, ddof=ddof, keepdims=keepdims)
    # So compared, NaN is not taken for equal numbers.
    return jnp.where(std <= resolution(x, mask, axis, keepdims=keepdims), 0.0, std)


def resolution(x: Array, mask: Array, axis: masked.Axis = None, *, keepdims: bool = True) -> Array:
    """The difference that rounding alone may leave between equal numbers of `x`'s size: 8 units in the last place."""
    x = masked.as_float(x)
    return 8 * jnp.finfo(x.dtype).eps * masked.max(jnp.abs(x), mask, axis, keepdims=keepdims)


def divide_by_spread(x: Array, deviation: Array, eps: float = 0.0) -> Array:
    r"""$x / (s + \epsilon)$, and 0 where the spread $s$ is 0.

    Args:
        x: float, differences from a baseline.
        deviation: $s$, of a shape that broadcasts to `x`'s; see `spread`.
        eps: $\epsilon$, in units of `x`.

    Returns:
        `x`'s shape; values and gradients are finite where `x` and `s` are.

    Example:
        >>> divide_by_spread(jnp.array([1.0, 2.0]), jnp.array([0.0, 4.0])).tolist()
        [0.0, 0.5]
    """
    none = deviation <= 0  # not of NaN, which stays
    return jnp.where(none, 0.0, x / jnp.where(none, 1.0, deviation + eps))

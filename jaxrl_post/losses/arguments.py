"""What the policy losses do with their arguments before any formula: dtypes, shapes, and what is a constant."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def as_logp(logp: Array) -> Array:
    """The trained policy's log-probs as float32 or wider, `[B, T]` or `[B]`.

    Raises:
        ValueError: if the rank is another.

    Example:
        >>> as_logp(jnp.zeros((2, 3), jnp.bfloat16)).dtype
        dtype('float32')
    """
    logp = masked.as_float(logp)
    masked.check_axes("logp", logp, "[B, T] or [B]")
    return logp


def as_constant(name: str, x: Array, logp: Array) -> Array:
    """`x` as float32 or wider, of the shape of `logp`, and without gradient.

    Raises:
        ValueError: if the shape is another; the message names the argument.

    Example:
        >>> as_constant("advantages", jnp.ones(2), jnp.zeros((2, 3)))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: advantages must have the shape of logp, (2, 3), got (2,); spread [P, G] over tokens ...
    """
    x = masked.as_float(x)
    hint = "spread [P, G] over tokens with advantages.per_token(advantages, mask)" if name == "advantages" else ""
    masked.check_like(name, x, "logp", logp, hint)
    return jax.lax.stop_gradient(x)


def as_tokens(logp: Array, old_logp: Array, mask: Array) -> tuple[Array, Array, Array]:
    """Log-probs and mask of a loss that adds up tokens of a sequence: `[B, T]`, and 0 where the mask is.

    What stands in masked places, NaN included, reaches neither the sums nor their gradients.

    Raises:
        ValueError: if `logp` is not `[B, T]` or the others have another shape.

    Example:
        >>> one = jnp.ones((1, 2))
        >>> as_tokens(jnp.array([[-1.0, jnp.nan]]), one, jnp.array([[1, 0]]))[0].tolist()
        [[-1.0, 0.0]]
    """
    logp = masked.as_float(logp)
    masked.check_axes("logp", logp, "[B, T]", "sums over a sequence need its tokens")
    mask = as_constant("mask", mask, logp)
    inside = mask != 0
    return jnp.where(inside, logp, 0.0), jnp.where(inside, as_constant("old_logp", old_logp, logp), 0.0), mask


def check_at_least(name: str, value: float | Array | None, low: float, hint: str = "") -> None:
    """Raise ValueError if a number that is known at trace time is below `low`; None and traced values pass.

    Example:
        >>> check_at_least("clip_low", -0.2, 0, "a distance from 1")
        Traceback (most recent call last):
            ...
        ValueError: clip_low must be >= 0, got -0.2; a distance from 1
    """
    if isinstance(value, float | int) and value < low:
        raise ValueError(f"{name} must be >= {low:g}, got {value}" + (f"; {hint}" if hint else ""))

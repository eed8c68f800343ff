"""The critic's regression loss, and what its clipping did."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def _errors(values: Array, returns: Array, old_values: Array | None, clip: float | None) -> tuple[Array, Array]:
    values, returns = masked.as_float(values), masked.as_float(returns)
    masked.check_axes("values", values, "[B, T] or [B]")
    masked.check_like("returns", returns, "values", values)
    error = values - jax.lax.stop_gradient(returns)
    if clip is None:
        return error, error
    if old_values is None:
        raise ValueError("clip needs old_values, the values at the start of the step; pass them or clip=None")
    if isinstance(clip, float | int) and clip <= 0:
        raise ValueError(f"clip must be above 0 (a distance in units of the return), got {clip}; None turns it off")
    old_values = masked.as_float(old_values)
    masked.check_like("old_values", old_values, "values", values)
    old_values = jax.lax.stop_gradient(old_values)
    clipped = jnp.clip(values, old_values - clip, old_values + clip)  # inside the range exactly `values`
    return error, clipped - jax.lax.stop_gradient(returns)


def value(values: Array, returns: Array, old_values: Array | None = None, *, clip: float | None = None) -> Array:
    r"""Half the squared error of the critic, optionally with PPO's clip of its step.

    $$\ell = \tfrac12 \max((V - R)^2,\ (\mathrm{clip}(V, V_{old} - c, V_{old} + c) - R)^2)$$

    Args:
        values: `[B, T]` or `[B]` float; the trained critic's estimates, in units of the return.
        returns: `values`' shape; regression targets, as `advantages.gae` gives them. A constant.
        old_values: `values`' shape; the estimates at the start of the step. A constant; needed only with `clip`.
        clip: $c > 0$, in units of the return; None for the plain squared error.

    Returns:
        `values`' shape, float32 or wider: the loss of each token.

    Raises:
        ValueError: if shapes differ, `clip` is not above 0, or it is given without `old_values`.

    Example:
        >>> value(jnp.array([[1.0]]), jnp.array([[2.0]]), jnp.array([[0.0]]), clip=0.5).tolist()
        [[1.125]]

    Reference: Proximal Policy Optimization Algorithms (arXiv 1707.06347); the clipped form is not in the paper but in
    its reference implementation (OpenAI Baselines, ppo2).
    """
    plain, clipped = _errors(values, returns, old_values, clip)
    if clip is None:
        return 0.5 * jnp.square(plain)
    return 0.5 * jnp.maximum(jnp.square(plain), jnp.square(clipped))


def value_clip_fraction(values: Array, returns: Array, old_values: Array, *, clip: float) -> Array:
    r"""Indicator of the tokens where the clip of `value` acts: the clipped error is the larger one.

    Args:
        values: `[B, T]` or `[B]` float; the trained critic's estimates.
        returns: `values`' shape; regression targets.
        old_values: `values`' shape; the estimates at the start of the step.
        clip: $c > 0$, in units of the return.

    Returns:
        `values`' shape, float32 or wider, 0 or 1, without gradient. These tokens get no gradient.

    Raises:
        ValueError: if shapes differ or `clip` is not above 0.

    Example:
        >>> value_clip_fraction(jnp.array([[1.0, 0.1]]), jnp.full((1, 2), 2.0), jnp.zeros((1, 2)), clip=0.5).tolist()
        [[1.0, 0.0]]
    """
    plain, clipped = _errors(values, returns, old_values, clip)
    return (jnp.square(clipped) > jnp.square(plain)).astype(plain.dtype)

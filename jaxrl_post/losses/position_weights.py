"""Weights of tokens by how much a group's completions differ where the token stands."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def position_weights(divergence: Array, mask: Array, *, alpha: float = 1.7, eps: float = 1e-8) -> Array:
    r"""Weights between 1 and $\alpha$ that rise with the divergence of a group's completions.

    $$w_t = 1 + (\alpha - 1) \frac{D_t - \min_t D}{\max_t D - \min_t D + \epsilon}$$

    The extremes are taken over the places at which the group has a token. The authors' code takes them over all places
    of the padded batch, so that a group's weights depend on the longest completion of another.

    Args:
        divergence: `[P, N]` float, not negative: one number per place of a group, or per token of all its completions
            (`TokenStats.group_divergence` as `[P, G * T]`).
        mask: `[P, N]`, nonzero where there is a token.
        alpha: $\alpha \ge 1$, the largest weight; 1 for no weights.
        eps: added to the range.

    Returns:
        `[P, N]`, float32 or wider, without gradient: factors of a loss per token; 1 where all divergences are equal
        and where the mask is 0.

    Raises:
        ValueError: if the arrays are not `[P, N]` of one shape, or `alpha` is below 1.

    Example:
        >>> weights = position_weights(jnp.array([[0.0, 1.0, 2.0, 9.0]]), jnp.array([[1, 1, 1, 0]]))
        >>> [round(weight, 4) for weight in weights[0].tolist()]
        [1.0, 1.35, 1.7, 1.0]

    Reference: Reinforcing Video Reasoning with Focused Thinking (arXiv 2505.24718).
    """
    if isinstance(alpha, float | int) and alpha < 1:
        raise ValueError(f"alpha must be at least 1, the weight of the least divergence, got {alpha}")
    divergence = jax.lax.stop_gradient(masked.as_float(divergence))
    masked.check_axes("divergence", divergence, "[P, N]", "one row per group")
    masked.check_like("mask", jnp.asarray(mask), "divergence", divergence)
    low, high = (extreme(divergence, mask, 1, keepdims=True) for extreme in (masked.min, masked.max))
    weights = 1 + (alpha - 1) * (divergence - low) / (high - low + eps)
    return jnp.where(jnp.asarray(mask) != 0, weights, 1.0)

"""Weights of tokens for a judge whose first token is its verdict."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post.types import Array


def first_token_weights(mask: Array, *, alpha: float) -> Array:
    r"""Weights with which the first trained token has the share $\alpha$ of a sequence's mean, the others the rest.

    $$w_1 = \alpha n, \qquad w_t = (1 - \alpha) \frac{n}{n - 1}, \qquad
    \frac{1}{n} \sum_t w_t \ell_t = \alpha \ell_1 + (1 - \alpha)\, \mathrm{mean}_{t > 1}\, \ell_t$$

    The paper's code has $\alpha$ in the place of $\alpha n$, with which the share of the first token would be
    $\alpha / n$; here it is $\alpha$, as the text says.

    Args:
        mask: `[B, T]`, nonzero where a token is trained.
        alpha: $\alpha$ in [0, 1].

    Returns:
        `[B, T]` float32: factors of a loss per token that is reduced by `seq_mean_token_mean`; 0 where the mask is, and
        1 for the only token of a sequence. A sequence's weights add up to its number of tokens.

    Raises:
        ValueError: if `mask` is not `[B, T]` or `alpha` is outside [0, 1].

    Example:
        >>> first_token_weights(jnp.array([[0, 1, 1, 1], [0, 1, 0, 0]]), alpha=0.5).tolist()
        [[0.0, 1.5, 0.75, 0.75], [0.0, 1.0, 0.0, 0.0]]

    Reference: PaCo-RL: Advancing Reinforcement Learning for Consistent Image Generation with Pairwise Reward Modeling
    (arXiv 2512.04784).
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}; it is the first token's share of the loss")
    trained = jnp.asarray(mask) != 0
    if trained.ndim != 2:
        raise ValueError(f"mask must be [B, T], got shape {trained.shape}")
    count = jnp.sum(trained, axis=1, keepdims=True).astype(jnp.float32)
    first = trained & (jnp.cumsum(trained, axis=1) == 1)
    several = jnp.where(first, alpha * count, (1 - alpha) * count / jnp.maximum(count - 1, 1))
    return jnp.where(trained, jnp.where(count > 1, several, 1.0), 0.0)

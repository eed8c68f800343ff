"""Losses on given answers: no sampling, no reward."""

from __future__ import annotations

from jaxrl_post import masked
from jaxrl_post.types import Array


def nll(logp: Array) -> Array:
    r"""Negative log-likelihood, $\ell = -\log\pi$: the loss of supervised fine-tuning.

    Args:
        logp: `[B, T]` or `[B]` float, nats; log-prob of the given token or sequence.

    Returns:
        `logp`'s shape, float32 or wider, nats.

    Raises:
        ValueError: if `logp` is neither `[B, T]` nor `[B]`.

    Example:
        >>> import jax.numpy as jnp
        >>> nll(jnp.array([[-1.0, -0.5]])).tolist()
        [[1.0, 0.5]]
    """
    logp = masked.as_float(logp)
    masked.check_axes("logp", logp, "[B, T] or [B]")
    return -logp

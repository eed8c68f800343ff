"""Losses of models that judge steps of a solution."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def success_bce(logits: Array, success_rate: Array) -> Array:
    r"""Cross-entropy of a predicted success rate with a counted one, $-q \log \sigma(z) - (1 - q) \log \sigma(-z)$.

    It trains a process verifier: $q$ is the share of tries from a prefix that came out right. Its minimum, at
    $\sigma(z) = q$, is the entropy of $q$, not 0.

    Args:
        logits: `[B, T]` or `[B]` float: $z$, the verifier's output after each prefix.
        success_rate: of the same shape, in [0, 1]. A constant.

    Returns:
        The same shape, float32 or wider, nats.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> [round(loss, 4) for loss in success_bce(jnp.array([0.0, 20.0]), jnp.array([0.25, 1.0])).tolist()]
        [0.6931, 0.0]

    Reference: Rewarding Progress: Scaling Automated Process Verifiers for LLM Reasoning (arXiv 2410.08146).
    """
    logits, success_rate = masked.as_float(logits), masked.as_float(success_rate)
    masked.check_axes("logits", logits, "[B, T] or [B]")
    masked.check_like("success_rate", success_rate, "logits", logits)
    rate = jax.lax.stop_gradient(jnp.clip(success_rate, 0, 1))
    return rate * jax.nn.softplus(-logits) + (1 - rate) * jax.nn.softplus(logits)

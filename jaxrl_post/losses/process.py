"""Losses of models that judge steps of a solution."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.arguments import as_tokens
from jaxrl_post.losses.consistency import check_positive
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


def implicit_outcome_bce(logp: Array, ref_logp: Array, outcome: Array, mask: Array, *, beta: float = 0.05) -> Array:
    r"""Cross-entropy of outcomes with the reward that a language model implies, $-\log\sigma(\pm\beta \sum_t q_t)$.

    $q_t = \log\pi_\phi(y_t) - \log\pi_{ref}(y_t)$; the sign is that of the outcome. No step has a label, and yet
    $\beta q_t$ becomes a reward of the token (see `implicit_reward`): the sum up to any token says what the model
    expects of the answer by then.

    Args:
        logp: `[B, T]` float, nats; log-prob of the token under the trained model.
        ref_logp: `[B, T]` float, nats; under the reference. A constant.
        outcome: `[B]`, in [0, 1]: 1 for a right answer. A constant.
        mask: `[B, T]`, nonzero where the token counts.
        beta: $\beta$, above 0.

    Returns:
        `[B]`, float32 or wider, nats; log 2 with zero gradient for an answer without tokens.

    Raises:
        ValueError: if the shapes do not fit or `beta` is not above 0.

    Example:
        >>> logp, ref_logp = jnp.array([[-1.0, -2.0]]), jnp.array([[-2.0, -3.0]])
        >>> loss = implicit_outcome_bce(logp, ref_logp, jnp.ones(1), jnp.ones((1, 2)))
        >>> round(float(loss[0]), 6)
        0.644397

    Reference: Process Reinforcement through Implicit Rewards (arXiv 2502.01456).
    """
    check_positive("beta", beta)
    logp, ref_logp, mask = as_tokens(logp, ref_logp, mask)
    return success_bce(beta * masked.sum(logp - ref_logp, mask, 1), outcome)

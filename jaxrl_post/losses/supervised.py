"""Losses on given answers, or on those of the policy's own that were right."""

from __future__ import annotations

import jax

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


def positive_mask(rewards: Array, mask: Array, *, threshold: float = 0.0) -> Array:
    r"""The mask of sequences that were right, $m_{b,t}\,[r_b > \mathrm{threshold}]$.

    With it `nll` becomes the positive-sample loss of VAPO: under `aggregate(..., "token_mean")` it is divided by the
    tokens of the right sequences alone, so that its strength does not fall with the share of right answers.

    Args:
        rewards: `[P, G]` or `[B]` float; `B = P * G`, prompt-major.
        mask: `[B, T]`; 1 where the loss counts.
        threshold: in units of the reward; a sequence is right above it.

    Returns:
        `[B, T]`, float32 or wider, without gradient.

    Raises:
        ValueError: if `rewards` does not have one number per row of `mask`.

    Example:
        >>> import jax.numpy as jnp
        >>> positive_mask(jnp.array([[1.0, 0.0]]), jnp.array([[1, 1, 0], [1, 1, 1]])).tolist()
        [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]

    Reference: VAPO: Efficient and Reliable Reinforcement Learning for Advanced Reasoning Tasks (arXiv 2504.05118).
    """
    rewards, mask = masked.as_float(rewards), masked.as_float(mask)
    masked.check_axes("mask", mask, "[B, T]")
    masked.check_axes("rewards", rewards, "[P, G] or [B]")
    if rewards.size != mask.shape[0]:
        raise ValueError(f"rewards must have one number per row of mask, {mask.shape[0]}, got shape {rewards.shape}")
    right = (rewards.reshape(-1, 1) > threshold).astype(mask.dtype)
    return jax.lax.stop_gradient(mask * right)

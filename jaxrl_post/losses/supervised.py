"""Losses on given answers, or on those of the policy's own that were right."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array

Generator = Literal["total_variation", "chi2", "hellinger"]
"""Of the divergence that `f_sft` minimises."""

_HELLINGER_LINEAR_BELOW = -0.5


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


def f_sft(reward: Array, generator: Generator = "chi2") -> Array:
    r"""Learning from demonstrations that holds to a reference: $\ell = -\phi(r)$ of the implicit reward $r$.

    | generator | $\phi(r)$ | weight of the likelihood's gradient, $\phi'(r)$ |
    |---|---|---|
    | `total_variation` | $r$ | 1: `nll` times $\beta$, and the reference plays no part |
    | `chi2` | $r - r^2 / 4$ | $1 - r / 2$, which pulls back above $r = 2$ |
    | `hellinger` | $r / (1 + r)$ | $(1 + r)^{-2}$ |

    With $r = \beta (\log\pi - \log\pi_{ref})$ a demonstration weighs less once the policy is well above the reference
    on it. $r / (1 + r)$ has a pole at -1: below -1/2 its tangent there goes on, with weight 4.

    Args:
        reward: `[B, T]` or `[B]` float, `implicit_reward` of tokens or of sequences.
        generator: of the table.

    Returns:
        `reward`'s shape, float32 or wider.

    Raises:
        ValueError: if `reward` is neither `[B, T]` nor `[B]`, or for an unknown generator.

    Example:
        >>> [round(float(f_sft(jnp.array([0.15]), name)[0]), 6) for name in ("total_variation", "chi2", "hellinger")]
        [-0.15, -0.144375, -0.130435]

    Reference: Implicit Reward as the Bridge: A Unified View of SFT and DPO Connections (arXiv 2507.00018), in the form
    without potentials; the generators are those of IQ-Learn: Inverse soft-Q Learning for Imitation (arXiv 2106.12142).
    """
    if generator not in get_args(Generator):
        raise ValueError(f"generator must be one of {', '.join(get_args(Generator))}, got {generator!r}")
    reward = masked.as_float(reward)
    masked.check_axes("reward", reward, "[B, T] or [B]")
    if generator == "total_variation":
        return -reward
    if generator == "chi2":
        return jnp.square(reward) / 4 - reward
    inside = jnp.maximum(reward, _HELLINGER_LINEAR_BELOW)
    return -inside / (1 + inside) - 4 * (reward - inside)


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

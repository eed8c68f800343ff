"""Advantages of sampled tokens from what a teacher thinks of them."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.advantages.layout import check_rewards
from jaxrl_post.types import Array

FailedBy = Literal["response", "group"]


def opd(
    teacher_logp: Array,
    logp: Array,
    mask: Array,
    *,
    base_logp: Array | None = None,
    extrapolation: float = 1.0,
    clip: float | None = None,
) -> Array:
    r"""On-policy distillation: each token's own advantage is how much likelier the teacher finds it.

    $$A_t = \mathrm{sg}\big(\lambda (\log \pi_{teacher}(y_t) - \log \pi_{base}(y_t))
    - (\log \pi(y_t) - \log \pi_{base}(y_t))\big)$$

    With $\lambda = 1$ the base cancels: $\log \pi_{teacher} - \log \pi$. With tokens sampled from $\pi$, REINFORCE on
    it descends the reverse KL divergence to the policy proportional to
    $\pi_{base}^{1 - \lambda} \pi_{teacher}^{\lambda}$ of each token, which goes beyond the teacher where
    $\lambda > 1$: later tokens get no credit for earlier ones.

    Args:
        teacher_logp: `[B, T]` float, nats; log-prob of the token under the teacher.
        logp: `[B, T]` float, nats; log-prob under the policy that sampled it.
        mask: `[B, T]`, nonzero where the policy chose the token.
        base_logp: `[B, T]` float, nats; under the model that the teacher was made from, or the policy was. None where
            `extrapolation` is 1.
        extrapolation: $\lambda$, at least 0; 0 goes back to the base.
        clip: bound on $|A|$, nats; None for none.

    Returns:
        `[B, T]`, float32 or wider, nats, without gradient; 0 where the mask is.

    Raises:
        ValueError: if the arrays are not `[B, T]` of one shape, `extrapolation` is not 1 without a base, or `clip` is
            not above 0.

    Example:
        >>> teacher_logp, logp = jnp.array([[-1.0, -8.0, -1.0]]), jnp.array([[-2.0, -1.0, 0.0]])
        >>> opd(teacher_logp, logp, jnp.array([[1, 1, 0]]), clip=5.0).tolist()
        [[1.0, -5.0, 0.0]]

    References: On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes (arXiv 2306.13649);
    MiniLLM: Knowledge Distillation of Large Language Models (arXiv 2306.08543); with $\lambda$, Learning beyond
    Teacher: Generalized On-Policy Distillation with Reward Extrapolation (arXiv 2602.12125).
    """
    if isinstance(clip, float | int) and clip <= 0:
        raise ValueError(f"clip must be above 0 (a bound in nats), got {clip}; None for no bound")
    if base_logp is None and not (isinstance(extrapolation, float | int) and extrapolation == 1):
        raise ValueError(f"extrapolation={extrapolation} goes beyond the teacher as seen from a base: give base_logp")
    logp, mask = masked.as_float(logp), jnp.asarray(mask)
    masked.check_axes("logp", logp, "[B, T]")
    for name, x in (("mask", mask), ("teacher_logp", teacher_logp), ("base_logp", base_logp)):
        if x is not None:
            masked.check_like(name, x, "logp", logp)
    found = masked.as_float(teacher_logp) - logp
    if base_logp is not None:
        found = found + (extrapolation - 1) * (masked.as_float(teacher_logp) - masked.as_float(base_logp))
    if clip is not None:
        found = jnp.clip(found, -clip, clip)
    return jax.lax.stop_gradient(jnp.where(mask != 0, found, 0.0))


def failed(rewards: Array, valid: Array | None = None, *, by: FailedBy = "response") -> Array:
    r"""1 where an answer, or a whole group of them, earned nothing: those that a teacher is asked about.

    $$m_g = [r_g \le 0] \quad\text{or}\quad [\max_j r_j \le 0]$$

    Args:
        rewards: `[P, G]` float.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.
        by: `"response"`, each answer for itself, or `"group"`, all answers of the prompt.

    Returns:
        `[P, G]`, float32 or wider, without gradient; 0 where `valid` is False.

    Raises:
        ValueError: if `rewards` is not `[P, G]`, or `valid` has another shape.

    Example:
        >>> rewards = jnp.array([[1.0, 0.0], [0.0, 0.0]])
        >>> failed(rewards).tolist(), failed(rewards, by="group").tolist()
        ([[0.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [1.0, 1.0]])

    Reference: KDRL: Post-Training Reasoning LLMs via Unified Knowledge Distillation and Reinforcement Learning
    (arXiv 2506.02208).
    """
    rewards, counts = check_rewards(rewards, valid)
    lost = (rewards <= 0) | ~counts
    if by == "group":
        lost = jnp.broadcast_to(jnp.all(lost, axis=1, keepdims=True), lost.shape)
    return jax.lax.stop_gradient((lost & counts).astype(rewards.dtype))

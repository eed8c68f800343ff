"""The forward KL to a reference that rewards have reshaped: keep what is good in it, be free elsewhere."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.arguments import as_constant, as_logp, check_at_least
from jaxrl_post.losses.policy import log_ratio
from jaxrl_post.types import Array


def reweighted_logp(ref_logp: Array, power: Array, *, vocab_size: int | None = None) -> Array:
    r"""Log-prob under a reference raised to a power, $\log\hat\pi_{ref} = \phi \log\pi_{ref} - (1 - \phi)\log V$.

    A power of 1 is the reference, one of 0 a reference that has nothing to say. The power of a distribution wants a
    normaliser that only all logits give. It lies between 1 and $V^{1 - \phi}$, and is the latter for the powers 0 and
    1: with `vocab_size` that is what divides, without it nothing does, as published.

    Args:
        ref_logp: `[B, T]` float, nats; log-prob under the reference.
        power: `[B]` float in [0, 1], $\phi$ of the reward of each sequence.
        vocab_size: $V$; None leaves the second summand out.

    Returns:
        `[B, T]`, float32 or wider, nats.

    Raises:
        ValueError: if `ref_logp` is not `[B, T]`, `power` not `[B]`, or `vocab_size` is below 1.

    Example:
        >>> reweighted_logp(jnp.array([[-2.0, -1.0], [-2.0, -1.0]]), jnp.array([1.0, 0.0])).tolist()
        [[-2.0, -1.0], [-0.0, -0.0]]

    Reference: Unlocking Reasoning Capabilities in LLMs via Reinforcement Learning Exploration (arXiv 2510.03865). The
    bound of the normaliser is ours, from Hoelder's inequality.
    """
    check_at_least("vocab_size", vocab_size, 1)
    ref_logp, power = masked.as_float(ref_logp), masked.as_float(power)
    masked.check_axes("ref_logp", ref_logp, "[B, T]")
    masked.check_like("power", power, "a column of ref_logp", ref_logp[:, 0])
    power = power[:, None]
    return power * ref_logp - (0.0 if vocab_size is None else (1 - power) * jnp.log(float(vocab_size)))


def forward_kl(logp: Array, target_logp: Array, *, limit: float = 10.0) -> Array:
    r"""Estimate of KL(target || policy) from tokens of the policy, $w \log w - w + 1$ with $w = \hat\pi / \pi$.

    Never negative, and 0 where the two agree. The gradient is that of the value, $-w \log w\, \nabla\log\pi$. Over the
    tokens of the policy its mean is that of $\frac{1}{2} E_{\hat\pi}[\log^2 (\hat\pi / \pi)]$, not of the divergence
    (for which the mean would have to be differentiated too): it vanishes at the same place, and pulls harder from afar.

    Args:
        logp: `[B, T]` or `[B]` float, nats; log-prob under the trained policy, which sampled the tokens.
        target_logp: `logp`'s shape, nats; log-prob under the target, e.g. `reweighted_logp`. A constant.
        limit: nats, clamp of $\log w$; the gradient is zero where it acts.

    Returns:
        `logp`'s shape, float32 or wider, nats.

    Raises:
        ValueError: if the shapes differ or `limit` is negative.

    Example:
        >>> [round(x, 4) for x in forward_kl(jnp.zeros(3), jnp.log(jnp.array([2.0, 0.5, 1.0]))).tolist()]
        [0.3863, 0.1534, 0.0]

    Reference: Unlocking Reasoning Capabilities in LLMs via Reinforcement Learning Exploration (arXiv 2510.03865); from
    transcriptions of its equations, the authors' code was not found.
    """
    logp = as_logp(logp)
    log_w = -log_ratio(logp, as_constant("target_logp", target_logp, logp), limit=limit)
    # expm1 keeps the digits near w = 1, where w log w - w + 1 is a small difference.
    return jnp.exp(log_w) * log_w - jnp.expm1(log_w)

"""Credit of reasonings by the likelihood that they give an answer together."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post.advantages.layout import check_rewards
from jaxrl_post.types import Array


def jepo(logp: Array, valid: Array | None = None) -> Array:
    r"""What a reasoning adds to the log of the group's mean probability of the answer.

    $$A_i = \log \frac{1}{n} \sum_j e^{S_j} - \log \frac{1}{n-1} \sum_{j \ne i} e^{S_j}$$

    The first term is Jensen's tighter bound of the answer's log-likelihood, with $n$ reasonings.

    Args:
        logp: `[P, G]` float, nats: $S$, log-prob of the answer after each reasoning.
        valid: `[P, G]` bool, False where a reasoning does not count; None for all.

    Returns:
        `[P, G]`, float32 or wider, nats; 0 where not valid, and in a group of one.

    Raises:
        ValueError: if `logp` is not `[P, G]` or `valid` has another shape.

    Example:
        >>> [round(float(a), 4) for a in jepo(jnp.log(jnp.array([[0.125, 0.5]])))[0]]
        [-0.47, 0.9163]

    References:
        Likelihood-Based Reward Designs for General LLM Reasoning (arXiv 2602.03979); Beyond Verifiable Rewards: Scaling
        Reinforcement Learning for Language Models to Unverifiable Data (arXiv 2503.19618).
    """
    logp, valid = check_rewards(logp, valid)
    count = jnp.sum(valid, axis=1, keepdims=True)
    several = valid & (count > 1)
    # Only differences matter; where there is none to compare, zeros keep the logarithm finite.
    best = jax.lax.stop_gradient(jnp.max(jnp.where(valid, logp, -jnp.inf), axis=1, keepdims=True))
    own = jnp.where(valid, logp - best, -jnp.inf)
    others = jnp.where(jnp.eye(logp.shape[1], dtype=bool), -jnp.inf, own[:, None, :])
    every = jax.nn.logsumexp(jnp.where(count > 0, own, 0.0), axis=1, keepdims=True)
    others = jax.nn.logsumexp(jnp.where(several[..., None], others, 0.0), axis=2)
    share = jnp.log(jnp.maximum(count - 1, 1)) - jnp.log(jnp.maximum(count, 1))
    return jnp.where(several, every - others + share, 0.0)

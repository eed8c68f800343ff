"""Stale rollouts: a policy that holds the update near by, apart from the one that sampled, and which tokens to trust.

Corrections for an engine whose numbers differ from the trainer's are in `mismatch`; here the sampler is an old policy.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.arguments import as_constant, as_logp, as_tokens, check_at_least
from jaxrl_post.losses.policy import importance_ratio, ppo
from jaxrl_post.types import Array


def decoupled_ppo(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    sampler_logp: Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    max_weight: float | None = None,
) -> Array:
    r"""PPO around a recent policy, weighted for the older one that sampled.

    $$\ell = \mathrm{sg}(\min(\pi_{prox} / \pi_{behav},\ c))\; \ell_{ppo}(\log\pi, \log\pi_{prox}, A)$$

    Plain PPO on stale rollouts holds the policy near a bad, old one: the clip acts on tokens that training has long
    moved. Here the clip is around the proximal policy $\pi_{prox}$, and the age of the data is in the weight alone.

    Args:
        logp: `[B, T]` or `[B]` float, nats; log-prob of the token under the trained policy.
        old_logp: `logp`'s shape, nats; log-prob under $\pi_{prox}$, e.g. recomputed at the start of the step. A
            constant.
        advantages: `logp`'s shape. A constant.
        sampler_logp: `logp`'s shape, nats; log-prob under $\pi_{behav}$, which sampled. A constant.
        clip_low: distance of the ratio's lower bound from 1.
        clip_high: distance of its upper bound from 1.
        dual_clip: see `ppo`.
        max_weight: $c$, the largest weight; None for no bound.

    Returns:
        `logp`'s shape, float32 or wider: the loss of each token.

    Raises:
        ValueError: if shapes differ, a clip distance is negative, `dual_clip` is not above 1, or `max_weight` is below
            1.

    Example:
        >>> logp = jnp.log(jnp.array([[0.4]]))
        >>> loss = decoupled_ppo(logp, logp, jnp.ones((1, 1)), jnp.log(jnp.array([[0.2]])))
        >>> round(float(loss[0, 0]), 4)
        -2.0

    Reference: Batch size-invariance for policy optimization (arXiv 2110.00641); AReaL: A Large-Scale Asynchronous
    Reinforcement Learning System for Language Reasoning (arXiv 2505.24298).
    """
    check_at_least("max_weight", max_weight, 1, "a ratio, e.g. 5.0, or None for no bound")
    loss = ppo(logp, old_logp, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    weight = importance_ratio(as_constant("old_logp", old_logp, loss), as_constant("sampler_logp", sampler_logp, loss))
    if max_weight is not None:
        weight = jnp.minimum(weight, max_weight)
    return weight * loss


def proximal_logp(logp: Array, sampler_logp: Array, version: Array, current: Array | int) -> Array:
    r"""Log-prob of the policy of one step ago, interpolated between the one that sampled and the trained one.

    $$\log\pi_{prox} = \log\pi_{behav} + \alpha\, (\log\pi - \log\pi_{behav}), \qquad
    \alpha = \frac{v_{prox} - v_{behav}}{v - v_{behav}},\quad v_{prox} = v - 1$$

    It stands in for a forward pass of the proximal policy, e.g. as `old_logp` of `decoupled_ppo`.

    Args:
        logp: `[B, T]` float, nats; log-prob of the token under the trained policy. A constant here.
        sampler_logp: `[B, T]`, nats; log-prob under the policy that sampled the token.
        version: `[B, T]` int, version of that policy; negative where none sampled, where `sampler_logp` is returned.
        current: int scalar, $v$, version of the trained policy.

    Returns:
        `[B, T]`, float32 or wider, nats, without gradient.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> logp, sampler = jnp.zeros((1, 3)), -jnp.ones((1, 3))
        >>> proximal_logp(logp, sampler, jnp.array([[2, 3, -1]]), 4).tolist()  # two steps old, one, and no sample
        [[-0.5, -1.0, -1.0]]

    Reference: the log-linear approximation of AReaL (arXiv 2505.24298), as its implementation has it.
    """
    logp = jax.lax.stop_gradient(as_logp(logp))
    sampler_logp, version = as_constant("sampler_logp", sampler_logp, logp), jnp.asarray(version)
    masked.check_like("version", version, "logp", logp)
    age = (jnp.asarray(current) - version).astype(logp.dtype)
    known = (version >= 0) & (age > 0)
    alpha = jnp.where(known, (age - 1) / jnp.where(known, age, 1.0), 0.0)
    return jnp.where(alpha > 0, sampler_logp + alpha * (logp - sampler_logp), sampler_logp)


def second_moment_mask(logp: Array, sampler_logp: Array, mask: Array, *, threshold: float = 0.04) -> Array:
    r"""The mask without the tokens of largest squared log-ratio, so that the mean over the rest is below a threshold.

    $$\text{drop the largest } d_t^2 \text{ until}\quad \frac1N \sum_{kept} d_t^2 < \tau_{M_2}, \qquad
    d_t = \log\pi_t - \log\pi_{behav,t}$$

    The second moment bounds the spread of the importance weights of the batch, where a clip would bound every token: of
    very stale rollouts only a few outliers go.

    Args:
        logp: `[B, T]` float, nats; log-prob of the token under the policy that is trained, or a recent one.
        sampler_logp: `[B, T]`, nats; log-prob under the policy that sampled.
        mask: `[B, T]`, of the whole batch; 1 where the token counts.
        threshold: $\tau_{M_2}$, nats squared.

    Returns:
        `[B, T]`, float32 or wider: `mask`, and 0 on the dropped tokens. The token of smallest $d^2$ is always kept.

    Raises:
        ValueError: if `logp` is not `[B, T]`, the others have another shape, or the threshold is not above 0.

    Example:
        >>> d = jnp.array([[0.1, -0.1, 0.9, 0.2]])
        >>> second_moment_mask(d, 0 * d, jnp.ones((1, 4))).tolist()
        [[1.0, 1.0, 0.0, 1.0]]

    Reference: Prosperity before Collapse: How Far Can Off-Policy RL Reach with Stale Data on LLMs? (arXiv 2510.01161);
    the mask is taken once per step, at its start.
    """
    if isinstance(threshold, float | int) and threshold <= 0:
        raise ValueError(f"threshold must be above 0, got {threshold}; the mean of squared log-ratios, e.g. 0.04")
    masked.check_like("sampler_logp", jnp.asarray(sampler_logp), "logp", jnp.asarray(logp))
    logp, sampler_logp, mask = as_tokens(jax.lax.stop_gradient(logp), sampler_logp, mask)
    # Tokens outside the mask sort last; the cumulative mean over the first n is what would remain of dropping the rest.
    squares = jnp.where(mask != 0, jnp.square(logp - sampler_logp), jnp.inf).reshape(-1)
    order = jnp.argsort(squares)
    ascending = squares[order]
    counted = jnp.isfinite(ascending)
    mean = jnp.cumsum(jnp.where(counted, ascending, 0.0)) / jnp.arange(1, ascending.size + 1)
    # The cumulative mean of ascending numbers never falls, so the kept ones are a prefix.
    keep = (counted & (mean < threshold)).at[0].set(True)
    return mask * jnp.zeros_like(keep).at[order].set(keep).reshape(mask.shape)

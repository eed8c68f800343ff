"""A weight per prompt from a Beta density that is fitted to the batch's success rates."""

from __future__ import annotations

import jax.numpy as jnp
from jax.scipy.special import betaln

from jaxrl_post import masked
from jaxrl_post.advantages.layout import check_rewards
from jaxrl_post.types import Array

_TINY = 1e-6  # keeps the logarithms of success rates of 0 and 1 finite; the advantages there are 0


def bnpo(
    rewards: Array,
    valid: Array | None = None,
    *,
    low: float | Array = 0.0,
    high: float | Array = 1.0,
    max_weight: float = 1e6,
) -> Array:
    r"""Centred rewards divided by a Beta density at the prompt's success rate.

    $$A_{p,g} = \frac{r_{p,g} - \bar r_p}{f(\bar r_p; \alpha, \beta)}, \qquad
    \alpha = \max(1, 1 + a / 3), \quad \beta = \max(1, 1 + b / 3)$$

    where $f$ is the Beta density and $\mathrm{Beta}(a, b)$ has the mean and variance of the success rates $\bar r_p$ of
    the batch's prompts. $f(\cdot; 1, 1) = 1$ leaves `dr_grpo`; $f(p; 3/2, 3/2) = (8 / \pi) \sqrt{p (1 - p)}$ is
    `grpo` with the population's deviation, times $\pi / 8$. Several components of a reward are each normalised by
    themselves and then averaged.

    Args:
        rewards: `[P, G]` float, the whole batch: the density is a statistic of all of it.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.
        low: the reward of failure; rewards are mapped from `[low, high]` to `[0, 1]`.
        high: the reward of success.
        max_weight: bound on $1 / f$.

    Returns:
        `[P, G]`, float32 or wider, in units of the mapped reward; 0 where not valid and in a group with one valid
        rollout. With one prompt, or success rates that do not differ, the weight is 1.

    Raises:
        ValueError: if `rewards` is not `[P, G]`, `valid` has another shape, or `low` is not below `high`.

    Example:
        >>> advantages = bnpo(jnp.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]]))
        >>> [round(a, 4) for a in advantages[0].tolist()]
        [0.7166, -0.2389, -0.2389, -0.2389]

    Reference: BNPO: Beta Normalization Policy Optimization (arXiv 2506.02864). Not the aggregation that TRL calls
    `bnpo`, which is a mean over a micro-batch's tokens.
    """
    if isinstance(low, float | int) and isinstance(high, float | int) and low >= high:
        raise ValueError(f"low, the reward of failure, must be below high, that of success, got {low} and {high}")
    rewards, valid = check_rewards(rewards, valid)
    rewards = jnp.where(valid, (rewards - low) / (high - low), 0.0)
    rate = masked.mean(rewards, valid, 1)
    counts = jnp.any(valid, axis=1)
    mean, variance = masked.mean(rate, counts), masked.var(rate, counts)
    spread = variance > 1e-8
    strength = jnp.where(spread, mean * (1 - mean) / jnp.where(spread, variance, 1.0) - 1, 0.0)
    alpha, beta = (jnp.maximum(1.0, 1 + strength * share / 3) for share in (mean, 1 - mean))
    inside = jnp.clip(rate, _TINY, 1 - _TINY)
    log_weight = betaln(alpha, beta) - (alpha - 1) * jnp.log(inside) - (beta - 1) * jnp.log1p(-inside)
    weight = jnp.exp(jnp.minimum(log_weight, jnp.log(max_weight)))
    return masked.center(rewards, valid, 1) * jnp.where(spread, weight, 1.0)[:, None]

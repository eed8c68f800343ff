"""Several rewards per rollout: how they are brought to one scale and added."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.advantages.group import grpo
from jaxrl_post.advantages.layout import check_rewards
from jaxrl_post.advantages.scale import divide_by_spread, spread
from jaxrl_post.types import Array


def gdpo(
    rewards: Array,
    valid: Array | None = None,
    *,
    weights: Array | None = None,
    leave_one_out: bool = False,
    normalize_batch: bool = True,
    lengths: Array | None = None,
    ddof: int = 1,
    eps: float = 1e-4,
) -> Array:
    r"""Each reward normalized within its group by itself, then their weighted sum over the batch.

    $$S_g = \sum_n w_n \frac{r_{g,n} - \bar r_n}{\mathrm{std}(r_n) + \epsilon}, \qquad
    A_g = \frac{S_g - \bar S}{\mathrm{std}(S) + \epsilon}$$

    Where GRPO adds first, different combinations of rewards may end at the same advantage, and the reward of the widest
    spread decides. A reward that is constant within a group contributes 0 there.

    Args:
        rewards: `[P, G, N]` float, the rewards of `N` functions; NaN where one could not score the rollout: it then
            contributes 0 and is out of that function's statistics.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.
        weights: `[N]` float, $w$, relative priorities; None for ones.
        leave_one_out: of `grpo`, for each reward.
        normalize_batch: False leaves the sum $S$ as it is.
        lengths: `[P, G]` number of trained tokens, by which rollouts weigh in the batch's mean and deviation (a
            whitening over tokens); None for one each.
        ddof: 1 for unbiased standard deviations, 0 for the population's.
        eps: added to them.

    Returns:
        `[P, G]`, float32 or wider; 0 where not valid, in a group with one valid rollout (which is out of the batch's
        statistics too), and everywhere if all sums are equal.

    Raises:
        ValueError: if `rewards` is not `[P, G, N]`, or `valid`, `lengths` or `weights` does not fit.

    Example:
        >>> rewards = jnp.array([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]])
        >>> [[round(a, 4) for a in row] for row in gdpo(rewards).tolist()]
        [[-0.5477, 0.5477], [-1.0954, 1.0954]]

    Reference: GDPO: Group reward-Decoupled Normalization Policy Optimization for Multi-reward RL Optimization
    (arXiv 2601.05242).
    """
    rewards, valid, scored, weights = _prepare(rewards, valid, weights)

    def one(reward: Array, counts: Array) -> Array:
        return grpo(reward, counts, leave_one_out=leave_one_out, ddof=ddof, eps=eps)

    total = jnp.sum(weights * jax.vmap(one, in_axes=2, out_axes=2)(rewards, scored), axis=2)
    if not normalize_batch:
        if lengths is not None:
            raise ValueError("lengths weigh the batch's statistics and do not apply to normalize_batch=False")
        return total
    compared = valid & (jnp.sum(valid, axis=1, keepdims=True) > 1)
    share = compared.astype(total.dtype)
    if lengths is not None:
        lengths = masked.as_float(lengths)
        masked.check_like("lengths", lengths, "valid", valid)
        share = share * lengths
    difference = jnp.where(compared, total - masked.mean(total, share), 0.0)
    return divide_by_spread(difference, spread(total, share, ddof=ddof), eps)


def log_tamed(
    rewards: Array,
    valid: Array | None = None,
    *,
    weights: Array | None = None,
    threshold: Literal["mean", "median"] | float = "mean",
    eps: float = 1e-6,
) -> Array:
    r"""Weighted sum of rewards of which the most spread-out are replaced by their logarithm.

    $$h_n = \frac{\mathrm{std}(r_n)}{\bar r_n + \epsilon}, \qquad
    r_n' = \log(1 + r_n)\ \text{if}\ h_n > h\ \text{else}\ r_n, \qquad R = \sum_n w_n r_n'$$

    with mean and (population) deviation over the batch. A heavy-tailed reward would otherwise decide the ranking alone.
    What comes out is a reward: give it to `grpo`.

    Args:
        rewards: `[P, G, N]` float, above -1 (lower ones count as -1 in the logarithm, less rounding); NaN where a
            function could not score the rollout: it then contributes 0.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.
        weights: `[N]` float, $w$; None for ones.
        threshold: $h$: the mean or the median of the $h_n$, or a number.
        eps: added to the mean. Where that is negative, $h_n$ is 0.

    Returns:
        `[P, G]`, float32 or wider, units of the reward; 0 where not valid.

    Raises:
        ValueError: if `rewards` is not `[P, G, N]`, `valid` or `weights` does not fit, or `threshold` is unknown.

    Example:
        >>> quality, consistency = [0.8, 0.9, 0.6, 0.7], [0.1, 4.0, 0.2, 0.5]
        >>> total = log_tamed(jnp.stack([jnp.array([quality]), jnp.array([consistency])], axis=2))
        >>> [round(r, 4) for r in total[0].tolist()]
        [0.8953, 2.5094, 0.7823, 1.1055]

    Reference: PaCo-RL: Advancing Reinforcement Learning for Consistent Image Generation with Pairwise Reward Modeling
    (arXiv 2512.04784).
    """
    rewards, _, scored, weights = _prepare(rewards, valid, weights)
    mean = masked.mean(rewards, scored, (0, 1))
    positive = mean + eps > 0
    spreads = spread(rewards, scored, (0, 1), ddof=0, keepdims=False)
    variation = jnp.where(positive, spreads / jnp.where(positive, mean + eps, 1.0), 0.0)
    any_scored = jnp.any(scored, axis=(0, 1))
    if threshold == "mean":
        bound = masked.mean(variation, any_scored)
    elif threshold == "median":
        bound = masked.quantile(variation, any_scored, 0.5)
    elif isinstance(threshold, str):
        raise ValueError(f'threshold must be "mean", "median" or a number, got {threshold!r}')
    else:
        bound = threshold
    lowest = -1 + jnp.finfo(rewards.dtype).eps
    tamed = jnp.where(variation > bound, jnp.log1p(jnp.maximum(rewards, lowest)), rewards)
    return jnp.sum(jnp.where(scored, weights * tamed, 0.0), axis=2)


def _prepare(rewards: Array, valid: Array | None, weights: Array | None) -> tuple[Array, Array, Array, Array]:
    """Rewards `[P, G, N]` without NaN, `valid [P, G]` where any function scored, `scored [P, G, N]`, `weights [N]`."""
    rewards = masked.as_float(rewards)
    masked.check_axes("rewards", rewards, "[P, G, N]", "stack the rewards along a last axis")
    _, valid = check_rewards(rewards[:, :, 0], valid)
    scored = ~jnp.isnan(rewards) & valid[:, :, None]
    weights = jnp.ones(rewards.shape[2], rewards.dtype) if weights is None else masked.as_float(weights)
    if weights.shape != rewards.shape[2:]:
        raise ValueError(f"weights must be [N] with N = {rewards.shape[2]}, got shape {weights.shape}")
    return jnp.where(scored, rewards, 0.0), jnp.any(scored, axis=2), scored, weights

"""Advantages of whole prompts, for groups whose rollouts all did equally well and cannot be told apart."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.advantages.layout import check_rewards
from jaxrl_post.advantages.scale import divide_by_spread, spread
from jaxrl_post.types import Array


def global_advantage(rewards: Array, valid: Array | None = None, *, ddof: int = 0, eps: float = 1e-6) -> Array:
    r"""A prompt's mean reward among those of the batch, $A_p = (\bar r_p - \mathrm{mean}_p\, \bar r_p) /
    (\mathrm{std}_p\, \bar r_p + \epsilon)$, the same for all its rollouts.

    Args:
        rewards: `[P, G]` float.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.
        ddof: 0 for the population's standard deviation, 1 for the unbiased one. The paper's is not known; the
            population's is taken.
        eps: added to it, in units of the reward.

    Returns:
        `[P, G]`, float32 or wider; 0 where not valid, and everywhere if all prompts' means are equal. Prompts without a
        valid rollout are out of the statistics.

    Raises:
        ValueError: if `rewards` is not `[P, G]`, `valid` has another shape, or `ddof` is neither 0 nor 1.

    Example:
        >>> rewards = jnp.array([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> [round(a, 4) for a in global_advantage(rewards, eps=0.0)[:, 0].tolist()]
        [1.4142, -1.4142, 0.0, 0.0]

    Reference: COPO: Consistency-Aware Policy Optimization (arXiv 2508.04138).
    """
    rewards, valid = check_rewards(rewards, valid)
    means, counts = masked.mean(rewards, valid, 1), jnp.any(valid, axis=1)
    found = divide_by_spread(masked.center(means, counts), spread(means, counts, ddof=ddof), eps)
    return jnp.where(valid, found[:, None], 0.0)


def answer_entropy(answer: Array, valid: Array | None = None, *, base: float = math.e) -> Array:
    r"""Entropy of a group's answers, $H_p = -\sum_v p_v \log p_v$ with $p_v$ the share of answer $v$.

    Args:
        answer: `[P, G]` int, rollouts with the same number gave the same answer; those that cannot be parsed share one.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.
        base: of the logarithm.

    Returns:
        `[P]` float32; 0 where all answers agree, or none is valid.

    Raises:
        ValueError: if `answer` is not `[P, G]`, `valid` has another shape, or `base` is not above 1.

    Example:
        >>> [round(h, 4) for h in answer_entropy(jnp.array([[7, 7], [3, 4]])).tolist()]
        [0.0, 0.6931]

    Reference: COPO: Consistency-Aware Policy Optimization (arXiv 2508.04138).
    """
    if base <= 1:
        raise ValueError(f"base must be above 1, got {base}; give 2 for bits or math.e for nats")
    answer = jnp.asarray(answer)
    masked.check_axes("answer", answer, "[P, G]", "one answer per rollout")
    _, valid = check_rewards(answer, valid)
    same = (answer[:, :, None] == answer[:, None, :]) & valid[:, None, :]
    share = jnp.sum(same, axis=2) / jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1)
    # -sum_v p log p is the mean over rollouts of -log of the share of their own answer.
    return masked.mean(-jnp.log(jnp.where(valid, share, 1.0)), valid, 1) / math.log(base)


def copo_weight(entropy: Array, *, gamma: float = 20.0, rho: float = 1.5) -> Array:
    r"""How much the comparison within the group counts, $w = \sigma(\gamma (H - \rho))$; the global one has the rest.

    Args:
        entropy: any shape, float: of the answers of a group.
        gamma: $\gamma$, steepness.
        rho: $\rho$, the entropy at which both count alike. In nats, groups of 6 reach at most 1.79.

    Returns:
        `entropy`'s shape, float32 or wider, in [0, 1].

    Example:
        >>> [round(w, 4) for w in copo_weight(jnp.array([0.0, 1.5, 1.7918])).tolist()]
        [0.0, 0.5, 0.9971]

    Reference: COPO: Consistency-Aware Policy Optimization (arXiv 2508.04138).
    """
    return jax.nn.sigmoid(gamma * (masked.as_float(entropy) - rho))


def uniform_weight(rewards: Array, valid: Array | None = None) -> Array:
    """1 for groups whose rewards differ, 0 for others: the global comparison only where there is no other.

    Args:
        rewards: `[P, G]` float.
        valid: `[P, G]` bool; None for all.

    Returns:
        `[P]`, float32 or wider.

    Raises:
        ValueError: if `rewards` is not `[P, G]` or `valid` has another shape.

    Example:
        >>> uniform_weight(jnp.array([[1.0, 0.0], [1.0, 1.0]])).tolist()
        [1.0, 0.0]

    Reference: COPO: Consistency-Aware Policy Optimization (arXiv 2508.04138).
    """
    rewards, valid = check_rewards(rewards, valid)
    return (spread(rewards, valid, 1, keepdims=False) > 0).astype(rewards.dtype)

"""Advantages that choose among the rollouts: by the sign of what was earned, for balance, or for being no outlier."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.advantages.group import grpo
from jaxrl_post.types import Array

_GROUP = 1  # the axis of G

Sign = Literal["positive", "negative", "both"]


def _prepare(rewards: Array, valid: Array | None) -> tuple[Array, Array]:
    rewards = masked.as_float(rewards)
    masked.check_axes("rewards", rewards, "[P, G]", "reshape with as_groups(rewards, group_size=8)")
    valid = jnp.ones(rewards.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", valid, "rewards", rewards, "reshape with as_groups(valid, group_size=8)")
    return rewards, valid


def signed(
    rewards: Array,
    valid: Array | None = None,
    *,
    sign: Sign = "both",
    positive_weight: float = 0.1,
    threshold: float = 0.5,
) -> tuple[Array, Array]:
    r"""Constant advantages of right and wrong answers, and which of them are learned from (PSR, NSR, W-REINFORCE).

    $$A = \lambda \text{ where } r \geq \mathrm{threshold}, \qquad A = -1 \text{ elsewhere}$$

    | sign | kept | |
    |---|---|---|
    | `negative` | wrong answers | NSR |
    | `positive` | right answers, with $\lambda = 1$ | PSR |
    | `both` | all | W-REINFORCE: $\lambda$ PSR + NSR |

    Args:
        rewards: `[P, G]` float.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.
        sign: see above.
        positive_weight: $\lambda$ of `both`.
        threshold: an answer with at least this reward is right.

    Returns:
        advantages: `[P, G]`, float32 or wider; 0 where not kept.
        keep: `[P, G]` bool; the denominators of the loss count these rollouts alone.

    Raises:
        ValueError: if `rewards` is not `[P, G]`, `valid` has another shape, `sign` is unknown, or the weight is
            negative.

    Example:
        >>> advantages, keep = signed(jnp.array([[1.0, 0.0, 0.0]]), sign="negative")
        >>> advantages.tolist(), keep.tolist()
        ([[0.0, -1.0, -1.0]], [[False, True, True]])

    Reference: The Surprising Effectiveness of Negative Reinforcement in LLM Reasoning (arXiv 2506.01347).
    """
    if sign not in get_args(Sign):
        raise ValueError(f"sign must be one of {', '.join(get_args(Sign))}, got {sign!r}")
    if isinstance(positive_weight, float | int) and positive_weight < 0:
        raise ValueError(f"positive_weight must be >= 0, got {positive_weight}; it multiplies what right answers earn")
    rewards, valid = _prepare(rewards, valid)
    right = rewards >= threshold
    keep = valid & {"positive": right, "negative": ~right, "both": jnp.ones_like(right)}[sign]
    weight = 1.0 if sign == "positive" else positive_weight
    return jnp.where(keep, jnp.where(right, weight, -1.0), 0.0).astype(rewards.dtype), keep


def red_drop(
    rewards: Array, key: Array, valid: Array | None = None, *, normalize_std: bool = False
) -> tuple[Array, Array]:
    r"""Group advantages after dropping rollouts below the mean at random until they are no more than those above it.

    With $n_+$ valid rollouts at or above the group's mean and $n_- > n_+$ below it, $n_- - n_+$ of the latter go; mean
    (and standard deviation) are those of the rest.

    Args:
        rewards: `[P, G]` float.
        key: which ones go.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.
        normalize_std: divide by the standard deviation of the rest, see `grpo`.

    Returns:
        advantages: `[P, G]`, float32 or wider; 0 where dropped or not valid.
        keep: `[P, G]` bool.

    Raises:
        ValueError: if `rewards` is not `[P, G]` or `valid` has another shape.

    Example:
        >>> advantages, keep = red_drop(jnp.array([[1.0, 0.0, 0.0, 0.0]]), jax.random.key(0))
        >>> advantages[0, 0].item(), int(keep.sum())
        (0.5, 2)

    Reference: Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm (arXiv 2509.24203).
    """
    rewards, valid = _prepare(rewards, valid)
    below = valid & (masked.center(rewards, valid, _GROUP) < 0)
    above = jnp.sum(valid & ~below, axis=_GROUP, keepdims=True)
    # The rank of each rollout below the mean in a random order of them; others rank behind.
    order = jnp.argsort(jnp.where(below, jax.random.uniform(key, rewards.shape), 2.0), axis=_GROUP)
    rank = jnp.argsort(order, axis=_GROUP)
    keep = valid & (~below | (rank < above))
    return grpo(rewards, keep, normalize_std=normalize_std), keep


def within_sigma(advantages: Array, mask: Array, *, sigma: float = 3.0, eps: float = 1e-8) -> Array:
    r"""Advantages standardised over the batch, and 0 where they are outliers.

    $$z = \frac{A - \bar A}{\sqrt{\max(\mathrm{var}, \epsilon)}}, \qquad \hat A = z \text{ if } \lvert z \rvert \leq
    \sigma \text{ else } 0$$

    In a batch that is nearly all right, the one wrong answer would otherwise have a huge advantage.

    Args:
        advantages: `[B, T]` (or any shape) float, of the whole batch.
        mask: of the same shape; 1 where the element counts.
        sigma: the largest magnitude that stays, in standard deviations.
        eps: floor of the (population) variance.

    Returns:
        The shape of `advantages`, float32 or wider; 0 where the mask is.

    Raises:
        ValueError: if the shapes differ or `sigma` is not above 0.

    Example:
        >>> rewards = jnp.ones((1, 256)).at[0, 0].set(0.0)
        >>> [round(z, 4) for z in within_sigma(rewards, jnp.ones((1, 256)))[0, :2].tolist()]
        [0.0, 0.0626]

    Reference: R1-Reward: Training Multimodal Reward Model Through Stable Reinforcement Learning (arXiv 2505.02835); the
    paper's rule, from which its code differs (it compares with the raw mean +- 3).
    """
    if isinstance(sigma, float | int) and sigma <= 0:
        raise ValueError(f"sigma must be above 0 standard deviations, got {sigma}")
    advantages, mask = masked.as_float(advantages), masked.as_float(mask)
    masked.check_like("mask", mask, "advantages", advantages)
    variance = masked.var(advantages, mask, ddof=0)
    z = masked.center(advantages, mask) / jnp.sqrt(jnp.maximum(variance, eps))
    return jnp.where(jnp.abs(z) <= sigma, z, 0.0)


def effective_positive_share(share: Array | float, baseline: Array | float) -> Array:
    r"""Share of right answers that a baseline makes of a batch: $p_{eff} = p\,(1 - c) / (1 + (1 - 2p)\,c)$.

    With rewards of +1 and -1, REINFORCE with the baseline $c$ has the gradient (up to scale) of a batch without one in
    which the right answers have this share. The reported optimum is 0.1 to 0.2.

    Args:
        share: $p$ in [0, 1], share of answers with reward +1.
        baseline: $c$ in (-1, 1).

    Returns:
        Float32 or wider, of the arguments' shape.

    Example:
        >>> [round(float(effective_positive_share(p, c)), 5) for p, c in ((0.5, -0.5), (0.2, -0.1))]
        [0.75, 0.23404]

    Reference: Tapered Off-Policy REINFORCE (arXiv 2503.14286).
    """
    p, c = masked.as_float(share), masked.as_float(baseline)
    return p * (1 - c) / (1 + (1 - 2 * p) * c)

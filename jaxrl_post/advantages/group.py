"""Advantages of whole sequences: the reward against a baseline, most often one of its own group.

Every function takes rewards `[P, G]`, one row per prompt, and gives advantages of that shape. Only valid rollouts enter
a group's statistics; the others get 0, whatever their reward holds. Where the baseline comes from the group, a group
with one valid rollout, or with equal rewards, gets exactly 0.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.advantages.layout import check_rewards
from jaxrl_post.advantages.scale import divide_by_spread, spread
from jaxrl_post.types import Array

_GROUP = 1  # the axis of G


def _spread_of_the_others(rewards: Array, valid: Array, ddof: int) -> Array:
    """`[P, G]`: the spread of the other valid rollouts of the group, or of the whole group where they are equal."""
    others = valid[:, None, :] & ~jnp.eye(rewards.shape[1], dtype=bool)
    pairwise = jnp.broadcast_to(rewards[:, None, :], others.shape)
    without = spread(pairwise, others, 2, ddof=ddof, keepdims=False)
    return jnp.where(without > 0, without, spread(rewards, valid, _GROUP, ddof=ddof))


def reinforce(rewards: Array, valid: Array | None = None) -> Array:
    r"""No baseline: $A_g = r_g$.

    Args:
        rewards: `[P, G]` float.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.

    Returns:
        `[P, G]`, float32 or wider; 0 where not valid.

    Raises:
        ValueError: if `rewards` is not `[P, G]` or `valid` has another shape.

    Example:
        >>> reinforce(jnp.array([[1.0, 2.0]]), jnp.array([[True, False]])).tolist()
        [[1.0, 0.0]]

    Reference: Simple statistical gradient-following algorithms for connectionist reinforcement learning
    (Williams, 1992).
    """
    rewards, valid = check_rewards(rewards, valid)
    return jnp.where(valid, rewards, 0.0)


def grpo(
    rewards: Array,
    valid: Array | None = None,
    *,
    normalize_std: bool = True,
    std_level: Literal["group", "batch"] = "group",
    leave_one_out: bool = False,
    ddof: int = 1,
    eps: float = 1e-6,
) -> Array:
    r"""Group-relative advantage, $A_g = (r_g - \bar r) / (\mathrm{std}(r) + \epsilon)$ over the group's valid rollouts.

    Args:
        rewards: `[P, G]` float.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.
        normalize_std: False leaves the difference undivided, as `dr_grpo`; `ddof` and `eps` then play no part.
        std_level: whose standard deviation divides: `"group"`, or `"batch"` for that of all valid rewards as they are,
            the differences between prompts included. The mean is the group's in both.
        leave_one_out: mean and standard deviation of a rollout's group are taken over its *other* valid rollouts. Where
            those are equal, or there is only one, the deviation is that of the whole group, so that the advantage has
            no unit. With `std_level="batch"` only the mean leaves the rollout out.
        ddof: 1 for the unbiased standard deviation (n - 1), 0 for the population's (n).
        eps: added to the standard deviation, in units of the reward.

    Returns:
        `[P, G]`, float32 or wider; 0 where not valid, in a group with one valid rollout, and in a group whose rewards
        are equal to within the resolution of their dtype.

    Raises:
        ValueError: if `rewards` is not `[P, G]`, `valid` has another shape, `ddof` is neither 0 nor 1, `std_level` is
            unknown, or `"batch"` although nothing is divided.

    Example:
        >>> [round(a, 4) for a in grpo(jnp.array([[1.0, 0.0, 0.0, 1.0]]), eps=0.0)[0].tolist()]
        [0.866, -0.866, -0.866, 0.866]
        >>> [round(a, 4) for a in grpo(jnp.array([[3.0, 0.0, 1.0]]), leave_one_out=True, eps=0.0)[0].tolist()]
        [3.5355, -1.4142, -0.2357]

    Reference: DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models (arXiv 2402.03300).
    """
    if std_level not in ("group", "batch"):
        raise ValueError(f'std_level must be "group" or "batch", got {std_level!r}')
    if std_level == "batch" and not normalize_std:
        raise ValueError('std_level="batch" does not apply to normalize_std=False; leave one of them out')
    centered = rloo(rewards, valid) if leave_one_out else dr_grpo(rewards, valid)
    if not normalize_std:
        return centered
    rewards, valid = check_rewards(rewards, valid)
    if std_level == "batch":
        deviation = spread(rewards, valid, None, ddof=ddof)
    elif leave_one_out:
        deviation = _spread_of_the_others(rewards, valid, ddof)
    else:
        deviation = spread(rewards, valid, _GROUP, ddof=ddof)
    return divide_by_spread(centered, deviation, eps)


def dr_grpo(rewards: Array, valid: Array | None = None) -> Array:
    r"""Group-relative advantage without the division: $A_g = r_g - \bar r$ over the group's valid rollouts.

    Args:
        rewards: `[P, G]` float.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.

    Returns:
        `[P, G]`, float32 or wider; 0 where not valid and in a group with one valid rollout.

    Raises:
        ValueError: if `rewards` is not `[P, G]` or `valid` has another shape.

    Example:
        >>> dr_grpo(jnp.array([[1.0, 0.0, 0.0, 1.0]])).tolist()
        [[0.5, -0.5, -0.5, 0.5]]

    Reference: Understanding R1-Zero-Like Training: A Critical Perspective (arXiv 2503.20783).
    """
    rewards, valid = check_rewards(rewards, valid)
    return masked.center(rewards, valid, _GROUP)


def rloo(rewards: Array, valid: Array | None = None) -> Array:
    r"""Leave-one-out baseline: $A_g = r_g - \frac{1}{n-1}\sum_{j \neq g} r_j = \frac{n}{n-1}(r_g - \bar r)$.

    Args:
        rewards: `[P, G]` float.
        valid: `[P, G]` bool, False where the rollout does not count; None for all. $n$ counts the valid ones.

    Returns:
        `[P, G]`, float32 or wider; 0 where not valid and in a group with one valid rollout.

    Raises:
        ValueError: if `rewards` is not `[P, G]` or `valid` has another shape.

    Example:
        >>> rloo(jnp.array([[1.0, 0.0, 2.0]])).tolist()
        [[0.0, -1.5, 1.5]]

    Reference: Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs
    (arXiv 2402.14740).
    """
    rewards, valid = check_rewards(rewards, valid)
    count = jnp.sum(valid, axis=_GROUP, keepdims=True).astype(rewards.dtype)
    return masked.center(rewards, valid, _GROUP) * count / jnp.maximum(count - 1, 1)


def gpg(
    rewards: Array,
    valid: Array | None = None,
    *,
    f_norm: float = 1.0,
    count: Literal["rewards", "advantages"] = "rewards",
) -> Array:
    r"""Group policy gradient: centred rewards, scaled up for the rollouts that carry no signal.

    $$A_g = \alpha\, (r_g - \bar r) / F, \qquad \alpha = B / \max(1, M)$$

    with $B$ the valid rollouts of the batch and $M$ those that count as carrying signal.

    Args:
        rewards: `[P, G]` float, the whole batch: $\alpha$ is a statistic of all of it.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.
        f_norm: $F$, in units of the reward.
        count: what $M$ counts: `"rewards"`, rollouts whose reward is not 0 (the usual implementation), or
            `"advantages"`, rollouts in groups whose rewards differ, which are the ones that have a gradient.

    Returns:
        `[P, G]`, float32 or wider; 0 where not valid and in a group with one valid rollout.

    Raises:
        ValueError: if `rewards` is not `[P, G]`, `valid` has another shape, or `count` is unknown.

    Example:
        >>> gpg(jnp.array([[1.0, 0.0], [0.0, 0.0]])).tolist()
        [[2.0, -2.0], [0.0, 0.0]]
        >>> gpg(jnp.array([[1.0, 0.0], [0.0, 0.0]]), count="advantages").tolist()
        [[1.0, -1.0], [0.0, 0.0]]

    Reference: GPG: A Simple and Strong Reinforcement Learning Baseline for Model Reasoning (arXiv 2504.02546).
    """
    if count not in ("rewards", "advantages"):
        raise ValueError(f'count must be "rewards" or "advantages", got {count!r}')
    rewards, valid = check_rewards(rewards, valid)
    centered = masked.center(rewards, valid, _GROUP)
    live = rewards != 0 if count == "rewards" else jnp.any(centered != 0, axis=_GROUP, keepdims=True)
    carrying = jnp.sum(live & valid).astype(rewards.dtype)
    alpha = jnp.sum(valid).astype(rewards.dtype) / jnp.maximum(carrying, 1)
    return alpha * centered / f_norm


def maxrl(rewards: Array, valid: Array | None = None) -> Array:
    r"""Maximum-likelihood RL: centred rewards over their mean, $A_g = (r_g - \bar r) / \bar r$.

    With rewards 0 and 1 a group's gradient is that of the log of its success rate, cut off at order `G`, so that a
    prompt solved with probability $p$ weighs $1 / p$.

    Args:
        rewards: `[P, G]` float, not negative.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.

    Returns:
        `[P, G]`, float32 or wider; 0 where not valid, in a group with one valid rollout, and where the mean is not
        above 0.

    Raises:
        ValueError: if `rewards` is not `[P, G]` or `valid` has another shape.

    Example:
        >>> maxrl(jnp.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])).tolist()
        [[3.0, -1.0, -1.0, -1.0], [0.0, 0.0, 0.0, 0.0]]

    Reference: Maximum Likelihood Reinforcement Learning (arXiv 2602.02710).
    """
    rewards, valid = check_rewards(rewards, valid)
    mean = masked.mean(rewards, valid, _GROUP, keepdims=True)
    return divide_by_spread(masked.center(rewards, valid, _GROUP), mean)


def pass_at_k(
    rewards: Array, valid: Array | None = None, *, normalize_std: bool = False, ddof: int = 1, eps: float = 1e-6
) -> Array:
    r"""Credit for the best of the group alone: its lead over the second best, $A_{\arg\max} = r_{(1)} - r_{(2)}$.

    Args:
        rewards: `[P, G]` float.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.
        normalize_std: divide by the group's standard deviation plus `eps`, as some systems do.
        ddof: of that standard deviation, see `grpo`.
        eps: added to it, in units of the reward.

    Returns:
        `[P, G]`, float32 or wider; 0 for all but the first rollout with the largest reward, in a group with a tie for
        the best, and in a group with one valid rollout.

    Raises:
        ValueError: if `rewards` is not `[P, G]`, `valid` has another shape, or `ddof` is neither 0 nor 1.

    Example:
        >>> pass_at_k(jnp.array([[0.25, 1.0, 0.5], [1.0, 1.0, 0.0]])).tolist()
        [[0.0, 0.5, 0.0], [0.0, 0.0, 0.0]]

    Reference: Optimizing Language Models for Inference Time Objectives using Reinforcement Learning
    (arXiv 2503.19595).
    """
    rewards, valid = check_rewards(rewards, valid)
    best = jnp.argmax(jnp.where(valid, rewards, -jnp.inf), axis=_GROUP, keepdims=True)
    is_best = (jnp.arange(rewards.shape[1]) == best) & valid
    others = valid & ~is_best
    second = masked.max(rewards, others, _GROUP, keepdims=True)
    pair = jnp.any(others, axis=_GROUP, keepdims=True)
    lead = jnp.where(is_best & pair, rewards - second, 0.0)
    return divide_by_spread(lead, spread(rewards, valid, _GROUP, ddof=ddof), eps) if normalize_std else lead


def opo(rewards: Array, lengths: Array, valid: Array | None = None) -> Array:
    r"""Length-weighted baseline, the one of least variance: $A_g = r_g - \sum_j L_j r_j / \sum_j L_j$.

    Args:
        rewards: `[P, G]` float.
        lengths: `[P, G]` int or float, trained tokens of each rollout.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.

    Returns:
        `[P, G]`, float32 or wider; 0 where not valid and in a group with one valid rollout. If all lengths of a group
        are 0 the baseline is the plain mean.

    Raises:
        ValueError: if `rewards` is not `[P, G]`, or `lengths` or `valid` has another shape.

    Example:
        >>> opo(jnp.array([[1.0, 0.0]]), jnp.array([[1, 3]])).tolist()
        [[0.75, -0.25]]

    Reference: On-Policy RL with Optimal Reward Baseline (arXiv 2505.23585).
    """
    rewards, valid = check_rewards(rewards, valid)
    lengths = masked.as_float(lengths)
    masked.check_like("lengths", lengths, "rewards", rewards, "reshape with as_groups(lengths, group_size=8)")
    # Weighing the centred rewards instead of the rewards keeps equal rewards at exactly 0.
    centered = masked.center(rewards, valid, _GROUP)
    weights = jnp.where(valid, lengths, 0.0)
    return jnp.where(valid, centered - masked.mean(centered, weights, _GROUP, keepdims=True), 0.0)


def remax(rewards: Array, greedy_rewards: Array, valid: Array | None = None) -> Array:
    r"""Reward of the greedy answer as baseline: $A_g = r_g - r_{greedy}$.

    The baseline does not come from the group, so one rollout per prompt is enough and a single one keeps its advantage.

    Args:
        rewards: `[P, G]` float.
        greedy_rewards: `[P]` float, reward of one answer per prompt, decoded greedily.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.

    Returns:
        `[P, G]`, float32 or wider; 0 where not valid.

    Raises:
        ValueError: if `rewards` is not `[P, G]`, `greedy_rewards` is not `[P]`, or `valid` has another shape.

    Example:
        >>> remax(jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.array([1.0, 0.0])).tolist()
        [[0.0, -1.0], [1.0, 1.0]]

    Reference: ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method for Aligning Large Language
    Models (arXiv 2310.10505).
    """
    rewards, valid = check_rewards(rewards, valid)
    greedy_rewards = masked.as_float(greedy_rewards)
    masked.check_axes("greedy_rewards", greedy_rewards, "[P]", "one greedy answer per prompt")
    if greedy_rewards.shape[0] != rewards.shape[0]:
        raise ValueError(
            f"greedy_rewards must have one number per prompt, P = {rewards.shape[0]}, "
            f"got shape {greedy_rewards.shape}; score one greedy answer per row of rewards"
        )
    return jnp.where(valid, rewards - greedy_rewards[:, None], 0.0)


def mc_grpo(
    rewards: Array,
    valid: Array | None = None,
    *,
    eps: float = 1e-3,
    max_abs: float | None = None,
    zero_mad_scale: float | None = None,
) -> tuple[Array, Array]:
    r"""Median-centred group advantage for small groups; one rollout that attains the median is dropped.

    $$A_g = (r_g - m) / (\mathrm{median}_j \lvert r_j - m \rvert + \epsilon), \qquad m = \mathrm{median}_j\, r_j$$

    Sample an odd number `G`: the dropped rollout would have advantage 0, and the other `G - 1` carry the gradient. Of
    an even number of valid rollouts the lower median is taken, so that one of them always attains it. Further ties at
    the median have advantage 0 but stay in the loss and its denominator.

    Args:
        rewards: `[P, G]` float.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.
        eps: $\epsilon$, added to the median absolute deviation, in units of the reward. Where that deviation is 0,
            `eps` alone is the scale. With rewards 0 and 1 it always is, and whatever differs from the median has
            $\lvert A \rvert = 1 / \epsilon$: 1000 for the default.
        max_abs: clip advantages to +- this; None for no clip, where `eps` alone bounds them. `methods.mc_grpo` clips
            at 5.
        zero_mad_scale: the scale where the deviation is 0, in units of the reward (1 leaves the difference as it is);
            None for `eps`.

    Returns:
        advantages: `[P, G]`, float32 or wider; 0 where not valid and in a group with one valid rollout.
        keep: `[P, G]` bool; the valid rollouts less the first one that attains the median in each group.

    Raises:
        ValueError: if `rewards` is not `[P, G]`, `valid` has another shape, or `eps`, `max_abs` or `zero_mad_scale`
            is not above 0.

    Example:
        >>> advantages, keep = mc_grpo(jnp.array([[0.2, 0.9, 0.5]]))
        >>> [round(a, 4) for a in advantages[0].tolist()], keep.tolist()
        ([-0.9967, 1.3289, 0.0], [[True, True, False]])
        >>> binary = jnp.array([[1.0, 0.0, 0.0]])
        >>> [round(float(mc_grpo(binary, max_abs=bound)[0].max())) for bound in (None, 5.0)]
        [1000, 5]

    Reference: MC-GRPO: Median-Centered Group Relative Policy Optimization for Small-Rollout Reinforcement Learning
    (arXiv 2601.22582).
    """
    for name, number in (("eps", eps), ("max_abs", max_abs), ("zero_mad_scale", zero_mad_scale)):
        if isinstance(number, float | int) and number <= 0:
            raise ValueError(f"{name} must be above 0, got {number}")
    rewards, valid = check_rewards(rewards, valid)
    median = masked.quantile(rewards, valid, 0.5, _GROUP, method="lower", keepdims=True)
    difference = jnp.where(valid, rewards - median, 0.0)
    deviation = masked.quantile(jnp.abs(difference), valid, 0.5, _GROUP, method="lower", keepdims=True)
    scale = deviation + eps
    if zero_mad_scale is not None:
        scale = jnp.where(deviation == 0, zero_mad_scale, scale)
    advantages = difference / scale
    if max_abs is not None:
        advantages = jnp.clip(advantages, -max_abs, max_abs)
    attains = valid & (rewards == median)
    dropped = attains & (jnp.cumsum(attains, axis=_GROUP) == 1)
    return advantages, valid & ~dropped

"""Rewards brought to another scale: differences of class probabilities, z-scores per input, linear maps."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.advantages.group import grpo
from jaxrl_post.types import Array


def gap_reward(probs: Array, label: Array, *, correct_scale: float = 200.0, wrong_scale: float = 180.0) -> Array:
    r"""Lead of the right label over the best other, scaled up more where it is positive.

    $$g = p_y - \max_{c \neq y} p_c, \qquad R = 200\, g \text{ if } g > 0 \text{ else } 180\, g$$

    Args:
        probs: `[N, C]` float; probabilities of the classes, e.g. a softmax over the verbalisers' logits.
        label: `[N]` int, the right class.
        correct_scale: factor of a positive gap.
        wrong_scale: factor of another gap.

    Returns:
        `[N]`, float32 or wider; RLPrompt takes the mean over the task's inputs.

    Raises:
        ValueError: if `probs` is not `[N, C]` with at least two classes, or `label` is not `[N]`.

    Example:
        >>> [round(x) for x in gap_reward(jnp.array([[0.7, 0.2, 0.1], [0.3, 0.5, 0.2]]), jnp.array([0, 0])).tolist()]
        [100, -36]

    Reference: RLPrompt: Optimizing Discrete Text Prompts with Reinforcement Learning (arXiv 2205.12548).
    """
    probs, label = masked.as_float(probs), jnp.asarray(label)
    masked.check_axes("probs", probs, "[N, C]")
    masked.check_like("label", label, "the rows of probs", probs[:, 0])
    if probs.shape[1] < 2:
        raise ValueError(f"probs must have at least two classes, got shape {probs.shape}; give one column per class")
    right = jnp.arange(probs.shape[1]) == label[:, None]
    gap = jnp.sum(jnp.where(right, probs, 0.0), 1) - jnp.max(jnp.where(right, -jnp.inf, probs), 1)
    return jnp.where(gap > 0, correct_scale, wrong_scale) * gap


def zscore_by_input(rewards: Array, valid: Array | None = None, *, eps: float = 1e-4) -> Array:
    r"""Rewards of the same input brought to one scale: $(r_{s,i} - \bar r_i) / (\mathrm{std}_s\, r_{s,i} + \epsilon)$.

    The inputs of a task differ in how much reward any prompt can earn on them; without this the mean over inputs is
    ruled by those with the largest spread.

    Args:
        rewards: `[S, I]` float; reward of each of `S` sampled prompts on each of `I` inputs.
        valid: `[S, I]` bool, False where there is no reward; None for all.
        eps: added to the population standard deviation, in units of the reward.

    Returns:
        `[S, I]`, float32 or wider; 0 where not valid, and on an input whose rewards are equal or single.

    Raises:
        ValueError: if `rewards` is not `[S, I]` or `valid` has another shape.

    Example:
        >>> scores = zscore_by_input(jnp.array([[0.0, 100.0], [1.0, 300.0]]), eps=0.0)
        >>> scores.tolist()
        [[-1.0, -1.0], [1.0, 1.0]]

    Reference: RLPrompt: Optimizing Discrete Text Prompts with Reinforcement Learning (arXiv 2205.12548).
    """
    rewards = masked.as_float(rewards)
    masked.check_axes("rewards", rewards, "[S, I]")
    return grpo(rewards.T, None if valid is None else jnp.asarray(valid).T, ddof=0, eps=eps).T


def rescale(x: Array, *, old_low: float, old_high: float, new_low: float, new_high: float) -> Array:
    r"""Linear map of one range onto another, $(x - a) \frac{d - c}{b - a} + c$; nothing is clipped.

    Args:
        x: any shape, float.
        old_low: $a$, in units of `x`.
        old_high: $b$, in units of `x`.
        new_low: $c$, what $a$ becomes.
        new_high: $d$, what $b$ becomes.

    Returns:
        `x`'s shape, float32 or wider.

    Raises:
        ValueError: if the old range is empty.

    Example:
        >>> rescale(jnp.array([0.0, 0.5, 1.0]), old_low=0, old_high=1, new_low=-20, new_high=80).tolist()
        [-20.0, 30.0, 80.0]

    Reference: RLPrompt: Optimizing Discrete Text Prompts with Reinforcement Learning (arXiv 2205.12548).
    """
    if old_low == old_high:
        raise ValueError(f"old_low and old_high must differ, got {old_low} for both")
    return (masked.as_float(x) - old_low) * ((new_high - new_low) / (old_high - old_low)) + new_low

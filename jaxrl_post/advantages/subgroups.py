"""Advantages of groups whose members were asked for different things: sub-groups with a level of their own."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.advantages.group import grpo
from jaxrl_post.advantages.layout import check_rewards
from jaxrl_post.types import Array


def hbpo(
    rewards: Array,
    budgets: Array,
    levels: Array,
    valid: Array | None = None,
    *,
    weight: float = 1.0,
    normalize_std: bool = True,
    ddof: int = 1,
    eps: float = 1e-6,
) -> Array:
    r"""HBPO: GRPO across the budgets of a prompt, plus how a budget's sub-group does against its own level.

    $$A_i = \frac{r_i - \bar r}{\mathrm{std}(r) + \epsilon} + w\, \big(\mathrm{mean}\{r_j : b_j = b_i\} - g_i\big)$$

    The paper's code adds the second part twice; `weight=2` does so.

    Args:
        rewards: `[P, G]` float.
        budgets: `[P, G]`, tokens or any other numbers: members of a prompt with the same one are a sub-group.
        levels: `[P, G]` float, $g$: the reward that the member's sub-group is held against, see `rewards.budget_level`.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.
        weight: $w$, of the comparison with the level.
        normalize_std: divide the comparison across budgets by the group's standard deviation.
        ddof: 1 for the unbiased standard deviation (n - 1), 0 for the population's (n).
        eps: added to the standard deviation, in units of the reward.

    Returns:
        `[P, G]`, float32 or wider; 0 where not valid, and in a group with one valid rollout.

    Raises:
        ValueError: if the arrays are not `[P, G]` of one shape.

    Example:
        >>> rewards, budgets = jnp.array([[1.0, 3.0, 2.0, 2.0]]), jnp.array([[8, 8, 16, 16]])
        >>> hbpo(rewards, budgets, jnp.array([[3.0, 3.0, 2.0, 2.0]]), normalize_std=False).tolist()
        [[-2.0, 0.0, 0.0, 0.0]]

    Reference: Hierarchical Budget Policy Optimization for Adaptive Reasoning (arXiv 2507.15844).
    """
    across = grpo(rewards, valid, normalize_std=normalize_std, ddof=ddof, eps=eps)
    rewards, valid = check_rewards(rewards, valid)
    budgets, levels = jnp.asarray(budgets), masked.as_float(levels)
    masked.check_like("budgets", budgets, "rewards", rewards)
    masked.check_like("levels", levels, "rewards", rewards)
    same = (budgets[:, :, None] == budgets[:, None, :]) & valid[:, None, :]
    own = masked.mean(jnp.broadcast_to(rewards[:, None, :], same.shape), same, axis=2)
    several = jnp.sum(valid, axis=1, keepdims=True) > 1
    return across + jnp.where(valid & several, weight * (own - levels), 0.0)

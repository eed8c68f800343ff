"""Methods whose groups have members of several kinds: under different token budgets, or from exits of one thought."""

from __future__ import annotations

from typing import Any, Unpack

from jaxrl_post import advantages, rewards
from jaxrl_post.methods import checks
from jaxrl_post.methods.policy_gradient import ClippedOptions, clipped
from jaxrl_post.methods.signals import Signals, stateless
from jaxrl_post.rollout import BUDGET, EXIT
from jaxrl_post.types import Array, Method


def hbpo(
    *,
    max_length: float = 4096,
    scale: float = 4.0,
    intra_weight: float = 1.0,
    correct_above: float = 0.5,
    format_reward: str | None = None,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""HBPO: a prompt's completions explore under several token budgets, compared across and within them.

    $$A_i = \mathrm{GRPO}(R)_i + w\, \big(\mathrm{mean}\{R_j : b_j = b_i\} - g(b_i)\big)$$

    with the rewards $R$ of `rewards.budget_cosine` and the levels $g$ of `rewards.budget_level`. At test time no prompt
    names a budget, and the length of an answer follows its problem.

    Args:
        max_length: tokens, the length at which a right answer is worth nothing.
        scale: reward of a right answer of length 0.
        intra_weight: $w$; the paper's code adds this part twice, as 2 does.
        correct_above: an answer whose reward is above this is right.
        format_reward: the component of the reward that is above 0 where the answer can be read; a completion without
            it gets -1. None: all can be read.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None), `aggregation` (`"token_mean"`), `beta` (0)
            and the others of `policy_gradient`, but for `kl_in`.

    Returns:
        A `Method` that reads `rollouts.extras["budget"]`, `[P, G]` tokens (0 for none), of `rollout.budgets`; groups of
        at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> sorted(hbpo(max_length=2048).wants)
        ['budget']

    Reference: Hierarchical Budget Policy Optimization for Adaptive Reasoning (arXiv 2507.15844).
    """
    checks.within("max_length", max_length, 1)
    checks.above("scale", scale, 0)
    checks.within("intra_weight", intra_weight, 0)
    checks.kl_in_loss(options, "right answers are told by their reward")
    shape: dict[str, Any] = {"max_length": max_length, "scale": scale}

    def apply(s: Signals) -> Array:
        budgets = s.extra(BUDGET, "sample under token budgets, rollout.budgets in a configuration")
        readable = None
        if format_reward is not None:
            if format_reward not in s.rollouts.rewards:
                known = ", ".join(sorted(s.rollouts.rewards)) or "(none)"
                raise ValueError(f"format_reward names {format_reward!r}, but the rollouts have the components {known}")
            readable = ~(s.rollouts.rewards[format_reward] <= 0)  # what could not be scored passes
        shaped = rewards.budget_cosine(s.lengths, s.reward > correct_above, budgets, readable, **shape)
        levels = rewards.budget_level(budgets, **shape)
        return advantages.hbpo(shaped, budgets, levels, s.valid, weight=intra_weight)

    return clipped(stateless(apply, min_group=2)._replace(wants=frozenset({BUDGET})), {}, options)


def s_grpo(*, decay: float = 2.0, correct_above: float = 0.5, **options: Unpack[ClippedOptions]) -> Method:
    r"""S-GRPO: of the answers from several exits of one thought, an early right one is worth more than a late one.

    $$A_i = r_i - \bar r, \qquad r_i = d^{-(N_i - 1)}\ \text{if right, else}\ 0$$

    where $N_i$ counts the right answers up to exit $i$. The mask of an exit's member must hold its thought and its exit
    (`rollout.exits.whole`): where only answers are trained, all that is learned of the thought is that the trajectory,
    the last to be right, was worth less, and thoughts vanish.

    Args:
        decay: $d$; 1 gives all right answers the same, which does not shorten.
        correct_above: an answer whose reward is above this is right.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None), `aggregation` (`"seq_mean_token_mean"`),
            `beta` (0) and the others of `policy_gradient`, but for `kl_in`.

    Returns:
        A `Method` for serial groups, those of `rollout.exits`, in order of the exits; `rollouts.extras["exit"]` says
        where these are. Groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> s_grpo().min_group
        2

    Reference: S-GRPO: Early Exit via Reinforcement Learning in Reasoning Models (arXiv 2505.07686).
    """
    checks.within("decay", decay, 1)
    checks.kl_in_loss(options, "right answers are told by their reward")

    def apply(s: Signals) -> Array:
        s.extra(EXIT, "sample serial groups, rollout.exits in a configuration")
        shaped = rewards.exit_decay(s.reward > correct_above, s.valid, decay=decay)
        return advantages.dr_grpo(shaped, s.valid)

    credit = stateless(apply, min_group=2)._replace(wants=frozenset({EXIT}))
    return clipped(credit, {"aggregation": "seq_mean_token_mean"}, options)

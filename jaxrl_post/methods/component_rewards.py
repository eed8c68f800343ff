"""GRPO on a reward that is made of the components of a run's rewards, other than by their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

from jaxrl_post import rewards
from jaxrl_post.methods import checks
from jaxrl_post.methods.credit import Advantage, Credit, Signals, as_advantage
from jaxrl_post.methods.policy_gradient import ClippedOptions, clipped
from jaxrl_post.methods.presets import preset_values
from jaxrl_post.types import Array, Method


def _grpo_on(reward: Callable[[Signals], Array], normalize_std: bool, options: Any) -> Method:
    checks.kl_in_loss(options, "it reads the components of the reward")
    chosen = {"name": "grpo", "normalize_std": normalize_std}
    grpo = as_advantage(chosen, preset_values(options.get("preset")).advantages)

    def apply(state, s: Signals) -> tuple[Credit | Array, Any]:
        return grpo.apply(state, s.with_reward(reward(s)))

    return clipped(Advantage(apply, min_group=2), {}, options)


def verified_score(
    *, score: str, correct: str, alpha: float = 0.5, normalize_std: bool = True, **options: Unpack[ClippedOptions]
) -> Method:
    r"""Qwen2.5-Math's reward for GRPO: a reward model ranks answers within what a verifier says of them.

    $$A = \mathrm{GRPO}\big(\sigma(\alpha s) + (c - 1)\big)$$

    Args:
        score: name of the component of the reward that is the reward model's score. (In the weighted sum it may have
            weight 0: the sum is not read.)
        correct: name of that which is above 0 where the answer is right.
        alpha: $\alpha$, per unit of the score.
        normalize_std: divide by the group's standard deviation.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`, but for
            `kl_in`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply; when traced, for a component that is
            not there.

    Example:
        >>> verified_score(score="reward_model", correct="math_verify").min_group
        2

    Reference: Qwen2.5-Math Technical Report: Toward Mathematical Expert Model via Self-Improvement (arXiv 2409.12122).
    """
    checks.above("alpha", alpha, 0)

    def reward(s: Signals) -> Array:
        return rewards.verified_score(s.component(score), s.component(correct) > 0, alpha=alpha)

    return _grpo_on(reward, normalize_std, options)


def gated_rewards(
    *,
    levels: Sequence[str],
    gates: Sequence[float] | None = None,
    normalize_std: bool = True,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""G-RA: GRPO on rewards of which an easy one counts only where all that matter more have passed their gates.

    $$A = \mathrm{GRPO}\Big(\sum_k R_k \prod_{j > k} [R_j > g_j]\Big)$$

    Args:
        levels: names of components of the reward, from the least important to the most.
        gates: $g_j$ of each, see `rewards.gated_sum`; None for 0.
        normalize_std: divide by the group's standard deviation.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`, but for
            `kl_in`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply; when traced, for a component that is
            not there.

    Example:
        >>> gated_rewards(levels=["format", "accuracy"]).min_group
        2

    Reference: Stabilizing Long-term Multi-turn Reinforcement Learning with Gated Rewards (arXiv 2508.10548).
    """
    if isinstance(levels, str) or not levels:
        raise ValueError(f"levels must list components of the reward, the least important first, got {levels!r}")
    names = tuple(levels)
    if gates is not None and len(gates) != len(names):
        raise ValueError(f"gates must hold one number for each of {len(names)} levels, got {len(gates)}")

    def reward(s: Signals) -> Array:
        return rewards.gated_sum([s.component(name) for name in names], gates)

    return _grpo_on(reward, normalize_std, options)


def sweet_spot(
    *,
    correct: str,
    proximity: str,
    zones: int = 4,
    alpha: float = 0.5,
    ladder: rewards.Ladder = "linear",
    normalize_std: bool = True,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""SSL: GRPO on a verdict and a few steps of how near an answer came.

    $$A = \mathrm{GRPO}(c + \alpha S(s))$$

    Args:
        correct: name of the component of the reward that is above 0 where the answer is right.
        proximity: name of that which says how near it came, in [0, 1].
        zones: see `rewards.sweet_spot`, as are the next two.
        alpha: weight of the proximity.
        ladder: of the zones.
        normalize_std: divide by the group's standard deviation.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`, but for
            `kl_in`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply; when traced, for a component that is
            not there.

    Example:
        >>> sweet_spot(correct="task_solved", proximity="task_score").min_group
        2

    Reference: SSL: Sweet Spot Learning for Differentiated Guidance in Agentic Optimization (arXiv 2601.22491).
    """
    checks.within("zones", zones, 1)
    checks.within("alpha", alpha, 0)
    checks.one_of("ladder", ladder, rewards.Ladder)

    def reward(s: Signals) -> Array:
        right = (s.component(correct) > 0).astype(s.reward.dtype)
        return rewards.sweet_spot(right, s.component(proximity), zones=zones, alpha=alpha, ladder=ladder)

    return _grpo_on(reward, normalize_std, options)

"""GRPO on a reward that is made of the components of a run's rewards, other than by their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import jax.numpy as jnp

from jaxrl_post import rewards
from jaxrl_post.methods import checks
from jaxrl_post.methods.credit import Advantage, Credit, Signals, as_advantage
from jaxrl_post.methods.policy_gradient import ClippedOptions, clipped
from jaxrl_post.methods.presets import preset_values
from jaxrl_post.types import Array, Method


def _grpo(normalize_std: bool, options: Any) -> Advantage:
    chosen = {"name": "grpo", "normalize_std": normalize_std}
    return as_advantage(chosen, preset_values(options.get("preset")).advantages)


def _grpo_on(reward: Callable[[Signals], Array], normalize_std: bool, options: Any) -> Method:
    checks.kl_in_loss(options, "it reads the components of the reward")
    grpo = _grpo(normalize_std, options)

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


def fapo(
    *,
    correct: str,
    flawed: str,
    penalty: float = 1.0,
    normalize_std: bool = True,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""FAPO: DAPO's loss on a reward by which right answers that were reached by flawed reasoning earn less.

    $$A = \mathrm{GRPO}(r), \qquad r = 1 - \lambda\, [\text{flawed}] \text{ if right},\ -1 \text{ if wrong}$$

    Early on, when most of a group is wrong, its flawed successes are reinforced; later, among sound ones, they are not.

    Args:
        correct: name of the component of the reward that is above 0 where the answer is right. (In the weighted sum it
            may have weight 0: the sum is not read.)
        flawed: name of that which is above 0 where a critic found an error in the reasoning; NaN counts as sound.
        penalty: $\lambda$.
        normalize_std: divide by the group's standard deviation.
        **options: `clip_low` (0.2), `clip_high` (0.28), `dual_clip` (10) and the others of `policy_gradient`, but for
            `kl_in`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply; when traced, for a component that is
            not there.

    Example:
        >>> fapo(correct="math_verify", flawed="critic").min_group
        2

    Reference: FAPO: Flawed-Aware Policy Optimization for Efficient and Reliable Reasoning (arXiv 2510.22543).
    """
    checks.within("penalty", penalty, 0)

    def reward(s: Signals) -> Array:
        return rewards.flawed_success(s.component(correct), s.component(flawed), penalty=penalty)

    return _grpo_on(reward, normalize_std, {"clip_high": 0.28, "dual_clip": 10.0, **options})


def base_and_bonus(
    *,
    base: str,
    bonus: str,
    base_weight: float = 0.6,
    normalize_std: bool = True,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""FIRM's reward for GRPO: what is desirable counts only as far as what is necessary was done.

    $$A = \mathrm{GRPO}\big(a (w + (1 - w) b)\big)$$

    Args:
        base: name of the component of the reward, in [0, 1], that says how far the task was done.
        bonus: name of that, in [0, 1], which says how well.
        base_weight: $w$, the share that a base without bonus earns.
        normalize_std: divide by the group's standard deviation.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`, but for
            `kl_in`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply; when traced, for a component that is
            not there.

    Example:
        >>> base_and_bonus(base="execution", bonus="consistency").min_group
        2

    Reference: Trust Your Critic: Robust Reward Modeling and Reinforcement Learning for Faithful Image Editing and
    Generation (arXiv 2603.12247).
    """
    checks.within("base_weight", base_weight, 0, 1)

    def reward(s: Signals) -> Array:
        return rewards.base_and_bonus(s.component(base), s.component(bonus), base_weight=base_weight)

    return _grpo_on(reward, normalize_std, options)


def longrlvr(
    *,
    answer: str,
    grounding: str,
    eta: float = 0.1,
    normalize_std: bool = True,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""LongRLVR: GRPO on an answer and on the evidence it names, most of which counts only with a right answer.

    $$A = \mathrm{GRPO}(a + \eta F + (1 - \eta)\, a F)$$

    An answer that needs many pieces of evidence at once is hardly ever right by chance; each piece teaches by itself.

    Args:
        answer: name of the component of the reward that is above 0 where the answer is right.
        grounding: name of that which scores the evidence in [0, 1], such as `evidence`.
        eta: $\eta$, the share that evidence earns without a right answer.
        normalize_std: divide by the group's standard deviation.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`, but for
            `kl_in`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply; when traced, for a component that is
            not there.

    Example:
        >>> longrlvr(answer="exact_match", grounding="evidence").min_group
        2

    Reference: LongRLVR: Long-Context Reinforcement Learning Requires Verifiable Context Rewards (arXiv 2603.02146).
    """
    checks.within("eta", eta, 0, 1)

    def reward(s: Signals) -> Array:
        right = (s.component(answer) > 0).astype(s.reward.dtype)
        return rewards.grounded_answer(right, s.component(grounding), eta=eta)

    return _grpo_on(reward, normalize_std, options)


def trust_grpo(
    *,
    outcome: str,
    score: str,
    alpha: float = 0.3,
    decay_steps: float = 500.0,
    correct_above: float = 0.5,
    normalize_std: bool = True,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""Trust-GRPO: an outcome and a score of the reasoning, which counts less where it misleads, and less every step.

    $$A = \mathrm{GRPO}\big(r + \gamma_q\, \alpha\, e^{-k / K} s\big), \qquad \gamma_q = \min(1, e^{\mu_+ - \mu_-})$$

    Args:
        outcome: name of the component of the reward that is the outcome.
        score: name of that which scores the reasoning, most often in [0, 1]; NaN counts as 0.
        alpha: $\alpha$, weight of the score at the first step.
        decay_steps: $K$, steps in which it falls to $1/e$; `inf` for no decay.
        correct_above: an answer whose outcome is above this is right, see `rewards.trust`.
        normalize_std: divide by the group's standard deviation.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`, but for
            `kl_in`.

    Returns:
        A `Method`, whose state counts the steps; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply; when traced, for a component that is
            not there.

    Example:
        >>> trust_grpo(outcome="math_verify", score="judge").min_group
        2

    Reference: SophiaVL-R1: Reinforcing MLLMs Reasoning with Thinking Reward (arXiv 2505.17018), by its equations. Its
    code also gives no score to groups of equal outcome, nor to wrong answers.
    """
    checks.within("alpha", alpha, 0)
    checks.above("decay_steps", decay_steps, 0)
    checks.kl_in_loss(options, "it reads the components of the reward")

    def apply(step: Array, s: Signals) -> tuple[Credit | Array, Array]:
        right, thinking = s.component(outcome), s.component(score)
        weight = rewards.trust(right, thinking, s.valid, correct_above=correct_above)[:, None]
        reward = right + weight * alpha * jnp.exp(-step / decay_steps) * thinking
        return grpo.apply((), s.with_reward(reward))[0], step + 1

    grpo = _grpo(normalize_std, options)
    return clipped(Advantage(apply, lambda rollouts, num_prompts: jnp.zeros(()), min_group=2), {}, options)

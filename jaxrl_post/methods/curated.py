"""Methods that learn from a part of what was sampled: by rank, by balance, by what a judge of steps makes of it."""

from __future__ import annotations

from typing import Any, Unpack

import jax.numpy as jnp

from jaxrl_post import advantages, curation, masked, rewards
from jaxrl_post.curation.samples import RankFilter
from jaxrl_post.methods import checks
from jaxrl_post.methods.actor_critic import CriticOptions, ppo
from jaxrl_post.methods.choices import Choice
from jaxrl_post.methods.policy_gradient import ClippedOptions, clipped
from jaxrl_post.methods.signals import Credit, Signals, stateless
from jaxrl_post.methods.step_credit import check_steps, find_steps, step_component
from jaxrl_post.types import Array, Method, Rollouts, Stats, Targets


def pf_ppo(*, keep: RankFilter = "best_worst", beta: float = 0.0, **options: Unpack[CriticOptions]) -> Method:
    r"""PF-PPO: PPO on the answers of each group whose rank makes their reward trustworthy, the best and the worst.

    Advantages are those of all answers; whitening, and the loss, are of those that are kept.

    Args:
        keep: see `curation.rank_filter`: `"best_worst"`, `"best_random"` or `"best"`. `curation.filter_r2` tells which
            suits a reward model.
        beta: weight of the k1 KL that is taken from the reward.
        **options: `whiten` (True), `gamma` (1.0), `lam` (0.95), `clip_low` (0.2), `clip_high` (0.2) and the others of
            `ppo`.

    Returns:
        A `Method` that trains the roles `policy` and `critic`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or a horizon that does not apply.

    Example:
        >>> pf_ppo(keep="best_random").min_group
        2

    Reference: Policy Filtration in RLHF to Fine-Tune LLM for Code Generation (arXiv 2409.06957).
    """
    checks.one_of("keep", keep, RankFilter)
    whiten = options.get("whiten", True)
    base = ppo(beta=beta, **{**options, "whiten": False})

    def targets(state: Any, rollouts: Rollouts, stats: Stats, key: Array) -> tuple[Targets, Any]:
        made, state = base.targets(state, rollouts, stats, key)
        chosen = curation.rank_filter(rollouts.reward, rollouts.valid, keep=keep, key=key)
        mask = made.mask * chosen.reshape(-1, 1)
        credit = masked.whiten(made.advantages, mask) if whiten else made.advantages
        return made._replace(advantages=jnp.where(mask != 0, credit, 0.0), mask=mask), state

    return base._replace(targets=targets, min_group=2)


def prof(
    *,
    process: str,
    keep: int,
    correct_above: float = 0.5,
    max_steps: int = 30,
    steps: Choice = "turns",
    normalize_std: bool = True,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""PROF: GRPO on the answers of each group whose steps agree with their outcome, as many right ones as wrong.

    Args:
        process: name in `rollouts.rewards` of the scores of steps in [0, 1]: `[B, T]` on a token of the step, or
            `[P, G]`, the same for all steps of the sequence. They choose answers and are no reward.
        keep: answers of each group that are learned from.
        correct_above: an answer whose reward is above this is right.
        max_steps: answers of more steps than this, or of one, go first.
        steps: how trajectories are cut, see `segments.as_segmenter`.
        normalize_std: divide by the standard deviation of those that are kept.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`, but for
            `kl_in`.

    Returns:
        A `Method`; it needs groups of at least `keep`, and of two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply; when traced, for a component that is
            not there.

    Example:
        >>> prof(process="judge", keep=4).min_group
        4

    Reference: Beyond Correctness: Harmonizing Process and Outcome Rewards through RL Training (arXiv 2509.03403).
    """
    checks.within("keep", keep, 2)
    checks.within("max_steps", max_steps, 2)
    check_steps(steps, None)

    def credit(s: Signals) -> Credit:
        found = find_steps(s.rollouts, s.mask, steps, None)
        scores = step_component(s.rollouts, process, found, s.mask)
        scored = found.exists & ~jnp.isnan(scores)
        right = s.reward > correct_above
        kept = curation.process_consistency(
            jnp.where(scored, scores, 0.0), scored, right, s.valid, keep=keep, max_steps=max_steps
        )
        return Credit(advantages.grpo(s.reward, kept, normalize_std=normalize_std), keep=kept.astype(s.reward.dtype))

    return clipped(stateless(credit, min_group=max(keep, 2), penalized=False), {}, options)


def reinforce_ada(*, keep: int, correct_above: float = 0.7, **options: Unpack[ClippedOptions]) -> Method:
    r"""Reinforce-Ada: of many answers half right and half wrong ones are learned from, against the mean of all.

    $$A_i = r_i - \mathrm{mean}_{pool}\, r$$

    so that a hard prompt's few right answers weigh much. Here the pool is the group; sampling in rounds until there are
    enough of both kinds (`curation.pool_finished`) is not part of the loop.

    Args:
        keep: answers of each group that are learned from, half of either kind where there are enough.
        correct_above: an answer whose reward is above this is right.
        **options: `clip_low` (0.2), `clip_high` (0.28), `dual_clip` (None) and the others of `policy_gradient`, but for
            `kl_in`.

    Returns:
        A `Method`; it needs groups of at least `keep`.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> reinforce_ada(keep=4).min_group
        4

    Reference: Reinforce-Ada: An Adaptive Sampling Framework for Reinforce-Style LLM Training (arXiv 2510.04996).
    """
    checks.within("keep", keep, 2)

    def credit(s: Signals) -> Credit:
        kept = curation.balanced(s.reward > correct_above, s.valid, keep=keep)
        return Credit(advantages.dr_grpo(s.reward, s.valid), keep=kept.astype(s.reward.dtype))

    return clipped(stateless(credit, min_group=keep, penalized=False), {}, {"clip_high": 0.28, **options})


def observe_r1(
    *,
    bonus: float = 0.2,
    min_length: float = 100.0,
    peak: float = 1.8,
    correct_above: float = 0.5,
    normalize_std: bool = True,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""Observe-R1: a bonus for the shortest right answer, and more weight for prompts that are solved half of the time.

    $$A_i = 4 \sigma d (1 - d)\, \mathrm{GRPO}(r + b)_i, \qquad d = \text{share of right answers}$$

    Its third part, easy problems first, is an order of the data.

    Args:
        bonus: of `rewards.shortest_bonus`, as is the next.
        min_length: tokens; a shorter right answer earns no bonus.
        peak: $\sigma$, weight of a prompt that is solved half of the time.
        correct_above: an answer whose reward is above this is right.
        normalize_std: divide by the group's standard deviation.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`, but for
            `kl_in`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> observe_r1(min_length=3).min_group
        2

    Reference: Observe-R1: Unlocking Reasoning Abilities of MLLMs with Dynamic Progressive Reinforcement Learning
    (arXiv 2505.12432).
    """
    checks.within("bonus", bonus, 0)
    checks.within("min_length", min_length, 0)
    checks.above("peak", peak, 0)

    def credit(s: Signals) -> Array:
        right = s.reward > correct_above
        earned = s.reward + rewards.shortest_bonus(s.lengths, right, s.valid, bonus=bonus, min_length=min_length)
        share = masked.mean(right, s.valid, 1, keepdims=True)
        weight = 4 * peak * share * (1 - share)
        return weight * advantages.grpo(earned, s.valid, normalize_std=normalize_std)

    return clipped(stateless(credit, min_group=2, penalized=False), {}, options)

"""Methods that shape the reward of a sequence: by references, by unit tests, by confidence, by the group's lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import jax.numpy as jnp

from jaxrl_post import advantages, rewards
from jaxrl_post.methods import checks
from jaxrl_post.methods.choices import Choice
from jaxrl_post.methods.credit import Advantage, Credit, Signals, stateless
from jaxrl_post.methods.policy_gradient import ClippedOptions, Options, clipped
from jaxrl_post.methods.step_credit import check_steps, find_steps, step_component
from jaxrl_post.types import Array, Method


def par(
    *,
    references: str | Sequence[str] = "reference_reward",
    shape: rewards.ReferenceShape = "sigmoid",
    scale: float = 1.0,
    normalize_std: bool = False,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""PAR: the reward is how likely the answer is to be preferred to reference answers, so that it cannot run away.

    $$A = r' - \mathrm{mean}_G\, r', \qquad r' = \frac{1}{M} \sum_m \sigma(k (r - r_m))$$

    Args:
        references: columns of the data (or keys of `rollouts.extras`, `[P]`) that hold the scores of reference answers,
            by the same reward model; NaN where there is none.
        shape: see `rewards.preference_as_reward`, as is the next.
        scale: $k$, per unit of the reward.
        normalize_std: divide by the group's standard deviation. That undoes much of the shape within a group.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`, but for
            `kl_in`.

    Returns:
        A `Method`; it needs groups of at least two. A prompt without any reference is not trained on.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> sorted(par(references=["first", "second"]).wants)
        ['first', 'second']

    Reference: Reward Shaping to Mitigate Reward Hacking in RLHF (arXiv 2502.18770), which trains with PPO.
    """
    names = (references,) if isinstance(references, str) else tuple(references)
    if not names:
        raise ValueError("references must name at least one column")
    checks.one_of("shape", shape, rewards.ReferenceShape)
    checks.above("scale", scale, 0)

    def apply(state: tuple[()], s: Signals) -> tuple[Credit, tuple[()]]:
        why = "give the data a column of that name: the reward of a reference answer to each prompt"
        theirs = jnp.stack([s.extra(name, why) for name in names], axis=-1)
        theirs = jnp.broadcast_to(theirs[:, None], (*s.reward.shape, len(names)))
        shaped = rewards.preference_as_reward(s.reward, theirs, shape=shape, scale=scale)
        known = ~jnp.isnan(shaped)
        found = advantages.grpo(jnp.where(known, shaped, 0.0), s.valid & known, normalize_std=normalize_std)
        return Credit(found, keep=known.astype(s.reward.dtype)), state

    return clipped(Advantage(apply, min_group=2, wants=frozenset(names), penalized=False), {}, options)


def verpo(
    *,
    tests: Sequence[str],
    alpha: float = 2.0,
    sigma: float = 0.1,
    delta: float = 1e-6,
    gamma: float = 1.0,
    turn_weight: float = 1.0,
    steps: Choice = "turns",
    max_steps: int | None = None,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""VeRPO: unit tests that few of a group pass count more, and a turn earns for those that its program passes.

    $$A_{g,k} = R_g - \bar R + w\, (r_{g,k} - \bar r), \qquad r_{g,k} = \sum_u w_u p_{g,k,u}$$

    Args:
        tests: components of the reward, one for each unit test, above 0 where it is passed: `[P, G]` of whole
            sequences, or `[B, T]` on a token of the turn.
        alpha: of `advantages.unit_test_weights`, as are the next two.
        sigma: how near pass rates must be for tests to be alike.
        delta: added to the number of tests that are alike.
        gamma: discount of $R$ by the number of turns.
        turn_weight: $w$.
        steps: how trajectories are cut into turns, see `segments.as_segmenter`.
        max_steps: turns of a sequence that count, the rest has advantage 0; None for all.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`, but for
            `kl_in`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply; when traced, for a component that is
            not there.

    Example:
        >>> verpo(tests=["empty_list", "one_item"]).min_group
        2

    Reference: VeRPO: Verifiable Dense Reward Policy Optimization for Code Generation (arXiv 2601.03525).
    """
    if isinstance(tests, str) or not tests:
        raise ValueError(f"tests must list components of the reward, one for each unit test, got {tests!r}")
    for name, value in (("alpha", alpha), ("sigma", sigma), ("delta", delta), ("turn_weight", turn_weight)):
        checks.within(name, value, 0)
    checks.above("gamma", gamma, 0)
    checks.within("gamma", gamma, 0, 1)
    check_steps(steps, max_steps)
    names = tuple(tests)

    def credit(s: Signals) -> Credit:
        found = find_steps(s.rollouts, s.mask, steps, max_steps)
        passes = jnp.stack([step_component(s.rollouts, name, found, s.mask) > 0 for name in names], axis=-1)
        scale = {"alpha": alpha, "sigma": sigma, "delta": delta, "gamma": gamma, "beta": turn_weight}
        return found.credit(advantages.verpo(passes, found.exists, s.valid, **scale), s.mask)

    return clipped(stateless(credit, min_group=2, penalized=False), {}, options)


def grpo_care(
    *,
    answer: Choice,
    weight: float = 0.5,
    margin: float = 0.01,
    correct_above: float = 0.1,
    normalize_std: bool = True,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""GRPO-CARE: a bonus for right answers that the reference finds likely after the reasoning that led to them.

    $$A = \mathrm{GRPO}(r + b), \qquad b_i = w\, r_i\, [c_i \ge \mathrm{mean}_S c - \delta]$$

    The reference is to follow the policy slowly: `roles: {reference: {refresh: every, every: 10, mix: 0.005}}`.

    Args:
        answer: how a completion is cut so that its last part is the answer, such as `{"name": "delimiter",
            "delimiters": [[...]]}` with the tokens of `<answer>`, see `segments.as_segmenter`. A completion that has
            one part alone names no answer and earns no bonus.
        weight: of `rewards.confidence_bonus`, as are the next two.
        margin: $\delta$.
        correct_above: what the reward must be above to earn a bonus.
        normalize_std: divide by the group's standard deviation.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None), `aggregation` (`"seq_mean_token_mean"`) and
            the others of `policy_gradient`, but for `kl_in`.

    Returns:
        A `Method` that reads the role `reference`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> sorted(grpo_care(answer={"name": "length", "num_steps": 2}).needs)
        ['policy', 'reference']

    Reference: GRPO-CARE: Consistency-Aware Reinforcement Learning for Multimodal Reasoning (arXiv 2506.16141).
    """
    checks.within("weight", weight, 0)
    checks.within("margin", margin, 0)
    check_steps(answer, None)

    def apply(state: tuple[()], s: Signals) -> tuple[Array, tuple[()]]:
        parts = find_steps(s.rollouts, s.mask, answer, None)
        last = jnp.max(parts.step, axis=1, keepdims=True)
        is_answer = (parts.step == last) & (last > 0)
        confidence = rewards.answer_confidence(s.stats["reference"].logp, is_answer).reshape(s.reward.shape)
        scale = {"weight": weight, "margin": margin, "correct_above": correct_above}
        bonus = rewards.confidence_bonus(s.reward, confidence, s.valid, **scale)
        return advantages.grpo(s.reward + bonus, s.valid, normalize_std=normalize_std), state

    needs = {"reference": frozenset({"logp"})}
    own: Options = {"aggregation": "seq_mean_token_mean"}
    return clipped(Advantage(apply, needs=needs, min_group=2, penalized=False), own, options)


def harmo(
    *,
    max_penalty: float = 0.5,
    tolerance: float = 0.8,
    correct_above: float = 0.5,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""HARMO: rewards less a penalty for answers much shorter than the group's right ones; no standard deviation.

    $$A = r' - \mathrm{mean}_G\, r', \qquad r'_i = r_i - P\, \max(0, 1 - L_i / (\tau \bar L_+))$$

    Its other half, a rule where there is one and a reward model elsewhere, is a matter of `rewards`: a function returns
    None where it has nothing to say.

    Args:
        max_penalty: of `rewards.too_short`, as is the next.
        tolerance: $\tau$.
        correct_above: an answer whose reward is above this is right.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`, but for
            `kl_in`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> harmo(tolerance=0.9).min_group
        2

    Reference: Beyond Monolithic Rewards: A Hybrid and Multi-Aspect Reward Optimization for MLLM Alignment
    (arXiv 2510.05283).
    """
    checks.within("max_penalty", max_penalty, 0)
    checks.above("tolerance", tolerance, 0)

    def credit(s: Signals) -> Array:
        right = s.reward > correct_above
        shape = {"max_penalty": max_penalty, "tolerance": tolerance}
        return advantages.dr_grpo(s.reward + rewards.too_short(s.lengths, right, s.valid, **shape), s.valid)

    return clipped(stateless(credit, min_group=2, penalized=False), {}, options)

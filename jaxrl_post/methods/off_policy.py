"""REINFORCE on rollouts of another policy, or of one sign, and what keeps it stable."""

from __future__ import annotations

import math
from typing import Unpack

from jaxrl_post import advantages
from jaxrl_post.advantages.selection import Sign, red_drop, signed, within_sigma
from jaxrl_post.losses.off_policy import Level, RecClip, RecPenalty
from jaxrl_post.methods import checks
from jaxrl_post.methods.credit import Credit, Signals, stateless
from jaxrl_post.methods.policy_gradient import ClippedOptions, Options, clipped, with_defaults
from jaxrl_post.types import Array, Method


def topr(*, baseline: float = 0.0, level: Level = "sequence", **options: Unpack[Options]) -> Method:
    r"""TOPR: successes at full weight, failures at their importance weight, at most 1.

    $$L = -\mathrm{mean}_i\, \alpha_i (R_i - c) \log\pi(y_i), \qquad
    \alpha_i = 1 \text{ if } R_i \geq c \text{ else } \min(\pi(y_i) / \mu(y_i), 1)$$

    The paper's rewards are +1 and -1; for rewards of 0 and 1 give `baseline=0.5`, which is the same up to scale.

    Args:
        baseline: $c$, taken from the rewards; see `advantages.selection.effective_positive_share` for what it means.
        level: the importance weight of the sequence, or of each token.
        **options: `aggregation` (`"seq_mean_token_sum"`), `beta` (0) and the others of `policy_gradient`.

    Returns:
        A `Method` on groups of any size.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> topr(baseline=0.5).min_group
        1

    Reference: Tapered Off-Policy REINFORCE: Stable and efficient reinforcement learning for LLMs (arXiv 2503.14286).
    """
    checks.one_of("level", level, Level)

    def centered(s: Signals) -> Array:
        return advantages.reinforce(s.reward - baseline, s.valid)

    loss = {"name": "topr", "level": level}
    return with_defaults(stateless(centered), loss, {"aggregation": "seq_mean_token_sum"}, options)


def rec(
    *,
    clip: RecClip = "one_side",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ring_low: float = 0.6,
    ring_high: float = 2.0,
    level: Level = "token",
    importance_weight: bool = False,
    temperature: float | None = None,
    penalty: RecPenalty | None = None,
    tau: float = 0.1,
    drop: bool = False,
    normalize_std: bool = False,
    **options: Unpack[Options],
) -> Method:
    r"""REC, REP and RED: group-relative REINFORCE for rollouts of any policy, with a clip, a penalty or weighted data.

    REC-OneSide-NoIS is the default: PPO's clip without the importance weight, $\ell = -M A \log\pi$.

    Args:
        clip: which tokens are trained, see `losses.rec_mask`.
        clip_low: distance of the lower bound from 1.
        clip_high: distance of the upper bound from 1; (0.6, 2.0) learns faster and is still stable.
        ring_low: lower end of the ring.
        ring_high: upper end of the ring.
        level: ratio of the token or of the sequence.
        importance_weight: weigh by the ratio.
        temperature: RED-Weight: weigh by `exp(A / temperature)`; None for equal weights.
        penalty: REP: `"opmd"` or `"asymre"` of weight `tau`, see `losses.rec`.
        tau: weight of the penalty.
        drop: RED-Drop: leave out failures at random until there are no more of them than successes.
        normalize_std: divide advantages by the group's standard deviation.
        **options: `aggregation` (`"token_mean"`), `beta` (0) and the others of `policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> rec(clip="none", penalty="opmd").unit
        'sequence'

    Reference: Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm: Demystifying Some Myths About GRPO and Its
    Friends (arXiv 2509.24203).
    """
    checks.one_of("clip", clip, RecClip)
    checks.one_of("level", level, Level)
    if penalty is not None:
        checks.one_of("penalty", penalty, RecPenalty)
    if temperature is not None and temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}; None for equal weights")
    bounds = {"clip_low": clip_low, "clip_high": clip_high, "ring_low": ring_low, "ring_high": ring_high}
    for name, value in {**bounds, "tau": tau}.items():
        checks.within(name, value, 0)

    def balanced(s: Signals) -> Credit:
        return Credit(*red_drop(s.reward, s.key, s.valid, normalize_std=normalize_std))

    credit = stateless(balanced, min_group=2) if drop else {"name": "grpo", "normalize_std": normalize_std}
    loss = {
        "name": "rec",
        "clip": clip,
        **bounds,
        "level": level,
        "importance_weight": importance_weight,
        "temperature": temperature,
        "penalty": penalty,
        "tau": tau,
    }
    return with_defaults(credit, loss, {}, options)


def nsr(
    *,
    sign: Sign = "negative",
    positive_weight: float = 0.1,
    threshold: float = 0.5,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""NSR, PSR and W-REINFORCE: learn from wrong answers only, from right ones only, or from both at unequal weight.

    $$A = -1 \text{ (wrong)}, \qquad A = \lambda \text{ (right)}$$

    Without a baseline. From failures alone, probability moves to the other answers in proportion to what they have,
    which keeps the policy's diversity.

    Args:
        sign: `"negative"` (NSR), `"positive"` (PSR, $\lambda = 1$) or `"both"` (W-REINFORCE).
        positive_weight: $\lambda$ of `"both"`.
        threshold: an answer with at least this reward is right.
        **options: `clip_low` (0.2), `clip_high` (0.2) and `dual_clip` (None) of `losses.ppo`; `aggregation`
            (`"token_mean"`, over the rows that are kept), `beta` (0) and the others of `policy_gradient`, but for
            `kl_in`.

    Returns:
        A `Method` on groups of any size.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> nsr(sign="both").min_group
        1

    Reference: The Surprising Effectiveness of Negative Reinforcement in LLM Reasoning (arXiv 2506.01347).
    """
    checks.one_of("sign", sign, Sign)
    checks.within("positive_weight", positive_weight, 0)
    checks.kl_in_loss(options, "right answers are told by their reward")

    def one_sided(s: Signals) -> Credit:
        return Credit(*signed(s.reward, s.valid, sign=sign, positive_weight=positive_weight, threshold=threshold))

    return clipped(stateless(one_sided), {}, options)


def stable_reinforce(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    max_ratio: float = 1000.0,
    sigma: float = 3.0,
    gamma: float = 1.0,
    **options: Unpack[Options],
) -> Method:
    r"""StableReinforce: REINFORCE++ whose ratio is bounded before the exponential and whose outliers are left out.

    $$d = \mathrm{clip}(\log\pi - \log\pi_{old}, -\log c, \log c), \qquad z = (A - \bar A) / \mathrm{std}, \qquad
    \hat A = z \text{ if } |z| \leq \sigma \text{ else } 0$$

    Its reward, which pays for coherence only where the verdict is right, is `rewards.consistency_reward`.

    Args:
        clip_low: distance of the ratio's lower bound from 1.
        clip_high: distance of its upper bound from 1.
        max_ratio: $c$, bound of the ratio and of its inverse.
        sigma: standard deviations beyond which an advantage counts as 0.
        gamma: discount per token of the reward-to-go.
        **options: `aggregation` (`"seq_mean_token_mean"`), `beta` (0) and the others of `policy_gradient`.

    Returns:
        A `Method` on groups of any size.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> stable_reinforce().min_group
        1

    Reference: R1-Reward: Training Multimodal Reward Model Through Stable Reinforcement Learning (arXiv 2505.02835).
    """
    checks.clipping(clip_low, clip_high, None)
    checks.within("gamma", gamma, 0, 1)
    if max_ratio <= 1:
        raise ValueError(f"max_ratio must be above 1, got {max_ratio}")
    if sigma <= 0:
        raise ValueError(f"sigma must be above 0, got {sigma}")

    def filtered(s: Signals) -> Array:
        raw = advantages.reinforce_plus_plus(s.token_rewards, s.mask, gamma=gamma, whiten=False)
        return within_sigma(raw, s.mask, sigma=sigma)

    loss = {"name": "ppo", "clip_low": clip_low, "clip_high": clip_high, "log_ratio_limit": math.log(max_ratio)}
    return with_defaults(stateless(filtered), loss, {"aggregation": "seq_mean_token_mean"}, options)

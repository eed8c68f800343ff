"""GRPO with another surrogate than PPO's clip: the importance weight, and what bounds it, is what these differ in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Unpack

import jax.numpy as jnp

from jaxrl_post import advantages, losses, rewards
from jaxrl_post.losses.surrogates import BinaryDivergence
from jaxrl_post.methods import checks
from jaxrl_post.methods.credit import Advantage, Signals, stateless
from jaxrl_post.methods.policy_gradient import ClippedOptions, Options, clipped, take, with_defaults
from jaxrl_post.types import Array, Method


def gspo(*, clip_low: float = 3e-4, clip_high: float = 4e-4, **options: Unpack[Options]) -> Method:
    r"""GSPO: the ratio that is clipped is that of the sequence, to the power of one over its length.

    $$s = \Big(\frac{\pi(y|x)}{\pi_{old}(y|x)}\Big)^{1/|y|}, \qquad
    L = -\mathrm{mean}_i \min(s_i A_i, \mathrm{clip}(s_i, 1 - \epsilon_{low}, 1 + \epsilon_{high}) A_i)$$

    Args:
        clip_low: distance of the lower bound from 1.
        clip_high: distance of the upper bound from 1.
        **options: `aggregation` (`"seq_mean_token_mean"`), `beta` (0) and the others of `policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> gspo().unit
        'sequence'

    Reference: Group Sequence Policy Optimization (arXiv 2507.18071).
    """
    checks.clipping(clip_low, clip_high, None)
    loss = {"name": "gspo", "clip_low": clip_low, "clip_high": clip_high}
    return with_defaults("grpo", loss, {"aggregation": "seq_mean_token_mean"}, options)


def luspo(*, clip_low: float = 2e-3, clip_high: float = 2.5e-3, **options: Unpack[Options]) -> Method:
    r"""LUSPO: GSPO in which a sequence weighs as much as it has tokens, $L = \mathrm{mean}_i\, |y_i|\, \ell_i$.

    GSPO divides the gradient of a sequence by its length, so that a short right answer gains more than a long one and a
    short wrong one loses more: lengths drift. Here every token counts the same.

    Args:
        clip_low: distance of the lower bound from 1.
        clip_high: distance of the upper bound from 1.
        **options: `aggregation` (`"seq_mean_token_sum"`, which is the weighting), `beta` (0) and the others of
            `policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> luspo().min_group
        2

    Reference: Length-Unbiased Sequence Policy Optimization: Revealing and Controlling Response Length Variation in RLVR
    (arXiv 2602.05261).
    """
    checks.clipping(clip_low, clip_high, None)
    loss = {"name": "gspo", "clip_low": clip_low, "clip_high": clip_high}
    return with_defaults("grpo", loss, {"aggregation": "seq_mean_token_sum"}, options)


def gmpo(*, clip_low: float = 0.4, clip_high: float = 0.4, **options: Unpack[Options]) -> Method:
    r"""GMPO: the geometric mean of the tokens' ratios, each clipped, see `losses.gmpo`: $L = -\mathrm{mean}_i R_i A_i$.

    Args:
        clip_low: nats below 0 at which the log-ratio of a token is clipped.
        clip_high: nats above 0.
        **options: `aggregation` (`"seq_mean_token_mean"`), `beta` (0) and the others of `policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> gmpo().unit
        'sequence'

    Reference: Geometric-Mean Policy Optimization (arXiv 2507.20673).
    """
    checks.within("clip_low", clip_low, 0)
    checks.within("clip_high", clip_high, 0)
    loss = {"name": "gmpo", "clip_low": clip_low, "clip_high": clip_high}
    return with_defaults("grpo", loss, {"aggregation": "seq_mean_token_mean"}, options)


class CispoOptions(Options, total=False):
    """Keywords of `losses.cispo` and those of `policy_gradient`."""

    clip_low: float | None
    clip_high: float
    cap: Literal["distance", "ratio"]


def cispo(**options: Unpack[CispoOptions]) -> Method:
    r"""CISPO: the importance weight is clipped, the gradient never: $\ell = -\mathrm{sg}(\mathrm{clip}(r)) A \log\pi$.

    Args:
        **options: of `losses.cispo`: `clip_low` (None), distance of the lower bound from 1, `clip_high` (4.0), that of
            the upper one, and `cap` (`"distance"`), where `"ratio"` makes `clip_high` the bound itself;
            `aggregation` (`"token_mean"`), `beta` (0) and the others of `policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> cispo(clip_high=0.28).unit
        'token'

    Reference: MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention (arXiv 2506.13585).
    """
    own, rest = take(options, "clip_low", "clip_high", "cap")
    checks.one_of("cap", own.get("cap", "distance"), Literal["distance", "ratio"])
    checks.within("clip_low", own.get("clip_low"), 0)
    checks.within("clip_high", own.get("clip_high"), 1 if own.get("cap") == "ratio" else 0)
    return with_defaults("grpo", {"name": "cispo", **own}, {}, rest)


def sapo(*, tau_pos: float = 1.0, tau_neg: float = 1.05, **options: Unpack[Options]) -> Method:
    r"""SAPO: a soft gate in the place of the clip, $\ell = -\frac4\tau \sigma(\tau (r - 1)) A$.

    Args:
        tau_pos: temperature of tokens with a positive advantage.
        tau_neg: temperature of the others.
        **options: `aggregation` (`"seq_mean_token_mean"`), `beta` (0) and the others of `policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> sapo().unit
        'token'

    Reference: Soft Adaptive Policy Optimization (arXiv 2511.20347).
    """
    for name, value in (("tau_pos", tau_pos), ("tau_neg", tau_neg)):
        if value <= 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    loss = {"name": "sapo", "tau_pos": tau_pos, "tau_neg": tau_neg}
    return with_defaults("grpo", loss, {"aggregation": "seq_mean_token_mean"}, options)


def vespo(
    *,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
    **options: Unpack[Options],
) -> Method:
    r"""VESPO: sequences weigh by a smooth function of their whole ratio, $\phi(w) = w^k e^{\lambda (1 - w)}$.

    Args:
        k_pos: power for advantages that are not negative.
        lambda_pos: decay for these.
        k_neg: power for negative advantages.
        lambda_neg: decay for these.
        **options: `aggregation` (`"token_mean"`), `beta` (0) and the others of `policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> vespo().unit
        'sequence'

    Reference: VESPO: Variational Sequence-Level Soft Policy Optimization for Stable Off-Policy LLM Training
    (arXiv 2602.10693).
    """
    constants = {"k_pos": k_pos, "lambda_pos": lambda_pos, "k_neg": k_neg, "lambda_neg": lambda_neg}
    for name, value in constants.items():
        checks.within(name, value, 0)
    return with_defaults("grpo", {"name": "vespo", **constants}, {}, options)


def dppo(
    *,
    divergence: BinaryDivergence = "tv",
    delta_low: float | None = None,
    delta_high: float | None = None,
    max_ratio: float | None = 20.0,
    **options: Unpack[Options],
) -> Method:
    r"""DPPO: tokens stay in the loss by how far their probability has moved, not by its ratio; see `losses.dppo`.

    Args:
        divergence: `"tv"` or `"kl"`, of "this token or another one".
        delta_low: threshold of what is pushed down; None for 0.15 (`tv`) or 0.05 (`kl`).
        delta_high: threshold of what is pushed up; None for the same.
        max_ratio: bound of the importance weight; None for none.
        **options: `aggregation` (`"token_mean"`), `beta` (0) and the others of `policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> dppo(divergence="kl").unit
        'token'

    Reference: Rethinking the Trust Region in LLM Reinforcement Learning (arXiv 2602.04879).
    """
    checks.one_of("divergence", divergence, BinaryDivergence)
    checks.within("delta_low", delta_low, 0)
    checks.within("delta_high", delta_high, 0)
    checks.within("max_ratio", max_ratio, 1)
    own = {"divergence": divergence, "delta_low": delta_low, "delta_high": delta_high, "max_ratio": max_ratio}
    return with_defaults("grpo", {"name": "dppo", **own}, {}, options)


def dapo(
    *,
    max_length: int | None = None,
    overlong_buffer: int | None = None,
    overlong_factor: float = 1.0,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""DAPO: GRPO with a higher upper clip, a mean over tokens, no KL, and a soft punishment of overlong answers.

    Its fourth part, sampling until every group has rewards that differ, is the curriculum's: `curriculum.oversample`.

    Args:
        max_length: tokens, the limit of an answer; None for no punishment.
        overlong_buffer: tokens before the limit over which the punishment grows, see `rewards.soft_overlong`.
        overlong_factor: the largest punishment, in units of the reward.
        **options: `clip_high` (0.28), `clip_low` (0.2) and `dual_clip` (None) of `losses.ppo`; `aggregation`
            (`"token_mean"`), `beta` (0) and the others of `policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> dapo(max_length=1024, overlong_buffer=256).min_group
        2

    Reference: DAPO: An Open-Source LLM Reinforcement Learning System at Scale (arXiv 2503.14476).
    """
    if (max_length is None) != (overlong_buffer is None):
        raise ValueError("overlong_buffer needs max_length and max_length needs overlong_buffer; give both or neither")
    checks.within("overlong_factor", overlong_factor, 0)
    credit: str | Advantage = "grpo"
    if max_length is not None and overlong_buffer is not None:
        checks.within("overlong_buffer", overlong_buffer, 1, max_length)

        def shaped(s: Signals) -> Array:
            punishment = rewards.soft_overlong(
                s.lengths, max_length=max_length, buffer=overlong_buffer, factor=overlong_factor
            )
            return advantages.grpo(s.reward + punishment, s.valid)

        credit = stateless(shaped, min_group=2)
    return clipped(credit, {}, {"clip_high": 0.28, **options})


def decoupled_ppo(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    max_weight: float | None = None,
    **options: Unpack[Options],
) -> Method:
    r"""Decoupled PPO: the clip is around the policy at the start of the step, the older sampler enters as a weight.

    $$\ell = \mathrm{sg}(\pi_{prox} / \pi_{behav})\, \ell_{ppo}(\log\pi, \log\pi_{prox}, A)$$

    For stale rollouts; on fresh ones it is PPO's surrogate.

    Args:
        clip_low: distance of the lower bound from 1.
        clip_high: distance of the upper bound from 1.
        dual_clip: see `losses.ppo`.
        max_weight: bound of the weight; None for none.
        **options: `aggregation` (`"token_mean"`), `beta` (0) and the others of `policy_gradient`; `old_logp` is
            `"recompute"`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> decoupled_ppo(max_weight=5.0).unit
        'token'

    Reference: Batch size-invariance for policy optimization (arXiv 2110.00641); AReaL: A Large-Scale Asynchronous
    Reinforcement Learning System for Language Reasoning (arXiv 2505.24298).
    """
    checks.clipping(clip_low, clip_high, dual_clip)
    checks.within("max_weight", max_weight, 1)
    _fixed("decoupled_ppo", options, "old_logp", "recompute")
    own = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip, "max_weight": max_weight}
    return with_defaults("grpo", {"name": "decoupled_ppo", **own}, {"old_logp": "recompute"}, options)


def m2po(*, threshold: float = 0.04, **options: Unpack[Options]) -> Method:
    r"""M2PO: no clip; the few tokens that carry the second moment of the log-ratios above a threshold are left out.

    $$L = -\frac{1}{\sum_i |y_i|} \sum_{i,t} M_{i,t}\, r_{i,t} A_i$$

    with $M$ of `losses.second_moment_mask`, taken over the batch at the start of the step. Left-out tokens stay in the
    denominator.

    Args:
        threshold: the largest mean of squared log-ratios, nats squared.
        **options: `aggregation` (`"token_mean"`), `beta` (0) and the others of `policy_gradient`; `old_logp` is
            `"rollout"`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> m2po().min_group
        2

    Reference: Prosperity before Collapse: How Far Can Off-Policy RL Reach with Stale Data on LLMs? (arXiv 2510.01161).
    """
    if threshold <= 0:
        raise ValueError(f"threshold must be above 0, got {threshold}")
    _fixed("m2po", options, "old_logp", "rollout")

    def trusted(s: Signals) -> Array:
        kept = losses.second_moment_mask(s.stats["policy"].logp, s.old_logp, s.mask, threshold=threshold)
        return advantages.per_token(advantages.grpo(s.reward, s.valid), s.mask) * (kept != 0).astype(jnp.float32)

    credit = stateless(trusted, min_group=2)._replace(needs={"policy": frozenset({"logp"})})
    loss = {"name": "ppo", "clip_low": 1.0, "clip_high": math.inf, "dual_clip": None}
    return with_defaults(credit, loss, {}, {**options, "old_logp": "rollout"})


def _fixed(method: str, options: Mapping[str, Any], name: str, value: str) -> None:
    if options.get(name, value) != value:
        raise ValueError(f"{name} of {method} is {value!r}, got {options[name]!r}; leave it out")


def dro(
    *, beta_ratio: float = 1.0, level: Literal["token", "sequence"] | None = None, **options: Unpack[Options]
) -> Method:
    r"""DRO: the policy gradient and a quadratic pull towards the policy that sampled; rollouts may be of any policy.

    $$\ell = -A \log\pi(y) + \frac{\beta}{2} \Big(\log\frac{\pi(y)}{\pi_{old}(y)}\Big)^2, \qquad A = r - \bar r$$

    The group's mean stands in for the learned value of the paper.

    Args:
        beta_ratio: weight of the squared log-ratio (`beta` is that of the KL to a reference).
        level: the log-ratio of the sequence, or of each token; None for `"sequence"`, or what a preset says.
        **options: `aggregation` (`"seq_mean_token_sum"`), `beta` (0) and the others of `policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> dro(beta_ratio=0.1).unit
        'sequence'

    Reference: Offline Regularised Reinforcement Learning for Large Language Models Alignment (arXiv 2405.19107).
    """
    if beta_ratio <= 0:
        raise ValueError(f"beta_ratio must be above 0, got {beta_ratio}")
    if level is not None:
        checks.one_of("level", level, Literal["token", "sequence"])
    loss = {"name": "dro", "beta": beta_ratio, **({} if level is None else {"level": level})}
    return with_defaults("dr_grpo", loss, {"aggregation": "seq_mean_token_sum"}, options)

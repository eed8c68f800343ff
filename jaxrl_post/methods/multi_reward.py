"""Methods whose advantage comes from several rewards, from bundles of prompts, or from other prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Unpack

from jaxrl_post import losses
from jaxrl_post.advantages.risk import BundleCredit
from jaxrl_post.methods import checks
from jaxrl_post.methods.policy_gradient import ClippedOptions, Options, clipped, with_defaults
from jaxrl_post.types import Array, Method


def gdpo(
    *,
    weights: Mapping[str, float] | None = None,
    leave_one_out: bool = False,
    by_token: bool | None = None,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""GDPO: every reward function is normalised within the group by itself, their sum over the batch.

    $$S_g = \sum_n w_n\, \mathrm{GRPO}(r_n)_g, \qquad A_g = (S_g - \bar S) / (\mathrm{std}(S) + \epsilon)$$

    Args:
        weights: of reward functions by name; None for all of them with weight 1, or, in a configuration, with those
            that `rewards` gives them.
        leave_one_out: a sequence's mean and deviation are those of the group's others.
        by_token: sequences weigh by their length in the batch's mean and deviation; None for False, or what a preset
            says.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`.

    Returns:
        A `Method` that reads `rollouts.rewards`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> gdpo(weights={"accuracy": 1.0, "format": 0.2}).min_group
        2

    Reference: GDPO: Group reward-Decoupled Normalization Policy Optimization for Multi-reward RL Optimization
    (arXiv 2601.05242).
    """
    own = {} if by_token is None else {"by_token": by_token}
    return clipped({"name": "gdpo", "weights": weights, "leave_one_out": leave_one_out, **own}, {}, options)


def paco_grpo(
    *,
    weights: Mapping[str, float] | None = None,
    threshold: Literal["mean", "median"] | float = "mean",
    std_level: Literal["group", "batch"] = "group",
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""PaCo-GRPO: GRPO on a weighted sum of rewards of which the most spread-out are replaced by their logarithm.

    $$r_n' = \log(1 + r_n)\ \text{if}\ \mathrm{std}(r_n) / \bar r_n > h\ \text{else}\ r_n$$

    Args:
        weights: of reward functions by name; None for all of them with weight 1, or, in a configuration, with those
            that `rewards` gives them.
        threshold: $h$: the mean or the median of the coefficients of variation, or a number.
        std_level: of `advantages.grpo`.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`.

    Returns:
        A `Method` that reads `rollouts.rewards`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> paco_grpo(threshold="median").min_group
        2

    Reference: PaCo-RL: Advancing Reinforcement Learning for Consistent Image Generation with Pairwise Reward Modeling
    (arXiv 2512.04784).
    """
    choice = {"name": "log_tamed", "weights": weights, "threshold": threshold, "std_level": std_level}
    return clipped(choice, {}, options)


def bnpo(*, low: float = 0.0, high: float = 1.0, decompose: bool = False, **options: Unpack[ClippedOptions]) -> Method:
    r"""BNPO: centred rewards are divided by a Beta density that is fitted to the batch's success rates.

    $$A_{p,g} = (r_{p,g} - \bar r_p) / f(\bar r_p; \alpha, \beta)$$

    Args:
        low: the reward of failure.
        high: the reward of success.
        decompose: normalise every reward function by itself, all valued between `low` and `high`, and average.
        **options: `clip_low` (0.2), `clip_high` (0.28), `dual_clip` (10), `aggregation` (`"seq_mean_token_sum"`) and
            the others of `policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> bnpo(high=10.0).min_group
        2

    Reference: BNPO: Beta Normalization Policy Optimization (arXiv 2506.02864).
    """
    own = {"clip_high": 0.28, "dual_clip": 10.0}
    choice = {"name": "bnpo", "low": low, "high": high, "decompose": decompose}
    return clipped(choice, {"aggregation": "seq_mean_token_sum"}, {**own, **options})


def riskpo(
    *,
    bundle_size: int = 5,
    alpha_d: float = 0.2,
    alpha_u: float = 0.8,
    omega: float = 1.5,
    natural_baseline: bool = False,
    normalize_std: bool = True,
    credit: BundleCredit = "sum_mean",
    lr: float = 0.1,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""RiskPO: bundles of prompts are scored together, and low scores weigh more, by tracked quantiles of the scores.

    $$A = \frac{\omega\, \mathrm{cvar} + \mathrm{rvar}}{\omega + 1}$$

    Args:
        bundle_size: prompts per bundle.
        alpha_d: level of the lower quantile.
        alpha_u: level of the upper quantile.
        omega: weight of the lower tail.
        natural_baseline: see `advantages.mixed_value_at_risk`.
        normalize_std: divide by the standard deviation of the bundle's scores.
        credit: how a bundle's advantage is shared, see `advantages.riskpo`.
        lr: by which the quantiles move per step, units of the score.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`.

    Returns:
        A `Method` whose state is the quantiles; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> riskpo(bundle_size=2).min_group
        2

    Reference: RiskPO: Risk-based Policy Optimization via Verifiable Reward for LLM Post-Training (arXiv 2510.00911).
    """
    quantiles = {"alpha_d": alpha_d, "alpha_u": alpha_u, "omega": omega, "natural_baseline": natural_baseline, "lr": lr}
    choice = {"name": "riskpo", "bundle_size": bundle_size, "normalize_std": normalize_std, "credit": credit}
    return clipped({**choice, **quantiles}, {}, options)


def copo(
    *,
    blend: Literal["entropy", "uniform"] = "entropy",
    gamma: float = 20.0,
    rho: float = 1.5,
    base: float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    **options: Unpack[Options],
) -> Method:
    r"""COPO: two clipped losses, of the comparison within the group and of that between prompts, blended per prompt.

    $$\ell = w_p\, \ell_{clip}(A^{group}) + (1 - w_p)\, \ell_{clip}(A^{global}), \qquad
    w_p = \sigma(\gamma (H_p - \rho))$$

    with the entropy $H_p$ of the group's answers: where all answers agree, nothing is to be learned within the group,
    and the prompt is compared with the others.

    Args:
        blend: `"entropy"`, or `"uniform"`: the global comparison exactly in groups whose rewards are equal.
        gamma: $\gamma$, steepness.
        rho: $\rho$, the entropy at which both count alike.
        base: of the entropy's logarithm; None for nats.
        clip_low: lower clip bound.
        clip_high: upper clip bound.
        dual_clip: see `losses.ppo`.
        **options: `aggregation` (`"seq_mean_token_mean"`) and the others of `policy_gradient`.

    Returns:
        A `Method` that reads `rollouts.extras["answer"]`, `[P, G]` int; where there is none, completions of the same
        tokens are the same answer.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> copo(blend="uniform").unit
        'sequence'

    Reference: COPO: Consistency-Aware Policy Optimization (arXiv 2508.04138).
    """
    checks.clipping(clip_low, clip_high, dual_clip)
    advantage = {"name": "copo", "blend": blend, "gamma": gamma, "rho": rho, "base": base}
    bounds = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}

    def blended(logp: Array, old_logp: Array, advantages: Array, extras: Mapping[str, Array]) -> Array:
        weight = extras["local_weight"][:, None]
        within = losses.ppo(logp, old_logp, advantages, **bounds)
        across = losses.ppo(logp, old_logp, extras["global_advantages"], **bounds)
        return weight * within + (1 - weight) * across

    return with_defaults(advantage, blended, {"aggregation": "seq_mean_token_mean"}, options)

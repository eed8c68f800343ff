"""Methods that weight log-probs by an advantage computed from the rewards of a group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from jaxrl_post import advantages, losses
from jaxrl_post.methods import checks
from jaxrl_post.types import AggregationMode, Array, Method, Metric, Rollouts, Stats, Targets, Term

KLEstimator = Literal["k1", "k2", "k3", "abs"]
OldLogp = Literal["rollout", "recompute"]
Baseline = Literal["none", "leave_one_out"]


def policy_needs(beta: float) -> Mapping[str, frozenset[str]]:
    """What a method with a KL term of weight `beta` reads: the reference only if it counts."""
    logp = frozenset({"logp"})
    return {"policy": logp, "reference": logp} if beta else {"policy": logp}


def kl_term(
    stats: Stats, targets: Targets, beta: float, estimator: KLEstimator, mode: AggregationMode, horizon: int | None
) -> dict[str, Term]:
    """The KL to the reference as a term of the loss; empty if `beta` is 0."""
    if not beta:
        return {}
    value = losses.kl(stats["policy"].logp, stats["reference"].logp, estimator=estimator)
    return {"kl": Term(value, targets.mask, mode, weight=beta, horizon=horizon)}


def policy_metrics(stats: Stats, targets: Targets, *, clip_low: float, clip_high: float) -> dict[str, Metric]:
    """Clip fractions, the KL to the policy that sampled (`ppo_kl`, k1), and the KL to the reference (`kl`, k3)."""
    logp, mask = stats["policy"].logp, targets.mask
    low = losses.clipped_low(logp, targets.old_logp, targets.advantages, clip_low=clip_low)
    high = losses.clipped_high(logp, targets.old_logp, targets.advantages, clip_high=clip_high)
    metrics = {
        "clip_ratio/low_mean": Metric.mean(low, mask),
        "clip_ratio/high_mean": Metric.mean(high, mask),
        "clip_ratio/region_mean": Metric.mean(low + high, mask),
        "ppo_kl": Metric.mean(targets.old_logp - logp, mask),
    }
    if "reference" in stats:
        metrics["kl"] = Metric.mean(losses.kl(logp, stats["reference"].logp, estimator="k3"), mask)
    return metrics


def clipped_policy_gradient(
    advantage: Callable[[Rollouts], tuple[Array, Array]],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    beta: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    aggregation: AggregationMode = "token_mean",
    horizon: int | None = None,
    old_logp: OldLogp = "rollout",
    min_group: int = 1,
) -> Method:
    r"""PPO's clipped surrogate with one advantage per sequence, plus a KL to a reference.

    $$L = \mathrm{agg}(-\min(r A, \mathrm{clip}(r, 1-\epsilon_l, 1+\epsilon_h) A)) + \beta\, \mathrm{agg}(KL)$$

    with `r = exp(logp - old_logp)`. Most methods of this family are this function with an advantage of their own.

    Args:
        advantage: `rollouts -> (advantages[P, G], keep[P, G])`; sequences with `keep == 0` leave the loss and its
            denominators.
        clip_low: lower clip bound, the ratio is clipped at `1 - clip_low`.
        clip_high: upper clip bound, the ratio is clipped at `1 + clip_high`.
        dual_clip: for negative advantages the loss is at most `dual_clip * |A|`; None for no bound.
        beta: weight of the KL term; 0 needs no reference.
        kl_estimator: `"k1" | "k2" | "k3" | "abs"`, see `losses.kl`.
        aggregation: how tokens are reduced, see `losses.aggregate`.
        horizon: fixed length for `aggregation="seq_mean_token_sum_norm"`.
        old_logp: `"rollout"` takes the log-probs of the sampler, which saves a forward pass and weights by the ratio to
            the policy that really sampled; `"recompute"` scores the tokens at the start of the step.

    Returns:
        A `Method`.

    Raises:
        ValueError: for a keyword out of its range, or a horizon that does not apply.

    Example:
        >>> method = clipped_policy_gradient(lambda r: (advantages.rloo(r.reward, r.valid), r.valid), beta=0.05)
        >>> sorted(method.needs)
        ['policy', 'reference']

    Reference:
        Proximal Policy Optimization Algorithms, arXiv 1707.06347.
    """

    checks.clipping(clip_low, clip_high, dual_clip)
    checks.reduction(aggregation, horizon)
    checks.within("beta", beta, 0)
    checks.one_of("kl_estimator", kl_estimator, KLEstimator)
    checks.one_of("old_logp", old_logp, OldLogp)

    def targets(state, rollouts: Rollouts, stats: Stats, key) -> tuple[Targets, tuple[()]]:
        del key
        per_sequence, keep = advantage(rollouts)
        mask = rollouts.valid_mask * keep.reshape(-1, 1)
        start = rollouts.logp if old_logp == "rollout" else stats["policy"].logp
        return Targets(advantages.per_token(per_sequence, mask), mask, start), state

    def loss(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        del rollouts
        surrogate = losses.ppo(
            stats["policy"].logp,
            targets.old_logp,
            targets.advantages,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
        )
        terms = {"policy": Term(surrogate, targets.mask, aggregation, horizon=horizon)}
        return terms | kl_term(stats, targets, beta, kl_estimator, aggregation, horizon)

    def metrics(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Metric]:
        del rollouts
        return policy_metrics(stats, targets, clip_low=clip_low, clip_high=clip_high)

    return Method(targets, loss, needs=policy_needs(beta), metrics=metrics, min_group=min_group)


def grpo(
    *,
    normalize_std: bool = True,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    beta: float = 0.04,
    kl_estimator: KLEstimator = "k3",
    aggregation: AggregationMode = "seq_mean_token_mean",
    horizon: int | None = None,
    old_logp: OldLogp = "rollout",
) -> Method:
    r"""GRPO: rewards centred and scaled within each prompt's group are the advantage of every token.

    $$A_{p,g} = \frac{r_{p,g} - \mathrm{mean}_g r_p}{\mathrm{std}_g r_p + 10^{-6}}$$

    The defaults are the paper's. `normalize_std=False, beta=0.0, aggregation="seq_mean_token_sum_norm", horizon=N` is
    Dr. GRPO; `clip_high=0.28, beta=0.0, aggregation="token_mean"` is DAPO's loss.

    Args:
        normalize_std: divide by the group's standard deviation.
        clip_low: lower clip bound.
        clip_high: upper clip bound.
        dual_clip: see `clipped_policy_gradient`.
        beta: weight of the KL to the reference.
        kl_estimator: see `losses.kl`.
        aggregation: see `losses.aggregate`.
        horizon: fixed length for `aggregation="seq_mean_token_sum_norm"`.
        old_logp: see `clipped_policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or a horizon that does not apply.

    Example:
        >>> sorted(grpo(beta=0.0).needs)
        ['policy']

    Reference:
        DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models, arXiv 2402.03300.
    """

    def advantage(rollouts: Rollouts) -> tuple[Array, Array]:
        return advantages.grpo(rollouts.reward, rollouts.valid, normalize_std=normalize_std), rollouts.valid

    return clipped_policy_gradient(
        advantage,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        beta=beta,
        kl_estimator=kl_estimator,
        aggregation=aggregation,
        horizon=horizon,
        old_logp=old_logp,
        min_group=2,
    )


def mc_grpo(
    *,
    eps: float = 1e-3,
    max_abs: float | None = 5.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    beta: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    aggregation: AggregationMode = "token_mean",
    horizon: int | None = None,
    old_logp: OldLogp = "rollout",
) -> Method:
    r"""MC-GRPO: the group's median is the baseline, and one rollout that attains it is dropped.

    $$A_{p,g} = \frac{r_{p,g} - \mathrm{median}_g r_p}{\mathrm{median}_g |r_{p,g} - \mathrm{median}_g r_p| + \epsilon}$$

    Sample `G + 1` rollouts per prompt, so that `G` of them carry gradient.

    Args:
        eps: added to the median absolute deviation.
        max_abs: bound on `|A|`; binary rewards often have a deviation of 0, hence a scale of `eps`. None for no bound.
        clip_low: lower clip bound.
        clip_high: upper clip bound.
        dual_clip: see `clipped_policy_gradient`.
        beta: weight of the KL to the reference.
        kl_estimator: see `losses.kl`.
        aggregation: see `losses.aggregate`.
        horizon: fixed length for `aggregation="seq_mean_token_sum_norm"`.
        old_logp: see `clipped_policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two, and is meant for odd ones.

    Raises:
        ValueError: for a keyword out of its range, or a horizon that does not apply.

    Example:
        >>> mc_grpo().unit
        'token'

    Reference:
        MC-GRPO: Median-Centered Group Relative Policy Optimization for Small-Rollout Reinforcement Learning, arXiv
        2601.22582.
    """
    checks.within("eps", eps, 0)
    checks.within("max_abs", max_abs, 0)
    return clipped_policy_gradient(
        lambda rollouts: advantages.mc_grpo(rollouts.reward, rollouts.valid, eps=eps, max_abs=max_abs),
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        beta=beta,
        kl_estimator=kl_estimator,
        aggregation=aggregation,
        horizon=horizon,
        old_logp=old_logp,
        min_group=2,
    )


def reinforce(
    *,
    baseline: Baseline = "none",
    beta: float = 0.0,
    kl_estimator: KLEstimator = "k2",
    aggregation: AggregationMode = "seq_mean_token_sum",
    horizon: int | None = None,
) -> Method:
    r"""REINFORCE: the log-prob of every token times the reward of its sequence, less a baseline.

    $$L = -\frac{1}{B} \sum_b (r_b - b_b) \sum_t m_{b,t} \log \pi(y_{b,t} | y_{b,<t})$$

    Args:
        baseline: `"none"`, or `"leave_one_out"`: the mean reward of the group's other sequences (RLOO).
        beta: weight of the KL to the reference.
        kl_estimator: see `losses.kl`; k2 has the gradient of the reverse KL.
        aggregation: see `losses.aggregate`.
        horizon: fixed length for `aggregation="seq_mean_token_sum_norm"`.

    Returns:
        A `Method`.

    Raises:
        ValueError: for a keyword out of its range, or a horizon that does not apply.

    Example:
        >>> sorted(reinforce(beta=0.1).needs)
        ['policy', 'reference']

    References:
        Simple statistical gradient-following algorithms for connectionist reinforcement learning (Williams, 1992); Back
        to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs, arXiv 2402.14740.
    """

    checks.one_of("baseline", baseline, Baseline)
    checks.reduction(aggregation, horizon)
    checks.within("beta", beta, 0)
    checks.one_of("kl_estimator", kl_estimator, KLEstimator)

    def targets(state, rollouts: Rollouts, stats: Stats, key) -> tuple[Targets, tuple[()]]:
        del stats, key
        mask = rollouts.valid_mask
        estimate = advantages.rloo if baseline == "leave_one_out" else advantages.reinforce
        per_sequence = estimate(rollouts.reward, rollouts.valid)
        return Targets(advantages.per_token(per_sequence, mask), mask, rollouts.logp), state

    def loss(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        del rollouts
        value = losses.reinforce(stats["policy"].logp, targets.advantages)
        terms = {"policy": Term(value, targets.mask, aggregation, horizon=horizon)}
        return terms | kl_term(stats, targets, beta, kl_estimator, aggregation, horizon)

    def metrics(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Metric]:
        del rollouts
        every = policy_metrics(stats, targets, clip_low=0.0, clip_high=0.0)
        return {name: metric for name, metric in every.items() if not name.startswith("clip_ratio")}

    min_group = 2 if baseline == "leave_one_out" else 1
    return Method(targets, loss, needs=policy_needs(beta), metrics=metrics, min_group=min_group)

"""Methods that weight log-probs by an advantage: one composition of which they are names.

What was good comes from `credit`, what is minimised from `surrogate`; this file joins them with the KL to a reference,
entropy, and corrections for a sampler that is not quite the trained model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict, Unpack

import jax.numpy as jnp

from jaxrl_post import advantages, losses, masked
from jaxrl_post.methods import checks
from jaxrl_post.methods.choices import Choice
from jaxrl_post.methods.correction import as_corrections, rejection
from jaxrl_post.methods.credit import Advantage, Credit, Signals, as_advantage
from jaxrl_post.methods.presets import Preset, preset_options, preset_values
from jaxrl_post.methods.surrogate import as_surrogate, cleaned, sampler_logp
from jaxrl_post.types import AggregationMode, Array, Method, Metric, Rollouts, Stats, Targets, Term

KLEstimator = losses.KLEstimator
OldLogp = Literal["rollout", "recompute"]
Baseline = Literal["none", "leave_one_out"]


class Options(TypedDict, total=False):
    """Keywords that the methods of this family share, explained at `policy_gradient`."""

    aggregation: AggregationMode
    horizon: int | None
    old_logp: OldLogp
    correction: Choice | list | None
    off_policy_threshold: float | None
    beta: float
    kl_estimator: KLEstimator
    kl_in: Literal["loss", "reward"]
    kl_target: float | None
    kl_horizon: float
    entropy_weight: float
    entropy_target: float | None
    top_entropy: float
    nll_weight: float
    preset: Preset | None


class ClippedOptions(Options, total=False):
    """Keywords of methods whose loss is `losses.ppo`."""

    clip_low: float
    clip_high: float
    dual_clip: float | None


DEFAULTS: Options = {
    "aggregation": "token_mean",
    "horizon": None,
    "old_logp": "rollout",
    "correction": None,
    "off_policy_threshold": None,
    "beta": 0.0,
    "kl_estimator": "k3",
    "kl_in": "loss",
    "kl_target": None,
    "kl_horizon": 10_000.0,
    "entropy_weight": 0.0,
    "entropy_target": None,
    "top_entropy": 1.0,
    "nll_weight": 0.0,
}


def policy_needs(beta: float) -> Mapping[str, frozenset[str]]:
    """What a method with a KL term of weight `beta` reads: the reference only if it counts."""
    logp = frozenset({"logp"})
    return {"policy": logp, "reference": logp} if beta else {"policy": logp}


def logp_at_start(rollouts: Rollouts, stats: Stats, old_logp: OldLogp) -> Array:
    """`[B, T]`, nats: the denominator of the ratios, `cleaned`."""
    return cleaned(rollouts.logp if old_logp == "rollout" else stats["policy"].logp, rollouts)


def policy_metrics(
    stats: Stats, targets: Targets, *, clip_low: float | None, clip_high: float | None
) -> dict[str, Metric]:
    """Clip fractions (None: no clipping), the KL to the policy that sampled (`ppo_kl`), and to the reference (`kl`)."""
    logp, mask = stats["policy"].logp, targets.mask
    metrics = {"ppo_kl": Metric.mean(targets.old_logp - logp, mask)}
    if clip_low is not None and clip_high is not None:
        low = losses.clipped_low(logp, targets.old_logp, targets.advantages, clip_low=clip_low)
        high = losses.clipped_high(logp, targets.old_logp, targets.advantages, clip_high=clip_high)
        metrics |= {
            "clip_ratio/low_mean": Metric.mean(low, mask),
            "clip_ratio/high_mean": Metric.mean(high, mask),
            "clip_ratio/region_mean": Metric.mean(low + high, mask),
        }
    if "reference" in stats:
        metrics["kl"] = Metric.mean(losses.kl(logp, stats["reference"].logp, estimator="k3"), mask)
    if stats["policy"].entropy is not None:
        metrics["entropy"] = Metric.mean(stats["policy"].entropy, mask)
    return metrics


def policy_gradient(
    *, advantage: Choice | Advantage = "grpo", loss: Choice = "ppo", **options: Unpack[Options]
) -> Method:
    r"""A surrogate loss of an advantage, a KL to a reference, and what else the options ask for.

    $$L = \mathrm{agg}(w\, \ell(\log\pi, \log\pi_{old}, A)) + \beta\, \mathrm{agg}(KL) - c\, \mathrm{agg}(H)
    + \mu\, \mathrm{agg}_{r > 0}(-\log\pi)$$

    The methods of this family are this function with other parts and defaults.

    Args:
        advantage: name of a function of `jaxrl_post.advantages` (`"grpo"`, `"rloo"`, `"opo"`, ...), a mapping of `name`
            and its keywords, an `Advantage`, or a function `Signals -> [P, G] or [B, T] or Credit`.
        loss: name of a function of `jaxrl_post.losses` (`"ppo"`, `"gspo"`, `"cispo"`, ...), a mapping of `name` and its
            keywords, or a function that takes any of `logp, old_logp, advantages, mask, entropy, ref_logp`,
            `sampler_logp` and `extras` by name and returns `[B, T]` or `[B]`.
        **options: keywords shared by all methods of this family:

            - aggregation: how tokens are reduced, see `losses.aggregate` (`"token_mean"`).
            - horizon: fixed length for `aggregation="seq_mean_token_sum_norm"`.
            - old_logp: `"rollout"` takes the log-probs of the sampler, which saves a forward pass and weights by the
              ratio to the policy that really sampled; `"recompute"` scores the tokens at the start of the step.
            - correction: for a sampler that differs from the trained model, with `old_logp="recompute"`: `"tis"`,
              `"mis"`, `"icepop"`, `"seq_mask_tis"`, `"rejection"`, a mapping of name and keywords (those of
              `losses.importance_weights` or `losses.rejection_mask`), or a list of these (None).
            - off_policy_threshold: nats per token; sequences of negative advantage that the policy has moved away from
              by more are dropped, see `losses.off_policy_sequence_mask` (None).
            - beta: weight of the KL to the reference; 0 needs no reference.
            - kl_estimator: see `losses.kl` (`"k3"`).
            - kl_in: `"loss"`, or `"reward"`: the KL of the start of the step is taken from the reward.
            - kl_target: nats; `beta` is moved by `losses.adaptive_kl_coefficient` so that the KL comes near it (None).
            - kl_horizon: sequences over which it moves by a fifth (10000).
            - entropy_weight: weight of the entropy bonus; with a target, its first value.
            - entropy_target: nats; the weight is moved by `losses.adaptive_entropy_coefficient` towards it (None).
            - top_entropy: share of tokens, those of highest entropy, whose surrogate counts (1.0).
            - nll_weight: weight of the negative log-likelihood of sequences with a positive reward.
            - preset: `"trl"` or `"verl"`: the conventions of that system where options do not say otherwise (None).

    Returns:
        A `Method`.

    Raises:
        ValueError: for an unknown name or keyword, one out of its range, or one that does not apply.

    Example:
        >>> method = policy_gradient(advantage="rloo", loss={"name": "ppo", "clip_high": 0.28}, beta=0.05)
        >>> sorted(method.needs)
        ['policy', 'reference']

    Reference: Proximal Policy Optimization Algorithms (arXiv 1707.06347).
    """
    preset = preset_values(options.get("preset"))
    given: dict[str, Any] = {**DEFAULTS, **preset_options(options), **options}
    given.pop("preset", None)
    if unknown := sorted(set(given) - set(DEFAULTS)):
        raise ValueError(f"policy_gradient has no keyword {unknown[0]!r}; it has {', '.join(sorted(DEFAULTS))}")
    _check(given, options)
    credit = as_advantage(advantage, preset.advantages)
    if not credit.penalized:
        checks.kl_in_loss(given, "its advantage does not read the reward less the KL")
    surrogate = as_surrogate(loss, preset.losses)
    corrections = as_corrections(given["correction"])
    if surrogate.corrects and any(getattr(one, "func", one) is not rejection for one in corrections):
        raise ValueError("correction does not apply: decoupled_ppo weighs by the ratio to the sampler itself")
    if corrections and given["old_logp"] != "recompute":
        raise ValueError("correction weighs the trained model against the sampler: give old_logp='recompute'")
    mode, horizon, beta = given["aggregation"], given["horizon"], given["beta"]
    in_reward, kl_target = given["kl_in"] == "reward", given["kl_target"]
    entropy_weight, entropy_target = given["entropy_weight"], given["entropy_target"]
    far = given["off_policy_threshold"]
    wants_entropy = bool(entropy_weight) or entropy_target is not None or given["top_entropy"] < 1

    def init(rollouts: Any, num_prompts: int) -> Any:
        state: dict[str, Any] = {}
        if kl_target is not None:
            state["beta"] = jnp.asarray(beta, jnp.float32)
        if entropy_target is not None:
            state["entropy_weight"] = jnp.asarray(entropy_weight, jnp.float32)
        own = credit.init(rollouts, num_prompts)
        return {**state, "advantage": own} if state or not (isinstance(own, tuple) and not own) else ()

    def targets(state, rollouts: Rollouts, stats: Stats, key) -> tuple[Targets, Any]:
        mask = rollouts.valid_mask
        start = logp_at_start(rollouts, stats, given["old_logp"])
        new, extras = dict(state) if state else {}, {}
        weight = new.get("beta", beta)
        if beta and (in_reward or kl_target is not None):
            penalty = losses.kl(start, stats["reference"].logp, estimator=given["kl_estimator"])
            if kl_target is not None:
                extras["beta"] = weight
                samples = jnp.sum(rollouts.valid)
                mean = losses.aggregate(penalty, mask, "token_mean")
                new["beta"] = losses.adaptive_kl_coefficient(
                    weight, mean, target=kl_target, horizon=given["kl_horizon"], samples=samples
                )
        token_rewards = advantages.on_last_token(rollouts.reward, mask)
        judged = rollouts
        if beta and in_reward:
            penalty = jnp.where(mask > 0, weight * penalty, 0.0)
            token_rewards = token_rewards - penalty
            judged = rollouts.replace(reward=rollouts.reward - jnp.sum(penalty, 1).reshape(rollouts.reward.shape))
        signals = Signals(judged, mask, start, token_rewards, stats, key)
        found, own = credit.apply(new.get("advantage", ()), signals)
        if "advantage" in new:
            new["advantage"] = own
        found = found if isinstance(found, Credit) else Credit(found)
        mask = found.kept(mask)
        sampler = sampler_logp(rollouts)
        for correction in corrections:
            weights, mask = correction(start, sampler, mask)
            extras["weights"] = weights * extras.get("weights", 1.0)
        if given["top_entropy"] < 1:
            extras["top_entropy"] = losses.top_entropy_mask(
                stats["policy"].entropy, mask, fraction=given["top_entropy"]
            )
        if entropy_target is not None:
            mean = losses.aggregate(stats["policy"].entropy, mask, "token_mean")
            new["entropy_weight"], extras["entropy_weight"] = losses.adaptive_entropy_coefficient(
                new["entropy_weight"], mean, target=entropy_target
            )
        per_token = found.advantages
        if per_token.shape != mask.shape:
            per_token = advantages.per_token(per_token, mask)
        per_token = jnp.where(mask != 0, per_token, 0.0)
        if given["nll_weight"]:
            extras["positive"] = losses.positive_mask(rollouts.reward, mask)
        return Targets(per_token, mask, start, extras={**extras, **found.extras}), new if state else state

    def loss_terms(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        policy, mask, extras = stats["policy"], targets.mask, targets.extras
        value = surrogate(stats, rollouts, targets)
        factors = [extras["top_entropy"]] if "top_entropy" in extras else []
        if far is not None:
            sampler = sampler_logp(rollouts)
            stays = losses.off_policy_sequence_mask(policy.logp, sampler, targets.advantages, mask, threshold=far)
            factors.append(stays)
        for factor in factors:  # a loss per sequence takes the mean of its tokens' factors
            value = value * (factor if value.ndim == 2 else masked.mean(factor, mask, axis=1))
        for_value = mask if value.ndim == 2 else jnp.max(mask, axis=1)
        terms = {"policy": Term(value, for_value, mode, horizon=horizon)}
        if beta and not in_reward:
            ratio = {"old_logp": targets.old_logp} if given["kl_estimator"].endswith("_weighted") else {}
            estimate = losses.kl(policy.logp, stats["reference"].logp, estimator=given["kl_estimator"], **ratio)
            terms["kl"] = Term(estimate, mask, mode, weight=extras.get("beta", beta), horizon=horizon)
        if entropy_weight or entropy_target is not None:
            weight = extras.get("entropy_weight", entropy_weight)
            terms["entropy"] = Term(policy.entropy, mask, mode, weight=-weight, horizon=horizon)
        if given["nll_weight"]:
            terms["nll"] = Term(
                losses.nll(policy.logp), extras["positive"], mode, weight=given["nll_weight"], horizon=horizon
            )
        return terms

    def metrics(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Metric]:
        found = policy_metrics(stats, targets, clip_low=surrogate.clip_low, clip_high=surrogate.clip_high)
        if "weights" in targets.extras:
            weights = targets.extras["weights"]
            found |= losses.mismatch_metrics(targets.old_logp, sampler_logp(rollouts), rollouts.valid_mask)
            found["sampling/importance_weight/mean"] = Metric.mean(weights, targets.mask)
        for name in ("beta", "entropy_weight"):
            if name in targets.extras:
                found[f"{name}_coefficient" if name == "beta" else name] = Metric.mean(targets.extras[name][None])
        return found

    fields: dict[str, frozenset[str]] = dict(policy_needs(beta))
    if wants_entropy:
        fields["policy"] |= {"entropy"}
    for more in (credit.needs, surrogate.needs):
        for role, names in more.items():
            fields[role] = fields.get(role, frozenset()) | names
    return Method(
        targets,
        loss_terms,
        needs=fields,
        init=init,
        unit="sequence" if far is not None else surrogate.unit,
        metrics=metrics,
        min_group=credit.min_group,
        wants=credit.wants,
        probes=credit.probes,
        contrasts=credit.contrasts and not given["nll_weight"],
    )


def _check(given: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    checks.reduction(given["aggregation"], given["horizon"])
    for name, literal in (("kl_estimator", KLEstimator), ("old_logp", OldLogp), ("kl_in", Literal["loss", "reward"])):
        checks.one_of(name, given[name], literal)
    for name in ("beta", "kl_target", "kl_horizon", "nll_weight", "entropy_target", "off_policy_threshold"):
        checks.within(name, given[name], 0)
    checks.within("top_entropy", given["top_entropy"], 1e-6, 1)
    # Methods that take it from the reward may be given none, by beta=0.
    if options.get("kl_in") == "reward" and not given["beta"] and "beta" not in options:
        raise ValueError("kl_in='reward' does not apply: there is no KL without beta; give e.g. beta=0.01")
    checks.applies(given["kl_target"] is not None, "kl_target=None", kl_horizon=options.get("kl_horizon"))
    if given["kl_target"] is not None and not given["beta"]:
        raise ValueError("kl_target moves beta, which must begin above 0; give e.g. beta=0.1")


def take(options: Mapping[str, Any], *names: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of the options that have one of the names, and the others: what is not given is left to a preset.

    Example:
        >>> take({"cap": "ratio", "beta": 0.1}, "cap", "clip_high")
        ({'cap': 'ratio'}, {'beta': 0.1})
    """
    rest = dict(options)
    return {name: rest.pop(name) for name in names if name in rest}, rest


def split_clipping(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The loss `ppo` with those of `clip_low, clip_high, dual_clip` that are given, and the other options."""
    clipping, rest = take(options, "clip_low", "clip_high", "dual_clip")
    checks.clipping(clipping.get("clip_low", 0.2), clipping.get("clip_high", 0.2), clipping.get("dual_clip"))
    return {"name": "ppo", **clipping}, rest


def grpo(*, normalize_std: bool = True, **options: Unpack[ClippedOptions]) -> Method:
    r"""GRPO: rewards centred and scaled within each prompt's group are the advantage of every token.

    $$A_{p,g} = \frac{r_{p,g} - \mathrm{mean}_g r_p}{\mathrm{std}_g r_p + 10^{-6}}$$

    The defaults are the paper's. `normalize_std=False, beta=0.0, aggregation="seq_mean_token_sum_norm", horizon=N` is
    Dr. GRPO; `clip_high=0.28, beta=0.0, aggregation="token_mean"` is DAPO's loss.

    Args:
        normalize_std: divide by the group's standard deviation.
        **options: `clip_low` (0.2), `clip_high` (0.2) and `dual_clip` (None) of `losses.ppo`; `beta` (0.04),
            `aggregation` (`"seq_mean_token_mean"`) and the others of `policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> sorted(grpo(beta=0.0).needs)
        ['policy']

    Reference: DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models, arXiv 2402.03300.
    """
    # The systems of the presets mean GRPO without KL, averaged over tokens: the defaults of `policy_gradient`.
    own: Options = {} if options.get("preset") else {"beta": 0.04, "aggregation": "seq_mean_token_mean"}
    return clipped({"name": "grpo", "normalize_std": normalize_std}, own, options)


def mc_grpo(*, eps: float = 1e-3, max_abs: float | None = 5.0, **options: Unpack[ClippedOptions]) -> Method:
    r"""MC-GRPO: the group's median is the baseline, and one rollout that attains it is dropped.

    $$A_{p,g} = \frac{r_{p,g} - \mathrm{median}_g r_p}{\mathrm{median}_g |r_{p,g} - \mathrm{median}_g r_p| + \epsilon}$$

    Sample `G + 1` rollouts per prompt, so that `G` of them carry gradient.

    Args:
        eps: added to the median absolute deviation.
        max_abs: bound on `|A|`; binary rewards often have a deviation of 0, hence a scale of `eps`. None for no bound.
        **options: `clip_low` (0.2), `clip_high` (0.2) and `dual_clip` (None) of `losses.ppo`; the others of
            `policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two, and is meant for odd ones.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> mc_grpo().unit
        'token'

    Reference: MC-GRPO: Median-Centered Group Relative Policy Optimization for Small-Rollout Reinforcement Learning,
    arXiv 2601.22582.
    """
    checks.within("eps", eps, 0)
    checks.within("max_abs", max_abs, 0)
    return clipped({"name": "mc_grpo", "eps": eps, "max_abs": max_abs}, {}, options)


def clipped(advantage: Choice | Advantage, defaults: Options, options: Mapping[str, Any]) -> Method:
    """`policy_gradient` with the loss `losses.ppo`: defaults of a method, those of a preset, and what the user gave."""
    loss, rest = split_clipping(options)
    return with_defaults(advantage, loss, defaults, rest)


def with_defaults(advantage: Choice | Advantage, loss: Choice, defaults: Options, options: Mapping[str, Any]) -> Method:
    """`policy_gradient` with a method's defaults, over which a preset goes, over which go the user's options."""
    merged: dict[str, Any] = {**defaults, **preset_options({**defaults, **options}), **options}
    return policy_gradient(advantage=advantage, loss=loss, **merged)


def reinforce(*, baseline: Baseline = "none", **options: Unpack[Options]) -> Method:
    r"""REINFORCE: the log-prob of every token times the reward of its sequence, less a baseline.

    $$L = -\frac{1}{B} \sum_b (r_b - b_b) \sum_t m_{b,t} \log \pi(y_{b,t} | y_{b,<t})$$

    Args:
        baseline: `"none"`, or `"leave_one_out"`: the mean reward of the group's other sequences (RLOO).
        **options: `aggregation` (`"seq_mean_token_sum"`), `kl_estimator` (`"k2"`, which has the gradient of the reverse
            KL) and the others of `policy_gradient`.

    Returns:
        A `Method`.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> sorted(reinforce(beta=0.1).needs)
        ['policy', 'reference']

    References:
        Simple statistical gradient-following algorithms for connectionist reinforcement learning (Williams, 1992); Back
        to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs, arXiv 2402.14740.
    """
    checks.one_of("baseline", baseline, Baseline)
    name = "rloo" if baseline == "leave_one_out" else "reinforce"
    return with_defaults(name, "reinforce", {"aggregation": "seq_mean_token_sum", "kl_estimator": "k2"}, options)

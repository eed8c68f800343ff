"""Methods that discriminate right from wrong answers, and methods that approach a target distribution."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp

from jaxrl_post.losses import discriminative
from jaxrl_post.losses import divergence_policy_gradient as dpg
from jaxrl_post.methods import checks
from jaxrl_post.methods.consistency import group_logp
from jaxrl_post.methods.policy_gradient import OldLogp, policy_metrics
from jaxrl_post.types import Array, Method, Metric, Rollouts, Stats, Targets, Term

ScoreKind = Literal["log_likelihood", "likelihood_ratio"]
Target = Literal["tilted", "constrained"]

_LOGP = frozenset({"logp"})


def disco(
    *,
    score: ScoreKind = "log_likelihood",
    tau: float | None = None,
    beta: float = 1e3,
    delta: float = 1e-4,
    kl_estimator: discriminative.HingeEstimator = "k1",
    correct_above: float = 0.5,
    old_logp: OldLogp = "recompute",
) -> Method:
    r"""DisCO: right answers are scored above wrong ones, within a KL trust region that is a squared hinge.

    $$L = -\mathrm{mean}_q\Big[\mathrm{mean}_+ s - \tau \log \mathrm{mean}_- e^{s/\tau}\Big]
    + \frac\beta2 [KL(\pi_{old} \| \pi) - \delta]_+^2$$

    Prompts whose answers are all right or all wrong count in the mean over prompts, and in the KL.

    Args:
        score: `"log_likelihood"`, the mean log-prob of a sequence's tokens, or `"likelihood_ratio"`, their mean ratio.
        tau: temperature of the soft maximum over wrong answers; `inf` for their mean (DisCO-b); None for the paper's
            10 (log-likelihoods) or 1 (ratios).
        beta: strength of the trust region.
        delta: its radius, nats per token.
        kl_estimator: of the trust region, see `losses.kl_hinge`.
        correct_above: an answer whose reward is above this is right.
        old_logp: see `policy_gradient`; the trust region is around the policy of the step's start.

    Returns:
        A `Method` whose smallest unit is the batch, over which the KL is one number; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range.

    Example:
        >>> disco(tau=float("inf")).unit
        'batch'

    Reference: DisCO: Reinforcing Large Reasoning Models with Discriminative Constrained Optimization, arXiv 2505.12366.
    """
    checks.one_of("score", score, ScoreKind)
    checks.one_of("kl_estimator", kl_estimator, discriminative.HingeEstimator)
    checks.one_of("old_logp", old_logp, OldLogp)
    checks.above("tau", tau, 0)
    checks.within("beta", beta, 0)
    checks.within("delta", delta, 0)
    temperature = (10.0 if score == "log_likelihood" else 1.0) if tau is None else float(tau)

    def targets(state, rollouts: Rollouts, stats: Stats, key) -> tuple[Targets, Any]:
        del key
        mask = rollouts.valid_mask
        start = rollouts.logp if old_logp == "rollout" else stats["policy"].logp
        return Targets(mask, mask, start), state

    def loss(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        logp, mask = stats["policy"].logp, targets.mask
        if score == "log_likelihood":
            scores = discriminative.log_likelihood_score(logp, mask)
        else:
            scores = discriminative.likelihood_ratio_score(logp, targets.old_logp, mask)
        scores = scores.reshape(rollouts.reward.shape)
        right, weights = rollouts.reward > correct_above, targets.extras.get("weights")
        value = discriminative.disco(scores, right, rollouts.valid, tau=temperature, weights=weights)
        prompts = jnp.any(rollouts.valid, axis=1).astype(jnp.float32)
        hinge = {"beta": beta, "delta": delta, "estimator": kl_estimator}
        penalty = discriminative.kl_hinge(logp, targets.old_logp, mask, **hinge)
        return {"disco": Term(value, prompts, "token_mean"), "kl_hinge": Term(penalty, mask, "token_mean")}

    def metrics(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Metric]:
        del rollouts
        return policy_metrics(stats, targets, clip_low=None, clip_high=None)

    return Method(targets, loss, needs={"policy": _LOGP}, unit="batch", metrics=metrics, min_group=2)


def f_dpg(
    *,
    divergence: dpg.Divergence = "js",
    target: Target = "tilted",
    beta: float | None = None,
    correct_above: float | None = None,
    window: int = 1024,
    max_log_t: float = 20.0,
) -> Method:
    r"""f-DPG: the policy approaches an explicit target distribution by policy gradient, under a divergence of choice.

    $$p(y) \propto \pi_{ref}(y)\, e^{r(y)/\beta} \quad\text{or}\quad p(y) \propto \pi_{ref}(y)\, [r(y) > c], \qquad
    L = -\mathrm{mean}\; \mathrm{sg}\Big(\frac{\pi}{q} (-f'(\pi / p) - b)\Big) \log\pi$$

    Each prompt has its own normaliser, estimated by importance sampling and averaged over the steps that saw the
    prompt. $b$ is the mean of the last `window` pseudo-rewards.

    Args:
        divergence: see `losses.divergence_reward`.
        target: `"tilted"` by the reward, or `"constrained"` to answers whose reward is above `correct_above`.
        beta: temperature of the tilted target, in units of the reward; None for 0.1.
        correct_above: an answer whose reward is above this satisfies the constraint of the other one; None for 0.5.
        window: pseudo-rewards that the baseline averages.
        max_log_t: see `losses.divergence_reward`.

    Returns:
        A `Method`; it needs a reference.

    Raises:
        ValueError: for a keyword out of its range, or one that the target does not read.

    Example:
        >>> sorted(f_dpg(divergence="forward_kl").needs)
        ['policy', 'reference']

    Reference: Aligning Language Models with Preferences through f-divergence Minimization, arXiv 2302.08215.
    """
    checks.one_of("divergence", divergence, dpg.Divergence)
    checks.one_of("target", target, Target)
    checks.above("beta", beta, 0)
    checks.applies(target == "tilted", f"target={target!r}", beta=beta)
    checks.applies(target == "constrained", f"target={target!r}", correct_above=correct_above)
    beta = 0.1 if beta is None else beta
    correct_above = 0.5 if correct_above is None else correct_above
    checks.within("window", window, 1)
    checks.within("max_log_t", max_log_t, 1e-6, 80)

    def init(rollouts: Any, num_prompts: int) -> Any:
        del rollouts
        return {
            "log_z": jnp.zeros(num_prompts),
            "steps": jnp.zeros(num_prompts, jnp.int32),
            "rewards": jnp.zeros(window),
            "count": jnp.zeros((), jnp.int32),
        }

    def log_score(stats: Stats, rollouts: Rollouts, mask: Array) -> Array:
        reference = group_logp(stats["reference"].logp, mask, rollouts)
        if target == "tilted":
            return reference + rollouts.reward / beta
        return jnp.where(rollouts.reward > correct_above, reference, -jnp.inf)

    def targets(state, rollouts: Rollouts, stats: Stats, key) -> tuple[Targets, Any]:
        del key
        mask, ids = rollouts.valid_mask, rollouts.prompt_id
        sampler, score = group_logp(rollouts.logp, mask, rollouts), log_score(stats, rollouts, mask)
        estimate = dpg.log_partition(score, sampler, rollouts.valid)
        seen = jnp.any(rollouts.valid, axis=1)
        log_z = dpg.running_log_partition(state["log_z"][ids], state["steps"][ids], estimate)
        log_z = jnp.where(seen, log_z, state["log_z"][ids])
        log_t = jnp.where(score == -jnp.inf, jnp.inf, sampler - score + log_z[:, None])
        pseudo = dpg.divergence_reward(log_t, divergence=divergence, max_log_t=max_log_t).reshape(-1)
        valid = rollouts.valid.reshape(-1)
        held = jnp.minimum(state["count"], window)
        batch_mean = jnp.sum(jnp.where(valid, pseudo, 0.0)) / jnp.maximum(jnp.sum(valid), 1)
        baseline = jnp.where(held > 0, jnp.sum(state["rewards"]) / jnp.maximum(held, 1), batch_mean)
        order = jnp.cumsum(valid) - 1
        kept = valid & (order >= jnp.sum(valid) - window)  # no more than the window holds
        place = jnp.where(kept, (state["count"] + order) % window, window)
        new = {
            "log_z": state["log_z"].at[ids].set(log_z),
            "steps": state["steps"].at[ids].add(seen.astype(jnp.int32)),
            "rewards": state["rewards"].at[place].set(pseudo, mode="drop"),
            "count": state["count"] + jnp.sum(valid),
        }
        extras = {"log_z": log_z, "baseline": jnp.broadcast_to(baseline, log_z.shape)}
        return Targets(mask, mask, rollouts.logp, extras=extras), new

    def loss(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        value = dpg.f_dpg(
            group_logp(stats["policy"].logp, targets.mask, rollouts),
            group_logp(targets.old_logp, targets.mask, rollouts),
            log_score(stats, rollouts, targets.mask),
            targets.extras["log_z"],
            rollouts.valid,
            divergence=divergence,
            baseline=targets.extras["baseline"],
            max_log_t=max_log_t,
        )
        return {"f_dpg": Term(value.reshape(-1), rollouts.valid.reshape(-1).astype(jnp.float32), "token_mean")}

    def metrics(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Metric]:
        del rollouts
        log_z = targets.extras["log_z"]
        return policy_metrics(stats, targets, clip_low=None, clip_high=None) | {
            "log_partition/mean": Metric.mean(log_z, jnp.isfinite(log_z).astype(jnp.float32))
        }

    needs = {"policy": _LOGP, "reference": _LOGP}
    return Method(targets, loss, needs=needs, init=init, unit="group", metrics=metrics)

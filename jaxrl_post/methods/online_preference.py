"""Methods that compare what the policy itself has sampled: a group's answers, by their rewards.

A reward need not be a score: a judge of pairs (`adapter: judge` in a configuration, `rewards.from_judge`) gives each
answer its win rate against the others of its prompt.
"""

from __future__ import annotations

from typing import Any, Literal, Unpack

import jax.numpy as jnp

from jaxrl_post import advantages, losses, masked
from jaxrl_post.losses.trajectory_dpo import Pairs
from jaxrl_post.methods import checks
from jaxrl_post.methods.credit import Signals, stateless
from jaxrl_post.methods.policy_gradient import ClippedOptions, OldLogp, clipped, policy_gradient
from jaxrl_post.types import Array, Method, Metric, Rollouts, Stats, Targets, Term

Labels = Literal["hard", "soft", "listwise"]
Reward = Literal["score", "win_rate"]
KLForm = Literal["token", "sequence"]


def _by_group(stats: Stats, role: str, rollouts: Rollouts, mask: Array) -> Array:
    """`[P, G]`, nats: log-probs of the answers."""
    return masked.sum(stats[role].logp, mask, 1).reshape(rollouts.reward.shape)


def _targets(state: Any, rollouts: Rollouts, stats: Stats, key: Array) -> tuple[Targets, Any]:
    del stats, key
    mask = rollouts.valid_mask
    return Targets(advantages=mask, mask=mask, old_logp=rollouts.logp), state


def _metrics(beta: float, pairs: Pairs) -> Any:
    def metrics(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Metric]:
        own, ref = (_by_group(stats, role, rollouts, targets.mask) for role in ("policy", "reference"))
        reward = beta * (own - ref)
        better = losses.preference_pairs(rollouts.reward, rollouts.valid, pairs=pairs).astype(reward.dtype)
        won, lost = jnp.broadcast_arrays(reward[:, :, None], reward[:, None, :])
        return {
            "rewards/chosen": Metric.mean(won, better),
            "rewards/rejected": Metric.mean(lost, better),
            "rewards/margins": Metric.mean(won - lost, better),
            "rewards/accuracies": Metric.mean((won > lost).astype(reward.dtype), better),
            "pairs": Metric.sum(jnp.sum(better)),
        }

    return metrics


def online_dpo(
    *,
    beta: float = 0.1,
    labels: Labels = "hard",
    pairs: Pairs | None = None,
    optimism: float = 0.0,
    temperature: float | None = None,
) -> Method:
    r"""DPO on pairs of a group's own answers, with the rewards for a judge.

    $$L = -\mathrm{mean}_{r_i > r_j} \log\sigma(z_i - z_j) + \alpha\, \mathrm{mean}_i\, z_i, \qquad
    z = \beta \log\frac{\pi}{\pi_{ref}}$$

    With `labels="soft"` it is direct Nash optimisation, `losses.dno`: all pairs, each drawn to the probability
    $\sigma(r_i - r_j)$; there `reference` is to be renewed from the policy, `roles: {reference: {refresh: every,
    every: N}}`. With `labels="listwise"` it is `losses.listwise`: the whole group at once.

    Args:
        beta: inverse temperature of the implicit reward; $\eta$ of direct Nash optimisation.
        labels: `"hard"`, `"soft"` or `"listwise"`.
        pairs: of hard labels, `"extremes"`: the best answer of a group and its worst, or `"all"`; None for extremes.
        optimism: $\alpha$: above 0 the answers that were sampled lose likelihood, so that others are tried. Where an
            answer is used once, as in a step of `epochs: 1` without `rollout.ahead`, that has mean 0: it needs answers
            that are older than the policy.
        temperature: of listwise labels, in units of the reward; None for 1.

    Returns:
        A `Method` on groups of two at least, whose smallest unit is the group. Groups of equal rewards have no pair.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> sorted(online_dpo().needs), online_dpo().min_group
        (['policy', 'reference'], 2)

    References: Direct Language Model Alignment from Online AI Feedback (arXiv 2402.04792); Direct Nash Optimization
    (arXiv 2404.03715); with $\alpha$, Self-Exploring Language Models (arXiv 2405.19332) and, with the same term,
    Value-Incentivized Preference Optimization (arXiv 2405.19320), whose offline form is `rpo`.
    """
    checks.above("beta", beta, 0)
    checks.one_of("labels", labels, Labels)
    checks.within("optimism", optimism, 0)
    checks.applies(labels == "hard", f"labels={labels!r}", pairs=pairs)
    which: Pairs = pairs or ("extremes" if labels == "hard" else "all")
    checks.one_of("pairs", which, Pairs)
    checks.applies(labels == "listwise", f"labels={labels!r}", temperature=temperature)
    checks.above("temperature", temperature, 0)
    heat = 1.0 if temperature is None else temperature

    def loss(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        own, ref = (_by_group(stats, role, rollouts, targets.mask) for role in ("policy", "reference"))
        given = (own, ref, rollouts.reward, rollouts.valid)
        there = jnp.sum(rollouts.valid, axis=1) > 1
        if labels == "soft":
            value = losses.dno(*given, beta=beta)
        elif labels == "listwise":
            value = losses.listwise(*given, beta=beta, temperature=heat)
        else:
            value = losses.trajectory_dpo(*given, beta=beta, pairs=which)
            better = losses.preference_pairs(rollouts.reward, rollouts.valid, pairs=which)
            there = jnp.any(better, axis=(1, 2))
        terms = {"preference": Term(value, there.astype(value.dtype), "token_mean")}
        if optimism:
            drift = losses.implicit_reward(own.reshape(-1), ref.reshape(-1), beta=beta)
            terms["optimism"] = Term(
                drift, rollouts.valid.reshape(-1).astype(drift.dtype), "token_mean", weight=optimism
            )
        return terms

    logp = frozenset({"logp"})
    return Method(
        _targets,
        loss,
        needs={"policy": logp, "reference": logp},
        unit="group",
        metrics=_metrics(beta, which),
        min_group=2,
        contrasts=labels == "hard" and not optimism,
    )


def inpo(*, eta: float = 7.5e-3, tau: float = 2.5e-3) -> Method:
    r"""INPO: mirror descent in the game of preferences, as a regression on the best and the worst answer of a group.

    $$L = \Big(h - \frac{\tau}{\eta} h_{ref} - \frac{\eta - \tau}{\eta} h_t - \frac{1}{2 \eta}\Big)^2, \qquad
    h = \log\pi(y_w) - \log\pi(y_l)$$

    Args:
        eta: $\eta$, inverse step size: the smaller, the larger the margin that is asked for.
        tau: $\tau$, strength of the KL to the reference; the paper takes a third of $\eta$.

    Returns:
        A `Method` on groups of two at least that reads the roles `reference`, which stays, and `previous`, which is to
        be renewed: `roles: {previous: {from: policy, refresh: every, every: N}}`.

    Raises:
        ValueError: for a keyword out of its range.

    Example:
        >>> sorted(inpo().needs)
        ['policy', 'previous', 'reference']

    Reference: Iterative Nash Policy Optimization: Aligning LLMs with General Preferences via No-Regret Learning
    (arXiv 2407.00617).
    """
    checks.above("eta", eta, 0)
    checks.within("tau", tau, 0, eta)
    roles = ("policy", "reference", "previous")

    def loss(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        better = losses.preference_pairs(rollouts.reward, rollouts.valid, pairs="extremes")
        there = jnp.any(better, axis=(1, 2))
        chosen, rejected = (jnp.argmax(jnp.any(better, axis=axis), axis=1)[:, None] for axis in (2, 1))
        logps = []
        for role in roles:
            logp = _by_group(stats, role, rollouts, targets.mask)
            logps += [jnp.take_along_axis(logp, at, axis=1)[:, 0] for at in (chosen, rejected)]
        return {"inpo": Term(losses.inpo(*logps, eta=eta, tau=tau), there.astype(logps[0].dtype), "token_mean")}

    logp = frozenset({"logp"})
    return Method(
        _targets,
        loss,
        needs=dict.fromkeys(roles, logp),
        unit="group",
        metrics=_metrics(eta, "extremes"),
        min_group=2,
        contrasts=True,
    )


def spo(*, reward: Reward = "score", scale: float | None = None, **options: Unpack[ClippedOptions]) -> Method:
    r"""SPO: self-play for the minimax winner: an answer earns its win rate against the others of its group.

    $$A_i = \frac{1}{k - 1} \sum_{j \ne i} P(i \succ j) - \frac12$$

    Args:
        reward: what `rollouts.reward` is: a `"score"`, by which answers are compared, or the `"win_rate"` itself, that
            of a judge of pairs, whose preferences need not be transitive.
        scale: with scores, preferences are $\sigma((r_i - r_j) / s)$; None for who has more.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`, but for
            `kl_in`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> spo().min_group
        2

    Reference: A Minimaximalist Approach to Reinforcement Learning from Human Feedback (arXiv 2401.04056).
    """
    checks.one_of("reward", reward, Reward)
    checks.above("scale", scale, 0)
    checks.applies(reward == "score", f"reward={reward!r}", scale=scale)
    checks.kl_in_loss(options, "win rates are of rewards as they were given")

    def apply(s: Signals) -> Array:
        rate = s.reward
        if reward == "score":
            rate = advantages.win_rate(advantages.order_wins(rate, s.valid, scale=scale), s.valid)
        return jnp.where(s.valid, rate - 0.5, 0.0)

    return clipped(stateless(apply, min_group=2), {}, options)


def nash_md(
    *, tau: float = 0.008, kl: KLForm = "token", normalize_length: bool = False, old_logp: OldLogp = "rollout"
) -> Method:
    r"""Nash-MD-PG: policy gradient of win rates less one half, with a KL to the reference.

    $$\nabla L = -E\Big[\nabla \log\pi(y) \Big(P(y \succ y') - \frac12
    - \tau \log\frac{\pi(y)}{\mu(y)}\Big)\Big]$$

    Args:
        tau: $\tau$, strength of the KL; the paper takes 0.008 for summaries.
        kl: `"sequence"` as above, each token with the ratio of the whole answer; `"token"`, as TRL has it, each with
            its own, which is less noisy, and blind to what a token does to those after it.
        normalize_length: the mean over all tokens, not the sum over an answer's.
        old_logp: see `policy_gradient`.

    Returns:
        A `Method` that takes `rollouts.reward` for win rates, in [0, 1], and reads the role `reference`. One sequence
        per prompt is enough where the win rate is against others than the group.

        The loop samples all answers from the policy, so that they are compared with one another, which is the paper's
        mixture with share 0. An opponent from the mixture with the reference is sampled with
        `models.geometric_mixture`; the tabular form is `advantages.nash_md_step`.

    Raises:
        ValueError: for a keyword out of its range.

    Example:
        >>> sorted(nash_md().needs)
        ['policy', 'reference']

    Reference: Nash Learning from Human Feedback (arXiv 2312.00886).
    """
    checks.within("tau", tau, 0)
    checks.one_of("kl", kl, KLForm)
    in_reward = kl == "sequence" and tau > 0

    def apply(s: Signals) -> Array:
        return jnp.where(s.valid, s.reward - 0.5, 0.0)

    return policy_gradient(
        advantage=stateless(apply),
        loss="reinforce",
        beta=tau,
        kl_estimator="k1" if in_reward else "k2",
        kl_in="reward" if in_reward else "loss",
        aggregation="token_mean" if normalize_length else "seq_mean_token_sum",
        old_logp=old_logp,
    )

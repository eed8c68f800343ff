"""Methods with a learned value function."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post import advantages, losses
from jaxrl_post.methods import checks
from jaxrl_post.methods.policy_gradient import OldLogp, policy_metrics, policy_needs
from jaxrl_post.types import AggregationMode, Method, Metric, Rollouts, Stats, Targets, Term


def ppo(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = True,
    value_clip: float | None = 0.2,
    value_weight: float = 1.0,
    beta: float = 0.0,
    aggregation: AggregationMode = "token_mean",
    horizon: int | None = None,
    old_logp: OldLogp = "rollout",
) -> Method:
    r"""PPO with a critic: GAE advantages, the clipped surrogate, a clipped value loss, and the KL inside the reward.

    $$R_t = [t = \mathrm{last}]\, r - \beta (\log \pi_{old} - \log \pi_{ref})_t, \quad
    \delta_t = R_t + \gamma V_{t+1} - V_t, \quad A_t = \delta_t + \gamma \lambda A_{t+1}$$

    Args:
        clip_low: lower clip bound.
        clip_high: upper clip bound.
        dual_clip: see `clipped_policy_gradient`.
        gamma: discount per action token.
        lam: GAE's lambda.
        whiten: give the advantages mean 0 and variance 1 over the batch.
        value_clip: values may move this far from those of the start of the step; None for no clip.
        value_weight: factor of the value loss; the critic's parameters are its own, so that it matters only beside
            optimisers that are not scale-free and in a joint gradient norm.
        beta: weight of the k1 KL that is taken from the reward.
        aggregation: see `losses.aggregate`.
        horizon: fixed length for `aggregation="seq_mean_token_sum_norm"`.
        old_logp: see `clipped_policy_gradient`.

    Returns:
        A `Method` that trains the roles `policy` and `critic`.

    Raises:
        ValueError: for a keyword out of its range, or a horizon that does not apply.

    Example:
        >>> sorted(ppo().trains), sorted(ppo().needs["critic"])
        (['critic', 'policy'], ['value'])

    References:
        Proximal Policy Optimization Algorithms, arXiv 1707.06347; Training language models to follow instructions with
        human feedback, arXiv 2203.02155.
    """

    checks.clipping(clip_low, clip_high, dual_clip)
    checks.reduction(aggregation, horizon)
    for name, value in (("gamma", gamma), ("lam", lam)):
        checks.within(name, value, 0, 1)
    for name, value in (("beta", beta), ("value_clip", value_clip), ("value_weight", value_weight)):
        checks.within(name, value, 0)
    checks.one_of("old_logp", old_logp, OldLogp)

    def targets(state, rollouts: Rollouts, stats: Stats, key) -> tuple[Targets, tuple[()]]:
        del key
        mask = rollouts.valid_mask
        start = rollouts.logp if old_logp == "rollout" else stats["policy"].logp
        rewards = advantages.on_last_token(rollouts.reward, mask)
        if beta:
            rewards = rewards - beta * losses.kl(start, stats["reference"].logp, estimator="k1") * mask
        values = stats["critic"].value
        advantage, returns = advantages.gae(rewards, values, mask, gamma=gamma, lam=lam, whiten=whiten)
        return Targets(advantage, mask, start, returns, extras={"old_values": values}), state

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
        value = losses.value(stats["critic"].value, targets.returns, targets.extras["old_values"], clip=value_clip)
        return {
            "policy": Term(surrogate, targets.mask, aggregation, horizon=horizon),
            "value": Term(value, targets.mask, aggregation, weight=value_weight, horizon=horizon),
        }

    def metrics(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Metric]:
        del rollouts
        return policy_metrics(stats, targets, clip_low=clip_low, clip_high=clip_high) | {
            "critic/values/mean": Metric.mean(stats["critic"].value, targets.mask),
            "critic/returns/mean": Metric.mean(jnp.asarray(targets.returns), targets.mask),
        }

    needs = {**policy_needs(beta), "critic": frozenset({"value"})}
    return Method(targets, loss, needs=needs, trains=frozenset({"policy", "critic"}), metrics=metrics)

"""Methods with a learned value function."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, TypedDict, Unpack

import jax.numpy as jnp

from jaxrl_post import advantages, losses
from jaxrl_post.methods import checks
from jaxrl_post.methods.policy_gradient import OldLogp, logp_at_start, policy_metrics
from jaxrl_post.types import AggregationMode, Array, Method, Metric, Rollouts, Stats, Targets, Term

TokenRewards: TypeAlias = Callable[[Rollouts, Stats, Array, Array], Array]
"""`(rollouts, stats of the start of the step, mask [B, T], old log-probs [B, T]) -> [B, T]`, what each token earns."""


class CriticOptions(TypedDict, total=False):
    """Keywords that methods with a critic share, explained at `ppo`."""

    clip_low: float
    clip_high: float
    dual_clip: float | None
    gamma: float
    lam: float
    whiten: bool
    value_clip: float | None
    value_weight: float
    aggregation: AggregationMode
    horizon: int | None
    old_logp: OldLogp


def ppo(*, beta: float = 0.0, **options: Unpack[CriticOptions]) -> Method:
    r"""PPO with a critic: GAE advantages, the clipped surrogate, a clipped value loss, and the KL inside the reward.

    $$R_t = [t = \mathrm{last}]\, r - \beta (\log \pi_{old} - \log \pi_{ref})_t, \quad
    \delta_t = R_t + \gamma V_{t+1} - V_t, \quad A_t = \delta_t + \gamma \lambda A_{t+1}$$

    Args:
        beta: weight of the k1 KL that is taken from the reward.
        **options:

            - clip_low: lower clip bound (0.2).
            - clip_high: upper clip bound (0.2).
            - dual_clip: see `losses.ppo` (None).
            - gamma: discount per action token (1.0).
            - lam: GAE's lambda (0.95).
            - whiten: give the advantages mean 0 and variance 1 over the batch (True).
            - value_clip: values may move this far from those of the start of the step; None for no clip (0.2).
            - value_weight: factor of the value loss; the critic's parameters are its own, so that it matters only
              beside optimisers that are not scale-free and in a joint gradient norm (1.0).
            - aggregation: see `losses.aggregate` (`"token_mean"`).
            - horizon: fixed length for `aggregation="seq_mean_token_sum_norm"`.
            - old_logp: see `policy_gradient` (`"rollout"`).

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
    checks.within("beta", beta, 0)

    def token_rewards(rollouts: Rollouts, stats: Stats, mask: Array, old_logp: Array) -> Array:
        return less_kl(advantages.on_last_token(rollouts.reward, mask), stats, mask, old_logp, beta=beta)

    return with_critic(token_rewards, ("reference",) if beta else (), **options)


def less_kl(earned: Array, stats: Stats, mask: Array, old_logp: Array, *, beta: float) -> Array:
    """Rewards of tokens `[B, T]` less `beta` times the k1 KL to the reference, which nothing reads if `beta` is 0."""
    if not beta:
        return earned
    penalty = losses.kl(old_logp, stats["reference"].logp, estimator="k1")
    return earned - beta * jnp.where(mask != 0, penalty, 0.0)


def with_critic(
    token_rewards: TokenRewards,
    reads: tuple[str, ...] = (),
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = True,
    value_clip: float | None = 0.2,
    value_weight: float = 1.0,
    aggregation: AggregationMode = "token_mean",
    horizon: int | None = None,
    old_logp: OldLogp = "rollout",
) -> Method:
    """PPO of any rewards of tokens; `ppo` explains the keywords.

    Args:
        token_rewards: what each token earns.
        reads: roles whose log-probs that takes, beside the policy's.
        **options: see `ppo`.

    Example:
        >>> method = with_critic(lambda rollouts, stats, mask, old_logp: stats["teacher"].logp * mask, ("teacher",))
        >>> sorted(method.needs), method.init(None, 0)
        (['critic', 'policy', 'teacher'], ())
    """
    checks.clipping(clip_low, clip_high, dual_clip)
    checks.reduction(aggregation, horizon)
    for name, value in (("gamma", gamma), ("lam", lam)):
        checks.within(name, value, 0, 1)
    checks.within("value_weight", value_weight, 0)
    checks.above("value_clip", value_clip, 0)
    checks.one_of("old_logp", old_logp, OldLogp)

    def targets(state, rollouts: Rollouts, stats: Stats, key) -> tuple[Targets, tuple[()]]:
        del key
        mask = rollouts.valid_mask
        start = logp_at_start(rollouts, stats, old_logp)
        earned = token_rewards(rollouts, stats, mask, start)
        values = stats["critic"].value
        advantage, returns = advantages.gae(earned, values, mask, gamma=gamma, lam=lam, whiten=whiten)
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

    logp = frozenset({"logp"})
    needs = {"policy": logp, **dict.fromkeys(reads, logp), "critic": frozenset({"value"})}
    return Method(targets, loss, needs=needs, trains=frozenset({"policy", "critic"}), metrics=metrics)

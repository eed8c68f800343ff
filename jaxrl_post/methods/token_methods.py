"""Methods that give every token a credit of its own."""

from __future__ import annotations

from typing import Unpack

import jax.numpy as jnp

from jaxrl_post import advantages, losses
from jaxrl_post.methods import checks
from jaxrl_post.methods.actor_critic import ppo
from jaxrl_post.methods.policy_gradient import ClippedOptions, OldLogp, clipped
from jaxrl_post.types import AggregationMode, Method, Rollouts, Stats, Targets, Term


def otb(*, handle_zero_tail: bool = True, **options: Unpack[ClippedOptions]) -> Method:
    r"""OTB: every token's reward-to-go less its mean over the group, weighted by the energy spent up to that token.

    $$A_{g,t} = G_{g,t} - \frac{\sum_j W_{j,t} G_{j,t}}{\sum_j W_{j,t}}, \qquad
    W_t = \sum_{s \le t} (1 - 2 \pi(y_s) + \sum_v \pi(v)^2)$$

    Time counts the policy's own tokens, so that this is the form for multi-turn rollouts as well.

    Args:
        handle_zero_tail: no baseline where a single sequence of the group is left, see `advantages.otb`.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two, and the sum of squared probabilities of the policy.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> sorted(otb().needs["policy"])
        ['logp', 'sum_p_squared']

    Reference: The Optimal Token Baseline: Variance Reduction for Long-Horizon LLM-RL (Proceedings of Machine Learning
    Research 306, 2026).
    """
    return clipped({"name": "otb", "handle_zero_tail": handle_zero_tail}, {}, options)


def vapo(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    gamma: float = 1.0,
    alpha: float = 0.05,
    lam_value: float = 1.0,
    whiten: bool = True,
    value_clip: float | None = None,
    value_weight: float = 1.0,
    nll_weight: float = 0.1,
    aggregation: AggregationMode = "token_mean",
    horizon: int | None = None,
    old_logp: OldLogp = "rollout",
) -> Method:
    r"""VAPO: PPO with a $\lambda$ by the length of the sequence for the policy, and another $\lambda$ for the critic.

    $$\lambda_{policy} = 1 - \frac{1}{\max(\alpha L, 1)}, \qquad \lambda_{critic} = 1, \qquad
    L = L_{clip} + L_{value} + \mu\, \mathrm{agg}_{r > 0}(-\log \pi)$$

    Args:
        clip_low: lower clip bound.
        clip_high: upper clip bound.
        gamma: discount per action token.
        alpha: $\alpha$, the horizon of the policy's advantages as a share of the length.
        lam_value: $\lambda$ of the critic's targets.
        whiten: give the advantages mean 0 and variance 1 over the batch.
        value_clip: values may move this far from those of the start of the step; None for no clip.
        value_weight: factor of the value loss.
        nll_weight: $\mu$, weight of the negative log-likelihood of sequences with a positive reward.
        aggregation: see `losses.aggregate`.
        horizon: fixed length for `aggregation="seq_mean_token_sum_norm"`.
        old_logp: see `policy_gradient`.

    Returns:
        A `Method` that trains the roles `policy` and `critic`.

    Raises:
        ValueError: for a keyword out of its range, or a horizon that does not apply.

    Example:
        >>> sorted(vapo().trains)
        ['critic', 'policy']

    Reference: VAPO: Efficient and Reliable Reinforcement Learning for Advanced Reasoning Tasks (arXiv 2504.05118).
    """
    checks.within("lam_value", lam_value, 0, 1)
    checks.within("nll_weight", nll_weight, 0)
    if alpha <= 0:
        raise ValueError(f"alpha must be above 0, got {alpha}; 1 / alpha is the longest sequence with lambda 0")
    base = ppo(
        clip_low=clip_low,
        clip_high=clip_high,
        gamma=gamma,
        whiten=whiten,
        value_clip=value_clip,
        value_weight=value_weight,
        aggregation=aggregation,
        horizon=horizon,
        old_logp=old_logp,
    )

    def targets(state, rollouts: Rollouts, stats: Stats, key) -> tuple[Targets, tuple[()]]:
        found, state = base.targets(state, rollouts, stats, key)
        mask = found.mask
        lam = advantages.length_adaptive_lam(jnp.sum(mask != 0, axis=1), alpha=alpha)
        advantage, returns = advantages.decoupled_gae(
            advantages.on_last_token(rollouts.reward, mask),
            stats["critic"].value,
            mask,
            gamma=gamma,
            lam_policy=lam,
            lam_value=lam_value,
            whiten=whiten,
        )
        positive = mask * (rollouts.reward > 0).reshape(-1, 1)
        return found._replace(
            advantages=advantage, returns=returns, extras={**found.extras, "positive": positive}
        ), state

    def loss(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        terms = base.loss(stats, rollouts, targets)
        if nll_weight:
            value = losses.nll(stats["policy"].logp)
            terms["nll"] = Term(value, targets.extras["positive"], aggregation, weight=nll_weight, horizon=horizon)
        return terms

    return base._replace(targets=targets, loss=loss, contrasts=False)

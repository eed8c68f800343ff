"""Methods whose policy is its own value function: ROVER and soft Q-learning."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp

from jaxrl_post import advantages
from jaxrl_post.losses import value_consistency
from jaxrl_post.methods import checks
from jaxrl_post.methods.policy_gradient import policy_metrics
from jaxrl_post.types import AggregationMode, Method, Metric, Rollouts, Stats, Targets, Term

Steps = Literal["single", "multi", "both"]


def _metrics(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Metric]:
    del rollouts
    return policy_metrics(stats, targets, clip_low=None, clip_high=None)


def rover(
    *,
    rho: float = 1.0,
    normalize_std: bool = False,
    next_value: bool = True,
    clip_eps: float | None = None,
    aggregation: AggregationMode = "token_mean",
    horizon: int | None = None,
) -> Method:
    r"""ROVER: log-ratios are regressed on the value of the uniform policy, whose softmax keeps every way to succeed.

    $$Q_t = \rho \log\frac{\pi(a_t|s_t)}{\pi_{old}(a_t|s_t)}, \qquad
    L = \mathrm{agg}\,\Big(Q_t - \mathrm{sg}\big[r - \bar r + \tfrac{1}{|V|}\textstyle\sum_v Q(s_{t+1}, v)\big]\Big)^2$$

    $\pi_{old}$ is the policy at the start of the step. The second term of the target is 0 in the first update on a
    batch: several epochs, or micro-steps on the same rollouts, bring it in.

    Args:
        rho: temperature: a unit of Q is `1 / rho` nats.
        normalize_std: divide the centred rewards by the group's standard deviation, as the authors do for mathematics.
        next_value: False leaves out the value of the next state.
        clip_eps: see `losses.rover`.
        aggregation: see `losses.aggregate`.
        horizon: fixed length for `aggregation="seq_mean_token_sum_norm"`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or a horizon that does not apply.

    Example:
        >>> sorted(rover().needs["policy"])
        ['logp', 'mean_logp']

    Reference: Random Policy Valuation is Enough for LLM Reasoning with Verifiable Rewards, arXiv 2509.24981.
    """
    checks.above("rho", rho, 0)
    checks.reduction(aggregation, horizon)
    if clip_eps is not None and not 0 < clip_eps < 1:
        raise ValueError(f"clip_eps must be between 0 and 1, got {clip_eps}")

    def targets(state, rollouts: Rollouts, stats: Stats, key) -> tuple[Targets, Any]:
        del key
        mask = rollouts.valid_mask
        centered = advantages.grpo(rollouts.reward, rollouts.valid, normalize_std=normalize_std)
        per_token = advantages.per_token(centered, mask)
        start = stats["policy"]
        return Targets(per_token, mask, start.logp, extras={"old_mean_logp": start.mean_logp}), state

    def loss(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        del rollouts
        policy, mask = stats["policy"], targets.mask
        target = value_consistency.rover_target(
            targets.advantages,
            policy.mean_logp,
            targets.extras["old_mean_logp"],
            mask,
            rho=rho,
            next_value=next_value,
        )
        value = value_consistency.rover(policy.logp, targets.old_logp, target, rho=rho, clip_eps=clip_eps)
        return {"rover": Term(value, mask, aggregation, horizon=horizon)}

    needs = {"policy": frozenset({"logp", "mean_logp"})}
    return Method(targets, loss, needs=needs, unit="sequence", metrics=_metrics, min_group=2)


def rlprompt(
    *,
    steps: Steps = "both",
    zscore: bool = True,
    reward_scale: float = 1.0,
) -> Method:
    r"""RLPrompt: on-policy soft Q-learning by path consistency, with rewards brought to one scale for each input.

    $$L = \mathrm{mean}_b \sum_t \tfrac12 \Big[\big(\log\pi_t - (r_t + \bar V_{t+1} - \bar V_t)\big)^2
    + \big(\textstyle\sum_{l \ge t} \log\pi_l - (r - \bar V_t)\big)^2\Big]$$

    $\bar V$ is the logsumexp of the logits of the role `target`, a slow average of the policy: refresh it every step
    with a `mix` of 0.001. At the optimum the policy draws in proportion to $e^r$.

    Args:
        steps: `"single"` or `"multi"` for one of the two squares alone, `"both"` for their mean.
        zscore: bring the rewards of each prompt to zero mean and unit spread (`rewards.zscore_by_input`).
        reward_scale: nats per unit of the reward, after that.

    Returns:
        A `Method` that reads the role `target`.

    Raises:
        ValueError: for a keyword out of its range.

    Example:
        >>> sorted(rlprompt().needs["target"])
        ['logsumexp']

    Reference: RLPrompt: Optimizing Discrete Text Prompts with Reinforcement Learning, arXiv 2205.12548.
    """
    checks.one_of("steps", steps, Steps)
    checks.above("reward_scale", reward_scale, 0)

    def targets(state, rollouts: Rollouts, stats: Stats, key) -> tuple[Targets, Any]:
        del key, stats
        mask, reward = rollouts.valid_mask, rollouts.reward
        if zscore:
            reward = advantages.grpo(reward, rollouts.valid, ddof=0, eps=1e-4)
        on_tokens = advantages.on_last_token(reward_scale * reward, mask)
        return Targets(on_tokens, mask, rollouts.logp), state

    def loss(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        del rollouts
        given = stats["policy"].logp, stats["target"].logsumexp, targets.advantages, targets.mask
        value = jnp.zeros(targets.mask.shape)
        if steps != "multi":
            value = value + value_consistency.soft_q_single_step(*given)
        if steps != "single":
            value = value + value_consistency.soft_q_multi_step(*given)
        value = value / 2 if steps == "both" else value
        return {"soft_q": Term(value, targets.mask, "seq_mean_token_sum")}

    needs = {"policy": frozenset({"logp"}), "target": frozenset({"logsumexp"})}
    return Method(targets, loss, needs=needs, unit="sequence", metrics=_metrics, min_group=2 if zscore else 1)

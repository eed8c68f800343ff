"""Learning from given completions."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from jaxrl_post import losses, masked
from jaxrl_post.methods import checks
from jaxrl_post.types import AggregationMode, Array, Method, Metric, Rollouts, Stats, Targets, Term

Level = Literal["sequence", "token"]


def sft(*, aggregation: AggregationMode = "token_mean", horizon: int | None = None) -> Method:
    r"""Supervised fine-tuning: the negative log-likelihood of the completion tokens.

    $$L = -\frac{1}{\sum m} \sum_{b,t} m_{b,t} \log \pi(y_{b,t} | y_{b,<t})$$

    Args:
        aggregation: how tokens are reduced, see `losses.aggregate`.
        horizon: fixed length for `aggregation="seq_mean_token_sum_norm"`.

    Returns:
        A `Method` that reads `logp` of the policy and of the rollouts only `tokens`, `mask` and `valid`.

    Raises:
        ValueError: for a horizon that does not apply.

    Example:
        >>> sorted(sft().needs["policy"])
        ['logp']
    """

    checks.reduction(aggregation, horizon)

    def targets(state, rollouts: Rollouts, stats: Stats, key) -> tuple[Targets, tuple[()]]:
        del stats, key
        mask = rollouts.valid_mask
        return Targets(advantages=mask, mask=mask, old_logp=rollouts.logp), state

    def loss(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        del rollouts
        return {"nll": Term(losses.nll(stats["policy"].logp), targets.mask, aggregation, horizon=horizon)}

    return Method(targets, loss, needs={"policy": frozenset({"logp"})}, learns_from="completions")


def f_sft(*, generator: losses.Generator = "chi2", beta: float = 0.1, level: Level = "sequence") -> Method:
    r"""Fine-tuning on given completions that holds to the reference: an f-divergence in place of the log-likelihood.

    $$L = -\mathrm{mean}\; \phi(r), \qquad r = \beta \log\frac{\pi}{\pi_{ref}}$$

    Where the policy is well above the reference on a completion, its likelihood weighs less. It is meant to come before
    `dpo`, which then sets out from a policy that has not gone as far; the paper's other remedy is a tenth of the
    learning rate.

    Args:
        generator: $\phi$ by the name of its divergence, see `losses.f_sft`; `"total_variation"` is `sft`, times `beta`.
        beta: scale of the implicit reward.
        level: whether $r$ is of whole completions, or of each token.

    Returns:
        A `Method` that learns from completions and reads the roles `policy` and `reference`.

    Raises:
        ValueError: for a keyword out of its range.

    Example:
        >>> sorted(f_sft().needs)
        ['policy', 'reference']

    Reference: Implicit Reward as the Bridge: A Unified View of SFT and DPO Connections (arXiv 2507.00018).
    """
    checks.one_of("generator", generator, losses.Generator)
    checks.one_of("level", level, Level)
    checks.above("beta", beta, 0)

    def targets(state, rollouts: Rollouts, stats: Stats, key) -> tuple[Targets, tuple[()]]:
        del stats, key
        mask = rollouts.valid_mask
        return Targets(advantages=mask, mask=mask, old_logp=rollouts.logp), state

    def rewards(stats: Stats, targets: Targets) -> tuple[Array, Array]:
        """Implicit rewards and where they count, `[B]` or `[B, T]`."""
        policy, reference, mask = stats["policy"].logp, stats["reference"].logp, targets.mask
        if level == "token":
            return losses.implicit_reward(policy, reference, beta=beta), mask
        whole = (masked.sum(x, mask, 1) for x in (policy, reference))
        return losses.implicit_reward(*whole, beta=beta), jnp.max(mask, axis=1)

    def loss(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        del rollouts
        reward, mask = rewards(stats, targets)
        return {"f_sft": Term(losses.f_sft(reward, generator), mask, "token_mean")}

    def metrics(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Metric]:
        del rollouts
        return {
            "nll": Metric.mean(losses.nll(stats["policy"].logp), targets.mask),
            "rewards/chosen": Metric.mean(*rewards(stats, targets)),
        }

    logp = frozenset({"logp"})
    return Method(targets, loss, needs={"policy": logp, "reference": logp}, metrics=metrics, learns_from="completions")

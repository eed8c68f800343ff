"""Learning from given completions."""

from __future__ import annotations

from jaxrl_post import losses
from jaxrl_post.methods import checks
from jaxrl_post.types import AggregationMode, Method, Rollouts, Stats, Targets, Term


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

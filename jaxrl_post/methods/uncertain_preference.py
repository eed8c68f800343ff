"""Pairs whose labels are not all to be trusted alike."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post import losses, masked
from jaxrl_post.methods import checks
from jaxrl_post.methods.preference import by_pair, from_pairs, log_ratio_pairs, pair_mask
from jaxrl_post.types import Method, Rollouts, Stats, Targets, Term

UNCERTAINTY, SCORE = "uncertainty", "chosen_score"


def upo(
    *,
    beta: float = 0.1,
    mu: float = 1.0,
    rule: losses.SmoothingRule = "information_gain",
    nll_weight: float = 0.0,
) -> Method:
    r"""UPO: DPO whose pairs weigh less, and whose labels are smoothed more, the less certain a judge is of them.

    $$L = \sum_j P_j \big[-(1 - \epsilon_j) \log\sigma(\beta h_j) - \epsilon_j \log\sigma(-\beta h_j)\big]
    - \lambda \sum_j P_j \frac{\log\pi(y_{c,j})}{|r_j|}$$

    where the paper draws pairs with probability $P_j$.

    Args:
        beta: inverse temperature of the implicit reward.
        mu: $\mu$ of $P_j \propto (1 - B_j)^\mu$.
        rule: of $\epsilon_j$, see `losses.uncertain_smoothing`.
        nll_weight: $\lambda$; above 0 it reads the column `chosen_score`, a reward $r$ of the chosen answer.

    Returns:
        A `Method` on groups of two, whose smallest unit is the group. It reads the data's column `uncertainty`: $B$ of
        `losses.information_gain`, nats.

    Raises:
        ValueError: for a keyword out of its range.

    Example:
        >>> sorted(upo().wants), sorted(upo().needs)
        (['uncertainty'], ['policy', 'reference'])

    Reference: Self-Evolutionary Large Language Models through Uncertainty-Enhanced Preference Optimization
    (arXiv 2409.11212).
    """
    checks.above("beta", beta, 0)
    checks.within("mu", mu, 0)
    checks.one_of("rule", rule, losses.SmoothingRule)
    checks.within("nll_weight", nll_weight, 0)

    base = from_pairs(log_ratio_pairs("dpo", beta=beta))

    def targets(state, rollouts: Rollouts, stats: Stats, key) -> tuple[Targets, tuple[()]]:
        found, state = base.targets(state, rollouts, stats, key)
        doubt, both = rollouts.extras[UNCERTAINTY], pair_mask(rollouts)
        extras = {
            "certainty": losses.certainty(doubt, both, mu=mu),
            "smoothing": losses.uncertain_smoothing(doubt, both, rule=rule, mu=mu),
        }
        return found._replace(extras=extras), state

    def loss(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        logps = (masked.sum(stats[role].logp, targets.mask, 1) for role in ("policy", "reference"))
        chosen, *others = (x for logp in logps for x in by_pair(logp, rollouts))
        weights, smoothing = targets.extras["certainty"], targets.extras["smoothing"]
        value = losses.dpo(chosen, *others, beta=beta, label_smoothing=smoothing)
        terms = {"upo": Term(value, weights, "token_mean")}
        if nll_weight:
            value = losses.nll(chosen) / jnp.maximum(jnp.abs(rollouts.extras[SCORE]), 1e-6)
            terms["nll"] = Term(value, weights, "token_mean", weight=nll_weight)
        return terms

    wants = frozenset({UNCERTAINTY, SCORE} if nll_weight else {UNCERTAINTY})
    return base._replace(targets=targets, loss=loss, wants=wants)

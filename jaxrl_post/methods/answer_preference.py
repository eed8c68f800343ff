"""Methods that learn from answers of which each is labelled good or bad by itself."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post import losses, masked
from jaxrl_post.methods import checks
from jaxrl_post.methods.probing import exchange_completions
from jaxrl_post.types import Array, Method, Metric, Rollouts, Stats, Targets, Term

LABEL = "label"
"""The column of the data, and in `Rollouts.extras` `[P]`, that is above 0 where the answer is good."""


def kto(*, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Method:
    r"""Kahneman-Tversky optimisation: answers that are labelled good or bad, without pairs.

    $$L = \lambda_D (1 - \sigma(\beta (h - z_0))) \text{ or } \lambda_U (1 - \sigma(\beta (z_0 - h))), \qquad
    h = \log\pi - \log\pi_{ref}, \quad z_0 = \max(0, \text{mean } h \text{ of other prompts' answers})$$

    Args:
        beta: inverse temperature of the implicit reward.
        desirable_weight: $\lambda_D$, of the good answers. With $n_D$ good and $n_U$ bad ones in the data, $\lambda_D
            n_D / (\lambda_U n_U)$ is to be between 1 and 4/3.
        undesirable_weight: $\lambda_U$, of the bad ones.

    Returns:
        A `Method` on groups of one, batches of two at least, that reads the column `label` of the data. Each prompt is
        scored once more, with the answer of the next one of the batch, under `policy` and `reference`, as TRL does.

    Raises:
        ValueError: for a keyword out of its range.

    Example:
        >>> sorted(kto().needs), sorted(kto().wants)
        (['policy', 'probe/policy', 'probe/reference', 'reference'], ['label'])

    Reference: KTO: Model Alignment as Prospect Theoretic Optimization (arXiv 2402.01306).
    """
    checks.above("beta", beta, 0)
    checks.within("desirable_weight", desirable_weight, 0)
    checks.within("undesirable_weight", undesirable_weight, 0)
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}

    def probes(rollouts: Rollouts) -> dict[str, tuple[Rollouts, str]]:
        other = exchange_completions(rollouts)
        return {role: (other, role) for role in ("policy", "reference")}

    def targets(state, rollouts: Rollouts, stats: Stats, key) -> tuple[Targets, tuple[()]]:
        del key
        mask = rollouts.valid_mask
        other = exchange_completions(rollouts)
        logp, ref_logp = (masked.sum(stats[f"probe/{role}"].logp, other.mask, 1) for role in ("policy", "reference"))
        anchor = losses.kto_anchor(logp, ref_logp, other.valid.reshape(-1))
        return Targets(advantages=mask, mask=mask, old_logp=rollouts.logp, extras={"anchor": anchor}), state

    def log_probs(stats: Stats, targets: Targets) -> tuple[Array, Array]:
        logp, ref_logp = (masked.sum(stats[role].logp, targets.mask, 1) for role in ("policy", "reference"))
        return logp, ref_logp

    def loss(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        anchor = targets.extras["anchor"]
        value = losses.kto(*log_probs(stats, targets), rollouts.extras[LABEL], anchor=anchor, beta=beta, **weights)
        return {"kto": Term(value, rollouts.valid.reshape(-1).astype(value.dtype), "token_mean")}

    def metrics(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Metric]:
        logp, ref_logp = log_probs(stats, targets)
        reward = beta * (logp - ref_logp)
        there = rollouts.valid.reshape(-1).astype(reward.dtype)
        good = (rollouts.extras[LABEL] > 0) * there
        found = {"kl": Metric.mean(jnp.broadcast_to(targets.extras["anchor"], reward.shape), there)}
        for name, mask in (("chosen", good), ("rejected", there - good)):
            found |= {f"rewards/{name}": Metric.mean(reward, mask), f"logps/{name}": Metric.mean(logp, mask)}
        return found

    fields = frozenset({"logp"})
    return Method(
        targets,
        loss,
        needs=dict.fromkeys(("policy", "reference", "probe/policy", "probe/reference"), fields),
        probes=probes,
        metrics=metrics,
        learns_from="completions",
        wants=frozenset({LABEL}),
    )

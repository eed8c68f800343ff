"""Methods that learn from pairs: a group of two, column 0 chosen, column 1 rejected."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post import losses
from jaxrl_post.methods import checks
from jaxrl_post.types import Array, Method, Metric, Rollouts, Stats, Targets, Term


def sequence_logp(logp: Array, mask: Array, rollouts: Rollouts) -> tuple[Array, Array]:
    """Log-probs of the chosen and the rejected sequences, each `[P]`, from `[B, T]` log-probs of tokens."""
    if rollouts.group_size != 2:
        raise ValueError(f"a preference pair is a group of two, got groups of {rollouts.group_size}")
    summed = jnp.sum(jnp.where(mask > 0, logp * mask, 0.0), axis=-1).reshape(-1, 2)
    return summed[:, 0], summed[:, 1]


def dpo(*, beta: float = 0.1, label_smoothing: float = 0.0) -> Method:
    r"""Direct preference optimisation.

    $$L = -\log \sigma(\beta [(\log\pi_c - \log\pi^{ref}_c) - (\log\pi_r - \log\pi^{ref}_r)])$$

    Args:
        beta: inverse temperature of the implicit reward.
        label_smoothing: assumed probability that a label is flipped.

    Returns:
        A `Method` on groups of two, whose smallest unit is the group.

    Raises:
        ValueError: for a keyword out of its range.

    Example:
        >>> dpo().unit
        'group'

    Reference:
        Direct Preference Optimization: Your Language Model is Secretly a Reward Model, arXiv 2305.18290.
    """

    checks.within("beta", beta, 0)
    checks.within("label_smoothing", label_smoothing, 0, 0.5)

    def pairs(stats: Stats, rollouts: Rollouts, targets: Targets) -> tuple[Array, Array, Array, Array]:
        policy = sequence_logp(stats["policy"].logp, targets.mask, rollouts)
        return (*policy, *sequence_logp(stats["reference"].logp, targets.mask, rollouts))

    def pair_mask(rollouts: Rollouts) -> Array:
        return jnp.all(rollouts.valid, axis=1).astype(jnp.float32)

    def targets(state, rollouts: Rollouts, stats: Stats, key) -> tuple[Targets, tuple[()]]:
        del stats, key
        mask = rollouts.valid_mask
        return Targets(advantages=mask, mask=mask, old_logp=rollouts.logp), state

    def loss(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        value = losses.dpo(*pairs(stats, rollouts, targets), beta=beta, label_smoothing=label_smoothing)
        return {"dpo": Term(value, pair_mask(rollouts), "token_mean")}

    def metrics(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Metric]:
        chosen, rejected, ref_chosen, ref_rejected = pairs(stats, rollouts, targets)
        won, lost, mask = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected), pair_mask(rollouts)
        return {
            "rewards/chosen": Metric.mean(won, mask),
            "rewards/rejected": Metric.mean(lost, mask),
            "rewards/margins": Metric.mean(won - lost, mask),
            "rewards/accuracies": Metric.mean((won > lost).astype(jnp.float32), mask),
            "logps/chosen": Metric.mean(chosen, mask),
            "logps/rejected": Metric.mean(rejected, mask),
        }

    logp = frozenset({"logp"})
    needs = {"policy": logp, "reference": logp}
    return Method(targets, loss, needs=needs, unit="group", metrics=metrics, learns_from="pairs", min_group=2)

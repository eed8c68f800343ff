"""Methods that learn from pairs: a group of two, column 0 chosen, column 1 rejected."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from jaxrl_post import losses, masked
from jaxrl_post.methods import checks
from jaxrl_post.types import Array, Method, Metric, Rollouts, Stats, Targets, Term


class PairLoss(NamedTuple):
    """A loss on pairs, and the rewards that it implies.

    Attributes:
        name: of the loss's term.
        rewards: `(stats, rollouts, mask) -> (chosen [P], rejected [P])`: implicit rewards.
        loss: `(stats, rollouts, mask) -> [P]`.
        margin: what the rewards of a pair are to differ by before the loss falls below log 2.
        needs: fields that are read of each role.
    """

    name: str
    rewards: Callable[[Stats, Rollouts, Array], tuple[Array, Array]]
    loss: Callable[[Stats, Rollouts, Array], Array]
    margin: float
    needs: dict[str, frozenset[str]]


def by_pair(x: Array, rollouts: Rollouts) -> tuple[Array, Array]:
    """What the chosen and the rejected sequences have, each `[P]`, from `[B]`."""
    if rollouts.group_size != 2:
        raise ValueError(f"a preference pair is a group of two, got groups of {rollouts.group_size}")
    x = x.reshape(-1, 2)
    return x[:, 0], x[:, 1]


def pair_mask(rollouts: Rollouts) -> Array:
    """`[P]`: 1 where both sequences are valid."""
    return jnp.all(rollouts.valid, axis=1).astype(jnp.float32)


def from_pairs(kind: PairLoss) -> Method:
    """A method that minimises a loss on pairs."""

    def targets(state, rollouts: Rollouts, stats: Stats, key) -> tuple[Targets, tuple[()]]:
        del stats, key
        mask = rollouts.valid_mask
        return Targets(advantages=mask, mask=mask, old_logp=rollouts.logp), state

    def loss(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        value = kind.loss(stats, rollouts, targets.mask)
        return {kind.name: Term(value, pair_mask(rollouts), "token_mean")}

    def metrics(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Metric]:
        won, lost = kind.rewards(stats, rollouts, targets.mask)
        chosen, rejected = by_pair(masked.sum(stats["policy"].logp, targets.mask, 1), rollouts)
        mask = pair_mask(rollouts)
        return {
            "rewards/chosen": Metric.mean(won, mask),
            "rewards/rejected": Metric.mean(lost, mask),
            "rewards/margins": Metric.mean(won - lost, mask),
            "rewards/accuracies": Metric.mean((won > lost).astype(jnp.float32), mask),
            "logps/chosen": Metric.mean(chosen, mask),
            "logps/rejected": Metric.mean(rejected, mask),
        }

    return Method(targets, loss, needs=kind.needs, unit="group", metrics=metrics, learns_from="pairs", min_group=2)


def dpo_pairs(*, beta: float, label_smoothing: float = 0.0) -> PairLoss:
    """`losses.dpo` of the policy and the reference."""
    checks.above("beta", beta, 0)
    checks.within("label_smoothing", label_smoothing, 0, 0.5)

    def log_probs(stats: Stats, rollouts: Rollouts, mask: Array) -> tuple[Array, Array, Array, Array]:
        policy, reference = (masked.sum(stats[role].logp, mask, 1) for role in ("policy", "reference"))
        return (*by_pair(policy, rollouts), *by_pair(reference, rollouts))

    def rewards(stats: Stats, rollouts: Rollouts, mask: Array) -> tuple[Array, Array]:
        chosen, rejected, ref_chosen, ref_rejected = log_probs(stats, rollouts, mask)
        return beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)

    def loss(stats: Stats, rollouts: Rollouts, mask: Array) -> Array:
        return losses.dpo(*log_probs(stats, rollouts, mask), beta=beta, label_smoothing=label_smoothing)

    logp = frozenset({"logp"})
    return PairLoss("dpo", rewards, loss, 0.0, {"policy": logp, "reference": logp})


def simpo_pairs(*, beta: float, gamma: float) -> PairLoss:
    """`losses.simpo` of the policy."""
    checks.above("beta", beta, 0)
    checks.within("gamma", gamma, 0)

    def log_probs(stats: Stats, rollouts: Rollouts, mask: Array) -> tuple[Array, Array]:
        return by_pair(masked.mean(stats["policy"].logp, mask, 1), rollouts)

    def rewards(stats: Stats, rollouts: Rollouts, mask: Array) -> tuple[Array, Array]:
        chosen, rejected = log_probs(stats, rollouts, mask)
        return beta * chosen, beta * rejected

    def loss(stats: Stats, rollouts: Rollouts, mask: Array) -> Array:
        return losses.simpo(*log_probs(stats, rollouts, mask), beta=beta, gamma=gamma)

    return PairLoss("simpo", rewards, loss, gamma, {"policy": frozenset({"logp"})})


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
    return from_pairs(dpo_pairs(beta=beta, label_smoothing=label_smoothing))


def simpo(*, beta: float = 2.0, gamma: float = 1.0) -> Method:
    r"""SimPO: the mean log-prob of a token is the reward, no reference is read, and the margin has a target.

    $$L = -\log\sigma\Big(\frac{\beta}{|y_c|} \log\pi_c - \frac{\beta}{|y_r|} \log\pi_r - \gamma\Big)$$

    Args:
        beta: scale of the reward.
        gamma: $\gamma$, the target of the margin.

    Returns:
        A `Method` on groups of two, whose smallest unit is the group.

    Raises:
        ValueError: for a keyword out of its range.

    Example:
        >>> sorted(simpo().needs)
        ['policy']

    Reference: SimPO: Simple Preference Optimization with a Reference-Free Reward (arXiv 2405.14734).
    """
    return from_pairs(simpo_pairs(beta=beta, gamma=gamma))

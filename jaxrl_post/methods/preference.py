"""Methods that learn from pairs: a group of two, column 0 chosen, column 1 rejected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax.numpy as jnp

from jaxrl_post import losses, masked
from jaxrl_post.methods import checks
from jaxrl_post.types import AggregationMode, Array, Method, Metric, Rollouts, Stats, Targets, Term

PairLossName: TypeAlias = Literal[
    "dpo",
    "robust_dpo",
    "ipo",
    "hinge",
    "exo",
    "discopop",
    "nca",
    "bco",
    "sppo",
    "apo_zero",
    "apo_down",
    "aot",
    "aot_unpaired",
]
"""Losses on the log-ratios of pairs, by their names in `losses`."""

_SMOOTHING = {"dpo": 0.0, "robust_dpo": 0.1, "exo": 1e-3, "aot": 0.0, "aot_unpaired": 0.0}
"""Those that know of flipped labels, with the share that they assume."""


class PairLoss(NamedTuple):
    """A loss on pairs, and the rewards that it implies.

    Attributes:
        name: of the loss's term.
        rewards: `(stats, rollouts, mask) -> (chosen [P], rejected [P])`: implicit rewards.
        loss: `(stats, rollouts, mask) -> [P]`.
        margin: what the rewards of a pair are to differ by before the loss falls below log 2.
        needs: fields that are read of each role.
        ranked: whether the loss compares the pairs of a batch, and gives values in the order of their ranks.
    """

    name: str
    rewards: Callable[[Stats, Rollouts, Array], tuple[Array, Array]]
    loss: Callable[[Stats, Rollouts, Array], Array]
    margin: float
    needs: Mapping[str, frozenset[str]]
    ranked: bool = False


def by_pair(x: Array, rollouts: Rollouts) -> tuple[Array, Array]:
    """What the chosen and the rejected sequences have, each `[P]`, from `[B]`."""
    if rollouts.group_size != 2:
        raise ValueError(f"a preference pair is a group of two, got groups of {rollouts.group_size}")
    x = x.reshape(-1, 2)
    return x[:, 0], x[:, 1]


def pair_mask(rollouts: Rollouts) -> Array:
    """`[P]`: 1 where both sequences are valid."""
    return jnp.all(rollouts.valid, axis=1).astype(jnp.float32)


def from_pairs(
    *kinds: PairLoss,
    weights: tuple[float, ...] = (),
    nll_weight: float = 0.0,
    nll_aggregation: AggregationMode = "token_mean",
) -> Method:
    """A method that minimises losses on pairs, each with its weight, and if asked that of the chosen answers' tokens.

    Metrics are of the first loss's rewards.
    """
    checks.within("nll_weight", nll_weight, 0)
    checks.reduction(nll_aggregation, None)
    first = kinds[0]

    def targets(state, rollouts: Rollouts, stats: Stats, key) -> tuple[Targets, tuple[()]]:
        del stats, key
        mask = rollouts.valid_mask
        return Targets(advantages=mask, mask=mask, old_logp=rollouts.logp), state

    def loss(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        both = pair_mask(rollouts)
        ranks = (jnp.arange(len(both)) < jnp.sum(both)).astype(both.dtype)
        terms = {
            kind.name: Term(
                kind.loss(stats, rollouts, targets.mask), ranks if kind.ranked else both, "token_mean", weight=weight
            )
            for kind, weight in zip(kinds, weights or (1.0,) * len(kinds), strict=True)
        }
        if nll_weight:
            chosen = jnp.stack([both, jnp.zeros_like(both)], axis=1).reshape(-1, 1) * targets.mask
            terms["nll"] = Term(losses.nll(stats["policy"].logp), chosen, nll_aggregation, weight=nll_weight)
        return terms

    def metrics(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Metric]:
        won, lost = first.rewards(stats, rollouts, targets.mask)
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

    needs = {role: fields for kind in kinds for role, fields in kind.needs.items()}
    unit = "batch" if any(kind.ranked for kind in kinds) else "group"
    return Method(targets, loss, needs=needs, unit=unit, metrics=metrics, learns_from="pairs", min_group=2)


def log_ratio_pairs(
    name: PairLossName,
    *,
    beta: float,
    label_smoothing: float | None = None,
    length_normalized: bool | None = None,
) -> PairLoss:
    """The loss of that name of the policy and the reference.

    Args:
        name: of the loss.
        beta: its scale of the implicit reward.
        label_smoothing: share of flipped labels; None for the loss's own, or where it knows none.
        length_normalized: whether log-probs are averaged over tokens, and not summed; None for `name == "ipo"`.
    """
    checks.one_of("loss", name, PairLossName)
    checks.above("beta", beta, 0)
    checks.applies(name in _SMOOTHING, f"loss={name!r}", label_smoothing=label_smoothing)
    over_tokens = masked.mean if (name == "ipo" if length_normalized is None else length_normalized) else masked.sum
    options: dict[str, Any] = {"beta": beta}
    if name in _SMOOTHING:
        options["label_smoothing"] = _SMOOTHING[name] if label_smoothing is None else label_smoothing
        checks.within("label_smoothing", options["label_smoothing"], 0, 0.5)
    if name == "aot_unpaired":
        options["paired"] = False
    ranked = name.startswith("aot")
    function: Callable[..., Array] = getattr(losses, "aot" if ranked else name)

    def log_probs(stats: Stats, rollouts: Rollouts, mask: Array) -> tuple[Array, Array, Array, Array]:
        policy, reference = (over_tokens(stats[role].logp, mask, 1) for role in ("policy", "reference"))
        return (*by_pair(policy, rollouts), *by_pair(reference, rollouts))

    def rewards(stats: Stats, rollouts: Rollouts, mask: Array) -> tuple[Array, Array]:
        chosen, rejected, ref_chosen, ref_rejected = log_probs(stats, rollouts, mask)
        return beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)

    def loss(stats: Stats, rollouts: Rollouts, mask: Array) -> Array:
        of_ranks = {"valid": pair_mask(rollouts)} if ranked else {}
        return function(*log_probs(stats, rollouts, mask), **options, **of_ranks)

    logp = frozenset({"logp"})
    return PairLoss(name, rewards, loss, 0.0, {"policy": logp, "reference": logp}, ranked)


def reference_free_pairs(
    name: str, loss: Callable[[Array, Array], Array], *, beta: float, margin: float = 0.0, mean: bool = True
) -> PairLoss:
    """A loss on the log-probs of the policy alone, `(chosen [P], rejected [P]) -> [P]`.

    Args:
        name: of the loss's term.
        loss: of log-probs that are averaged over tokens, or summed.
        beta: scale of the reward.
        margin: as in `PairLoss`.
        mean: which of the two.
    """
    over_tokens = masked.mean if mean else masked.sum

    def log_probs(stats: Stats, rollouts: Rollouts, mask: Array) -> tuple[Array, Array]:
        return by_pair(over_tokens(stats["policy"].logp, mask, 1), rollouts)

    def rewards(stats: Stats, rollouts: Rollouts, mask: Array) -> tuple[Array, Array]:
        chosen, rejected = log_probs(stats, rollouts, mask)
        return beta * chosen, beta * rejected

    def of_pairs(stats: Stats, rollouts: Rollouts, mask: Array) -> Array:
        return loss(*log_probs(stats, rollouts, mask))

    return PairLoss(name, rewards, of_pairs, margin, {"policy": frozenset({"logp"})})


def simpo_pairs(*, beta: float, gamma: float) -> PairLoss:
    """`losses.simpo` of the policy."""
    checks.above("beta", beta, 0)
    checks.within("gamma", gamma, 0)

    def loss(chosen: Array, rejected: Array) -> Array:
        return losses.simpo(chosen, rejected, beta=beta, gamma=gamma)

    return reference_free_pairs("simpo", loss, beta=beta, margin=gamma)


def dpo(
    *,
    beta: float = 0.1,
    label_smoothing: float | None = None,
    loss: PairLossName | Mapping[PairLossName, float] = "dpo",
    length_normalized: bool | None = None,
    nll_weight: float = 0.0,
    nll_aggregation: AggregationMode = "token_mean",
) -> Method:
    r"""Direct preference optimisation, and the losses that have taken the place of its logistic one.

    $$L = -\log \sigma(\beta [(\log\pi_c - \log\pi^{ref}_c) - (\log\pi_r - \log\pi^{ref}_r)]) - w \log\pi_c$$

    Args:
        beta: inverse temperature of the implicit reward.
        label_smoothing: assumed probability that a label is flipped; None for the loss's own: 0, or 0.1 of
            `robust_dpo` and 0.001 of `exo`. Of the others it is an error.
        loss: which of `losses`, or several with their weights: `{dpo: 0.8, bco: 0.2}`. The `aot` losses compare all
            pairs of a batch, which is then their smallest unit.
        length_normalized: whether log-probs of sequences are means over their tokens, and not sums; None for means with
            `ipo` only, as TRL has it.
        nll_weight: `w`, weight of the chosen answers' negative log-likelihood.
        nll_aggregation: how its tokens are reduced, see `losses.aggregate`.

    Returns:
        A `Method` on groups of two, whose smallest unit is the group.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> dpo().unit, dpo(loss="aot").unit
        ('group', 'batch')

    Reference:
        Direct Preference Optimization: Your Language Model is Secretly a Reward Model, arXiv 2305.18290; those of the
        other losses stand with them.
    """
    weights: dict[PairLossName, float] = {loss: 1.0} if isinstance(loss, str) else dict(loss)
    if not weights:
        raise ValueError(f"loss must name one at least of {', '.join(get_args(PairLossName))}")
    for name, weight in weights.items():
        checks.within(f"the weight of {name}", weight, 0)
    knows = [name for name in weights if name in _SMOOTHING]
    checks.applies(bool(knows), f"loss={loss!r}", label_smoothing=label_smoothing)
    kinds = [
        log_ratio_pairs(
            name,
            beta=beta,
            label_smoothing=label_smoothing if name in knows else None,
            length_normalized=length_normalized,
        )
        for name in weights
    ]
    return from_pairs(*kinds, weights=tuple(weights.values()), nll_weight=nll_weight, nll_aggregation=nll_aggregation)


def rpo(*, beta: float = 0.05, eta: float = 0.005) -> Method:
    r"""RPO: DPO whose chosen answers must not become unlikely, a regulariser against over-optimisation.

    $$L = L_{DPO} - \eta \beta \log\pi_c$$

    Args:
        beta: inverse temperature of the implicit reward.
        eta: $\eta$, weight of the log-likelihood of the chosen answer, summed over tokens; 0 gives DPO.

    Returns:
        A `Method` on groups of two, whose smallest unit is the group.

    Raises:
        ValueError: for a keyword out of its range.

    Example:
        >>> sorted(rpo().needs)
        ['policy', 'reference']

    Reference: Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an Adversarial Regularizer
    (arXiv 2405.16436). With the mean over tokens, as others have it, it is `dpo(nll_weight=...)`.
    """
    checks.within("eta", eta, 0)
    return dpo(beta=beta, nll_weight=eta * beta, nll_aggregation="seq_mean_token_sum")


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


def orpo(*, beta: float = 0.1) -> Method:
    r"""ORPO: the likelihood of the chosen answers and their odds ratio over the rejected ones, in one stage.

    $$L = -\log P_c - \beta \log\sigma\Big(\log\frac{P_c}{1 - P_c} - \log\frac{P_r}{1 - P_r}\Big), \qquad
    \log P = \frac{1}{|y|} \log\pi$$

    Args:
        beta: $\lambda$ of the paper, weight of the odds ratio.

    Returns:
        A `Method` on groups of two, whose smallest unit is the group. No reference is read.

    Raises:
        ValueError: for a keyword out of its range.

    Example:
        >>> sorted(orpo().needs)
        ['policy']

    Reference: ORPO: Monolithic Preference Optimization without Reference Model (arXiv 2403.07691).
    """
    checks.within("beta", beta, 0)

    def loss(chosen: Array, rejected: Array) -> Array:
        return losses.orpo(chosen, rejected, beta=beta)

    return from_pairs(reference_free_pairs("orpo", loss, beta=beta))


def cpo(
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    nll_weight: float = 1.0,
    nll_aggregation: AggregationMode = "token_mean",
) -> Method:
    r"""CPO: DPO with a uniform reference, which need not be read, and the likelihood of the chosen answers.

    $$L = -\log\sigma(\beta \log\pi_c - \beta \log\pi_r) - w \log\pi_c$$

    Args:
        beta: scale of the margin.
        label_smoothing: assumed probability that a label is flipped.
        nll_weight: `w`, weight of the chosen answers' negative log-likelihood.
        nll_aggregation: how its tokens are reduced; the mean is that of the authors' code, `"seq_mean_token_sum"` the
            paper's formula.

    Returns:
        A `Method` on groups of two, whose smallest unit is the group. No reference is read.

    Raises:
        ValueError: for a keyword out of its range.

    Example:
        >>> sorted(cpo().needs)
        ['policy']

    Reference: Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation
    (arXiv 2401.08417).
    """
    checks.above("beta", beta, 0)
    checks.within("label_smoothing", label_smoothing, 0, 0.5)

    def loss(chosen: Array, rejected: Array) -> Array:
        return losses.cpo(chosen, rejected, beta=beta, label_smoothing=label_smoothing, nll_weight=0.0)

    kind = reference_free_pairs("cpo", loss, beta=beta, mean=False)
    return from_pairs(kind, nll_weight=nll_weight, nll_aggregation=nll_aggregation)

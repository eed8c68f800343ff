"""Methods that raise one objective while others must keep what they have.

The objectives are components of the reward, as in `multi_objective`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Unpack

import jax.numpy as jnp

from jaxrl_post.losses.constrained import barrier_weights, ratio_barrier
from jaxrl_post.methods import checks
from jaxrl_post.methods.choices import Choice
from jaxrl_post.methods.credit import Advantage, Credit, Signals, as_advantage
from jaxrl_post.methods.multi_objective import distinct_names, objective_means, objective_rewards
from jaxrl_post.methods.policy_gradient import ClippedOptions, clipped, split_clipping
from jaxrl_post.types import Array, Method, Metric, Rollouts, Stats, Targets, Term

BarrierForm = Literal["returns", "ratio"]


class Start(NamedTuple):
    """State of `c_morl`.

    Attributes:
        returns: `[M]`, the objectives' means in the first batch, or those given.
        known: bool scalar, whether they are.
        inner: state of the advantage, by objective.
    """

    returns: Array
    known: Array
    inner: tuple[Any, ...]


def c_morl(
    *,
    objective: str,
    constraints: Sequence[str],
    keep: float = 0.9,
    t: float = 20.0,
    floor: float = 1e-3,
    start: Mapping[str, float] | None = None,
    barrier: BarrierForm = "returns",
    advantage: Choice | Advantage = "dr_grpo",
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""C-MORL's extension of a front: raise one objective, keep the others above a share of what they were.

    $$\max_\theta G_l + \frac{1}{t (m - 1)} \sum_{j \ne l} \log(G_j - \beta\, G_j^{start})$$

    Before it, policies are trained for fixed preferences; `curation.pareto` keeps the archive of what they reach and
    says from which points to go on (`pareto_insert`, `most_isolated`), each once for every objective.

    Args:
        objective: the component of the reward that is raised.
        constraints: the components that are held.
        keep: $\beta$, the share of its first value that each constraint must keep; values must be positive.
        t: sharpness of the barrier.
        floor: slack below which the barrier is linear.
        start: the constraints' values at the start; None takes the means of the first batch.
        barrier: `"returns"` is the gradient of the problem above: advantages of all objectives are added up with
            `losses.barrier_weights`. `"ratio"` is what the authors released (`losses.ratio_barrier`), whose expected
            gradient at the sampling policy is 0.
        advantage: of each objective by itself, linear in the reward; see `policy_gradient`.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`.

    Returns:
        A `Method` whose state holds the values at the start.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> c_morl(objective="accuracy", constraints=("brevity",)).min_group
        2

    Reference: C-MORL: Multi-Objective Reinforcement Learning through Efficient Discovery of Pareto Front,
    arXiv 2410.02236.
    """
    names = distinct_names((objective, *constraints))
    checks.within("keep", keep, 0, 1)
    for name, number in (("t", t), ("floor", floor)):
        if not number > 0:
            raise ValueError(f"{name} must be above 0, got {number}")
    checks.one_of("barrier", barrier, BarrierForm)
    if start is not None and set(start) != set(constraints):
        raise ValueError(f"start must give a value for each of {sorted(constraints)}, got {sorted(start)}")
    base = as_advantage(advantage)
    loss_choice, _ = split_clipping(options)
    count = len(names)

    def init(rollouts: Any, num_prompts: int) -> Start:
        own = tuple(base.init(rollouts, num_prompts) for _ in names)
        given = [0.0] * count if start is None else [0.0, *(float(start[name]) for name in names[1:])]
        return Start(jnp.array(given), jnp.array(start is not None), own)

    def credit(state: Start, s: Signals) -> tuple[Credit, Start]:
        means = objective_means(s.rollouts, names)
        begun = jnp.where(state.known, state.returns, means)
        found, own = [], []
        for reward, inner in zip(objective_rewards(s.rollouts, names), state.inner, strict=True):
            credit, inner = base.apply(inner, s.with_reward(reward))
            found.append(credit if isinstance(credit, Credit) else Credit(credit))
            own.append(inner)
        new = Start(begun, state.known | jnp.any(s.valid), tuple(own))
        if barrier == "ratio":
            held = {f"held/{name}": mean for name, mean in zip(names[1:], means[1:], strict=True)}
            return found[0]._replace(extras={**found[0].extras, **held}), new
        limits = jnp.append(-jnp.inf, keep * begun[1:])
        each = barrier_weights(means, limits, t=t, floor=floor)
        mixed = sum(each[i] * one.advantages for i, one in enumerate(found))
        slack = jnp.min((means - limits)[1:])
        return found[0]._replace(advantages=mixed, extras={**found[0].extras, "slack": slack}), new

    method = clipped(base._replace(apply=credit, init=init, penalized=False, contrasts=False), {}, options)
    inner_loss, inner_metrics = method.loss, method.metrics

    def loss(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        terms = inner_loss(stats, rollouts, targets)
        if barrier == "ratio":
            clip = {name: loss_choice[name] for name in ("clip_low", "clip_high") if name in loss_choice}
            held = jnp.stack([targets.extras[f"held/{name}"] for name in names[1:]])
            value = ratio_barrier(stats["policy"].logp, targets.old_logp, held, beta=keep, t=t, floor=floor, **clip)
            terms["barrier"] = terms["policy"]._replace(value=value, mask=targets.mask)
        return terms

    def metrics(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Metric]:
        found = {} if inner_metrics is None else inner_metrics(stats, rollouts, targets)
        if "slack" in targets.extras:
            found["constraint_slack"] = Metric.mean(targets.extras["slack"][None])
        return found

    return method._replace(loss=loss, metrics=metrics)

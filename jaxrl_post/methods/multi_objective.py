"""Methods for several rewards at once, whose weights follow what training does to each of them.

The objectives are components of the reward (`rollouts.rewards`, by name). Fronts and archives are in `curation.pareto`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.curation import pareto
from jaxrl_post.methods import checks
from jaxrl_post.methods.choices import Choice
from jaxrl_post.methods.credit import Advantage, Credit, Signals, as_advantage
from jaxrl_post.methods.policy_gradient import ClippedOptions, clipped
from jaxrl_post.types import Array, Method, Metric, Rollouts, Stats, Targets, Term


def objective_rewards(rollouts: Rollouts, names: Sequence[str]) -> list[Array]:
    """`[P, G]` for each name: components of the reward; those of tokens are summed over the sequence.

    Raises:
        ValueError: if there is no such component.
    """
    found = []
    for name in names:
        if name not in rollouts.rewards:
            have = ", ".join(sorted(rollouts.rewards)) or "none"
            raise ValueError(f"objectives: the reward has no component {name!r}; it has {have}")
        value = masked.as_float(rollouts.rewards[name])
        value = jnp.where(jnp.isnan(value), 0.0, value)
        if value.shape != rollouts.reward.shape:
            value = jnp.sum(jnp.where(rollouts.mask > 0, value, 0.0), axis=1).reshape(rollouts.reward.shape)
        found.append(value)
    return found


def objective_means(rollouts: Rollouts, names: Sequence[str]) -> Array:
    """`[M]`: the mean of each objective over the batch's valid sequences."""
    return jnp.stack([masked.mean(value, rollouts.valid) for value in objective_rewards(rollouts, names)])


def distinct_names(objectives: Sequence[str]) -> tuple[str, ...]:
    """The names of two or more components of the reward, or a ValueError."""
    names = tuple(objectives)
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"objectives must name two or more different components of the reward, got {list(names)}")
    return names


def _simplex(weights: Any, count: int) -> Array:
    """Weights `[M]` as float32; the mean of all objectives for None."""
    if weights is None:
        return jnp.full(count, 1.0 / count)
    weights = masked.as_float(weights)
    if weights.shape != (count,):
        raise ValueError(f"weights must hold a number for each of {count} objectives, got shape {weights.shape}")
    return weights


class Influence(NamedTuple):
    """State of `gradient_weighting`.

    Attributes:
        log_weights: `[M]`, logs of the objectives' weights.
        influence: `[M]`, inner products gathered since the weights moved last.
        count: int32 scalar, updates.
        inner: the surrogate's own state, by objective.
    """

    log_weights: Array
    influence: Array
    count: Array
    inner: dict[str, Any]


def gradient_weighting(
    *,
    objectives: Sequence[str],
    step_size: float = 0.1,
    window: int = 1,
    bounds: tuple[float, float] | None = None,
    weights: Sequence[float] | None = None,
    advantage: Choice | Advantage = "rloo",
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""Dynamic reward weighting by gradients: objectives whose gradient moves the others along gain weight.

    $$g_i = \nabla L(A_i), \quad I_i = \Big\langle g_i, \sum_j g_j \Big\rangle, \quad
    w \leftarrow \mathrm{softmax}(\log w + \eta\, \bar I), \quad g = \sum_i w_i g_i$$

    The new weights hold for the step whose gradients gave them. For advantages that are linear in the reward (`rloo`,
    `dr_grpo`, `reinforce`) at the start of a step, $\sum_i w_i g_i$ is the gradient of the weighted reward; with `grpo`
    each objective is divided by its own standard deviation first. The paper takes inner products over some layers to
    save memory; here they are over all trained parameters.

    Args:
        objectives: components of the reward.
        step_size: $\eta$; the paper's learning rate over its regularisation, 1e-6 / 1e-5.
        window: updates over which influences are averaged before the weights move.
        bounds: lower and upper bound of $\eta \bar I$; None for none.
        weights: the first weights, adding up to 1; None for equal ones.
        advantage: of each objective by itself; see `policy_gradient`.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`.

    Returns:
        A `Method` with a term and a backward pass for each objective.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> gradient_weighting(objectives=("accuracy", "format")).combine is not None
        True

    Reference: Learning to Optimize Multi-Objective Alignment Through Dynamic Reward Weighting, arXiv 2509.11452.
    """
    names = distinct_names(objectives)
    checks.within("step_size", step_size, 0)
    checks.within("window", window, 1)
    first = jnp.log(_simplex(weights, len(names)))
    inner = clipped(advantage, {}, options)

    def init(rollouts: Any, num_prompts: int) -> Influence:
        own = {name: inner.init(rollouts, num_prompts) for name in names}
        return Influence(first, jnp.zeros(len(names)), jnp.zeros((), jnp.int32), own)

    def targets(state: Influence, rollouts: Rollouts, stats: Stats, key: Array) -> tuple[Targets, Influence]:
        extras, own, made = {}, {}, {}
        for name, reward in zip(names, objective_rewards(rollouts, names), strict=True):
            made[name], own[name] = inner.targets(state.inner[name], rollouts.replace(reward=reward), stats, key)
            extras |= {f"{name}/advantages": made[name].advantages, f"{name}/mask": made[name].mask}
            extras |= {f"{name}/{extra}": value for extra, value in made[name].extras.items()}
        now = jnp.exp(state.log_weights)
        mixed = sum(now[i] * made[name].advantages for i, name in enumerate(names))
        anywhere = jnp.max(jnp.stack([made[name].mask for name in names]), axis=0)
        whole = Targets(mixed, anywhere, made[names[0]].old_logp, extras=extras)  # type: ignore[arg-type]
        return whole, state._replace(inner=own)

    def of_objective(targets: Targets, name: str) -> Targets:
        own = {key.removeprefix(f"{name}/"): x for key, x in targets.extras.items() if key.startswith(f"{name}/")}
        return Targets(own.pop("advantages"), own.pop("mask"), targets.old_logp, extras=own)

    def loss(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        terms: dict[str, Term] = {}
        for name in names:
            found = inner.loss(stats, rollouts, of_objective(targets, name))
            terms[f"objective/{name}"] = found.pop("policy")
            terms = {**found, **terms}  # the KL and entropy of all objectives are the same
        return terms

    def combine(state: Influence, gram: Array, terms: tuple[str, ...]) -> tuple[Array, Influence]:
        at = jnp.array([terms.index(f"objective/{name}") for name in names])
        total = state.influence + jnp.sum(gram[at][:, at], axis=1)
        count = state.count + 1
        push = step_size * total / window
        push = push if bounds is None else jnp.clip(push, *bounds)
        due = count % window == 0
        log_weights = jnp.where(due, jax.nn.log_softmax(state.log_weights + push), state.log_weights)
        every = jnp.ones(len(terms)).at[at].set(jnp.exp(log_weights))
        return every, state._replace(log_weights=log_weights, influence=jnp.where(due, 0.0, total), count=count)

    def metrics(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Metric]:
        found = {} if inner.metrics is None else inner.metrics(stats, rollouts, of_objective(targets, names[0]))
        means = zip(names, objective_rewards(rollouts, names), strict=True)
        valid = rollouts.valid.astype(jnp.float32)
        return found | {f"objective/{name}/mean": Metric.mean(value, valid) for name, value in means}

    return inner._replace(init=init, targets=targets, loss=loss, combine=combine, metrics=metrics)


class Progress(NamedTuple):
    """State of `hypervolume_weighting`.

    Attributes:
        archive: the objectives' means that added volume.
        count: int32 scalar, steps.
        inner: state of the advantage.
    """

    archive: pareto.ParetoArchive
    count: Array
    inner: Any


def hypervolume_weighting(
    *,
    objectives: Sequence[str],
    weights: Sequence[float] | None = None,
    reference: Sequence[float] | None = None,
    capacity: int = 64,
    floor: float = 0.5,
    gain: float = 1.5,
    advantage: Choice | Advantage = "rloo",
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""Dynamic reward weighting by hypervolume: steps that push the front outwards are rewarded more.

    $$r = m \sum_i w_i r_i, \quad m = 0.5 + 1.5 \tanh(\Delta HV(p)), \quad \Delta HV(p) = HV(A \cup p) - HV(A)$$

    `p` is what the policy reaches on every objective. The paper measures it on validation problems after each step;
    here it is the mean of the next step's own batch, which the same policy has sampled. Points that add volume are
    archived. The factor changes the size of a step, so it does nothing to advantages that are divided by a standard
    deviation: take `rloo`, `dr_grpo` or `reinforce`.

    Args:
        objectives: components of the reward, larger is better.
        weights: $w$; None for equal ones.
        reference: the corner from which volume is measured; None for zeros.
        capacity: points that the archive holds.
        floor: the factor where nothing is added.
        gain: the most that is added to it.
        advantage: of the weighted reward; see `policy_gradient`.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`.

    Returns:
        A `Method` with an archive in its state.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> hypervolume_weighting(objectives=("accuracy", "format")).min_group
        2

    Reference: Learning to Optimize Multi-Objective Alignment Through Dynamic Reward Weighting, arXiv 2509.11452.
    """
    names = distinct_names(objectives)
    checks.within("capacity", capacity, 1)
    checks.within("floor", floor, 0)
    checks.within("gain", gain, 0)
    fixed = _simplex(weights, len(names))
    corner = jnp.zeros(len(names)) if reference is None else masked.as_float(jnp.asarray(reference))
    if corner.shape != (len(names),):
        raise ValueError(f"reference must hold a number for each of {len(names)} objectives, got shape {corner.shape}")
    base = as_advantage(advantage)

    def init(rollouts: Any, num_prompts: int) -> Progress:
        empty = pareto.pareto_archive(capacity, len(names))
        return Progress(empty, jnp.zeros((), jnp.int32), base.init(rollouts, num_prompts))

    def credit(state: Progress, s: Signals) -> tuple[Credit, Progress]:
        point = objective_means(s.rollouts, names)
        added = pareto.hypervolume_contribution(point, state.archive.points, corner, state.archive.valid)
        known = jnp.any(s.valid)
        new, _ = pareto.pareto_insert(state.archive, point)
        grown = jax.tree.map(lambda n, o: jnp.where((added > 0) & known, n, o), new, state.archive)
        factor = jnp.where(state.count > 0, hypervolume_factor(added, floor=floor, gain=gain), 1.0)
        mixed = sum(fixed[i] * value for i, value in enumerate(objective_rewards(s.rollouts, names)))
        found, own = base.apply(state.inner, s.with_reward(factor * mixed))
        found = found if isinstance(found, Credit) else Credit(found)
        extras = {**found.extras, "hypervolume_factor": factor}
        return found._replace(extras=extras), Progress(grown, state.count + 1, own)

    method = clipped(base._replace(apply=credit, init=init, penalized=False, contrasts=False), {}, options)
    inner_metrics = method.metrics

    def metrics(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Metric]:
        found = {} if inner_metrics is None else inner_metrics(stats, rollouts, targets)
        return found | {"hypervolume_factor": Metric.mean(targets.extras["hypervolume_factor"][None])}

    return method._replace(metrics=metrics)


def hypervolume_factor(added: Array, *, floor: float = 0.5, gain: float = 1.5) -> Array:
    r"""What the reward is multiplied with after a step that added volume, $m = 0.5 + 1.5 \tanh(\Delta HV)$.

    Args:
        added: scalar, from `curation.pareto.hypervolume_contribution`.
        floor: the factor where nothing is added.
        gain: the most that is added to it.

    Returns:
        Scalar, float32 or wider.

    Example:
        >>> round(float(hypervolume_factor(jnp.array(0.2))), 6)
        0.796063

    Reference: arXiv 2509.11452.
    """
    return floor + gain * jnp.tanh(masked.as_float(added))

"""Methods that make answers shorter: by weights among the right ones, by a record to beat, by a budget that shrinks.

The length of an answer is the number of its trained tokens. An answer is right where its reward is above
`correct_above`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Unpack

import jax.numpy as jnp

from jaxrl_post import advantages, losses, rewards
from jaxrl_post.advantages.asymmetric import DadsForm
from jaxrl_post.curation.memory import init_memory, recall, remember
from jaxrl_post.losses.discriminative import HingeEstimator
from jaxrl_post.methods import checks
from jaxrl_post.methods.credit import Credit, Signals, stateless
from jaxrl_post.methods.divergence import ScoreKind, disco
from jaxrl_post.methods.policy_gradient import ClippedOptions, OldLogp, Options, clipped, grpo
from jaxrl_post.rewards.length_history import BudgetShape, HistoryForm
from jaxrl_post.types import Array, Method, Metric, Rollouts, Stats, Targets, Term

History = Literal["min", "mean"]


def _lengths(rollouts: Rollouts) -> Array:
    return jnp.sum(rollouts.mask != 0, axis=1).astype(jnp.float32).reshape(rollouts.reward.shape)


def drpo(
    *,
    max_length: float,
    lam: float = 0.1,
    score: ScoreKind = "log_likelihood",
    tau: float | None = None,
    beta: float = 1e3,
    delta: float = 1e-4,
    kl_estimator: HingeEstimator = "k1",
    correct_above: float = 0.5,
    old_logp: OldLogp = "recompute",
) -> Method:
    r"""DRPO: DisCO whose right answers count by how short they are, so that length never makes one of them bad.

    $$L = -\mathrm{mean}_q\Big[\sum_+ \omega_i s_i - \tau \log \mathrm{mean}_- e^{s/\tau}\Big]
    + \frac\beta2 [KL(\pi_{old} \| \pi) - \delta]_+^2, \qquad
    \omega_i \propto e^{(1 - |o_i| / L_{max}) / \lambda}$$

    Args:
        max_length: $L_{max}$, tokens: the budget of a completion.
        lam: $\lambda$; the smaller, the shorter. `inf` is DisCO; towards 0 the shortest right answer alone counts.
        score: see `disco`.
        tau: see `disco`.
        beta: strength of the trust region.
        delta: its radius, nats per token.
        kl_estimator: of the trust region, see `losses.kl_hinge`.
        correct_above: an answer whose reward is above this is right.
        old_logp: see `policy_gradient`; the trust region is around the policy of the step's start.

    Returns:
        A `Method` whose smallest unit is the batch; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range.

    Example:
        >>> drpo(max_length=8192).unit
        'batch'

    Reference: DRPO: Efficient Reasoning via Decoupled Reward Policy Optimization, arXiv 2510.04474.
    """
    checks.within("max_length", max_length, 1)
    checks.above("lam", lam, 0)
    base = disco(
        score=score,
        tau=tau,
        beta=beta,
        delta=delta,
        kl_estimator=kl_estimator,
        correct_above=correct_above,
        old_logp=old_logp,
    )

    def targets(state, rollouts: Rollouts, stats: Stats, key) -> tuple[Targets, Any]:
        found, state = base.targets(state, rollouts, stats, key)
        right = rollouts.reward > correct_above
        weights = losses.length_weights(_lengths(rollouts), right, rollouts.valid, max_length=max_length, lam=lam)
        return found._replace(extras={**found.extras, "weights": weights}), state

    return base._replace(targets=targets)


def _on_reward(
    base: Method,
    init: Callable[[Any, int], Any],
    shape: Callable[[Any, Rollouts], tuple[Array, dict[str, Array], Any]],
) -> Method:
    """`base` on another reward: `shape` gives it `[P, G]`, numbers `[P, G]` to be reported, and a state of its own."""

    def targets(state, rollouts: Rollouts, stats: Stats, key) -> tuple[Targets, Any]:
        reward, report, own = shape(state["reward"], rollouts)
        found, inner = base.targets(state["method"], rollouts.replace(reward=reward), stats, key)
        extras = {**found.extras, **{name: x.reshape(-1) for name, x in report.items()}}
        return found._replace(extras=extras), {"reward": own, "method": inner}

    def metrics(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Metric]:
        found = base.metrics(stats, rollouts, targets) if base.metrics else {}
        valid = rollouts.valid.reshape(-1)
        names = [name for name in targets.extras if name.startswith("length/")]
        return found | {f"{name}/mean": Metric.mean(targets.extras[name], valid) for name in names}

    def whole(rollouts: Any, num_prompts: int) -> Any:
        return {"reward": init(rollouts, num_prompts), "method": base.init(rollouts, num_prompts)}

    return base._replace(targets=targets, metrics=metrics, init=whole, contrasts=False)


def hapo(
    *,
    weight: float = 1.0,
    form: HistoryForm = "cosine",
    history: History = "min",
    floor: float = -0.7,
    tolerance: float | None = None,
    capacity: int | None = None,
    correct_above: float = 0.5,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""HAPO (history-aware): GRPO with a reward for being shorter than what the same problem took before.

    $$r_i' = r_i + w\, r_{len}(L_i, h_q), \qquad h_q \leftarrow \min(h_q, \min_{i\,\text{right}} L_i)$$

    The record is read before and written after the batch; where a problem was never solved only $r_i$ counts.

    Args:
        weight: $w$; up to 1 it leaves every right answer (reward 1) above every wrong one (reward 0).
        form: see `rewards.history_length`.
        history: what a problem's record is: `"min"`, the shortest of its right answers so far, or `"mean"`, their mean
            length.
        floor: the least that a right answer's length earns it.
        tolerance: of the linear form, see `rewards.history_length`; None for 0.1.
        capacity: problems that are remembered; None for the whole data set. With fewer, a problem may forget its
            record to another.
        correct_above: an answer whose reward is above this is right.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None), `beta` (0.04), `aggregation`
            (`"seq_mean_token_mean"`) and the others of `policy_gradient`.

    Returns:
        A `Method` whose state holds the records; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> hapo(capacity=2).init(None, 100)["reward"].prompt_id.tolist()
        [-1, -1]

    Reference: HAPO: Training Language Models to Reason Concisely via History-Aware Policy Optimization,
    arXiv 2505.11225.
    """
    checks.one_of("form", form, HistoryForm)
    checks.one_of("history", history, History)
    checks.within("weight", weight, 0)
    checks.within("floor", floor, -1, 0)
    checks.within("tolerance", tolerance, 0)
    checks.applies(form == "linear", f"form={form!r}", tolerance=tolerance)
    checks.within("capacity", capacity, 1)
    allowed = 0.1 if tolerance is None else tolerance

    def init(rollouts: Any, num_prompts: int) -> Any:
        zero = jnp.zeros(())
        return init_memory(capacity or num_prompts, zero if history == "min" else {"total": zero, "count": zero})

    def shape(memory: Any, rollouts: Rollouts) -> tuple[Array, dict[str, Array], Any]:
        lengths, ids = _lengths(rollouts), rollouts.prompt_id
        right = rollouts.reward > correct_above
        if history == "min":
            record, _ = recall(memory, ids, jnp.inf)
            seen, combine = jnp.min(jnp.where(right & rollouts.valid, lengths, jnp.inf), axis=1), "min"
        else:
            past, known = recall(memory, ids, {"total": 0.0, "count": 0.0})
            record = jnp.where(known, past["total"] / jnp.maximum(past["count"], 1.0), jnp.inf)
            counts = (right & rollouts.valid).astype(jnp.float32)
            seen, combine = {"total": jnp.sum(lengths * counts, axis=1), "count": jnp.sum(counts, axis=1)}, "sum"
        solved = jnp.any(right & rollouts.valid, axis=1)
        earned = rewards.history_length(lengths, right, record, form=form, floor=floor, tolerance=allowed)
        memory = remember(memory, ids, seen, solved, combine=combine)
        return rollouts.reward + weight * earned, {"length/reward": earned}, memory

    return _on_reward(grpo(**options), init, shape)


def curriculum_grpo(
    *,
    budget: float = 256.0,
    decay: float = 0.7,
    every: int = 150,
    shape: BudgetShape = "triangle",
    correct_weight: float = 0.3,
    length_weight: float = 0.6,
    format_reward: str | None = None,
    format_weight: float | None = None,
    correct_above: float = 0.5,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""Curriculum GRPO (Train Long, Think Short): a length reward that peaks at a token budget which shrinks in stages.

    $$r_i' = \lambda_c [r_i > c] + \lambda_l R_{len}(L_i; B(t)) + \lambda_f f_i, \qquad
    B(t) = \max(1, B_0 \gamma^{\lfloor t / T \rfloor})$$

    Where the rollouts carry `extras["budget"]`, `[P, G]` tokens (the budget that their prompt named; 0 for none), that
    is what lengths are held against; otherwise the budget follows from the number of steps that the method has made.

    Args:
        budget: $B_0$, tokens.
        decay: $\gamma$; 1 for a fixed budget.
        every: $T$, steps.
        shape: `"triangle"`, or `"band"`: every length within the budget is paid alike.
        correct_weight: $\lambda_c$. The paper's are (0.3, 0.6) for correctness and length, and (0.6, 0.3).
        length_weight: $\lambda_l$, paid to wrong answers too.
        format_reward: component of `rollouts.rewards` that is $f$; None for none.
        format_weight: $\lambda_f$, 0.1 if not given.
        correct_above: an answer whose reward is above this is right.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None), `beta` (0.04), `aggregation`
            (`"seq_mean_token_mean"`) and the others of `policy_gradient`. The group's deviation is the population's.

    Returns:
        A `Method` whose state counts its steps; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> curriculum_grpo(budget=64, every=50, correct_weight=0.6, length_weight=0.3).min_group
        2

    Reference: Train Long, Think Short: Curriculum Learning for Efficient Reasoning, arXiv 2508.08940.
    """
    checks.one_of("shape", shape, BudgetShape)
    checks.within("budget", budget, 1)
    checks.within("decay", decay, 1e-6, 1)
    checks.within("every", every, 1)
    for name, number in (("correct_weight", correct_weight), ("length_weight", length_weight)):
        checks.within(name, number, 0)
    checks.within("format_weight", format_weight, 0)
    if format_weight is not None and format_reward is None:
        raise ValueError(f"format_weight={format_weight} does not apply without format_reward: name a component")

    def shaped(step: Array, rollouts: Rollouts) -> tuple[Array, dict[str, Array], Array]:
        lengths = _lengths(rollouts)
        own = rewards.budget_schedule(step, start=budget, decay=decay, every=every)
        limit = rollouts.extras.get("budget", jnp.broadcast_to(own, lengths.shape)).reshape(lengths.shape)
        earned = rewards.target_length(lengths, limit, shape=shape)
        total = correct_weight * (rollouts.reward > correct_above) + length_weight * earned
        if format_reward is not None:
            if format_reward not in rollouts.rewards:
                known = ", ".join(sorted(rollouts.rewards)) or "(none)"
                raise ValueError(f"format_reward names {format_reward!r}, but the rollouts have the components {known}")
            well_formed = rollouts.rewards[format_reward]
            well_formed = jnp.where(jnp.isnan(well_formed), 0.0, well_formed)
            total = total + (0.1 if format_weight is None else format_weight) * well_formed
        return total, {"length/reward": earned, "length/budget": limit}, step + 1

    own: Options = {"beta": 0.04, "aggregation": "seq_mean_token_mean"}
    base = clipped({"name": "grpo", "ddof": 0}, {} if options.get("preset") else own, options)
    return _on_reward(base, lambda rollouts, num_prompts: jnp.zeros((), jnp.int32), shaped)


def asymmetric_po(
    *,
    dads: bool = True,
    stcr: bool = True,
    rate: float | None = None,
    form: DadsForm | None = None,
    base: float | None = None,
    correct_above: float = 0.5,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""APO (asymmetric policy optimisation): GRPO that frees rare right answers of the KL and shortens wrong ones.

    $$A_i \leftarrow A_i (1 + u_i), \qquad
    L = L_{clip} + \beta\, \mathrm{mean}_i \Big[w_i\, \mathrm{mean}_t KL_t\Big]$$

    $w$ (DADS) is small for right answers to hard prompts, $u$ (STCR) grows with what a wrong answer is longer than the
    right ones. It has nothing to do with `losses.apo_zero` and `losses.apo_down`, anchored preference optimisation.

    Args:
        dads: weigh the KL, see `advantages.dads_kl_weight`; it needs `beta` above 0.
        stcr: scale the advantage, see `advantages.stcr_factor`.
        rate: of DADS; None for e.
        form: of DADS; None for `"saturating"`.
        base: of STCR, per token; None for 1.00001.
        correct_above: an answer whose reward is above this is right.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None), `beta` (0.001), `aggregation`
            (`"seq_mean_token_mean"`) and the others of `policy_gradient`, but for `kl_in`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> sorted(asymmetric_po().needs), sorted(asymmetric_po(dads=False, beta=0.0).needs)
        (['policy', 'reference'], ['policy'])

    Reference: APO: Enhancing Reasoning Ability of MLLMs via Asymmetric Policy Optimization, arXiv 2506.21655.
    """
    if form is not None:
        checks.one_of("form", form, DadsForm)
    checks.above("rate", rate, 0)
    checks.within("base", base, 1)
    checks.applies(dads, "dads=False", rate=rate, form=form)
    checks.applies(stcr, "stcr=False", base=base)
    checks.kl_in_loss(options, "right answers are told by their reward, and DADS weighs a loss")
    speed, curve = math.e if rate is None else rate, form or "saturating"
    per_token = 1.00001 if base is None else base

    def credit(s: Signals) -> Credit:
        right = s.reward > correct_above
        found = advantages.grpo(s.reward, s.valid, eps=1e-9)
        extras = {}
        if dads:
            extras["kl_weight"] = advantages.dads_kl_weight(right, found, s.valid, rate=speed, form=curve).reshape(-1)
        if stcr:
            found = found * advantages.stcr_factor(right, s.lengths, s.valid, base=per_token)
        return Credit(found, extras=extras)

    own: Options = {"beta": 1e-3, "aggregation": "seq_mean_token_mean"}
    method = clipped(stateless(credit, min_group=2), {} if options.get("preset") else own, options)
    if not dads:
        return method
    if "reference" not in method.needs:
        raise ValueError("dads weighs the KL to the reference: give beta above 0, or dads=False")

    def loss(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        terms = method.loss(stats, rollouts, targets)
        kl = terms["kl"]
        return {**terms, "kl": kl._replace(value=kl.value * targets.extras["kl_weight"][:, None])}

    return method._replace(loss=loss)

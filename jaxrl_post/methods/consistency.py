"""Methods on log-probs of whole sequences in groups: squared consistency with the reward, and pairs.

None of them clips a token's ratio or needs a critic; `flowrl` learns the prompt's log-partition function in the place
of one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp

from jaxrl_post import advantages, masked, rewards
from jaxrl_post.losses import consistency, pairwise
from jaxrl_post.methods import checks
from jaxrl_post.methods.policy_gradient import OldLogp, policy_metrics
from jaxrl_post.types import Array, Method, Metric, Rollouts, Stats, Targets, Term

Form = Literal["policy_gradient", "leave_one_out"]
Baseline = Literal["mean", "log_mean_exp"]
Clip = Literal["separate", "joint"]
Values = Literal["first_group", "given"]

_LOGP = frozenset({"logp"})
_TINY = 1e-12


def group_logp(logp: Array, mask: Array, rollouts: Rollouts) -> Array:
    """`[P, G]`, nats: log-probs `[B, T]` summed over the mask of each sequence."""
    return masked.sum(logp, mask, 1).reshape(rollouts.reward.shape)


def _on_groups(
    loss: Callable[[Callable[[str], Array], Rollouts, Targets, Stats], Array],
    *,
    name: str,
    old_logp: OldLogp = "rollout",
    needs: Mapping[str, frozenset[str]],
    prepare: Callable[[Any, Rollouts, Array], tuple[dict[str, Array], Any]] | None = None,
    init: Callable[[Any, int], Any] = lambda rollouts, num_prompts: (),
    min_group: int = 2,
    trains: frozenset[str] = frozenset({"policy"}),
) -> Method:
    """A method whose loss is a function of `[P, G]` log-probs: one number per prompt, or per sequence.

    `loss` gets a function from a role's name, or `"old"`, to its log-probs; `prepare` gives extras of the targets.
    """
    checks.one_of("old_logp", old_logp, OldLogp)

    def targets(state, rollouts: Rollouts, stats: Stats, key) -> tuple[Targets, Any]:
        del key
        mask = rollouts.valid_mask
        start = rollouts.logp if old_logp == "rollout" else stats["policy"].logp
        extras: dict[str, Array] = {}
        if prepare is not None:
            extras, state = prepare(state, rollouts, group_logp(start, mask, rollouts))
        return Targets(mask, mask, start, extras=extras), state

    def loss_terms(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        def logp(role: str) -> Array:
            return group_logp(targets.old_logp if role == "old" else stats[role].logp, targets.mask, rollouts)

        value = loss(logp, rollouts, targets, stats)
        if value.ndim == 1:
            counts = jnp.sum(rollouts.valid, axis=1) > 1
            return {name: Term(value, counts.astype(jnp.float32), "token_mean")}
        return {name: Term(value.reshape(-1), rollouts.valid.reshape(-1).astype(jnp.float32), "token_mean")}

    def metrics(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Metric]:
        del rollouts
        return policy_metrics(stats, targets, clip_low=None, clip_high=None)

    return Method(
        targets,
        loss_terms,
        needs=needs,
        init=init,
        trains=trains,
        unit="group",
        metrics=metrics,
        min_group=min_group,
    )


def copg(*, beta: float = 0.1, form: Form = "policy_gradient") -> Method:
    r"""Contrastive policy gradient: the regularised rewards of a prompt's answers must be equal.

    $$R_i = r_i - \beta \log\frac{\pi(y_i)}{\pi_{ref}(y_i)}, \qquad
    L = \mathrm{mean}_{i<j} \frac{(R_i - R_j)^2}{2 \beta}$$

    The answers may come from any policy: there is no importance ratio.

    Args:
        beta: strength of the KL constraint, in units of the reward per nat.
        form: see `losses.copg`.

    Returns:
        A `Method`; it needs groups of at least two and a reference.

    Raises:
        ValueError: for a keyword out of its range.

    Example:
        >>> sorted(copg().needs), copg().unit
        (['policy', 'reference'], 'group')

    Reference: Contrastive Policy Gradient: Aligning LLMs on sequence-level scores in a supervised-friendly fashion,
    arXiv 2406.19185.
    """
    checks.within("beta", beta, _TINY)
    checks.one_of("form", form, Form)

    def loss(logp, rollouts: Rollouts, targets: Targets, stats: Stats) -> Array:
        del targets, stats
        return consistency.copg(
            logp("policy"), logp("reference"), rollouts.reward, rollouts.valid, beta=beta, form=form
        )

    return _on_groups(loss, name="copg", needs={"policy": _LOGP, "reference": _LOGP})


def gvpo(*, beta: float = 0.1, old_logp: OldLogp = "rollout") -> Method:
    r"""GVPO: within a group, rewards and log-ratios to the policy of the step's start must differ by a constant.

    $$L = \frac{1}{2 (n - 1)} \sum_i \big(\beta (d_i - \bar d) - (r_i - \bar r)\big)^2$$

    Args:
        beta: strength of the KL constraint, in units of the reward per nat.
        old_logp: see `policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range.

    Example:
        >>> sorted(gvpo().needs)
        ['policy']

    Reference: GVPO: Group Variance Policy Optimization for Large Language Model Post-Training, arXiv 2504.19599.
    """
    checks.within("beta", beta, _TINY)

    def loss(logp, rollouts: Rollouts, targets: Targets, stats: Stats) -> Array:
        del targets, stats
        return consistency.gvpo(logp("policy"), logp("old"), rollouts.reward, rollouts.valid, beta=beta)

    return _on_groups(loss, name="gvpo", needs={"policy": _LOGP}, old_logp=old_logp)


def kimi(
    *,
    tau: float = 0.1,
    baseline: Baseline = "mean",
    length_weight: float = 0.0,
    length_warmup: int = 0,
    correct_above: float | None = None,
    old_logp: OldLogp = "rollout",
) -> Method:
    r"""Kimi k1.5's online policy mirror descent, with its length reward.

    $$L = -\frac1k \sum_j \Big[(r_j - \bar r)\, d_j - \frac{\tau}{2} d_j^2\Big], \qquad
    d_j = \log\frac{\pi(y_j)}{\pi_{old}(y_j)}$$

    Args:
        tau: strength of the pull to the policy of the step's start, in units of the reward per nat.
        baseline: see `losses.opmd`.
        length_weight: weight of `rewards.group_length`, added to the reward.
        length_warmup: steps over which that weight grows from 0.
        correct_above: an answer whose reward is above this is right, as the length reward wants to know; None for 0.5.
        old_logp: see `policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> kimi(length_weight=0.2, length_warmup=100).min_group
        2

    Reference: Kimi k1.5: Scaling Reinforcement Learning with LLMs, arXiv 2501.12599.
    """
    checks.within("tau", tau, _TINY)
    checks.one_of("baseline", baseline, Baseline)
    checks.within("length_warmup", length_warmup, 0)
    if length_warmup and not length_weight:
        raise ValueError(f"length_warmup={length_warmup} does not apply without a length_weight")
    checks.applies(length_weight != 0, "length_weight=0", correct_above=correct_above)
    correct_above = 0.5 if correct_above is None else correct_above

    def prepare(state, rollouts: Rollouts, old: Array) -> tuple[dict[str, Array], Any]:
        del old
        if not length_weight:
            return {"reward": rollouts.reward}, state
        lengths = jnp.sum(rollouts.mask, axis=1).reshape(rollouts.reward.shape)
        share = jnp.minimum(state / length_warmup, 1.0) if length_warmup else 1.0
        shorter = rewards.group_length(lengths, rollouts.reward > correct_above, rollouts.valid)
        return {"reward": rollouts.reward + share * length_weight * shorter}, state + 1 if length_warmup else state

    def loss(logp, rollouts: Rollouts, targets: Targets, stats: Stats) -> Array:
        del stats
        reward = targets.extras["reward"]
        return consistency.opmd(logp("policy"), logp("old"), reward, rollouts.valid, tau=tau, baseline=baseline)

    def init(rollouts: Any, num_prompts: int) -> Any:
        del rollouts, num_prompts
        return jnp.zeros((), jnp.int32) if length_warmup else ()

    return _on_groups(loss, name="opmd", needs={"policy": _LOGP}, old_logp=old_logp, prepare=prepare, init=init)


def a2po(*, beta: float = 1e-3, value_beta: float = 0.5, values: Values = "first_group") -> Method:
    r"""A*-PO: log-ratios are regressed on the advantage over the optimal policy, whose value is estimated once.

    $$V^*(x) = \beta_1 \log \mathrm{mean}_j\, e^{r_j / \beta_1}, \qquad
    L = \mathrm{mean}\, \big(\beta_2 \log(\pi / \pi_{ref}) - (r - V^*)\big)^2$$

    The paper estimates $V^*$ offline, from answers of the reference.

    Args:
        beta: $\beta_2$, in units of the reward per nat.
        value_beta: $\beta_1$, in units of the reward.
        values: `"given"` reads $V^*$ from the column `optimal_value` of the data (`rollouts.extras["optimal_value"]`,
            `[P]`); `"first_group"` estimates it from the first group sampled for a prompt, and keeps it.

    Returns:
        A `Method`; it needs a reference. With given values one rollout per prompt is enough.

    Raises:
        ValueError: for a keyword out of its range.

    Example:
        >>> sorted(a2po().needs)
        ['policy', 'reference']

    Reference: Accelerating RL for LLM Reasoning with Optimal Advantage Regression, arXiv 2505.20686.
    """
    checks.within("beta", beta, _TINY)
    checks.within("value_beta", value_beta, _TINY)
    checks.one_of("values", values, Values)

    def init(rollouts: Any, num_prompts: int) -> Any:
        del rollouts
        if values == "given":
            return ()
        return {"value": jnp.zeros(num_prompts), "known": jnp.zeros(num_prompts, bool)}

    def prepare(state, rollouts: Rollouts, old: Array) -> tuple[dict[str, Array], Any]:
        del old
        if values == "given":
            return {"optimal_value": rollouts.extras["optimal_value"]}, state
        ids = rollouts.prompt_id
        known = state["known"][ids]
        now = consistency.optimal_value(rollouts.reward, rollouts.valid, beta=value_beta)
        value = jnp.where(known, state["value"][ids], now)
        known = known | jnp.any(rollouts.valid, axis=1)
        return {"optimal_value": value}, {
            "value": state["value"].at[ids].set(jnp.where(known, value, 0.0)),
            "known": state["known"].at[ids].set(known),
        }

    def loss(logp, rollouts: Rollouts, targets: Targets, stats: Stats) -> Array:
        del stats
        value = targets.extras["optimal_value"]
        return consistency.a2po(logp("policy"), logp("reference"), rollouts.reward, value, rollouts.valid, beta=beta)

    needs = {"policy": _LOGP, "reference": _LOGP}
    method = _on_groups(loss, name="a2po", needs=needs, prepare=prepare, init=init)
    return method if values == "first_group" else method._replace(wants=frozenset({"optimal_value"}), min_group=1)


def flowrl(
    *,
    beta: float = 15.0,
    weight_low: float = 0.0,
    weight_high: float = 10.0,
    normalize_std: bool = True,
    old_logp: OldLogp = "rollout",
) -> Method:
    r"""FlowRL: answers come to be drawn in proportion to $\pi_{ref}\, e^{\beta \hat r}$, rather than the best alone.

    $$L = \mathrm{mean}\; w \Big(\log Z(x) + \tfrac{1}{\lvert y\rvert} \log\pi(y) - \beta \hat r
    - \tfrac{1}{\lvert y\rvert} \log\pi_{ref}(y)\Big)^2$$

    $\log Z$ is the value that the role `critic` gives where the first token is chosen: a function of the prompt alone.
    $\hat r$ is the group-normalised reward.

    Args:
        beta: inverse temperature of the target, per unit of the normalised reward.
        weight_low: smallest importance weight, see `losses.flowrl`.
        weight_high: largest importance weight.
        normalize_std: divide the centred rewards by the group's standard deviation.
        old_logp: see `policy_gradient`.

    Returns:
        A `Method` that trains the roles `policy` and `critic`; it needs a reference and groups of at least two.

    Raises:
        ValueError: for a keyword out of its range.

    Example:
        >>> sorted(flowrl().trains)
        ['critic', 'policy']

    Reference: FlowRL: Matching Reward Distributions for LLM Reasoning, arXiv 2509.15207.
    """
    checks.within("beta", beta, 0)
    checks.within("weight_low", weight_low, 0)
    checks.within("weight_high", weight_high, weight_low)

    def prepare(state, rollouts: Rollouts, old: Array) -> tuple[dict[str, Array], Any]:
        del old
        return {"reward": advantages.grpo(rollouts.reward, rollouts.valid, normalize_std=normalize_std)}, state

    def loss(logp, rollouts: Rollouts, targets: Targets, stats: Stats) -> Array:
        mask = targets.mask
        first = (jnp.cumsum(mask, axis=1) == 1) & (mask > 0)
        return consistency.flowrl(
            logp("policy"),
            logp("old"),
            logp("reference"),
            targets.extras["reward"],
            jnp.sum(mask, axis=1).reshape(rollouts.reward.shape),
            masked.sum(stats["critic"].value, first, 1).reshape(rollouts.reward.shape),
            rollouts.valid,
            beta=beta,
            weight_low=weight_low,
            weight_high=weight_high,
        )

    needs = {"policy": _LOGP, "reference": _LOGP, "critic": frozenset({"value"})}
    trains = frozenset({"policy", "critic"})
    return _on_groups(loss, name="flow", needs=needs, old_logp=old_logp, prepare=prepare, trains=trains)


def p3o(
    *,
    clip: Clip = "separate",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
    old_logp: OldLogp = "rollout",
) -> Method:
    r"""P3O: PPO on the differences of the rewards of a prompt's answers, with the ratios of whole sequences.

    $$D_{ij} = R_i - R_j, \qquad R_i = r_i - \beta \log\frac{\pi_{old}(y_i)}{\pi_{ref}(y_i)}$$

    What a prompt adds to all its rewards cancels. With one update per batch it is RLOO.

    Args:
        clip: `"separate"` clips each answer's ratio (V1), `"joint"` their product (V2); see `losses.p3o_separate` and
            `losses.p3o_joint`.
        clip_low: distance of the lower bound from 1.
        clip_high: distance of the upper bound from 1.
        beta: weight of the KL that is taken from the reward; 0 needs no reference.
        old_logp: see `policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range.

    Example:
        >>> sorted(p3o(beta=0.1).needs)
        ['policy', 'reference']

    Reference: Pairwise Proximal Policy Optimization: Harnessing Relative Feedback for LLM Alignment, arXiv 2310.00212.
    """
    checks.one_of("clip", clip, Clip)
    checks.clipping(clip_low, clip_high, None)
    checks.within("beta", beta, 0)
    function = pairwise.p3o_separate if clip == "separate" else pairwise.p3o_joint
    clipped = functools.partial(function, clip_low=clip_low, clip_high=clip_high)

    def loss(logp, rollouts: Rollouts, targets: Targets, stats: Stats) -> Array:
        del targets, stats
        reward = rollouts.reward - beta * (logp("old") - logp("reference")) if beta else rollouts.reward
        return clipped(logp("policy"), logp("old"), reward, rollouts.valid)

    needs = {"policy": _LOGP, "reference": _LOGP} if beta else {"policy": _LOGP}
    return _on_groups(loss, name="policy", needs=needs, old_logp=old_logp)

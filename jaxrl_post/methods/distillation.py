"""Methods that learn from a teacher's log-probs of what the policy itself has sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Unpack

import jax.numpy as jnp

from jaxrl_post import advantages, losses, masked
from jaxrl_post.methods import checks
from jaxrl_post.methods.credit import Advantage, Credit, Signals, as_advantage
from jaxrl_post.methods.policy_gradient import ClippedOptions, Options, clipped, with_defaults
from jaxrl_post.methods.presets import preset_values
from jaxrl_post.types import Array, Method, Metric, Rollouts, Stats, Targets, Term

PullForm = Literal["k1_in_reward", "k2", "k3"]
"""How `kdrl` takes the KL to the teacher: from the reward, or as one of `losses.kl` in the loss."""


def opd(
    *,
    clip: float | None = None,
    extrapolation: float = 1.0,
    teachers: Sequence[str] = ("teacher",),
    **options: Unpack[Options],
) -> Method:
    r"""On-policy distillation: REINFORCE on how much likelier the teacher finds each sampled token; no reward is read.

    $$A_t = \lambda \log \frac{\pi_{teacher}(y_t)}{\pi_{ref}(y_t)} - \log \frac{\pi(y_t)}{\pi_{ref}(y_t)}, \qquad
    L = \mathrm{agg}(-A_t \log \pi(y_t))$$

    Args:
        clip: bound on $|A|$, nats; None for none.
        extrapolation: $\lambda$; 1 is ordinary distillation, which needs no reference, more goes beyond the teacher as
            seen from the reference: the policy's own start, or what the teacher was trained from.
        teachers: roles; of more than one, the data's column `teacher` says which teaches a prompt: its place in this
            list, from 0.
        **options: those of `policy_gradient`.

    Returns:
        A `Method` that reads the roles of the teachers, and `reference` where it extrapolates; one sequence per prompt
        is enough.

    Raises:
        ValueError: for an unknown name or keyword, one out of its range, or one that does not apply.

    Example:
        >>> sorted(opd().needs), sorted(opd(extrapolation=1.25).needs)
        (['policy', 'teacher'], ['policy', 'reference', 'teacher'])

    References: On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes (arXiv 2306.13649);
    MiniLLM: Knowledge Distillation of Large Language Models (arXiv 2306.08543); with $\lambda$, Learning beyond
    Teacher: Generalized On-Policy Distillation with Reward Extrapolation (arXiv 2602.12125), whose authors use 1.25.
    """
    advantage = {"name": "opd", "clip": clip, "extrapolation": extrapolation, "teachers": teachers}
    return with_defaults(advantage, "reinforce", {}, options)


def kdrl(
    *,
    form: PullForm = "k2",
    teacher_weight: float = 5e-3,
    final_weight: float | None = None,
    anneal_steps: int | None = None,
    only_failed: advantages.FailedBy | None = None,
    normalize_std: bool = True,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""KDRL: GRPO, and the reverse KL to a teacher on the same samples, whose weight may fall while training.

    $$L = L_{GRPO} + \beta_k\, \mathrm{agg}\big(m\, D(\log\pi - \log\pi_{teacher})\big), \qquad
    \beta_k = \max\Big(\beta_{min}, \beta_0 - k \frac{\beta_0 - \beta_{min}}{K}\Big)$$

    With `form="k2"`, $D = \delta^2 / 2$, the gradient is that of REINFORCE with the token's advantage
    $A - \beta_k \delta$.

    Args:
        form: $D$: `"k2"`, whose gradient is that of the reverse KL at each token, or `"k3"`, see `losses.kl`; or
            `"k1_in_reward"`, which takes $\beta_k \sum_t \delta_t$ from the reward before the group is compared.
        teacher_weight: $\beta_0$, at least 0; 0 gives GRPO. Its scale depends on the models: others begin at 0.2.
        final_weight: $\beta_{min}$; None for no change.
        anneal_steps: $K$, the steps over which it gets there, with `final_weight`.
        only_failed: $m$ is 1 for answers without reward (`"response"`), or for groups of which none has one
            (`"group"`); None for all.
        normalize_std: divide by the group's standard deviation.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`.

    Returns:
        A `Method` that reads the role `teacher`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> sorted(kdrl().needs)
        ['policy', 'teacher']

    Reference: KDRL: Post-Training Reasoning LLMs via Unified Knowledge Distillation and Reinforcement Learning
    (arXiv 2506.02208), which found `"k2"` with a falling weight to be best.
    """
    checks.one_of("form", form, PullForm)
    checks.within("teacher_weight", teacher_weight, 0)
    checks.within("final_weight", final_weight, 0, teacher_weight)
    if only_failed is not None:
        checks.one_of("only_failed", only_failed, advantages.FailedBy)
    if (final_weight is None) != (anneal_steps is None):
        raise ValueError("final_weight and anneal_steps go together: where the weight ends, and after how many steps")
    checks.within("anneal_steps", anneal_steps, 1)
    annealed = anneal_steps is not None
    fall = (teacher_weight - (final_weight or 0.0)) / (anneal_steps or 1)
    grpo = as_advantage(
        {"name": "grpo", "normalize_std": normalize_std}, preset_values(options.get("preset")).advantages
    )

    def apply(taken, s: Signals) -> tuple[Credit, Any]:
        weight = jnp.asarray(teacher_weight, jnp.float32)
        if annealed:
            weight = jnp.maximum(final_weight or 0.0, weight - fall * taken)
            taken = taken + 1
        pull = jnp.broadcast_to(weight, s.reward.shape)
        if only_failed is not None:
            pull = pull * advantages.failed(s.reward, s.valid, by=only_failed)
        if form == "k1_in_reward":
            gap = masked.sum(s.old_logp - s.stats["teacher"].logp, s.mask, 1).reshape(s.reward.shape)
            s = s.with_reward(s.reward - pull * gap)
        found, _ = grpo.apply((), s)
        found = found if isinstance(found, Credit) else Credit(found)
        return found._replace(extras={"teacher_weight": pull.reshape(-1)}), taken

    credit = Advantage(
        apply,
        init=lambda rollouts, num_prompts: jnp.zeros((), jnp.int32) if annealed else (),
        needs={"teacher": frozenset({"logp"})},
        min_group=2,
        penalized=False,
    )
    base = clipped(credit, {}, options)
    if form == "k1_in_reward":
        return base

    def divergence(stats: Stats) -> Array:
        return losses.kl(stats["policy"].logp, stats["teacher"].logp, estimator=form)

    def loss(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        terms = base.loss(stats, rollouts, targets)
        value = targets.extras["teacher_weight"][:, None] * divergence(stats)
        return terms | {"teacher": terms["policy"]._replace(value=value, mask=targets.mask)}

    def metrics(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Metric]:
        found = base.metrics(stats, rollouts, targets) if base.metrics else {}
        weight = Metric.mean(targets.extras["teacher_weight"])
        return found | {"teacher_kl": Metric.mean(divergence(stats), targets.mask), "teacher_weight": weight}

    return base._replace(loss=loss, metrics=metrics)

"""Methods that give each step of a trajectory its own credit: from step rewards, shared steps, or a learned judge."""

from __future__ import annotations

from typing import Any, Literal, Unpack

import jax.numpy as jnp

from jaxrl_post import losses, masked, rewards
from jaxrl_post.advantages.step_groups import Blocks
from jaxrl_post.losses.trajectory_dpo import Pairs
from jaxrl_post.methods import checks
from jaxrl_post.methods.actor_critic import CriticOptions, less_kl, with_critic
from jaxrl_post.methods.chaining import chain
from jaxrl_post.methods.choices import Choice
from jaxrl_post.methods.policy_gradient import ClippedOptions, OldLogp, clipped, take, with_defaults
from jaxrl_post.methods.presets import preset_options
from jaxrl_post.methods.step_credit import Estimator, check_steps, find_steps, outcome_of, step_component
from jaxrl_post.methods.step_credit import oprl as oprl_advantage
from jaxrl_post.types import Array, Method, Metric, Rollouts, Stats, Targets, Term


def srgpo(
    *,
    step_reward: str = "step",
    block_size: int | None = 16,
    step_weight: float = 1.0,
    blocks: Blocks = "batch",
    by_step: bool = True,
    normalize_std: bool = True,
    steps: Choice = "turns",
    max_steps: int | None = None,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""SRGPO: GRPO of trajectories, plus GRPO of the verifiable rewards of steps that chance puts into one block.

    $$A_{g,k} = \mathrm{GRPO}(R)_g + w\, \mathrm{GRPO}_{\mathrm{block}(g,k)}(r)_{g,k}$$

    Args:
        step_reward: the component of the reward that steps earn, `rollouts.rewards[step_reward]`: `[B, T]` on the token
            where it was earned, or `[P, G]`, the same for all steps of the sequence.
        block_size: steps of a block; None for one block of all.
        step_weight: $w$.
        blocks: what a block is drawn from: the steps of the `"batch"`, of a `"prompt"` or of a `"sequence"`.
        by_step: mean and deviation of the trajectories' rewards are taken over steps.
        normalize_std: divide by the standard deviations.
        steps: how trajectories are cut, see `segments.as_segmenter`.
        max_steps: steps of a sequence that count, the rest has advantage 0; None for all.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`.

    Returns:
        A `Method`.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> srgpo(step_reward="closer", block_size=32).unit
        'token'

    Reference: SeeNav-Agent: Enhancing Vision-Language Navigation with Visual Prompt and Step-Level Policy Optimization
    (arXiv 2512.02631).
    """
    own = {"step_reward": step_reward, "block_size": block_size, "step_weight": step_weight, "blocks": blocks}
    own |= {"by_step": by_step, "normalize_std": normalize_std, "steps": steps, "max_steps": max_steps}
    return clipped({"name": "srgpo", **own}, {}, options)


def salt(
    *,
    estimator: Estimator = "grpo",
    history: int = 1,
    state: str = "state",
    normalize_std: bool | None = None,
    steps: Choice = "turns",
    max_steps: int | None = None,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""SALT: a step has the mean advantage of the trajectories of its group that took the same step.

    $$A_{g,k} = \frac{1}{|E|} \sum_{g' \in E} A_{g'}, \qquad E = \{g' : g' \text{ took the step}\ (g, k)\}$$

    Args:
        estimator: the advantage of trajectories: `"grpo"` or `"rloo"`.
        history: steps that must agree for two to be the same, the step itself among them.
        state: name in `rollouts.extras` of `[B, T]` int, at the first token of each step a number of the state it was
            taken from; or `"prefix"`: the state is every token before the step.
        normalize_std: of GRPO; None for True.
        steps: how trajectories are cut, see `segments.as_segmenter`.
        max_steps: steps of a sequence that count, the rest has advantage 0; None for all.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`.

    Returns:
        A `Method`; groups of at least two. Actions are the same where the tokens that the policy chose are.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> salt(estimator="rloo", state="prefix").min_group
        2

    Reference: SALT: Step-level Advantage Assignment for Long-horizon Agents via Trajectory Graph (arXiv 2510.20022).
    """
    own = {"estimator": estimator, "history": history, "state": state, "normalize_std": normalize_std}
    return clipped({"name": "salt", **own, "steps": steps, "max_steps": max_steps}, {}, options)


def trajectory_preference(
    *,
    beta: float = 0.05,
    pairs: Pairs = "all",
    over_steps: Literal["sum", "mean"] = "sum",
    steps: Choice | None = None,
    old_logp: OldLogp = "rollout",
) -> Method:
    r"""An implicit process reward model: DPO between better and worse trajectories of a prompt, against the policy.

    $$L = -\log\sigma(m_+ - m_-), \qquad m = \beta \sum_t (\log\pi_\phi - \log\pi_{old})_t$$

    Args:
        beta: $\beta$.
        pairs: `"all"` ordered pairs of a group, or `"extremes"`: its best and its worst.
        over_steps: $m$ is the sum over the trajectory's steps, or their mean.
        steps: how trajectories are cut, for the mean; see `segments.as_segmenter`. None for `"turns"`.
        old_logp: of the policy that sampled, the reference: see `policy_gradient`.

    Returns:
        A `Method` that trains the role `prm`, whose smallest unit is the group. Groups with equal outcomes have no
        pair; a batch without any is a skipped update.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> sorted(trajectory_preference().trains)
        ['prm']

    Reference: Online Process Reward Leanring for Agentic Reinforcement Learning (arXiv 2509.19199).
    """
    checks.above("beta", beta, 0)
    checks.one_of("pairs", pairs, Pairs)
    checks.one_of("over_steps", over_steps, Literal["sum", "mean"])
    checks.one_of("old_logp", old_logp, OldLogp)
    checks.applies(over_steps == "mean", f"over_steps={over_steps!r}", steps=steps)
    cut = "turns" if steps is None else steps
    check_steps(cut, None)

    def targets(state: Any, rollouts: Rollouts, stats: Stats, key: Array) -> tuple[Targets, Any]:
        del key
        mask = rollouts.valid_mask
        start = rollouts.logp if old_logp == "rollout" else stats["policy"].logp
        extras = {}
        if over_steps == "mean":
            found = find_steps(rollouts, mask, cut, None)
            extras["steps"] = jnp.sum(found.exists, axis=2).astype(jnp.float32)
        return Targets(jnp.zeros_like(mask), mask, start, extras=extras), state

    def sums(stats: Stats, rollouts: Rollouts, targets: Targets) -> tuple[Array, Array]:
        logps = (masked.sum(logp, targets.mask, 1) for logp in (stats["prm"].logp, targets.old_logp))
        own, old = (logp.reshape(rollouts.reward.shape) for logp in logps)
        return own, old

    def loss(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        own, old = sums(stats, rollouts, targets)
        value = losses.trajectory_dpo(
            own, old, rollouts.reward, rollouts.valid, beta=beta, pairs=pairs, steps=targets.extras.get("steps")
        )
        better = losses.preference_pairs(rollouts.reward, rollouts.valid, pairs=pairs)
        return {"preference": Term(value, jnp.any(better, axis=(1, 2)).astype(value.dtype), "token_mean")}

    def metrics(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Metric]:
        own, old = sums(stats, rollouts, targets)
        margin = beta * (own - old)
        difference = margin[:, :, None] - margin[:, None, :]
        better = losses.preference_pairs(rollouts.reward, rollouts.valid, pairs=pairs).astype(difference.dtype)
        return {
            "prm/accuracy": Metric.mean((difference > 0).astype(difference.dtype), better),
            "prm/margin": Metric.mean(difference, better),
            "prm/pairs": Metric.sum(jnp.sum(better)),
        }

    logp = frozenset({"logp"})
    needs = {"prm": logp, "policy": logp} if old_logp == "recompute" else {"prm": logp}
    return Method(targets, loss, needs=needs, trains=frozenset({"prm"}), unit="group", metrics=metrics, min_group=2)


def oprl(
    *,
    prm_beta: float = 0.05,
    alpha: float = 1.0,
    pairs: Pairs = "all",
    over_steps: Literal["sum", "mean"] = "sum",
    estimator: Estimator = "grpo",
    normalize_std: bool | None = None,
    normalize_length: bool = False,
    steps: Choice = "turns",
    max_steps: int | None = None,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""OPRL (iStar): a process reward model learns from outcomes online, its step rewards join the group's advantage.

    $$r_{g,k} = \beta \sum_{t \in k} (\log\pi_\phi - \log\pi_{old})_t, \qquad
    A_{g,k} = \mathrm{GRPO}(R)_g + \alpha\, \mathrm{GRPO}_{\text{all steps}}(r)_{g,k}$$

    Each step of training has two stages: `prm` (`trajectory_preference`) and `policy`, with `losses.step_ppo`. Where
    all outcomes of a prompt are equal, the reward model learns nothing from it, but the policy still learns from its
    steps.

    Args:
        prm_beta: $\beta$, also of the preference loss. (`beta` is the weight of a KL to a reference, as everywhere.)
        alpha: $\alpha$, weight of the step advantage.
        pairs: of `trajectory_preference`.
        over_steps: of `trajectory_preference`.
        estimator: `"grpo"`, or `"rloo"`: both advantages are differences from the mean of the others.
        normalize_std: of GRPO, for both; None for True.
        normalize_length: the importance ratio of a step is the geometric mean of its tokens', not their product.
        steps: how trajectories are cut, see `segments.as_segmenter`.
        max_steps: steps of a sequence that count, the rest has advantage 0; None for all.
        **options: `clip_low` (0.2), `clip_high` (0.2) and the others of `policy_gradient`.

    Returns:
        A chain of two methods that trains the roles `prm` (best started from the policy) and `policy`.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> list(oprl().stages), sorted(oprl().trains)
        (['prm', 'policy'], ['policy', 'prm'])

    Reference: Online Process Reward Leanring for Agentic Reinforcement Learning (arXiv 2509.19199); the defaults of
    beta and alpha are those of its code.
    """
    if options.get("dual_clip") is not None:
        raise ValueError("dual_clip does not apply to oprl: the ratio is that of a step; leave it out")
    clipping, rest = take({k: v for k, v in options.items() if k != "dual_clip"}, "clip_low", "clip_high")
    checks.clipping(clipping.get("clip_low", 0.2), clipping.get("clip_high", 0.2), None)
    old_logp = {"old_logp": "rollout", **preset_options(rest), **rest}["old_logp"]
    advantage = oprl_advantage(
        beta=prm_beta, alpha=alpha, estimator=estimator, normalize_std=normalize_std, steps=steps, max_steps=max_steps
    )
    surrogate = {"name": "step_ppo", "normalize_length": normalize_length, **clipping}
    cut = steps if over_steps == "mean" else None
    return chain(
        prm=trajectory_preference(beta=prm_beta, pairs=pairs, over_steps=over_steps, steps=cut, old_logp=old_logp),
        policy=with_defaults(advantage, surrogate, {}, rest),
    )


def ppr_renorm(
    *,
    process: str = "process",
    outcome: str | None = None,
    unscored: float = 0.5,
    steps: Choice = "turns",
    max_steps: int | None = None,
    beta: float = 0.0,
    **options: Unpack[CriticOptions],
) -> Method:
    r"""PPR with ReNorm: PPO whose every step earns its process score and the outcome, both less one half.

    $$\hat r_k = p_k + o - 1 \quad \text{on the last token of step}\ k$$

    Args:
        process: name in `rollouts.rewards` of the judge's scores in [0, 1]: `[B, T]` on the token where they were
            earned, or `[P, G]`, the same for all steps of the sequence; NaN where a step could not be scored.
        outcome: name in `rollouts.rewards` of the outcome in [0, 1], `[P, G]`; None for the whole reward.
        unscored: score of a step that has none.
        steps: how trajectories are cut, see `segments.as_segmenter`.
        max_steps: steps of a sequence that earn something; None for all.
        beta: weight of the k1 KL that is taken from the reward.
        **options: `lam` (1.0), `gamma` (1.0), `clip_low` (0.2), `clip_high` (0.2) and the others of `ppo`.

    Returns:
        A `Method` that trains the roles `policy` and `critic`. Its metric `steps/mean` shows whether successes grow
        longer.

    Raises:
        ValueError: for a keyword out of its range, or a horizon that does not apply.

    Example:
        >>> sorted(ppr_renorm(process="judge").trains)
        ['critic', 'policy']

    Reference: Hybrid Reward Normalization for Process-supervised Non-verifiable Agentic Tasks (arXiv 2509.25598).
    """
    checks.within("unscored", unscored, 0, 1)
    check_steps(steps, max_steps)
    checks.within("beta", beta, 0)

    def token_rewards(rollouts: Rollouts, stats: Stats, mask: Array, old_logp: Array) -> Array:
        found = find_steps(rollouts, mask, steps, max_steps)
        scores = step_component(rollouts, process, found, mask).reshape(-1, found.count)
        exists = found.exists.reshape(-1, found.count)
        earned = rewards.renorm(scores, outcome_of(rollouts, outcome).reshape(-1), exists, unscored=unscored)
        return less_kl(rewards.on_step_ends(earned, found.step, mask), stats, mask, old_logp, beta=beta)

    base = with_critic(token_rewards, ("reference",) if beta else (), **{"lam": 1.0, **options})

    def targets(state: Any, rollouts: Rollouts, stats: Stats, key: Array) -> tuple[Targets, Any]:
        made, state = base.targets(state, rollouts, stats, key)
        exists = find_steps(rollouts, made.mask, steps, max_steps).exists
        number = jnp.sum(exists.reshape(made.mask.shape[0], -1), axis=1).astype(made.mask.dtype)
        return made._replace(extras={**made.extras, "steps": number}), state

    def metrics(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Metric]:
        number = targets.extras["steps"]
        known = (number > 0).astype(number.dtype)
        return base.metrics(stats, rollouts, targets) | {"steps/mean": Metric.mean(number, known)}  # type: ignore[misc]

    return base._replace(targets=targets, metrics=metrics, contrasts=False)

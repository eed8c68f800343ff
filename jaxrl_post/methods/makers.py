"""Advantages that read more than a reward per sequence, or keep a state: what they need, and where they find it.

The formulas are in `jaxrl_post.advantages`, under the same names. Here their arguments are taken from the rollouts,
from the stats of roles and from what the last step left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import jax.numpy as jnp

from jaxrl_post import advantages, rewards
from jaxrl_post.advantages.risk import BundleCredit
from jaxrl_post.methods import checks
from jaxrl_post.methods.signals import Advantage, Credit, Signals, stateless
from jaxrl_post.methods.step_credit import Steps, earned_by_step
from jaxrl_post.types import Array


def otb(*, handle_zero_tail: bool = True) -> Advantage:
    """`advantages.otb`, with the probabilities of the policy at the start of the step."""

    def apply(state, s: Signals):
        policy = s.stats["policy"]
        found = advantages.otb(
            s.token_rewards,
            s.mask,
            policy.logp,
            policy.sum_p_squared,
            group_size=s.rollouts.group_size,
            handle_zero_tail=handle_zero_tail,
        )
        return found, state

    return Advantage(apply, needs={"policy": frozenset({"logp", "sum_p_squared"})}, min_group=2)


def opd(*, clip: float | None = None, extrapolation: float = 1.0, teachers: Sequence[str] = ("teacher",)) -> Advantage:
    """`advantages.opd`: the role `teacher` against the policy that sampled. Rewards are not read.

    With `extrapolation` other than 1 the base is the role `reference`; of several teachers the data's column `teacher`
    names each prompt's by its place.
    """
    checks.within("clip", clip, 0)
    checks.within("extrapolation", extrapolation, 0)
    names = (teachers,) if isinstance(teachers, str) else tuple(teachers)
    if not names:
        raise ValueError("teachers must name at least one role")

    def teacher_logp(s: Signals) -> Array:
        if len(names) == 1:
            return s.stats[names[0]].logp
        which = s.extra("teacher", "it is a column of the data: the number of the prompt's teacher").astype(jnp.int32)
        row = jnp.repeat(which, s.rollouts.group_size)
        # Of a number that no teacher has NaN, which the step reports.
        return jnp.stack([s.stats[name].logp for name in names]).at[row, jnp.arange(row.size)].get(mode="fill")

    def apply(state, s: Signals):
        base = s.stats["reference"].logp if extrapolation != 1 else None
        options = {"base_logp": base, "extrapolation": extrapolation, "clip": clip}
        return advantages.opd(teacher_logp(s), s.old_logp, s.mask, **options), state

    roles = names if extrapolation == 1 else (*names, "reference")
    wants = frozenset({"teacher"} if len(names) > 1 else ())
    return Advantage(apply, needs=dict.fromkeys(roles, frozenset({"logp"})), penalized=False, wants=wants)


def dr_mas(*, normalize_std: bool = True, ddof: int = 1, eps: float = 1e-6, max_turns: int | None = None) -> Advantage:
    """`advantages.dr_mas` over the turns of `rollouts.step` by the agents of `rollouts.extras["agent"]`."""

    def apply(s: Signals) -> Array:
        agent, exists = _turns(s, "agent", max_turns)
        prompt = jnp.broadcast_to(_prompt(s)[:, None], agent.shape)
        rewards = jnp.broadcast_to(s.reward.reshape(-1, 1), agent.shape)
        found = advantages.dr_mas(rewards, prompt, agent, exists, normalize_std=normalize_std, ddof=ddof, eps=eps)
        return advantages.from_turns(found, s.rollouts.step, s.mask)

    return stateless(apply, min_group=2)


def gigpo(
    *,
    step_reward: str | None = None,
    gamma: float = 0.95,
    episode_weight: float = 1.0,
    step_weight: float = 1.0,
    normalize_std: bool = True,
    ddof: int = 1,
    eps: float = 1e-6,
    max_turns: int | None = None,
) -> Advantage:
    """`advantages.gigpo` over the turns of `rollouts.step`, from the states of `rollouts.extras["state"]`."""
    checks.within("gamma", gamma, 0, 1)

    def apply(s: Signals) -> Array:
        state, exists = _turns(s, "state", max_turns)
        shape = (*s.reward.shape, state.shape[1])
        steps = Steps(s.rollouts.step, exists.reshape(shape))
        found = advantages.gigpo(
            s.reward,
            state.reshape(shape),
            steps.exists,
            s.valid,
            step_rewards=None if step_reward is None else earned_by_step(s.rollouts, step_reward, steps, s.mask),
            gamma=gamma,
            episode_weight=episode_weight,
            step_weight=step_weight,
            normalize_std=normalize_std,
            ddof=ddof,
            eps=eps,
        )
        return advantages.from_turns(found.reshape(state.shape), s.rollouts.step, s.mask)

    return stateless(apply, min_group=2)


def hierarchical_grpo(
    *, episode_agents: Sequence[int], normalize_std: bool = False, ddof: int = 1, eps: float = 1e-6
) -> Advantage:
    """`advantages.hierarchical_grpo`: a sequence is the trajectory of the agent that chose its first trained token."""

    def apply(s: Signals) -> Array:
        episode = s.extra("episode", "it numbers [P, G] the episodes of a prompt").reshape(s.reward.shape)
        group = jnp.broadcast_to(jnp.arange(s.reward.shape[0])[:, None], s.reward.shape)
        scale = {"normalize_std": normalize_std, "ddof": ddof, "eps": eps}
        return advantages.hierarchical_grpo(
            s.reward, group, episode, _role(s), s.valid, episode_agents=tuple(episode_agents), **scale
        )

    return stateless(apply, min_group=2)


def rae(*, roles: int = 2, decay: float = 0.95, order: Literal["sequence", "batch"] = "sequence") -> Advantage:
    """`advantages.rae`: a sequence is played by the agent that chose its first trained token, in `[0, roles)`."""
    checks.within("decay", decay, 0, 1)
    checks.within("roles", roles, 1)
    checks.one_of("order", order, Literal["sequence", "batch"])

    def apply(state, s: Signals):
        return advantages.rae(s.reward, _role(s), state, s.valid, decay=decay, order=order)

    return Advantage(apply, init=lambda rollouts, num_prompts: jnp.zeros(roles))


def gdpo(
    *,
    weights: Mapping[str, float] | None = None,
    leave_one_out: bool = False,
    normalize_batch: bool = True,
    by_token: bool = False,
    ddof: int = 1,
    eps: float = 1e-4,
) -> Advantage:
    """`advantages.gdpo` of the components of the reward; None for `weights` takes all of them with weight 1."""
    if by_token and not normalize_batch:
        raise ValueError("by_token weighs the batch's statistics and does not apply to normalize_batch=False")

    def apply(s: Signals) -> Array:
        stacked, factors = _components(s, weights)
        return advantages.gdpo(
            stacked,
            s.valid,
            weights=factors,
            leave_one_out=leave_one_out,
            normalize_batch=normalize_batch,
            lengths=s.lengths if by_token else None,
            ddof=ddof,
            eps=eps,
        )

    return stateless(apply, min_group=2, penalized=False)


def log_tamed(
    *,
    weights: Mapping[str, float] | None = None,
    threshold: Literal["mean", "median"] | float = "mean",
    normalize_std: bool = True,
    std_level: Literal["group", "batch"] = "group",
) -> Advantage:
    """`advantages.grpo` of the `advantages.log_tamed` sum of the components of the reward."""

    def apply(s: Signals) -> Array:
        stacked, factors = _components(s, weights)
        total = advantages.log_tamed(stacked, s.valid, weights=factors, threshold=threshold)
        return advantages.grpo(total, s.valid, normalize_std=normalize_std, std_level=std_level)

    return stateless(apply, min_group=2, penalized=False)


def bnpo(*, low: float = 0.0, high: float = 1.0, decompose: bool = False) -> Advantage:
    """`advantages.bnpo` of the reward, or the mean of that of its components (valued between `low` and `high`)."""
    if low >= high:
        raise ValueError(f"low, the reward of failure, must be below high, that of success, got {low} and {high}")

    def apply(s: Signals) -> Array:
        if not decompose:
            return advantages.bnpo(s.reward, s.valid, low=low, high=high)
        stacked, _ = _components(s, None)
        scored = s.valid[..., None] & ~jnp.isnan(stacked)
        stacked = jnp.where(scored, stacked, low)
        parts = [advantages.bnpo(stacked[..., n], scored[..., n], low=low, high=high) for n in range(stacked.shape[2])]
        return jnp.mean(jnp.stack(parts), axis=0)

    return stateless(apply, min_group=2, penalized=False)


def riskpo(
    *,
    bundle_size: int = 5,
    alpha_d: float = 0.2,
    alpha_u: float = 0.8,
    omega: float = 1.5,
    natural_baseline: bool = False,
    normalize_std: bool = True,
    credit: BundleCredit = "sum_mean",
    lr: float = 0.1,
) -> Advantage:
    """`advantages.riskpo`, whose tracked quantiles are the state."""
    checks.one_of("credit", credit, BundleCredit)
    checks.within("bundle_size", bundle_size, 1)
    checks.within("alpha_d", alpha_d, 0, alpha_u)
    checks.within("alpha_u", alpha_u, alpha_d, 1)

    def apply(state, s: Signals):
        return advantages.riskpo(
            s.reward,
            state,
            s.valid,
            bundle_size=bundle_size,
            alpha_d=alpha_d,
            alpha_u=alpha_u,
            omega=omega,
            natural_baseline=natural_baseline,
            normalize_std=normalize_std,
            credit=credit,
            lr=lr,
        )

    return Advantage(apply, init=lambda rollouts, num_prompts: jnp.zeros(2), min_group=2)


def copo(
    *,
    blend: Literal["entropy", "uniform"] = "entropy",
    gamma: float = 20.0,
    rho: float = 1.5,
    base: float | None = None,
    eps: float = 1e-6,
) -> Advantage:
    """Group-relative advantages, and in `extras` the global ones and the weight of the first, for `methods.copo`."""
    checks.one_of("blend", blend, Literal["entropy", "uniform"])

    def apply(s: Signals) -> Credit:
        if blend == "entropy":
            answer = s.rollouts.extras.get("answer")
            answer = rewards.fingerprint(s.rollouts.tokens, s.mask) if answer is None else answer
            answer = answer.reshape(s.reward.shape)
            options = {} if base is None else {"base": base}
            weight = advantages.copo_weight(advantages.answer_entropy(answer, s.valid, **options), gamma=gamma, rho=rho)
        else:
            weight = advantages.uniform_weight(s.reward, s.valid)
        across = advantages.per_token(advantages.global_advantage(s.reward, s.valid, eps=eps), s.mask)
        rows = jnp.repeat(weight, s.rollouts.group_size)
        return Credit(
            advantages.grpo(s.reward, s.valid, eps=eps),
            extras={"global_advantages": across, "local_weight": rows},
        )

    return stateless(apply, penalized=blend == "entropy")


def _prompt(s: Signals) -> Array:
    """`[B]` int: the row of `[P, G]` of each sequence."""
    return jnp.repeat(jnp.arange(s.rollouts.num_prompts), s.rollouts.group_size)


def _turns(s: Signals, name: str, max_turns: int | None) -> tuple[Array, Array]:
    why = f"it names [B, T] the {name} of every token"
    turns = s.mask.shape[1] if max_turns is None else max_turns
    return advantages.to_turns(s.extra(name, why), s.rollouts.step, s.mask, num_turns=turns)


def _role(s: Signals) -> Array:
    """`[P, G]` int: the agent of each sequence's first trained token; 0 where it has none."""
    agent = s.extra("agent", "it names [B, T] the agent of every token")
    first, _ = advantages.to_turns(agent, jnp.zeros_like(agent), s.mask, num_turns=1)
    return first.reshape(s.reward.shape)


def _components(s: Signals, weights: Mapping[str, float] | None) -> tuple[Array, Array]:
    """Components of the reward `[P, G, N]`, NaN where one could not be scored, and their weights `[N]`."""
    found = {name: x for name, x in s.rollouts.rewards.items() if x.shape == s.reward.shape}
    chosen = dict.fromkeys(sorted(found), 1.0) if weights is None else dict(weights)
    if missing := sorted(set(chosen) - set(found)):
        raise ValueError(
            f"weights names {missing[0]!r}, but the rollouts have the components {', '.join(sorted(found)) or '(none)'}"
        )
    if not chosen:
        raise ValueError("this method reads rollouts.rewards, one [P, G] array per reward function, and there is none")
    return jnp.stack([found[name] for name in chosen], axis=2), jnp.asarray(list(chosen.values()), jnp.float32)

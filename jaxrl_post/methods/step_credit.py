"""Advantages of steps: where random groups, trajectory graphs and learned step rewards find what they compare.

The formulas are in `jaxrl_post.advantages`; `makers` does the same for advantages of sequences and tokens.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from jaxrl_post import advantages
from jaxrl_post.advantages.step_groups import Blocks
from jaxrl_post.methods import checks
from jaxrl_post.methods.choices import Choice
from jaxrl_post.methods.segments import as_segmenter
from jaxrl_post.methods.signals import Advantage, Credit, Signals, stateless
from jaxrl_post.types import Array, Rollouts

Estimator = Literal["grpo", "rloo"]


class Steps(NamedTuple):
    """The steps of a batch: `step` `[B, T]`, the step of each token, and `exists` `[P, G, S]`, which there are."""

    step: Array
    exists: Array

    @property
    def count(self) -> int:
        """`S`."""
        return self.exists.shape[2]

    def sum(self, x: Array, mask: Array) -> Array:
        """`[B, T] -> [P, G, S]`: the sum over each step's trained tokens."""
        return advantages.step_sum(x, self.step, mask, num_steps=self.count).reshape(self.exists.shape)

    def credit(self, x: Array, mask: Array) -> Credit:
        """`[P, G, S]` as the advantages of tokens, with the steps themselves for the loss."""
        found = advantages.from_turns(x.reshape(-1, self.count), self.step, mask)
        return Credit(found, extras={"step": self.step})


def find_steps(rollouts: Rollouts, mask: Array, steps: Choice, max_steps: int | None) -> Steps:
    """The steps of rollouts, cut as `segments.as_segmenter(steps)` says; those beyond `max_steps` do not count."""
    number = mask.shape[1] if max_steps is None else max_steps
    step = as_segmenter(steps)(rollouts)
    step = jnp.where((mask != 0) & (step < number), step, -1)
    exists = advantages.step_exists(step, mask, num_steps=number)
    return Steps(step, exists.reshape(*rollouts.reward.shape, number))


def step_component(rollouts: Rollouts, name: str, steps: Steps, mask: Array) -> Array:
    """`[P, G, S]`: a component of the reward by step; NaN where it could not be scored.

    A component `[B, T]` is summed over each step's trained tokens; one per sequence is that of each of its steps.

    Raises:
        ValueError: if there is no such component.
    """
    if name not in rollouts.rewards:
        raise ValueError(
            f"this method reads rollouts.rewards[{name!r}], [B, T] on the token where it was earned or [P, G], but the "
            f"rollouts have the components {', '.join(sorted(rollouts.rewards)) or '(none)'}"
        )
    found = rollouts.rewards[name]
    if found.shape == rollouts.reward.shape:
        return jnp.broadcast_to(found[:, :, None], steps.exists.shape)
    unknown = steps.sum(jnp.isnan(found), mask) > 0
    return jnp.where(unknown, jnp.nan, steps.sum(jnp.where(jnp.isnan(found), 0.0, found), mask))


def earned_by_step(rollouts: Rollouts, name: str, steps: Steps, mask: Array) -> Array:
    """`step_component` for what is summed over steps, where one number per sequence would count once for each.

    Raises:
        ValueError: if there is no such component, or it has one number per sequence.
    """
    found = step_component(rollouts, name, steps, mask)
    if rollouts.rewards[name].shape == rollouts.reward.shape:
        raise ValueError(
            f"step_reward={name!r} must name a component [B, T] of rollouts.rewards, on the tokens where it was "
            f"earned, but it has one number per sequence, {rollouts.reward.shape}; without step_reward the last step "
            "earns the whole reward"
        )
    return found


def outcome_of(rollouts: Rollouts, name: str | None) -> Array:
    """`[P, G]`: a component of the reward, or all of it."""
    if name is None:
        return rollouts.reward
    found = rollouts.rewards.get(name)
    if found is None or found.shape != rollouts.reward.shape:
        shapes = {component: x.shape for component, x in rollouts.rewards.items()}
        raise ValueError(f"outcome={name!r} must name a component [P, G] of rollouts.rewards, which has {shapes}")
    return jnp.where(jnp.isnan(found), 0.0, found)


def srgpo(
    *,
    step_reward: str = "step",
    block_size: int | None = 16,
    step_weight: float = 1.0,
    blocks: Blocks = "batch",
    by_step: bool = True,
    normalize_std: bool = True,
    ddof: int = 1,
    eps: float = 1e-6,
    steps: Choice = "turns",
    max_steps: int | None = None,
) -> Advantage:
    """`advantages.srgpo` of the component `step_reward` of the reward."""
    checks.within("block_size", block_size, 1)
    checks.within("step_weight", step_weight, 0)
    checks.one_of("blocks", blocks, Blocks)
    check_steps(steps, max_steps)

    def apply(s: Signals) -> Credit:
        found = find_steps(s.rollouts, s.mask, steps, max_steps)
        earned = step_component(s.rollouts, step_reward, found, s.mask)
        both = advantages.srgpo(
            s.key,
            s.reward,
            earned,
            found.exists,
            s.valid,
            block_size=block_size,
            step_weight=step_weight,
            blocks=blocks,
            by_step=by_step,
            normalize_std=normalize_std,
            id=s.rollouts.id,
            ddof=ddof,
            eps=eps,
        )
        return found.credit(both, s.mask)

    return stateless(apply)


def salt(
    *,
    estimator: Estimator = "grpo",
    history: int = 1,
    state: str = "state",
    normalize_std: bool | None = None,
    ddof: int | None = None,
    eps: float | None = None,
    steps: Choice = "turns",
    max_steps: int | None = None,
) -> Advantage:
    """`advantages.salt` of GRPO's or RLOO's advantage; actions are the tokens of a step, states of `extras[state]`."""
    checks.one_of("estimator", estimator, Estimator)
    checks.within("history", history, 1)
    check_steps(steps, max_steps)
    scale = _scale(estimator, normalize_std=normalize_std, ddof=ddof, eps=eps)

    def apply(s: Signals) -> Credit:
        found = find_steps(s.rollouts, s.mask, steps, max_steps)
        where = {"num_steps": found.count}
        action, prefix = advantages.step_fingerprints(s.rollouts.tokens, found.step, s.mask, **where)
        if state != "prefix":
            why = "it numbers [B, T] the state each step answers to; state='prefix' takes all tokens before the step"
            prefix, _ = advantages.to_turns(s.extra(state, why), found.step, s.mask, num_turns=found.count)
        if estimator == "rloo":
            whole = advantages.rloo(s.reward, s.valid)
        else:
            whole = advantages.grpo(s.reward, s.valid, **scale)
        shape = found.exists.shape
        merged = advantages.salt(
            whole, prefix.reshape(shape), action.reshape(shape), found.exists, s.valid, history=history
        )
        return found.credit(merged, s.mask)

    return stateless(apply, min_group=2)


def oprl(
    *,
    beta: float = 0.05,
    alpha: float = 1.0,
    estimator: Estimator = "grpo",
    normalize_std: bool | None = None,
    ddof: int | None = None,
    eps: float | None = None,
    steps: Choice = "turns",
    max_steps: int | None = None,
) -> Advantage:
    """`advantages.two_level` of outcomes, and of how much likelier the role `prm` finds each step than the policy."""
    checks.one_of("estimator", estimator, Estimator)
    checks.within("beta", beta, 0)
    checks.within("alpha", alpha, 0)
    check_steps(steps, max_steps)
    scale = _scale(estimator, normalize_std=normalize_std, ddof=ddof, eps=eps)

    def apply(state: Any, s: Signals):
        found = find_steps(s.rollouts, s.mask, steps, max_steps)
        earned = beta * found.sum(jnp.where(s.mask != 0, s.stats["prm"].logp - s.old_logp, 0.0), s.mask)
        both = advantages.two_level(
            s.reward,
            earned,
            advantages.prompt_of(found.exists),
            found.exists,
            s.valid,
            step_weight=alpha,
            estimator=estimator,
            **scale,
        )
        return found.credit(both, s.mask), state

    return Advantage(apply, needs={"prm": frozenset({"logp"})})


def _scale(estimator: Estimator, **given: Any) -> dict[str, Any]:
    """The keywords of a standard deviation that are given; RLOO divides by none."""
    checks.applies(estimator == "grpo", f"estimator={estimator!r}", **given)
    return {name: value for name, value in given.items() if value is not None}


def check_steps(steps: Choice, max_steps: int | None) -> None:
    """Raise ValueError for a way to cut that does not exist, or a number of steps below 1."""
    as_segmenter(steps)
    checks.within("max_steps", max_steps, 1)

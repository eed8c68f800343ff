"""How a method gives credit: what an advantage may read, what it returns, and the table of those that have a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxrl_post import advantages
from jaxrl_post.methods.choices import Choice, call_by_name, choose, inputs
from jaxrl_post.types import Array, PyTree, Rollouts, Stats


class Signals(NamedTuple):
    """What an advantage may read.

    Attributes:
        rollouts: what happened; `reward` is less the KL penalty, if that is taken from the reward.
        mask: `[B, T]`, trained tokens of valid sequences.
        old_logp: `[B, T]`, nats, of the start of the step.
        token_rewards: `[B, T]`: the reward on the last trained token, less the KL penalty of every token.
        stats: stats of the start of the step by role.
        key: for what is random.
    """

    rollouts: Rollouts
    mask: Array
    old_logp: Array
    token_rewards: Array
    stats: Stats
    key: Array

    @property
    def reward(self) -> Array:
        """`[P, G]`."""
        return self.rollouts.reward

    @property
    def valid(self) -> Array:
        """`[P, G]` bool."""
        return self.rollouts.valid

    @property
    def lengths(self) -> Array:
        """`[P, G]` float, trained tokens of each sequence."""
        return jnp.sum(self.mask != 0, axis=1).astype(jnp.float32).reshape(self.reward.shape)

    def extra(self, name: str, why: str) -> Array:
        """An array of `rollouts.extras`.

        Raises:
            ValueError: if it is not there; `why` says who puts it there.
        """
        if name not in self.rollouts.extras:
            raise ValueError(f"this method reads rollouts.extras[{name!r}], which these rollouts lack: {why}")
        return self.rollouts.extras[name]


class Credit(NamedTuple):
    """What an advantage returns.

    Attributes:
        advantages: `[P, G]` or `[B, T]`.
        keep: `[P, G]` or `[B, T]`: 0 takes sequences or tokens out of the loss and its denominators; None keeps all.
        extras: for the loss, with a leading axis of `B` or `P`, or scalars.
    """

    advantages: Array
    keep: Array | None = None
    extras: Mapping[str, Array] = {}


class Advantage(NamedTuple):
    """An advantage with what the method must know of it. A plain function `Signals -> Credit | Array` will often do.

    Attributes:
        apply: `(state, signals) -> (Credit | Array, state)`.
        init: `(rollouts, num_prompts) -> state`; `rollouts` holds shapes only.
        needs: fields of the stats of roles that are read, beyond the policy's `logp`.
        min_group: the smallest group that gives any advantage.
    """

    apply: Callable[[PyTree, Signals], tuple[Credit | Array, PyTree]]
    init: Callable[[Any, int], PyTree] = lambda rollouts, num_prompts: ()
    needs: Mapping[str, frozenset[str]] = {}
    min_group: int = 1


def stateless(function: Callable[[Signals], Credit | Array], min_group: int = 1) -> Advantage:
    """A plain function of `Signals` as an `Advantage`.

    Example:
        >>> stateless(lambda s: s.reward).min_group
        1
    """
    return Advantage(lambda state, signals: (function(signals), state), min_group=min_group)


ON_GROUPS: dict[str, Callable[..., Any]] = {
    "dr_grpo": advantages.dr_grpo,
    "gpg": advantages.gpg,
    "grpo": advantages.grpo,
    "mc_grpo": advantages.mc_grpo,
    "opo": advantages.opo,
    "pass_at_k": advantages.pass_at_k,
    "reinforce": advantages.reinforce,
    "reinforce_plus_plus_baseline": advantages.reinforce_plus_plus_baseline,
    "remax": advantages.remax,
    "rloo": advantages.rloo,
}
"""Functions of the rewards `[P, G]` of whole sequences, called by the names of their arguments."""

ON_TOKENS: dict[str, Callable[..., Any]] = {"reinforce_plus_plus": advantages.reinforce_plus_plus}
"""Functions of the rewards `[B, T]` of tokens."""

MAKERS: dict[str, Callable[..., Advantage]] = {}
"""Functions that return an `Advantage`, because it has a state or reads more than rewards."""

WITHOUT_GROUP = frozenset({"reinforce", "reinforce_plus_plus", "remax"})
"""Names whose baseline, if any, does not come from the group: one rollout per prompt is enough."""

DEFAULTS: dict[str, Mapping[str, Any]] = {"mc_grpo": {"max_abs": 5.0}}


def as_advantage(choice: Choice | Advantage, defaults: Mapping[str, Mapping[str, Any]] | None = None) -> Advantage:
    """The `Advantage` that a choice means.

    Args:
        choice: an `Advantage`, a function of `Signals`, a name of `ON_GROUPS`, `ON_TOKENS` or `MAKERS`, or a mapping of
            `name` and keywords.
        defaults: keywords by name, which those of the choice override.

    Raises:
        ValueError: for an unknown name or keyword.

    Example:
        >>> as_advantage({"name": "grpo", "normalize_std": False}).min_group
        2
    """
    if isinstance(choice, Advantage):
        return choice
    if callable(choice):
        return stateless(choice)
    name = choice if isinstance(choice, str) else choice.get("name")
    function = choose("advantage", choice, ON_GROUPS | ON_TOKENS | MAKERS, {**DEFAULTS, **(defaults or {})})
    if name in MAKERS:
        return function()

    def apply(s: Signals) -> Credit:
        available = {
            "rewards": s.reward if name in ON_GROUPS else s.token_rewards,
            "valid": s.valid,
            "lengths": s.lengths,
            "mask": s.mask,
        }
        if "greedy_rewards" in inputs(function):
            available["greedy_rewards"] = s.extra("greedy_reward", "sample a greedy answer to each prompt and score it")
        found = call_by_name(function, available)
        return Credit(*found) if isinstance(found, tuple) else Credit(found)

    return stateless(apply, min_group=1 if name in WITHOUT_GROUP else 2)

"""How a method gives credit: the table of the advantages that have a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxrl_post import advantages
from jaxrl_post.methods import makers, step_credit
from jaxrl_post.methods.choices import Choice, call_by_name, choose, inputs
from jaxrl_post.methods.signals import Advantage, Credit, Signals, stateless

__all__ = ["Advantage", "Credit", "Signals", "as_advantage", "stateless"]

ON_GROUPS: dict[str, Callable[..., Any]] = {
    "dr_grpo": advantages.dr_grpo,
    "gpg": advantages.gpg,
    "grpo": advantages.grpo,
    "maxrl": advantages.maxrl,
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

MAKERS: dict[str, Callable[..., Advantage]] = {
    "bnpo": makers.bnpo,
    "copo": makers.copo,
    "dr_mas": makers.dr_mas,
    "gdpo": makers.gdpo,
    "gigpo": makers.gigpo,
    "hierarchical_grpo": makers.hierarchical_grpo,
    "log_tamed": makers.log_tamed,
    "opd": makers.opd,
    "otb": makers.otb,
    "rae": makers.rae,
    "riskpo": makers.riskpo,
    "salt": step_credit.salt,
    "srgpo": step_credit.srgpo,
}
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

    found = stateless(apply, min_group=1 if name in WITHOUT_GROUP else 2)
    found = found._replace(contrasts=name in ON_GROUPS and name not in WITHOUT_GROUP)
    return found._replace(wants=frozenset({"greedy_reward"})) if "greedy_rewards" in inputs(function) else found

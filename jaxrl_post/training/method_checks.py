"""Whether a method, its rollouts and what it gives back fit together: errors while a step is traced."""

from __future__ import annotations

from collections.abc import Mapping

from jaxrl_post.rollout import BUDGET, EXIT
from jaxrl_post.types import ANSWER_TOKENS, PROBE, Method, Rollouts, Term


def check_wants(method: Method, rollouts: Rollouts) -> None:
    """Raise ValueError unless the rollouts hold what the method wants of each prompt."""
    for name in sorted(method.wants):
        found = rollouts.extras.get(name)
        if found is None:
            source = {
                "greedy_reward": "the reward of a greedy completion of each prompt, which the loop samples",
                ANSWER_TOKENS: "[P, A], the tokens of the right answer, which the loop takes from the data's answers",
                BUDGET: "[P, G], the tokens that a prompt asks for, which the loop takes from rollout.budgets",
                EXIT: "[P, G], where a thought was left, which the loop fills in under rollout.exits",
            }.get(name, "one number per prompt, which the loop takes from the data's column of that name")
            raise ValueError(f"the method reads rollouts.extras[{name!r}] ({source}), which these rollouts lack")
        if name == ANSWER_TOKENS and found.ndim == 2 and found.shape[0] == rollouts.num_prompts:
            continue
        of_sequences = name in (BUDGET, EXIT)
        expected = rollouts.reward.shape if of_sequences else (rollouts.num_prompts,)
        if found.shape != expected:
            what = "[P, G] = {}, a number per sequence" if of_sequences else "[P] = {}, a number per prompt"
            raise ValueError(
                f"rollouts.extras[{name!r}] must be {what.format(list(expected))}, got shape {found.shape}"
            )


def check_probes(method: Method, probes: Mapping[str, tuple[Rollouts, str]]) -> None:
    """Raise ValueError unless the probes are those whose fields the method needs, of roles that it needs."""
    wanted = {name.removeprefix(PROBE) for name in method.needs if name.startswith(PROBE)}
    if set(probes) != wanted:
        raise ValueError(
            f"the method's probes are {sorted(probes)}, but its needs name {sorted(wanted)}; give the fields of "
            "each as needs['probe/<name>']"
        )
    for name, (_, role) in probes.items():
        if role not in method.roles:
            raise ValueError(
                f"probe {name!r} is scored by the role {role!r}, which is not among the method's needs "
                f"{sorted(method.roles)}; name it there, with no fields if nothing else is read of it"
            )


def check_terms(terms: Mapping[str, Term], rollouts: Rollouts, micro_batches: int, method: Method) -> None:
    """Raise ValueError unless the terms are what a method may return.

    That is one at least, each a `Term` whose mask has its value's shape, and none with a number per prompt where
    micro-batches may tear groups apart.
    """
    if not terms:
        raise ValueError("the method's loss returned no terms")
    for name, term in terms.items():
        if not isinstance(term, Term):
            raise ValueError(f"term {name!r} is a {type(term).__name__}; return Term(value, mask, mode), not reduced")
        if term.value.shape != term.mask.shape:
            raise ValueError(
                f"term {name!r}: value has shape {term.value.shape} and mask {term.mask.shape}; losses are not reduced "
                "by the method, give one number per token, sequence or prompt"
            )
        if micro_batches > 1 and method.unit in ("token", "sequence") and term.value.shape[0] != rollouts.batch_size:
            raise ValueError(
                f"term {name!r} has {term.value.shape[0]} rows for {rollouts.batch_size} sequences: it compares the "
                "sequences of a group, which micro-batches would tear apart; give the method unit='group'"
            )

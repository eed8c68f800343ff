"""Several methods in one step: what runs first leaves its parameters to what comes next."""

from __future__ import annotations

from typing import Any

from jaxrl_post.types import LearnsFrom, Method, Rollouts, Stats, Targets, Term, Unit

_COARSER: tuple[Unit, ...] = ("token", "sequence", "group", "batch")


def chain(*stages: Method, **named: Method) -> Method:
    """Methods that are run in this order in every step, each scored with what the last one left.

    A stage computes its targets from stats of the parameters at its own start and makes its own update(s). Stages that
    train the same role share that role's optimiser state. Each has a state of its own. PRIME is a reward model's
    cross-entropy and then RLOO; PIPO is a second update on the batch before and then GRPO.

    Args:
        *stages: methods, which are named `stage_0`, `stage_1`, ... in metrics and state; chains among them are laid out
            in their place.
        **named: methods that run after those, with names of their own.

    Returns:
        A `Method` that needs, trains and wants what any of its stages does. Its `unit` is the coarsest of theirs (each
        stage is cut along its own) and its `min_group` the largest.

    Raises:
        ValueError: for fewer than two stages, names that are not different, or stages that learn from different kinds
            of batches, as where some learn from sequences that are still running and some do not.

    Example:
        >>> from jaxrl_post import methods
        >>> both = chain(methods.grpo(beta=0.0), critic=methods.ppo())
        >>> list(both.stages), sorted(both.trains)
        (['stage_0', 'critic'], ['critic', 'policy'])
    """
    every: dict[str, Method] = {}
    for name, stage in [*((f"stage_{index}", stage) for index, stage in enumerate(stages)), *named.items()]:
        if stage.stages:
            inner = {f"{name}/{part}" if part.startswith("stage_") else part: m for part, m in stage.stages.items()}
        else:
            inner = {name: stage}
        if taken := sorted(every.keys() & inner.keys()):
            raise ValueError(f"two stages are called {taken[0]!r}; give them different names")
        every |= inner
    if len(every) < 2:
        raise ValueError(f"chain runs two or more methods in one step, got {len(every)}")
    kinds: dict[str, LearnsFrom] = {name: stage.learns_from for name, stage in every.items()}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"the stages of a chain must learn from the same kind of batch, got {kinds}")
    partial = {name: stage.partial for name, stage in every.items()}
    if len(set(partial.values())) > 1:
        raise ValueError(f"some stages learn from sequences that are still running, some do not: {partial}")
    units: list[Unit] = [stage.unit for stage in every.values()]
    needs: dict[str, frozenset[str]] = {}
    for stage in every.values():
        for role, fields in stage.needs.items():
            needs[role] = needs.get(role, frozenset()) | fields

    def init(rollouts: Any, num_prompts: int) -> dict[str, Any]:
        return {name: stage.init(rollouts, num_prompts) for name, stage in every.items()}

    return Method(
        _no_targets,
        _no_loss,
        needs=needs,
        init=init,
        trains=frozenset().union(*(stage.trains for stage in every.values())),
        unit=max(units, key=_COARSER.index),
        learns_from=next(iter(kinds.values())),
        min_group=max(stage.min_group for stage in every.values()),
        wants=frozenset().union(*(stage.wants for stage in every.values())),
        stages=every,
        partial=next(iter(partial.values())),
        contrasts=all(stage.contrasts for stage in every.values()),
    )


def _no_targets(*_: Any) -> tuple[Targets, Any]:
    raise ValueError("a chain has no targets of its own; go through method.stages")


def _no_loss(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
    del stats, rollouts, targets
    raise ValueError("a chain has no loss of its own; go through method.stages")

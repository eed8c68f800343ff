"""The loss of a policy-gradient method by name: functions of `jaxrl_post.losses`, called by their arguments' names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jaxrl_post import losses
from jaxrl_post.methods.choices import Choice, call_by_name, choose, inputs
from jaxrl_post.types import Array, Rollouts, Stats, Targets, Unit

LOSSES: dict[str, Callable[..., Array]] = {
    "cispo": losses.cispo,
    "decoupled_ppo": losses.decoupled_ppo,
    "dppo": losses.dppo,
    "dro": losses.dro,
    "gmpo": losses.gmpo,
    "gspo": losses.gspo,
    "ppo": losses.ppo,
    "rec": losses.rec,
    "reinforce": losses.reinforce,
    "sapo": losses.sapo,
    "step_ppo": losses.step_ppo,
    "topr": losses.topr,
    "vespo": losses.vespo,
}
"""Surrogate losses by name."""

READ: dict[str, Callable[[Stats, Rollouts, Targets], Any]] = {
    "logp": lambda stats, rollouts, targets: stats["policy"].logp,
    "entropy": lambda stats, rollouts, targets: stats["policy"].entropy,
    "ref_logp": lambda stats, rollouts, targets: stats["reference"].logp,
    "old_logp": lambda stats, rollouts, targets: targets.old_logp,
    "advantages": lambda stats, rollouts, targets: targets.advantages,
    "mask": lambda stats, rollouts, targets: targets.mask,
    "sampler_logp": lambda stats, rollouts, targets: rollouts.extras.get("sampler_logp", rollouts.logp),
    "extras": lambda stats, rollouts, targets: targets.extras,
    "step": lambda stats, rollouts, targets: targets.extras.get("step", rollouts.step),
}
"""What a surrogate loss may read, by the name of its argument."""

_WHOLE_SEQUENCE = frozenset({"mask", "extras", "step"})

_CLIPS_ANOTHER_RATIO = (losses.cispo, losses.gmpo, losses.gspo, losses.rec, losses.step_ppo)
"""Their `clip_low` and `clip_high` do not say which tokens lose their gradient, as those of `losses.ppo` do."""


class Surrogate:
    """A surrogate loss with what the method must know of it: `(stats, rollouts, targets) -> [B, T] or [B]`.

    Attributes:
        needs: fields of the stats that it reads.
        unit: `"sequence"` if it reads the mask, hence more than one token at a time.
        clip_low: its clip distance, None if it does not clip the ratio of each token.
        clip_high: likewise.
    """

    def __init__(self, function: Callable[..., Array]) -> None:
        names = inputs(function)
        if unknown := sorted(set(names) - set(READ)):
            raise ValueError(f"a surrogate loss may read {', '.join(READ)} by name, not {unknown[0]!r}")
        self._function, self._names = function, names
        self.needs: Mapping[str, frozenset[str]] = {
            role: fields
            for role, fields in {
                "policy": frozenset({"logp", "entropy"} & set(names)),
                "reference": frozenset({"logp"} if "ref_logp" in names else ()),
            }.items()
            if fields
        }
        self.unit: Unit = "sequence" if _WHOLE_SEQUENCE & set(names) else "token"
        parameters = inspect.signature(function).parameters
        clips = "clip_low" in parameters and "clip_high" in parameters
        clips = clips and getattr(function, "func", function) not in _CLIPS_ANOTHER_RATIO
        self.clip_low: float | None = parameters["clip_low"].default if clips else None
        self.clip_high: float | None = parameters["clip_high"].default if clips else None

    def __call__(self, stats: Stats, rollouts: Rollouts, targets: Targets) -> Array:
        """The loss of each token, `[B, T]`, or of each sequence, `[B]`."""
        available = {name: READ[name](stats, rollouts, targets) for name in self._names}
        return call_by_name(self._function, available)


def as_surrogate(choice: Choice, defaults: Mapping[str, Mapping[str, Any]] | None = None) -> Surrogate:
    """The surrogate loss that a choice means: a name of `LOSSES`, a mapping of `name` and keywords, or a function.

    Args:
        choice: see above.
        defaults: keywords by name, which those of the choice override.

    Raises:
        ValueError: for an unknown name or keyword, or a function with an argument that it cannot be given.

    Example:
        >>> as_surrogate({"name": "ppo", "clip_high": 0.28}).clip_high
        0.28
    """
    return Surrogate(choose("loss", choice, LOSSES, defaults or {}))

"""The loss of a policy-gradient method by name: functions of `jaxrl_post.losses`, called by their arguments' names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from jaxrl_post import losses, masked
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


def cleaned(logp: Array, rollouts: Rollouts) -> Array:
    """Log-probs `[B, T]`, 0 where there is no number and no token counts: what a loss leaves out is in its gradient."""
    return jnp.where((rollouts.valid_mask == 0) & ~jnp.isfinite(logp), 0.0, logp)


def sampler_logp(rollouts: Rollouts) -> Array:
    """`[B, T]`, nats: the log-probs under what was drawn from, `cleaned`."""
    return cleaned(rollouts.extras.get("sampler_logp", rollouts.logp), rollouts)


READ: dict[str, Callable[[Stats, Rollouts, Targets], Any]] = {
    "logp": lambda stats, rollouts, targets: stats["policy"].logp,
    "entropy": lambda stats, rollouts, targets: stats["policy"].entropy,
    "ref_logp": lambda stats, rollouts, targets: stats["reference"].logp,
    "old_logp": lambda stats, rollouts, targets: targets.old_logp,
    "advantages": lambda stats, rollouts, targets: targets.advantages,
    "mask": lambda stats, rollouts, targets: targets.mask,
    "sampler_logp": lambda stats, rollouts, targets: sampler_logp(rollouts),
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
        corrects: whether it weighs by the ratio to the sampler itself.
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

        self._base = getattr(function, "func", function)
        self.corrects = self._base is losses.decoupled_ppo

    def __call__(self, stats: Stats, rollouts: Rollouts, targets: Targets) -> Array:
        """The loss of each token, `[B, T]`, or of each sequence, `[B]`, by the `"weights"` that extras may have.

        These correct for the sampler, `[B, T]`. A loss of tokens is multiplied by them, one of sequences by their mean,
        GMPO's by the geometric one, as its ratio is. In VESPO's they are factors of the sequence's ratio. In these two
        a weight of 0 takes out its token and not the sequence.
        """
        weights = targets.extras.get("weights")
        if weights is None:
            return self._value(stats, rollouts, targets)
        counts = weights > 0
        logs = jnp.log(jnp.where(counts, weights, 1.0))
        if self._base is losses.vespo:
            return counts * self._value(stats, rollouts, targets._replace(old_logp=targets.old_logp - logs))
        value = self._value(stats, rollouts, targets)
        if self._base is losses.gmpo:
            own = targets.mask * counts
            mean = jnp.any(own != 0, axis=1) * jnp.exp(masked.mean(logs, own, axis=1))
            return value * (mean if value.ndim == 1 else mean[:, None])
        return value * (weights if value.ndim == 2 else masked.mean(weights, targets.mask, axis=1))

    def _value(self, stats: Stats, rollouts: Rollouts, targets: Targets) -> Array:
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

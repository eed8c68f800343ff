"""How a method cuts trajectories into steps: by a name that a configuration can hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp

from jaxrl_post import advantages
from jaxrl_post.methods.choices import Choice, choose
from jaxrl_post.types import Array, Rollouts

Segmenter: TypeAlias = Callable[[Rollouts], Array]
"""`rollouts -> [B, T]` int32: the step of each trained token from 0, -1 elsewhere."""


def turns(rollouts: Rollouts) -> Array:
    """The steps that the rollouts name, `rollouts.step`: turns, where an environment has them."""
    return jnp.where(rollouts.mask != 0, rollouts.step, -1)


def delimiter(rollouts: Rollouts, *, delimiters: Any) -> Array:
    """`advantages.segment_by_delimiter`."""
    return advantages.segment_by_delimiter(rollouts.tokens, rollouts.mask, delimiters)


def length(rollouts: Rollouts, *, num_steps: int) -> Array:
    """`advantages.segment_by_length`."""
    return advantages.segment_by_length(rollouts.mask, num_steps=num_steps)


def entropy(rollouts: Rollouts, *, num_steps: int, fraction: float = 0.2) -> Array:
    """`advantages.segment_by_entropy`, with the entropies that sampling recorded."""
    if "entropy" not in rollouts.extras:
        raise ValueError(
            "steps by entropy read rollouts.extras['entropy'], [B, T] in nats, which rollout.generate records"
        )
    found = rollouts.extras["entropy"]
    return advantages.segment_by_entropy(found, rollouts.mask, num_steps=num_steps, fraction=fraction)


SEGMENTERS: Mapping[str, Callable[..., Array]] = {
    "delimiter": delimiter,
    "entropy": entropy,
    "length": length,
    "turns": turns,
}
"""Ways to cut a trajectory, by name."""


def as_segmenter(choice: Choice) -> Segmenter:
    """The function that a choice means: a name of `SEGMENTERS`, a mapping of `name` and keywords, or a function.

    Args:
        choice: `"turns"`, `{"name": "delimiter", "delimiters": [[13, 13]]}`, `{"name": "length", "num_steps": 4}`,
            `{"name": "entropy", "num_steps": 4}`, or `rollouts -> [B, T]`.

    Raises:
        ValueError: for an unknown name or keyword, or one that is missing.

    Example:
        >>> from jaxrl_post import data
        >>> rollouts = data.to_rollouts([[7]], [[[1, 1, 2, 2]]], length=6)
        >>> as_segmenter({"name": "length", "num_steps": 2})(rollouts).tolist()
        [[-1, 0, 0, 1, 1, -1]]
    """
    function = choose("steps", choice, SEGMENTERS, {})
    parameters = inspect.signature(function).parameters.values()
    required = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if required:
        raise ValueError(f"steps {choice!r} needs {', '.join(required)}; give a mapping of name and keywords")
    return function

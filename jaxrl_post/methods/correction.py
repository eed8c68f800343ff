"""Corrections for a sampler whose log-probs differ from the trained model's, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxrl_post.methods.choices import Choice, choose
from jaxrl_post.types import Array

Correction = Callable[[Array, Array, Array], tuple[Array, Array]]
"""`(old_logp, sampler_logp, mask) -> (weights, mask)`, each `[B, T]`."""

CORRECTIONS: dict[str, Callable[..., tuple[Array, Array]]] = {}
"""Corrections by name."""


def as_corrections(choice: Choice | list | tuple | None) -> list[Correction]:
    """The corrections that a choice, a list of choices or None means.

    Raises:
        ValueError: for an unknown name or keyword.

    Example:
        >>> as_corrections(None)
        []
    """
    if choice is None:
        return []
    many: list[Any] = list(choice) if isinstance(choice, list | tuple) else [choice]
    return [choose("correction", one, CORRECTIONS, {}) for one in many]

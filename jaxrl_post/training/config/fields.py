"""A field of a section: its meaning, bounds and name in YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


def option(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    factory: Callable[[], Any] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    key: str | None = None,
) -> Any:
    """A field with its meaning and bounds; required if it has neither `default` nor `factory`.

    Args:
        help: meaning and unit, one line.
        default: value where the file says nothing.
        factory: makes the default of a section or container.
        minimum: smallest allowed value.
        above: the value must be larger.
        maximum: largest allowed value.
        below: the value must be smaller.
        key: name in YAML where it cannot be the field's (a Python keyword).
    """
    bounds = {"minimum": minimum, "above": above, "maximum": maximum, "below": below}
    metadata = {
        "help": help,
        "key": key,
        "bounds": {name: value for name, value in bounds.items() if value is not None},
    }
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def yaml_key(field: dataclasses.Field[Any]) -> str:
    """The name that `field` has in YAML."""
    return field.metadata.get("key") or field.name

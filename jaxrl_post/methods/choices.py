"""Parts of a method chosen by name, as YAML writes them: `cispo`, or `{name: cispo, clip_high: 5.0}`."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Choice: TypeAlias = str | Mapping[str, Any] | Callable[..., Any]
"""A name out of a table, a mapping of `name` and keywords, or a function of the caller's own."""


def choose(what: str, choice: Choice, table: Mapping[str, Callable], defaults: Mapping[str, Any]) -> Callable:
    """The function that a choice means, with its keywords bound.

    Args:
        what: what is chosen, for messages.
        choice: see `Choice`; a function is returned as it is.
        table: functions by name.
        defaults: keywords by name of function, which those of the choice override.

    Raises:
        ValueError: for a name that is not in the table, or a keyword that its function does not have.

    Example:
        >>> choose("loss", {"name": "scaled", "by": 3}, {"scaled": lambda x, *, by=2: by * x}, {})(5)
        15
    """
    if callable(choice):
        return choice
    given = {"name": choice} if isinstance(choice, str) else dict(choice)
    name = str(given.pop("name", None))
    if name not in table:
        raise ValueError(f"{what}: there is no {name!r}{_near(name, table)}")
    function = table[name]
    known = keywords(function)
    for key in given:
        if key not in known:
            raise ValueError(f"{what} {name!r} has no keyword {key!r}{_near(key, known) or '; it has none'}")
    bound = {**defaults.get(name, {}), **given}
    return functools.partial(function, **bound) if bound else function


def keywords(function: Callable) -> tuple[str, ...]:
    """Names of a function's keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


def call_by_name(function: Callable, available: Mapping[str, Any]) -> Any:
    """Call with those of `available` that the function's positional parameters name.

    Example:
        >>> call_by_name(lambda a, b: a - b, {"b": 1, "a": 3, "c": 7})
        2
    """
    return function(**{name: available[name] for name in inputs(function)})


def inputs(function: Callable) -> tuple[str, ...]:
    """Names of a function's positional parameters."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    return tuple(p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds)


def _near(name: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(known))}" if known else ""

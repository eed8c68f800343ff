"""From plain values to typed sections and back, with every mistake recorded under its key; nothing is read or run here.

A value that cannot be used becomes None in the section that is returned, and its key is marked in `Problems`, so that
checks of several fields can pass over it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Union

from jaxrl_post.training.config.errors import Problems, nearest, show
from jaxrl_post.training.config.fields import yaml_key
from jaxrl_post.training.config.schema import Config, MethodConfig

BAD: Any = object()
"""What `coerce` returns for a value that does not fit."""


def join(path: str, key: Any) -> str:
    """The dotted key of `key` inside `path`."""
    return f"{path}.{key}" if path else str(key)


@functools.cache
def section_fields(section: type) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Fields of a section by YAML key, each with its resolved type."""
    hints = typing.get_type_hints(section)
    return {yaml_key(field): (field, hints[field.name]) for field in dataclasses.fields(section)}


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether the field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The field's default, or None if it is required."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def type_name(hint: Any) -> str:
    """A type in the words of somebody who writes YAML."""
    if len(members(hint)) > 1:
        return " or ".join(type_name(member) for member in members(hint))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(show(choice) for choice in arguments)
    if origin in (tuple, list, Sequence):
        inner = [argument for argument in arguments if argument is not Ellipsis]
        return f"list of {type_name(inner[0])}" if inner else "list"
    if origin in (dict, Mapping) or hint in (dict, Mapping) or dataclasses.is_dataclass(hint):
        return "mapping"
    words = {
        int: "integer",
        float: "number",
        bool: "true or false",
        str: "text",
        type(None): "null",
        list: "list",
        tuple: "list",
    }
    return words.get(hint, "anything")


def coerce(value: Any, hint: Any, path: str, problems: Problems) -> Any:
    """`value` as `hint`, or `BAD` with the reason in `problems`.

    Whole numbers pass as floats, floats that are whole pass as integers (1e5), lists become tuples.

    Args:
        value: what the YAML holds.
        hint: a type: scalars, `Literal`, unions, lists, mappings and sections. A type outside these accepts anything.
        path: dotted key of the value.
        problems: takes what is wrong.
    """
    alternatives = members(hint)
    if len(alternatives) > 1:
        if value is None and type(None) in alternatives:
            return None
        rest = [member for member in alternatives if member is not type(None)]
        if len(rest) == 1:
            return coerce(value, rest[0], path, problems)
        # Where only one alternative has the value's form, what is wrong inside the value can be said in full.
        same_form = [member for member in rest if type_name(member).split()[0] == _form(value)]
        if len(same_form) == 1:
            return coerce(value, same_form[0], path, problems)
        # A type that YAML cannot hold (an array) would accept anything; it must not hide what the others refuse.
        for member in [member for member in rest if type_name(member) != "anything"] or rest:
            result = coerce(value, member, path, Problems())
            if result is not BAD:
                return result
        problems.add(path, f"must be {type_name(hint)}", value)
        return BAD
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return parse_section(hint, {} if value is None else value, path, problems)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        hint_text = nearest(value, [str(choice) for choice in arguments]) if isinstance(value, str) else ""
        problems.add(path, f"must be {type_name(hint)}" + (f"; {hint_text}" if "mean" in hint_text else ""), value)
        return BAD
    if origin in (tuple, list, Sequence) or hint in (tuple, list):
        if not isinstance(value, list | tuple):
            problems.add(path, f"must be a {type_name(hint)}; write [...] or one '- item' per line", value)
            return BAD
        inner = arguments[0] if arguments else Any
        items = [coerce(item, inner, join(path, index), problems) for index, item in enumerate(value)]
        return BAD if any(item is BAD for item in items) else tuple(items)
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        if not isinstance(value, Mapping):
            problems.add(path, "must be a mapping; write {key: value} or one 'key: value' per line", value)
            return BAD
        inner = arguments[1] if len(arguments) == 2 else Any
        result = {}
        for key, item in value.items():
            if not isinstance(key, str):
                problems.add(join(path, key), f"the key {show(key)} must be text; write it in quotes")
                return BAD
            result[key] = coerce(item, inner, join(path, key), problems)
        return BAD if any(item is BAD for item in result.values()) else result
    return _scalar(value, hint, path, problems)


def _form(value: Any) -> str:
    """`list` or `mapping`, the first word of the `type_name` of what could hold the value; empty for a scalar."""
    return "mapping" if isinstance(value, Mapping) else "list" if isinstance(value, list | tuple) else ""


def _scalar(value: Any, hint: Any, path: str, problems: Problems) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float:
        if is_number and math.isfinite(value):
            return float(value)
        problems.add(path, "must be a finite number", value)
    elif hint is int:
        if is_number and math.isfinite(value) and value == int(value):
            return int(value)
        problems.add(path, "must be an integer", value)
    elif hint is bool:
        if isinstance(value, bool):
            return value
        problems.add(path, "must be true or false", value)
    elif hint is str:
        if isinstance(value, str):
            return value
        problems.add(path, "must be text; write it in quotes", value)
    elif hint is type(None):
        if value is None:
            return None
        problems.add(path, "must be null", value)
    else:
        return value
    return BAD


def check_bounds(value: Any, bounds: Mapping[str, float], path: str, problems: Problems) -> bool:
    """Whether `value` is inside `bounds`; the reason goes to `problems` if it is not."""
    if value is None or not bounds:
        return True
    inside = (
        value >= bounds.get("minimum", value)
        and value <= bounds.get("maximum", value)
        and ("above" not in bounds or value > bounds["above"])
        and ("below" not in bounds or value < bounds["below"])
    )
    if not inside:
        problems.add(path, f"must be {bounds_text(bounds)}", value)
    return inside


def bounds_text(bounds: Mapping[str, float]) -> str:
    """Bounds in words.

    Example:
        >>> bounds_text({"above": 0, "maximum": 1})
        'above 0 and at most 1'
    """
    words = {"minimum": "at least", "above": "above", "maximum": "at most", "below": "below"}
    return " and ".join(f"{words[name]} {bound}" for name, bound in bounds.items())


def parse_section(section: type, values: Any, path: str, problems: Problems) -> Any:
    """An instance of the dataclass `section` from a mapping; fields with a problem hold None."""
    if not isinstance(values, Mapping):
        problems.add(path, "must be a section; write its keys indented below it", values)
        return BAD
    if section is MethodConfig and isinstance(values, Mapping):
        # The keywords stand beside the name; they are checked against the function's signature, not here.
        values = {"name": values.get("name", "grpo"), "keywords": {k: v for k, v in values.items() if k != "name"}}
    fields = section_fields(section)
    for key in values:
        if key not in fields:
            _unknown(section, str(key), values[key], path, problems)
    arguments: dict[str, Any] = {}
    for key, (field, hint) in fields.items():
        here = path if section is MethodConfig and key == "keywords" else join(path, key)
        section_types = [member for member in members(hint) if dataclasses.is_dataclass(member)]
        if key in values:
            value = coerce(values[key], hint, here, problems)
            if value is not BAD and not check_bounds(value, field.metadata["bounds"], here, problems):
                value = BAD
        elif not is_required(field):
            value = default_of(field)
        elif section_types:
            # A required section that is absent is read as empty, so that its required keys are named one by one.
            value = coerce({}, hint, here, problems)
        else:
            problems.add(here, f"is missing and has no default; it is the {field.metadata['help']}")
            value = BAD
        arguments[field.name] = None if value is BAD else value
    return section(**arguments)


def _unknown(section: type, key: str, value: Any, path: str, problems: Problems) -> None:
    elsewhere = [known for known in all_keys() if known.rsplit(".", 1)[-1] == key]
    hint = nearest(key, section_fields(section), prefix=path)
    if elsewhere and "did you mean" not in hint:
        hint = f"did you mean {min(elsewhere, key=len)!r}?"
    problems.add(join(path, key), f"unknown key; {hint}", value)


def all_keys() -> list[str]:
    """Every dotted key of the schema outside lists and mappings."""
    return [key for key, _, _ in walk(Config)]


def walk(section: type, path: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Dotted key, field and type of everything in `section`, sections before what they contain."""
    for key, (field, hint) in section_fields(section).items():
        here = join(path, key)
        yield here, field, hint
        for member in members(hint):
            if isinstance(member, type) and dataclasses.is_dataclass(member):
                yield from walk(member, here)


def plain(value: Any) -> Any:
    """A section, or anything inside one, as mappings, lists and scalars under YAML keys."""
    if isinstance(value, MethodConfig):
        return {"name": value.name, **plain(value.keywords)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {yaml_key(field): plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value

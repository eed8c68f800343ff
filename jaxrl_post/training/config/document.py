"""The reference of all configuration keys, made from the schema so that it cannot fall behind."""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from typing import Any

from jaxrl_post.training.config import yaml_text
from jaxrl_post.training.config.parsing import (
    bounds_text,
    default_of,
    is_required,
    join,
    members,
    plain,
    section_fields,
    type_name,
)
from jaxrl_post.training.config.schema import Config, MethodConfig


def document() -> str:
    """Every key with its type, bounds, default and meaning, one paragraph per section."""
    lines: list[str] = []
    _section(Config, "", lines)
    return "\n".join(lines).strip() + "\n"


def defaults() -> str:
    """A YAML file of all defaults; required keys stand in it as null, marked `required`."""
    return "\n".join(_yaml(Config, 0)) + "\n"


def _inner(hint: Any) -> tuple[Any, str]:
    # The section inside a type, and how the path goes on to it: directly, by number in a list, by name in a mapping.
    for member in members(hint):
        if isinstance(member, type) and dataclasses.is_dataclass(member):
            return member, ""
        arguments = typing.get_args(member)
        if typing.get_origin(member) is tuple and dataclasses.is_dataclass(arguments[0]):
            return arguments[0], ".<number>"
        if typing.get_origin(member) is dict and dataclasses.is_dataclass(arguments[1]):
            return arguments[1], ".<role>"
    return None, ""


def _default(field: dataclasses.Field[Any], is_section: bool) -> str:
    if is_required(field):
        return "" if is_section else "required"
    value = plain(default_of(field))
    return "" if is_section and isinstance(value, dict) and value else "default " + _inline(value)


def _inline(value: Any) -> str:
    text = yaml_text.write(value) if isinstance(value, str) else yaml_text.write([value])
    if isinstance(value, str):
        return text.removesuffix("\n").removesuffix("\n...")
    return "[]" if value in ((), []) else "{}" if value == {} else text.removeprefix("- ").strip()


def _section(section: type, path: str, lines: list[str]) -> None:
    later = []
    for key, (field, hint) in section_fields(section).items():
        here = join(path, key)
        inner, step = _inner(hint)
        if inner is not None:
            later.append((here + step, inner, field, step))
        if section is MethodConfig and key == "keywords":
            here = join(path, "<keyword>")
        if inner is not None and not step and not is_required(field) and default_of(field) is not None:
            continue
        if inner is not None and is_required(field):
            continue
        bounds = bounds_text(field.metadata["bounds"])
        facts = ", ".join(part for part in (type_name(hint), bounds, _default(field, inner is not None)) if part)
        lines.append(f"{here}  ({facts})")
        lines.extend(textwrap.wrap(field.metadata["help"], 100, initial_indent="    ", subsequent_indent="    "))
    for here, inner, field, _ in later:
        first = (inner.__doc__ or "").strip().splitlines()[0]
        lines.extend(["", f"# {here}: {first or field.metadata['help']}"])
        _section(inner, here, lines)


def _yaml(section: type, depth: int) -> list[str]:
    indent = "  " * depth
    lines = []
    for key, (field, hint) in section_fields(section).items():
        inner, step = _inner(hint)
        help_text = field.metadata["help"]
        if section is MethodConfig and key == "keywords":
            continue
        if inner is not None and not step and (is_required(field) or default_of(field) is not None):
            lines.append(f"{indent}{key}:  # {help_text}")
            lines.extend(_yaml(inner, depth + 1))
        elif is_required(field):
            lines.append(f"{indent}{key}: null  # required: {help_text}")
        else:
            lines.append(f"{indent}{key}: {_inline(plain(default_of(field)))}  # {help_text}")
    return lines

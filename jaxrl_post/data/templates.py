"""Text templates over the columns of a row: `{question}`, `{reward_model.ground_truth}`, `{options: }`."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping
from decimal import Decimal
from typing import Any


class _Template(string.Formatter):
    def get_field(self, field_name: str, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        return lookup(field_name, kwargs), field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        # Python's brackets and quotes around a list are noise in a prompt.
        if isinstance(value, list | tuple):
            return (format_spec or ",").join(str(item) for item in value)
        if isinstance(value, float) and not format_spec:
            return digits(value)
        return super().format_field(value, format_spec)


def digits(number: float) -> str:
    """A number as people write it, without an exponent.

    Example:
        >>> digits(1e-05), digits(2.5), digits(1e16)
        ('0.00001', '2.5', '10000000000000000')
    """
    return f"{Decimal(repr(float(number))):f}" if math.isfinite(number) else str(number)


def lookup(field: str, row: Mapping[str, Any]) -> Any:
    """The value of a field, which may lie deeper in a row: `reward_model.ground_truth`, `choices[0].text`.

    Args:
        field: name of a column, or names and list positions on the way to a value. A column whose own name holds the
            dots is found first.
        row: the columns.

    Returns:
        The value.

    Raises:
        KeyError: if there is no such column or key.
        IndexError: if a list is too short.
        TypeError: if the way leads through something that has no parts.

    Example:
        >>> lookup("choices[1].text", {"choices": [{"text": "no"}, {"text": "yes"}]})
        'yes'
    """
    if field in row:
        return row[field]
    value: Any = row
    for part in field.replace("[", ".").replace("]", "").split("."):
        if isinstance(value, Mapping):
            value = value[part]
        elif isinstance(value, list | tuple):
            value = value[int(part)]
        else:
            raise TypeError(f"{part!r} is looked for in {type(value).__name__}, which has no parts")
    return value


def bare_field(template: str) -> str | None:
    """The field of a template that is one field and nothing else, as `{messages}`; None for any other template.

    Example:
        >>> bare_field("{messages}"), bare_field("{question}?"), bare_field("{numbers: }")
        ('messages', None, None)
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError:
        return None
    if len(parts) != 1:
        return None
    literal, field, spec, conversion = parts[0]
    return field if field and not (literal or spec or conversion) else None


def render(template: str, keys: Mapping[str, Any], column: str, *, nulls: bool = True) -> str:
    """A template filled in. Lists are joined by commas, or by the text after a colon: `{numbers: }` joins by spaces.

    Args:
        template: text with fields in braces, as `lookup` takes them.
        keys: what the fields name.
        column: what is made, for the message.
        nulls: whether a field may be None.

    Returns:
        The text.

    Raises:
        ValueError: if a field is not there, or None though `nulls` is False.

    Example:
        >>> render("{numbers}={target}", {"numbers": [1, 2], "target": 3}, "prompt")
        '1,2=3'
    """
    try:
        if not nulls:
            for _, field, _, _ in string.Formatter().parse(template):
                if field and lookup(field, keys) is None:
                    raise ValueError(f"{field!r} is null")
        return _Template().vformat(template, (), keys)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"the {column} template {template!r} cannot be filled ({type(error).__name__}: {error}); its keys are "
            f"{', '.join(sorted(keys)) or 'none'} (a brace that is meant as text is written twice)"
        ) from error

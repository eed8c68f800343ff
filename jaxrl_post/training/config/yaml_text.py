"""YAML as configurations use it: plain scalars as in YAML 1.2, and a key given twice is an error.

YAML 1.1, which PyYAML implements, reads `3e-3` as text, `no` as false and `1:30` as 90; all three have spoiled runs.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from jaxrl_post.training.config.errors import ConfigError

_PLAIN_SCALARS = (
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("tag:yaml.org,2002:int", r"^[-+]?(?:0|[1-9][0-9_]*)$", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+0123456789."),
    ),
    ("tag:yaml.org,2002:merge", r"^<<$", ["<"]),
)


class _Loader(yaml.SafeLoader):
    """Safe loader that remembers keys given twice instead of keeping the last."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (the class attribute is PyYAML's interface)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[str] = []

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in getattr(node, "value", []):
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            line = key_node.start_mark.line + 1
            if key_node.value in seen:
                self.duplicates.append(
                    f"{key_node.value}: given twice, on lines {seen[key_node.value]} and {line}; keep one of them"
                )
            seen.setdefault(key_node.value, line)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe dumper that quotes exactly the text which `_Loader` would read as something else."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    for _tag, _pattern, _first in _PLAIN_SCALARS:
        _class.add_implicit_resolver(_tag, re.compile(_pattern), _first)


def read(text: str, source: str) -> tuple[Any, list[str]]:
    """The value of a YAML document, and the sentences about keys that were given twice.

    Raises:
        ConfigError: the text is not YAML.

    Example:
        >>> read("rate: 3e-3", "text")
        ({'rate': 0.003}, [])
    """
    try:
        loader = _Loader(text)
        try:
            value = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(
            [f"not valid YAML: {where}{error.problem or error.context}; check indentation, colons and quotes there"],
            source,
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError([f"not valid YAML: {error}"], source) from error
    return value, loader.duplicates


def write(value: Any) -> str:
    """`value` as YAML that `read` gives back unchanged; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)

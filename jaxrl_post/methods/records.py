"""The record of every method: what it is, where its functions are, and what its claim check measured."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import yaml


@dataclasses.dataclass(frozen=True)
class Record:
    """A method of the catalog.

    Attributes:
        id: its name in configurations and on the command line, e.g. `mc-grpo`.
        title: of the paper, or the usual name.
        family: e.g. `policy gradient`.
        functions: dotted names of the public functions it consists of.
        summary: what it does, in a sentence.
        formula: its core, in a line.
        arxiv: number of the paper, or None.
        method: name of the function of `jaxrl_post.methods` that makes it, or None.
        config: path of a configuration that trains it, or None.
        claim: the test that measures the paper's claim.
        claim_result: `held`, means of the outcome for `method` and `baseline`, 95% `interval` of the effect, `seeds`.
    """

    id: str
    title: str
    family: str
    functions: tuple[str, ...]
    summary: str = ""
    formula: str = ""
    arxiv: str | None = None
    method: str | None = None
    config: str | None = None
    claim: str | None = None
    claim_result: Mapping[str, Any] | None = None


@functools.cache
def catalog() -> tuple[Record, ...]:
    """Every method that the library holds, in the order of families.

    Example:
        >>> [record.arxiv for record in catalog() if record.id == "mc-grpo"]
        ['2601.22582']
    """
    text = resources.files("jaxrl_post.methods").joinpath("catalog.yaml").read_text(encoding="utf-8")
    return tuple(Record(**{**row, "functions": tuple(row["functions"])}) for row in yaml.safe_load(text))


def to_yaml(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as the text of the catalog's file: one block a row, a blank line between."""
    names = [field.name for field in dataclasses.fields(Record)]
    blocks = []
    for row in rows:
        ordered = {name: row[name] for name in names if row.get(name) not in (None, "", [])}
        text = yaml.safe_dump([ordered], sort_keys=False, width=118, allow_unicode=True, default_flow_style=None)
        blocks.append(text)
    return "# The catalog of methods. Results of claims are written by `python -m tests.claims.record`.\n" + "\n".join(
        blocks
    )

"""The record of every method: what it is, where its functions are, and what its claim check measured."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
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
        note: what a reader of the result should know, e.g. where else the claim was tried and how it went.
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
    note: str | None = None
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


def search(words: Sequence[str] = (), family: str | None = None) -> list[Record]:
    """Records whose text holds every word, of one family if it is given; case does not matter.

    Example:
        >>> [record.id for record in search(["median-centered"])]
        ['mc-grpo']
    """
    found = []
    for record in catalog():
        text = " ".join(str(value) for value in dataclasses.astuple(record)).lower()
        if (family is None or record.family == family) and all(word.lower() in text for word in words):
            found.append(record)
    return found


def result_text(record: Record) -> str:
    """What the record's claim check measured, in a sentence.

    Example:
        >>> result_text(Record("x", "X", "y", ()))
        'not measured'
    """
    result = record.claim_result
    if result is None:
        return "not measured"
    low, high = result["interval"]
    verdict = "held" if result["held"] else "did not hold"
    return (
        f"{verdict}: {result['method']:.3g} against {result['baseline']:.3g}, difference in [{low:.3g}, {high:.3g}] "
        f"(95%, {result['seeds']} seeds)"
    )


def describe(record: Record) -> str:
    """Everything that is known of a method, as text for a terminal: record, functions, arguments, what was measured."""
    parts = [f"{record.id}: {record.title}"]
    parts += [f"family: {record.family}"] + ([f"paper: https://arxiv.org/abs/{record.arxiv}"] if record.arxiv else [])
    parts += [text for text in (record.summary, record.formula) if text]
    parts.append("functions:\n" + "\n".join(f"  {name}{_signature(name)}" for name in record.functions))
    if record.method is not None:
        function = _resolve(f"jaxrl_post.methods.{record.method}")
        parts.append(f"methods.{record.method}: " + (inspect.getdoc(function) or ""))
    if record.config is not None:
        parts.append(f"train it: jaxrl-post train {record.config}")
    parts.append(f"claim: {record.claim or 'no check'}\n  {result_text(record)}")
    parts += [f"note: {record.note}"] if record.note else []
    return "\n\n".join(parts)


def unrecorded(words: Sequence[str] = ()) -> dict[str, str]:
    """Methods that no record is about, as a configuration names them, and what each is; those that hold every word.

    Example:
        >>> list(unrecorded(["supervised"]))
        ['sft']
    """
    module = importlib.import_module("jaxrl_post.methods")
    known = {record.method for record in catalog()}
    found = {}
    for name in sorted(set(module.__all__) - known):
        function = getattr(module, name)
        if not inspect.isfunction(function):
            continue
        signature = inspect.signature(function)
        alone = all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in signature.parameters.values())
        if signature.return_annotation == "Method" and alone:
            first = (inspect.getdoc(function) or "").partition("\n")[0]
            if all(word.lower() in f"{name} {first}".lower() for word in words):
                found[name] = first
    return found


def without_record(name: str) -> str | None:
    """What is known of a public function of `jaxrl_post.methods` that no record is about; None if there is none.

    Example:
        >>> without_record("dpo").splitlines()[0].startswith("methods.dpo(")
        True
    """
    module = importlib.import_module("jaxrl_post.methods")
    function = getattr(module, name, None) if name in module.__all__ else None
    if not inspect.isfunction(function):
        return None
    return f"methods.{name}{_signature(f'jaxrl_post.methods.{name}')}\n\n{inspect.getdoc(function)}"


def _resolve(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _signature(name: str) -> str:
    try:
        parameters = inspect.signature(_resolve(name)).parameters.values()
    except (TypeError, ValueError):  # a class without a signature
        return ""
    shown = [f"{p.name}={p.default!r}" if p.default is not p.empty else str(p).split(":")[0] for p in parameters]
    return f"({', '.join(shown)})"


def table() -> str:
    """The catalog as a Markdown table, which the README holds."""
    lines = ["| method | what it does | paper | claim |", "|---|---|---|---|"]
    for record in catalog():
        name = f"[`{record.id}`]({record.config})" if record.config else f"`{record.id}`"
        paper = f"[{record.arxiv}](https://arxiv.org/abs/{record.arxiv})" if record.arxiv else ""
        held = {None: "not measured", True: "held", False: "did not hold"}[
            None if record.claim_result is None else bool(record.claim_result["held"])
        ]
        held += "; see note" if record.note else ""
        lines.append(f"| {name} | {record.summary} | {paper} | {held} |")
    return "\n".join(lines)


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

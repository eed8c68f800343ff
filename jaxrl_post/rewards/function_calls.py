"""A reward for calls of functions: right form, and the same calls as wanted, compared as syntax trees.

Calls are read as JSON or as Python, and never made: of Python only literals are understood.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from jaxrl_post.rewards.verifiable import row_by_row

MAX_CHARACTERS = 20_000
"""Longer text is not parsed."""

MAX_DEPTH = 50
"""Values nested deeper are none: what a model writes may go on beyond the stack."""

Tags: TypeAlias = tuple[str, str]


class Call(NamedTuple):
    """A call: `name`, a dotted name, and its `arguments` by name; those without a name are numbered from 0."""

    name: str
    arguments: Mapping[str | int, Any]


def parse_calls(text: str) -> list[Call] | None:
    """The calls that a text consists of, written as JSON or as Python.

    Args:
        text: `{"name": "f", "arguments": {"a": 1}}`, or a JSON list of such, or one on each line; or `f(a=1)`, or
            `[f(a=1), g()]`, or one call on each line. The arguments of JSON may also be called `parameters`, or be a
            text that is JSON itself.

    Returns:
        The calls; None if the text is anything else, or holds what is not a literal.

    Example:
        >>> parse_calls('[f(a=1, b="x")]') == parse_calls('{"name": "f", "arguments": {"b": "x", "a": 1}}')
        True
        >>> parse_calls("f(a=g())") is None
        True
    """
    text = text.strip()
    if not text or len(text) > MAX_CHARACTERS:
        return None
    for parse in (_from_json, _from_json_lines, _from_python):
        try:
            calls = parse(text)
            for call in calls:
                _typed(call.arguments)
            return calls
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
    return None


def ast_equal(calls: Sequence[Call], gold: Sequence[Call]) -> bool:
    """Whether two lists hold the same calls, as often each, in any order.

    Arguments are compared by name, in any order, and with their types: 1 is neither "1", 1.0 nor True.

    Args:
        calls: see `parse_calls`.
        gold: what is wanted.

    Example:
        >>> f = lambda **arguments: [Call("f", arguments)]
        >>> ast_equal(f(a=1, b="x"), f(b="x", a=1)), ast_equal(f(a=1), f(a="1"))
        (True, False)

    Reference: Exploring Superior Function Calls via Reinforcement Learning (arXiv 2508.05118).
    """
    one, other = (Counter((call.name, _typed(call.arguments)) for call in side) for side in (calls, gold))
    return one == other


def function_call_reward(
    *, think: Tags | None = ("<think>", "</think>"), call: Tags | None = ("<tool_call>", "</tool_call>")
) -> Callable[..., list[float | None]]:
    """A reward function: 1 where form and calls are right, otherwise 0.

    The form is a span of reasoning, then nothing but spans of calls. Every call wanted must be there, none else, see
    `ast_equal`.

    Args:
        think: what opens and closes the reasoning; its opening may stand in the prompt and be missing. None for no
            reasoning.
        call: what opens and closes a span of calls; None where all that follows the reasoning is calls.

    Returns:
        `(prompts, completions, answer, **columns) -> list[float | None]`: `answer` holds the calls wanted, in a form
        that `parse_calls` reads, as what JSON gives for it, or as `Call`s; an empty list wants no call, None gives
        None.

    Raises:
        ValueError: if a tag is empty. By the reward, if an answer holds no calls.

    Example:
        >>> reward = function_call_reward()
        >>> text = '<think>Ada asks.</think> <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
        >>> reward(["?", "?"], [text, "f(a=1)"], answer=["f(a=1)", "f(a=1)"])
        [1.0, 0.0]

    Reference: Exploring Superior Function Calls via Reinforcement Learning (arXiv 2508.05118).
    """
    for tags in (think, call):
        if tags is not None and not all(tags):
            raise ValueError(f"tags must not be empty, got {tags}; give None for no tags")

    def reward(
        prompts: Sequence[str], completions: Sequence[str], answer: Sequence[Any], **columns: object
    ) -> list[float | None]:
        del prompts, columns
        pairs = list(zip(completions, answer, strict=True))

        def one(row: int) -> float | None:
            completion, wanted = pairs[row]
            if wanted is None:
                return None
            right = _wanted(wanted)  # an answer that holds no calls is an error whatever the completion is
            found = _calls_of(completion, think, call)
            return float(found is not None and ast_equal(found, right))

        return row_by_row(len(pairs), one)

    return reward


def function_calls(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[Any]) -> list[float | None]:
    """`function_call_reward` with its default tags.

    Args:
        prompts: `N` texts; not looked at.
        completions: `N` texts.
        answer: `N` times the calls wanted.

    Returns:
        `N` rewards; None where there is no answer to compare with.

    Example:
        >>> text = "<think>a is one</think><tool_call>f(a=1)</tool_call>"
        >>> function_calls(["?", "?"], [text, text], answer=['{"name": "f", "arguments": {"a": 1}}', "f(a=2)"])
        [1.0, 0.0]
    """
    return function_call_reward()(prompts, completions, answer)


def _calls_of(completion: str, think: Tags | None, call: Tags | None) -> list[Call] | None:
    """The calls of a completion of the right form; None for another form."""
    text = completion.strip()
    if think is not None:
        before, closing, text = text.partition(think[1])
        if not closing or think[0] in before.removeprefix(think[0]) or any(tag in text for tag in think):
            return None
        text = text.strip()
    if call is None:
        return parse_calls(text) if text else []
    calls: list[Call] = []
    while text:
        inside, closing, rest = text.removeprefix(call[0]).partition(call[1])
        found = parse_calls(inside) if text.startswith(call[0]) and closing else None
        if found is None:
            return None
        calls, text = calls + found, rest.strip()
    return calls


def _wanted(answer: Any) -> list[Call]:
    if isinstance(answer, str):
        found = parse_calls(answer) if answer.strip() else []
    elif isinstance(answer, Sequence) and not isinstance(answer, Call):
        found = [item if isinstance(item, Call) else _from_record(item) for item in answer]
    else:
        found = [answer if isinstance(answer, Call) else _from_record(answer)]
    if found is None:
        raise ValueError(f"answer must hold calls as JSON or as Python, got {answer!r}")
    return found


def _from_record(record: Any) -> Call:
    if not isinstance(record, Mapping) or not isinstance(record.get("name"), str):
        raise ValueError(f"a call is a mapping with a name and arguments, got {record!r}")
    if unknown := set(record) - {"name", "arguments", "parameters"}:
        raise ValueError(f"a call has a name and arguments, not {sorted(map(str, unknown))[0]!r}")
    if "arguments" in record and "parameters" in record:
        raise ValueError("a call has arguments or parameters, not both")
    arguments = record.get("arguments", record.get("parameters", {}))
    arguments = _load(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, Mapping):
        raise ValueError(f"the arguments of a call are a mapping, got {arguments!r}")
    return Call(record["name"], dict(arguments))


def _load(text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name is given twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=once)


def _from_json(text: str) -> list[Call]:
    found = _load(text)
    return [_from_record(record) for record in (found if isinstance(found, list) else [found])]


def _from_json_lines(text: str) -> list[Call]:
    return [_from_record(_load(line)) for line in text.splitlines() if line.strip()]


def _from_python(text: str) -> list[Call]:
    calls: list[ast.expr] = []
    for statement in ast.parse(text).body:
        if not isinstance(statement, ast.Expr):
            raise ValueError("only calls, no statements")
        value = statement.value
        calls += value.elts if isinstance(value, ast.List | ast.Tuple) else [value]
    return [_from_tree(call) for call in calls]


def _from_tree(tree: ast.expr) -> Call:
    if not isinstance(tree, ast.Call):
        raise ValueError("not a call")
    arguments: dict[str | int, Any] = {place: ast.literal_eval(value) for place, value in enumerate(tree.args)}
    for keyword in tree.keywords:
        if keyword.arg is None:
            raise ValueError("**arguments are not literals")
        if keyword.arg in arguments:
            raise ValueError("a name is given twice")
        arguments[keyword.arg] = ast.literal_eval(keyword.value)
    return Call(ast.unparse(_dotted(tree.func)), arguments)


def _dotted(tree: ast.expr) -> ast.expr:
    part = tree
    while isinstance(part, ast.Attribute):
        part = part.value
    if not isinstance(part, ast.Name):
        raise ValueError("a function is named by a dotted name")
    return tree


def _typed(value: Any, depth: int = 0) -> Hashable:
    """A value that equals only values of the same type, and can be counted."""
    if depth > MAX_DEPTH:
        raise ValueError(f"a value is nested deeper than {MAX_DEPTH}")
    if isinstance(value, Mapping):
        return dict, frozenset((_typed(key, depth + 1), _typed(item, depth + 1)) for key, item in value.items())
    if isinstance(value, set | frozenset):
        return set, frozenset(_typed(item, depth + 1) for item in value)
    if isinstance(value, list | tuple):
        return type(value), tuple(_typed(item, depth + 1) for item in value)
    return type(value), value

"""Changes of a configuration: by a file that has a `base`, and by `a.b.c=value` on the command line.

The key of an override is held against the schema here already, so that a message shows it as it was typed. Which of
them an evaluation may make stands here too.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from jaxrl_post.training.config import yaml_text
from jaxrl_post.training.config.errors import ConfigError, Problems, near, nearest
from jaxrl_post.training.config.parsing import all_keys, members, section_fields
from jaxrl_post.training.config.schema import Config, MethodConfig

REPLACED = frozenset({"method", "rewards", "roles"})
"""Sections that are given as a whole, because their keys belong together."""

EVALUATION_KEYS = (
    "eval",
    "data.eval_files",
    "mesh",
    "logging",
    "rewards",
    "on_reward_error",
    "rollout.sampling",
    "rollout.mesh",
)
"""Keys, or sections, that say how a model is measured; all others say how it was made."""


def merge(base: Any, values: Any, path: tuple[str, ...] = ()) -> Any:
    """`values` over `base`: keys of sections one by one, all else, and what is in `REPLACED`, as a whole.

    Null in the place of a section changes nothing, unless the schema has null for it.

    Args:
        base: what is changed.
        values: what it is changed to.
        path: keys that lead to both.

    Example:
        >>> base = {"model": {"path": "a", "width": 8}, "warm_start": {"steps": 3}, "seed": 1}
        >>> merge(base, {"model": {"width": 4}, "warm_start": None})
        {'model': {'path': 'a', 'width': 4}, 'warm_start': None, 'seed': 1}
        >>> merge(base, {"model": None}) == base
        True
    """
    if values is None and isinstance(base, dict) and not _takes_null(path):
        return base
    if not isinstance(base, dict) or not isinstance(values, dict) or not REPLACED.isdisjoint(path[:1]):
        return values
    return {**base, **{key: merge(base.get(key), value, (*path, str(key))) for key, value in values.items()}}


def _takes_null(path: Sequence[str]) -> bool:
    hint, _ = _follow(path)
    return hint is Any or type(None) in members(hint)


def override(values: Any, text: str, problems: Problems) -> None:
    """Change `values` in place as `a.b.c=value` says; the value is YAML, or plain text where the schema wants text.

    A section goes over the one that is there, see `merge`.

    Example:
        >>> values = {"rollout": {"prompts": 32}}
        >>> override(values, "rollout.prompts=8", Problems())
        >>> override(values, "training.optimizer.learning_rate=3e-3", Problems())
        >>> values
        {'rollout': {'prompts': 8}, 'training': {'optimizer': {'learning_rate': 0.003}}}
    """
    dotted, equals, raw = text.partition("=")
    dotted = dotted.strip()
    path = dotted.split(".")
    if not equals or not all(path):
        problems.add(text, "is not an override; write key=value, e.g. training.steps=100")
        return
    hint, wrong = _follow(path)
    if wrong:
        problems.add(dotted, wrong)
        return
    wants_text = str in members(hint)
    try:
        value, _ = yaml_text.read(raw, dotted)
        if wants_text and not isinstance(value, str) and value is not None:
            value = raw
    except ConfigError as error:
        if not wants_text:
            problems.messages.extend(f"{dotted}={raw}: {message}" for message in error.problems)
            return
        value = raw
    _assign(values, path, value, problems)


def check_evaluation_overrides(overrides: Sequence[str]) -> None:
    """Refuse overrides that would describe another model than the one that was trained.

    Args:
        overrides: `a.b.c=value`. Those that are no overrides, or whose key does not exist, are left to `load`.

    Raises:
        ConfigError: names each override that does not say how the model is measured.

    Example:
        >>> check_evaluation_overrides(["eval.problems=64", "mesh.data=2"])
    """
    problems = Problems()
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or _follow(key.split("."))[1]:
            continue
        if not any(key == allowed or key.startswith(allowed + ".") for allowed in EVALUATION_KEYS):
            problems.add(
                f"{key}={value}",
                f"does not apply to a trained model; an evaluation can change {', '.join(EVALUATION_KEYS)}",
            )
    if problems.messages:
        raise ConfigError(problems.messages, "evaluation")


def _follow(path: Sequence[str]) -> tuple[Any, str]:
    """The type that the schema gives a dotted key (Any where it says nothing), and what is wrong with the key."""
    hint: Any = Config
    for depth, part in enumerate(path):
        if hint is Any:
            break
        here = ".".join(path[:depth])
        for member in members(hint):
            origin, arguments = typing.get_origin(member), typing.get_args(member)
            if isinstance(member, type) and dataclasses.is_dataclass(member):
                if member is MethodConfig and part != "name":
                    return Any, ""  # the method's keywords are checked against its function
                fields = section_fields(member)
                if part not in fields:
                    return None, f"unknown key; {_suggestion(path, depth, fields)}"
                hint = fields[part][1]
                break
            if origin is tuple:
                if not part.isdigit():
                    return None, f"{here} is a list; give the number of one of its items, e.g. {here}.0"
                hint = arguments[0]
                break
            if origin is dict:
                hint = arguments[1]
                break
        else:
            return None, f"{here} is not a section, so nothing inside it can be set"
    return hint, ""


def _suggestion(path: Sequence[str], depth: int, known: Iterable[str]) -> str:
    # The part that is wrong put right, if the rest then leads somewhere; or the same last part in another section.
    hint = nearest(path[depth], known, prefix=".".join(path[:depth]))
    if close := near(path[depth], known):
        corrected = [*path[:depth], close[0], *path[depth + 1 :]]
        _, wrong = _follow(corrected)
        if not wrong:
            return f"did you mean {'.'.join(corrected)!r}?"
        if "did you mean" in wrong:
            return wrong.removeprefix("unknown key; ")
    keys = all_keys()
    elsewhere = [key for key in keys if key.rsplit(".", 1)[-1] == path[-1]]
    if elsewhere:
        return f"did you mean {min(elsewhere, key=len)!r}?"
    whole = difflib.get_close_matches(".".join(path), keys, n=1, cutoff=0.6)
    return f"did you mean {whole[0]!r}?" if whole else hint


def _assign(values: Any, path: list[str], value: Any, problems: Problems) -> None:
    node = values
    for depth, part in enumerate(path):
        key: Any = part
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                problems.add(".".join(path), f"the list {'.'.join(path[:depth])} has items 0 to {len(node) - 1}")
                return
            key = int(part)
        elif not isinstance(node, dict):
            problems.add(".".join(path), f"{'.'.join(path[:depth])} is not a section, so nothing inside it can be set")
            return
        child = node[key] if isinstance(node, list) else node.get(key)
        if depth == len(path) - 1:
            node[key] = merge(child, value, tuple(path))
            return
        if child is None:
            child = node[key] = {}
        node = child

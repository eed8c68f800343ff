"""The method's name and keywords, held against the functions of `jaxrl_post.methods`, and what a method needs.

The signatures are the only description of the keywords: a method that gains one needs no change here.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from jaxrl_post.data import PRINTABLE, CharTokenizer, Tokenizer, load_tokenizer
from jaxrl_post.rewards.loading import load
from jaxrl_post.training.config.errors import Problems, nearest
from jaxrl_post.training.config.parsing import BAD, coerce, type_name
from jaxrl_post.training.config.schema import DataConfig, MethodConfig
from jaxrl_post.types import Method


def method_functions(namespace: Any = None) -> dict[str, Callable[..., Any]]:
    """The functions that make a method, by name.

    Args:
        namespace: where they are looked up; `jaxrl_post.methods` if None.
    """
    if namespace is None:
        from jaxrl_post import methods as namespace
    names = getattr(namespace, "__all__", None) or [name for name in vars(namespace) if not name.startswith("_")]
    found = {name: getattr(namespace, name) for name in names}
    return {name: function for name, function in found.items() if _makes_method(function)}


def find_method(name: str, namespace: Any = None) -> Callable[..., Any]:
    """The function that makes a method: one of `jaxrl_post.methods` by its name, or the user's own, `file.py:function`.

    Args:
        name: as a configuration has it.
        namespace: as in `method_functions`.

    Raises:
        ValueError: if there is none.
    """
    if ":" in name:
        return load(name)
    functions = method_functions(namespace)
    if name not in functions:
        raise ValueError(f"there is no such method; {nearest(name, functions)}")
    return functions[name]


def _makes_method(function: Any) -> bool:
    if not inspect.isfunction(function):
        return False
    annotation = inspect.signature(function).return_annotation
    # Annotations may be text (postponed evaluation), so the name is compared, not the class.
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    parameters = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    return name.rsplit(".", 1)[-1] == "Method" and all(p.kind in kinds for p in parameters)


def keyword_types(function: Callable[..., Any]) -> dict[str, Any]:
    """The type of each keyword: its annotation, else the type of its default, else anything.

    Keywords that many methods share are the fields of a `TypedDict`, `**options: Unpack[Options]`.
    """
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError):  # a name that only type checkers import
        hints = {}
    result = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            shared = typing.get_args(hints.get(name))
            result |= typing.get_type_hints(shared[0]) if shared else {}
            continue
        default = parameter.default
        guess = Any if default is parameter.empty or default is None else type(default)
        result[name] = hints.get(name, guess)
    return result


def encode_texts(method: MethodConfig, data: DataConfig | None, problems: Problems) -> MethodConfig:
    """The method with the token ids of each `{text: "..."}` among its keywords in its place."""

    def encode(value: Any, key: str) -> Any:
        if isinstance(value, Mapping) and set(value) == {"text"}:
            if not isinstance(value["text"], str) or not value["text"]:
                problems.add(f"{key}.text", "must be a text of at least one token", value["text"])
                return []
            if data is None:
                return []  # what is wrong with it has been said
            try:
                return list(map(int, tokenizer_of(data).encode(value["text"])))
            except (ValueError, OSError) as error:
                problems.add(f"{key}.text", str(error))
                return []
        if isinstance(value, Mapping):
            return {name: encode(item, f"{key}.{name}") for name, item in value.items()}
        return [encode(item, f"{key}.{i}") for i, item in enumerate(value)] if isinstance(value, list) else value

    keywords = {name: encode(value, f"method.{name}") for name, value in method.keywords.items()}
    return dataclasses.replace(method, keywords=keywords)


def tokenizer_of(options: DataConfig) -> Tokenizer:
    """The character tokenizer of `alphabet`, or the one at `tokenizer`."""
    if options.tokenizer is not None:
        return load_tokenizer(options.tokenizer, revision=options.tokenizer_revision)
    return CharTokenizer(options.alphabet or PRINTABLE)


def check_method(method: MethodConfig, problems: Problems, namespace: Any = None) -> tuple[MethodConfig, Method | None]:
    """The method with its keywords as the function wants them, and what the function returns (None after a problem)."""
    try:
        function = find_method(method.name, namespace)
    except ValueError as error:
        problems.add("method.name", str(error), method.name)
        return method, None
    label = method.name if ":" in method.name else f"methods.{method.name}"
    types = keyword_types(function)
    keywords: dict[str, Any] = {}
    for name, value in method.keywords.items():
        key = f"method.{name}"
        if name not in types:
            problems.add(key, f"{label} has no such keyword; {nearest(name, types, prefix='method')}", value)
            continue
        fitted = coerce(value, types[name], key, problems)
        if fitted is not BAD:
            keywords[name] = fitted
    for name, parameter in inspect.signature(function).parameters.items():
        required = parameter.default is parameter.empty and parameter.kind in (
            inspect.Parameter.KEYWORD_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,  # of a user's own function
        )
        if required and name not in method.keywords:
            problems.add(f"method.{name}", f"{label} needs this ({type_name(types[name])}); give it")
    _check_horizon(types, keywords, problems)
    if not problems.ok("method"):
        return method, None
    try:
        made = function(**keywords)
    except ValueError as error:
        subject = str(error).split()[0].split("=")[0]  # messages begin with the keyword that is wrong
        problems.add(f"method.{subject}" if subject in types else "method", str(error))
        return method, None
    if ":" in method.name and not isinstance(made, Method):
        problems.add(
            "method.name", f"must name a function that returns a Method, got {type(made).__name__}", method.name
        )
        return method, None
    return dataclasses.replace(method, keywords=keywords), made


def _check_horizon(types: dict[str, Any], keywords: dict[str, Any], problems: Problems) -> None:
    if "horizon" not in types or "aggregation" not in keywords:
        return  # the method knows its own default
    fixed = keywords.get("aggregation") == "seq_mean_token_sum_norm"
    if fixed and keywords.get("horizon") is None and problems.ok("method.horizon"):
        problems.add(
            "method.horizon",
            "is missing; aggregation seq_mean_token_sum_norm divides by it: give rollout.max_new_tokens",
        )
    elif not fixed and keywords.get("horizon") is not None and problems.ok("method.aggregation"):
        problems.add(
            "method.horizon",
            "does not apply: only aggregation seq_mean_token_sum_norm divides by it; leave it out",
            keywords["horizon"],
        )

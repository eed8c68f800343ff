"""The method's name and keywords, held against the functions of `jaxrl_post.methods`, and what a method needs.

The signatures are the only description of the keywords: a method that gains one needs no change here.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from typing import Any

from jaxrl_post.training.config.errors import Problems, nearest
from jaxrl_post.training.config.parsing import BAD, coerce, type_name
from jaxrl_post.training.config.schema import MethodConfig
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


def check_method(method: MethodConfig, problems: Problems, namespace: Any = None) -> tuple[MethodConfig, Method | None]:
    """The method with its keywords as the function wants them, and what the function returns (None after a problem)."""
    functions = method_functions(namespace)
    if method.name not in functions:
        problems.add("method.name", f"there is no such method; {nearest(method.name, functions)}", method.name)
        return method, None
    function = functions[method.name]
    types = keyword_types(function)
    keywords: dict[str, Any] = {}
    for name, value in method.keywords.items():
        key = f"method.{name}"
        if name not in types:
            problems.add(
                key, f"methods.{method.name} has no such keyword; {nearest(name, types, prefix='method')}", value
            )
            continue
        fitted = coerce(value, types[name], key, problems)
        if fitted is not BAD:
            keywords[name] = fitted
    for name, parameter in inspect.signature(function).parameters.items():
        required = parameter.default is parameter.empty and parameter.kind is inspect.Parameter.KEYWORD_ONLY
        if required and name not in method.keywords:
            problems.add(f"method.{name}", f"methods.{method.name} needs this ({type_name(types[name])}); give it")
    _check_horizon(types, keywords, problems)
    if not problems.ok("method"):
        return method, None
    try:
        made = function(**keywords)
    except ValueError as error:
        subject = str(error).split()[0].split("=")[0]  # messages begin with the keyword that is wrong
        problems.add(f"method.{subject}" if subject in types else "method", str(error))
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

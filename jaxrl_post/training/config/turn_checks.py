"""What must hold where the policy acts in an environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxrl_post import rewards
from jaxrl_post.rollout import environments
from jaxrl_post.training.config.content_checks import refuse_unused
from jaxrl_post.training.config.errors import ConfigError, Problems, nearest
from jaxrl_post.training.config.schema import Config
from jaxrl_post.types import Method

SHIPPED = ("calculator", "gridworld")


def find_environment(name: str) -> Callable[..., Any]:
    """The function that makes an environment written in JAX: one of this library, or the user's own.

    Raises:
        ConfigError: if there is none.
    """
    if ":" in name:
        return find_function(name, "data.environment")
    if name not in SHIPPED:
        raise ConfigError(
            [f"data.environment = {name!r}: there is no such environment; {nearest(name, SHIPPED)}, or path:function"]
        )
    return getattr(environments, name)


def find_function(name: str, key: str) -> Callable[..., Any]:
    """The user's function that the value of a key names.

    Raises:
        ConfigError: if there is none.
    """
    try:
        return rewards.load(name)
    except ValueError as error:
        raise ConfigError([f"{key} = {name!r}: {error}"]) from None


def check_turns(config: Config, made: Method, problems: Problems) -> None:
    """An environment against what the run samples, and against what makes groups in other ways."""
    data, rollout = config.data, config.rollout
    if data is None or rollout is None or not problems.ok("data.environment", "rollout"):
        return
    of_python = ("environment_options", "environment_timeout", "environment_error")
    if rollout.environment is None:
        refuse_unused(rollout, "rollout", of_python, "there is no rollout.environment", problems)
    if data.environment is None and rollout.environment is None:
        refuse_unused(rollout, "rollout", ("max_turns", "max_turn_tokens"), "there is no environment", problems)
        return
    if data.environment is not None and rollout.environment is not None:
        both = "exactly one of data.environment (written in JAX) and rollout.environment (in Python) can be given"
        problems.add("rollout.environment", f"{both}; remove one", rollout.environment)
        return
    key = "data.environment" if rollout.environment is None else "rollout.environment"
    if rollout.environment is not None:
        why = "rollout.environment is given, which is asked turn by turn"
        refuse_unused(rollout, "rollout", ("slots", "mesh"), why, problems)
        if ":" not in rollout.environment:
            problems.add(key, "must be module:function or file.py:function", rollout.environment)
    if made.learns_from != "rollouts":
        why = f"method {config.method.name} learns from given completions, where nobody acts"
        problems.add(key, f"{why}; leave it out", data.environment or rollout.environment)
    if rollout.max_turns is None:
        problems.add("rollout.max_turns", "is missing: the most actions that the policy may take, e.g. 8")
    if problems.ok("rollout.max_turn_tokens") and (rollout.max_turn_tokens or 0) > rollout.max_new_tokens:
        problems.add(
            "rollout.max_turn_tokens",
            f"one action may not be longer than all of rollout.max_new_tokens = {rollout.max_new_tokens}",
            rollout.max_turn_tokens,
        )
    why = f"{key} is given, where completions go on turn by turn"
    refuse_unused(rollout, "rollout", ("budgets", "budget_prompt", "exits"), why, problems)
    if config.warm_start is not None and data.environment is not None:
        problems.add("warm_start", "learns from worked examples, which data.environment does not have; leave it out")

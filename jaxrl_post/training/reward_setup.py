"""The reward functions that a configuration names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxrl_post import data, rewards
from jaxrl_post.training.config import Config, ConfigError
from jaxrl_post.training.config.content_checks import ENVIRONMENT_REWARD, reward_names
from jaxrl_post.training.config.turn_checks import find_function


def make_rewards(config: Config, train: Callable[[], data.Source]) -> list[rewards.RewardFunction]:
    """The reward functions of the configuration, by names that are unique.

    Raises:
        ConfigError: for a reward that the library, or the user's file, does not have.
    """
    made: list[rewards.RewardFunction] = []
    for number, (option, name) in enumerate(zip(config.rewards, reward_components(config), strict=True)):
        if option.path is not None:
            function = find_function(option.path, f"rewards.{number}.path")
            adapters = {"verl": rewards.from_verl, "verifiers": rewards.from_verifiers, "judge": rewards.from_judge}
            try:
                if option.adapter in adapters:
                    function = rewards.with_options(adapters[option.adapter], option.options)(function)
                else:
                    function = rewards.with_options(function, option.options)
            except ValueError as error:
                raise ConfigError([f"rewards.{number}.options: {error}"]) from None
        elif option.name == ENVIRONMENT_REWARD:
            function = _environment_reward
        elif option.name in ("task_score", "task_solved"):
            source = train()
            assert isinstance(source, data.ReasoningGymSource)  # the configuration's check has seen to it
            function = getattr(rewards, option.name)(source.score_answer)
        elif option.name in (known := reward_names()):
            function = rewards.with_options(getattr(rewards, option.name), option.options)
        else:
            raise ConfigError([f"rewards: there is no reward {option.name!r}; use {', '.join(known)} or path"])
        if option.threshold is not None:
            function = rewards.thresholded(function, option.threshold)
        made.append(rewards.RewardFunction(name, function, option.weight))
    return made


def check_reward_columns(
    config: Config, functions: Sequence[rewards.RewardFunction], problems: Any, *, sampled: bool, in_turns: bool
) -> None:
    """Raise ConfigError for a column that a reward function needs and problems lack, before anything is sampled.

    Args:
        config: of the run.
        functions: as they were made.
        problems: `problem_setup.Problems`.
        sampled: whether training samples completions; else held-out problems alone are scored.
        in_turns: whether an environment answers.
    """
    parts = {"rewards": problems.train.columns} if sampled else {}
    if config.data.eval_files and problems.held_out:
        parts["data.eval_files"] = data.columns(problems.held_out)
    for key, columns in parts.items():
        try:
            rewards.check_columns(functions, reward_columns(config, columns, in_turns=in_turns))
        except ValueError as error:
            raise ConfigError([f"{key}: {error}"]) from None


def reward_columns(config: Config, columns: Iterable[str], *, in_turns: bool) -> list[str]:
    """The names of what reward functions are given besides prompts and completions, of problems with such columns."""
    names = [name for name in columns if name != "prompt"]
    added = {"prompt_messages": config.data.chat, "environment_reward": in_turns}
    return [*names, *(name for name, present in added.items() if present)]


def _environment_reward(
    prompts: Sequence[str], completions: Sequence[str], environment_reward: Sequence[float], **columns: Any
) -> list[float]:
    """What the environment gave while the completions were sampled, which is known by now."""
    del prompts, completions, columns
    return list(environment_reward)


def reward_components(config: Config) -> list[str]:
    """The names of the reward's components, none of them twice."""
    names: list[str] = []
    for option in config.rewards:
        name = option.name if option.path is None else option.path.rpartition(":")[2]
        names.append(f"{name}_{len(names)}" if name in names else str(name))
    return names

"""What must hold between the fields that say what is trained on: problems, templates, tokenizer, rewards, files."""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import inspect
import string
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxrl_post.models.hub import is_path
from jaxrl_post.training.config.errors import Problems, nearest
from jaxrl_post.training.config.parsing import default_of, join
from jaxrl_post.training.config.schema import Config, DataConfig
from jaxrl_post.types import Method

TASK_REWARDS = ("task_score", "task_solved")
"""Rewards that are made from the scorer of `data.task`."""
ENVIRONMENT_REWARD = "environment"
"""The reward that an environment gives."""


def reward_names() -> list[str]:
    """The rewards that a configuration can name: functions of prompts and completions, and those of the data."""
    from jaxrl_post import rewards

    def takes_completions(function: object) -> bool:
        return inspect.isfunction(function) and [*inspect.signature(function).parameters][:2] == [
            "prompts",
            "completions",
        ]

    own = (name for name in rewards.__all__ if takes_completions(getattr(rewards, name)))
    return [*TASK_REWARDS, ENVIRONMENT_REWARD, *own]


def changed(section: Any, names: Iterable[str]) -> list[str]:
    """The fields among `names` whose value is not the default."""
    # Only values that differ from the default can be told from silence: a written-out configuration holds them all.
    fields = {field.name: field for field in dataclasses.fields(section)}
    return [name for name in names if getattr(section, name) != default_of(fields[name])]


def refuse_unused(section: Any, path: str, names: Iterable[str], why: str, problems: Problems) -> None:
    """A problem for each field among `names` that was set although it does not apply."""
    for name in changed(section, names):
        key = join(path, name)
        if problems.ok(key):
            problems.add(key, f"does not apply: {why}; leave it out", getattr(section, name))


def check_data(config: Config, made: Method | None, problems: Problems) -> None:
    """Problems, templates and tokenizer; `made` is the method, None if it could not be made."""
    data = config.data
    if data is None:
        return
    if problems.ok("data.task", "data.files", "data.environment"):
        _check_source(data, problems)
    if problems.ok("data.alphabet", "data.tokenizer"):
        if data.alphabet is not None and data.tokenizer is not None:
            problems.add(
                "data.tokenizer",
                "exactly one of data.alphabet and data.tokenizer can be given; remove one",
                data.tokenizer,
            )
        elif data.tokenizer_revision is not None and (data.tokenizer is None or Path(data.tokenizer).is_dir()):
            why = "it is for a tokenizer of the hub; leave it out"
            problems.add("data.tokenizer_revision", f"does not apply: {why}", data.tokenizer_revision)
        elif data.alphabet is not None:
            twice = sorted({character for character in data.alphabet if data.alphabet.count(character) > 1})
            if not data.alphabet:
                problems.add("data.alphabet", "must hold at least one character", data.alphabet)
            elif twice:
                problems.add("data.alphabet", f"holds {''.join(twice)!r} more than once; list each once", data.alphabet)
    if data.system is not None and not data.chat:
        problems.add(
            "data.system", "does not apply: data.chat is false; set it to true, or leave this out", data.system
        )
    for name in ("prompt", "answer", "chosen", "rejected"):
        if problems.ok(f"data.{name}") and getattr(data, name) is not None:
            _template(getattr(data, name), f"data.{name}", problems)
    if made is not None:
        if made.learns_from != "pairs":
            why = f"method {config.method.name} does not train on pairs"
            refuse_unused(data, "data", ("chosen", "rejected"), why, problems)
        elif data.task is not None:
            problems.add(
                "data.task",
                f"{config.method.name} trains on preference pairs, which no task has; give data.files",
                data.task,
            )


def _check_source(data: DataConfig, problems: Problems) -> None:
    given = [name for name in ("task", "files", "environment") if getattr(data, name)]
    of_files = ("eval_files", "kind", "split", "columns", "on_bad_row")
    of_texts = ("prompt", "answer", "chosen", "rejected", "lowercase", "chat", "system")
    if not given:
        problems.add("data", "nothing to train on; give data.task (a generator), data.files or data.environment")
    elif len(given) > 1:
        both = " and ".join(f"data.{name}" for name in given)
        problems.add(f"data.{given[-1]}", f"exactly one of {both} can be given; remove one", getattr(data, given[-1]))
    elif data.files:
        names = ("task_options", "environment_options", "size")
        refuse_unused(data, "data", names, "data.files is given, nothing is generated", problems)
    elif data.task:
        names = (*of_files, "environment_options")
        refuse_unused(data, "data", names, "data.task is given, whose generator makes all problems", problems)
    else:
        names = (*of_files, *of_texts, "task_options", "on_long_prompt")
        refuse_unused(data, "data", names, "data.environment is given, which makes all prompts", problems)


def _template(text: str, key: str, problems: Problems) -> None:
    try:
        columns = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        problems.add(key, f"is not a template: {error}; write a brace itself as {{{{ or }}}}", text)
        return
    if "" in columns or any(column.isdigit() for column in columns):
        problems.add(key, "must name its columns, e.g. {question}", text)
    elif not columns:
        problems.add(key, "names no column, so it is the same for every problem; write e.g. {question}", text)


def _check_compared(config: Config, key: str, value: str, problems: Problems) -> None:
    """A judge of pairs, or a vote, needs a group; on held-out problems neither says who is right."""
    rollout, held_out = config.rollout, config.eval
    if rollout is not None and problems.ok("rollout") and rollout.group_size < 2:
        why = "compares the completions of a group: give rollout.group_size of at least 2"
        problems.add(key, why, value)
    if len(config.rewards or ()) == 1 and held_out is not None and problems.ok("eval") and held_out.problems:
        what = "win rates say who is better" if value == "judge" else "a vote says who agrees"
        problems.warnings.append(
            f"{key} = {value}: a greedy completion has no other to be compared with, and {what}, not who is right: "
            "accuracy on held-out problems means nothing; set eval.problems to 0"
        )


def _check_reward_options(name: str, options: Mapping[str, Any], key: str, problems: Problems) -> None:
    """A reward of the library takes its keywords; those of the data and of environments have none."""
    from jaxrl_post import rewards

    taken: list[str] = []
    if name not in (*TASK_REWARDS, ENVIRONMENT_REWARD):
        parameters = inspect.signature(getattr(rewards, name)).parameters.values()
        taken = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for unknown in sorted(set(options) - set(taken)):
        hint = nearest(unknown, taken) if taken else f"{name} has no options"
        problems.add(f"{key}.{unknown}", f"there is no such option; {hint}", options[unknown])


def check_rewards(config: Config, made: Method | None, problems: Problems) -> None:
    """Each component of the reward, and that there is one where the method, if it could be made, needs it."""
    for index, reward in enumerate(config.rewards or ()):
        key = f"rewards.{index}"
        if reward is None or not problems.ok(key):
            continue
        if (reward.name is None) == (reward.path is None):
            problems.add(key, "give exactly one of name (a reward of this library) and path (a function of yours)")
        elif reward.name is not None:
            refuse_unused(reward, key, ("adapter",), "it is for a function given by path", problems)
            if reward.name not in (known := reward_names()):
                problems.add(f"{key}.name", f"there is no such reward; {nearest(reward.name, known)}", reward.name)
            elif reward.options and problems.ok(f"{key}.options"):
                _check_reward_options(reward.name, reward.options, f"{key}.options", problems)
            if reward.name == "agreement":
                _check_compared(config, f"{key}.name", "agreement", problems)
            if reward.name in TASK_REWARDS and config.data is not None and problems.ok("data") and not config.data.task:
                problems.add(f"{key}.name", "scores with the generator of data.task; give data.task", reward.name)
            if reward.name == ENVIRONMENT_REWARD and problems.ok("data", "rollout"):
                sections = (config.data, config.rollout)
                if not any(section is not None and section.environment for section in sections):
                    why = "is given by data.environment or rollout.environment, and there is none"
                    problems.add(f"{key}.name", why, reward.name)
        elif not all(reward.path.rpartition(":")[::2]):  # pyright: ignore[reportOptionalMemberAccess]
            problems.add(f"{key}.path", "must be module:function or file.py:function", reward.path)
        elif reward.adapter == "judge" and "against" not in reward.options:
            _check_compared(config, f"{key}.adapter", "judge", problems)
    if config.rewards and problems.ok("rewards") and all(reward.weight == 0 for reward in config.rewards):
        problems.add("rewards", "all have weight 0, so that there is nothing to learn from; give one another weight")
    if made is not None and made.learns_from == "rollouts" and problems.ok("rewards") and not config.rewards:
        problems.add(
            "rewards", f"method {config.method.name} needs at least one reward, e.g. [{{name: task_score}}]", []
        )


def check_files_exist(config: Config, problems: Problems) -> None:
    """Files and packages that the run needs."""
    data = config.data
    path = None if config.model is None else config.model.path
    if path is not None and is_path(path) and not Path(path).expanduser().is_dir():
        why = f"no such directory (looked from {Path.cwd()}); correct the path, or give a hub id like 'owner/name'"
        problems.add("model.path", why, path)
    for name in ("files", "eval_files"):
        if data is not None and problems.ok(f"data.{name}"):
            for index, file in enumerate(getattr(data, name)):
                if not Path(file).exists() and not glob.glob(file):
                    problems.add(
                        f"data.{name}.{index}", f"no such file (looked from {Path.cwd()}); correct the path", file
                    )
    for index, reward in enumerate(config.rewards or ()):
        if reward is not None and reward.path is not None and problems.ok(f"rewards.{index}"):
            file = reward.path.rpartition(":")[0]
            if file.endswith(".py") and not Path(file).is_file():
                problems.add(
                    f"rewards.{index}.path", f"no such file (looked from {Path.cwd()}); correct the path", reward.path
                )
    names = [reward.name for reward in config.rewards or () if reward is not None]
    if "math_verify" in names and importlib.util.find_spec("math_verify") is None:
        problems.add(
            f"rewards.{names.index('math_verify')}.name",
            "math-verify is not installed; pip install 'jaxrl-post[math]'",
            "math_verify",
        )
    if config.logging is not None and config.logging.wandb and importlib.util.find_spec("wandb") is None:
        problems.add(
            "logging.wandb", "wandb is not installed; pip install 'jaxrl-post[wandb]', or set it to false", True
        )

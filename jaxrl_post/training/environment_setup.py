"""The environment that a configuration names, its tasks as problems, and groups that act in one in Python."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post import data
from jaxrl_post.rollout.environments import Environment
from jaxrl_post.rollout.host_environment import HostEnvironment
from jaxrl_post.rollout.host_transcripts import failure_tokens
from jaxrl_post.training.config import Config, ConfigError
from jaxrl_post.training.config.content_checks import ENVIRONMENT_REWARD
from jaxrl_post.training.config.turn_checks import find_environment, find_function
from jaxrl_post.types import Array, Rollouts

TOKEN_REWARD = "environment_tokens"
"""`[B, T]` of the rewards of rollouts: the reward of each action on its last token, before weights and thresholds."""


class Turns(NamedTuple):
    """How the policy acts.

    Attributes:
        environment: that answers.
        max_turns: most actions.
        max_turn_tokens: longest action.
    """

    environment: Environment
    max_turns: int
    max_turn_tokens: int


class HostTurns(NamedTuple):
    """The same where the environment is written in Python.

    Attributes:
        environment: that answers.
        max_turns: most actions.
        max_turn_tokens: longest action.
        timeout: seconds that an answer may take.
        on_error: what the policy reads where there is no answer.
    """

    environment: HostEnvironment
    max_turns: int
    max_turn_tokens: int
    timeout: float
    on_error: str


def make_turns(config: Config, tokenizer: data.Tokenizer) -> Turns | HostTurns | None:
    """What `data.environment` or `rollout.environment` says; None without.

    Raises:
        ConfigError: if there is no such environment, it refuses its options, or its prompts are too long.
    """
    options, rollout = config.data, config.rollout
    longest = rollout.max_turn_tokens or rollout.max_new_tokens
    if rollout.environment is not None:
        make = find_function(rollout.environment, "rollout.environment")
        answers = _made(make, rollout.environment, rollout.environment_options, "rollout.environment")
        if not (callable(getattr(answers, "reset", None)) and callable(getattr(answers, "step", None))):
            why = f"must return an object with reset and step, got {type(answers).__name__}"
            raise ConfigError([f"rollout.environment: {rollout.environment} {why}"])
        try:
            failure_tokens("", tokenizer, rollout.environment_error)
        except ValueError as error:
            given = f"rollout.environment_error = {rollout.environment_error!r}"
            raise ConfigError([f"{given}: {error}; give a text of characters that it knows"]) from None
        assert rollout.max_turns is not None  # the configuration's check has seen to it
        return HostTurns(answers, rollout.max_turns, longest, rollout.environment_timeout, rollout.environment_error)
    if options.environment is None:
        return None
    keywords = {"vocabulary": tokenizer, **options.environment_options}
    environment = _made(find_environment(options.environment), options.environment, keywords, "data.environment")
    if not isinstance(environment, Environment):
        raise ConfigError(
            [f"data.environment: {options.environment} must return an Environment, got {type(environment).__name__}"]
        )
    if environment.max_prompt > options.max_prompt_length:
        raise ConfigError(
            [
                f"data.max_prompt_length = {options.max_prompt_length}: prompts of {options.environment} may have "
                f"{environment.max_prompt} tokens; give that many"
            ]
        )
    assert rollout.max_turns is not None  # the configuration's check has seen to it
    return Turns(environment, rollout.max_turns, longest)


def by_token(rollouts: Rollouts) -> dict[str, Array]:
    """What an environment gave, on the tokens that earned it, under a name beside that of the reward's component."""
    given = rollouts.rewards.get(ENVIRONMENT_REWARD)
    return {} if given is None else {TOKEN_REWARD: given}


def as_if_answered(rollouts: Rollouts) -> Rollouts:
    """Completions that nobody has answered, with all that those of `host_turns` hold; for their shapes."""
    counted = ("turns", "environment_errors", "environment_timeouts")
    extras = {name: jnp.zeros(rollouts.reward.shape, jnp.int32) for name in counted}
    return rollouts.replace(
        rewards={ENVIRONMENT_REWARD: jnp.zeros(rollouts.mask.shape, jnp.float32)}, extras={**rollouts.extras, **extras}
    )


def _made(make: Callable[..., Any], name: str, keywords: Mapping[str, Any], key: str) -> Any:
    try:
        return make(**keywords)
    except (TypeError, ValueError) as error:
        raise ConfigError([f"{key}_options: {name} refuses them: {error}"]) from None


class TaskSource:
    """The tasks of an environment as problems: columns `prompt`, `prompt_id`, `prompt_tokens`, `task`, and `identity`.

    `task` is its number. Two tasks are the same problem if they have the same prompt and begin in the same state, which
    `identity` tells: what has to be found out may not be in the prompt.

    Args:
        environment: whose tasks they are.
        tokenizer: gives the prompts' texts.
        first: number of the first task.
        size: number of tasks.

    Example:
        >>> from jaxrl_post.rollout import environments
        >>> tokenizer = data.CharTokenizer("0123456789-+*=()>?")
        >>> source = TaskSource(environments.calculator(vocabulary=tokenizer, terms=2), tokenizer, first=2, size=9)
        >>> source[0]["prompt"], source[0]["task"]
        ('5-2>', 2)
    """

    def __init__(self, environment: Environment, tokenizer: data.Tokenizer, *, first: int, size: int):
        self.columns = ("prompt", "prompt_id", "prompt_tokens", "task", data.IDENTITY)
        self._tokenizer, self._first, self._size = tokenizer, first, size
        self._reset = functools.partial(jax.jit(environment.reset), key=jax.random.key(0))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> data.Problem:
        if not 0 <= index < self._size:
            raise IndexError(f"task {index} of {self._size}")
        number = self._first + index
        state, text = self._reset(np.int32(number))
        tokens = np.asarray(text.tokens)[: int(text.length)].tolist()
        prompt = self._tokenizer.decode(tokens)
        begun = hashlib.sha256(b"".join(np.asarray(_raw(x)).tobytes() for x in jax.tree.leaves(state))).hexdigest()
        same = {data.IDENTITY: f"{prompt} {begun[:16]}"}
        return {"prompt": prompt, "prompt_id": index, "prompt_tokens": tokens, "task": number, **same}


def _raw(x: Array) -> Array:
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

"""Environments of `verifiers`, turn by turn: the package's own loop with the policy's text in the place of its client.

The package is not needed to import this, and what has the same methods will do. Its data sets are read in
`data.environments`, its rubrics alone in `rewards.rubrics`.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

_NEEDED = ("init_state", "setup_state", "is_completed", "get_prompt_messages", "add_trajectory_step", "rubric")


def show_contents(messages: Sequence[Mapping[str, Any]], first: bool) -> str:
    r"""The contents of messages, one after the other, without roles.

    Args:
        messages: dicts with a `role` and a `content`, text or parts of text.
        first: whether they are the prompt of the first turn.

    Example:
        >>> show_contents([{"role": "system", "content": "Guess."}, {"role": "user", "content": "Begin."}], True)
        'Guess.\n\nBegin.'
    """
    del first
    return "\n\n".join(_text(message.get("content")) for message in messages)


def as_assistant(action: str) -> dict[str, Any]:
    """What the policy said as the assistant's message.

    Example:
        >>> as_assistant("42")
        {'role': 'assistant', 'content': '42'}
    """
    return {"role": "assistant", "content": action}


class Turn(NamedTuple):
    """Where a conversation stands.

    Attributes:
        state: the environment's own; it changes it in place.
        messages: all so far, up to where the policy speaks next.
    """

    state: Any
    messages: list[Any]


@dataclasses.dataclass(frozen=True)
class VerifiersEnvironment:
    """A `MultiTurnEnv` of `verifiers`, or what is derived from it, as an environment with `reset` and `step`.

    A conversation goes as in the environment's `rollout`: its stop conditions are asked after each turn, its answer is
    what it adds to the messages, and at the end its rubric scores the whole: that is the reward of the last step, and
    those before get 0. An error that the package knows ends the conversation, as it does there; of a step that raises
    anything else, the turn is taken back. A state belongs to one conversation and is changed in place.

    A conversation that is given up from outside (by a limit on turns or tokens) is not scored or cleaned up; give the
    environment limits of its own that are reached first.

    Attributes:
        env: the environment, of `verifiers` 0.1.14 to 0.3, or anything with `init_state`, `setup_state`,
            `is_completed`, `get_prompt_messages`, `add_trajectory_step` and `rubric.score_rollout`.
        show: `(messages, first) ->` what the policy reads of new messages, text or token ids. For a model with a chat
            template: render the prompt with it if `first`, else the end of the assistant's turn, the messages, and the
            beginning of its next turn.
        speak: `text -> ` the assistant's message, e.g. with the `tool_calls` that are found in it.

    Raises:
        ValueError: for an environment that lacks a method, or whose rubric scores whole groups.

    Example:
        >>> import asyncio
        >>> from types import SimpleNamespace
        >>> class Rubric:
        ...     async def score_rollout(self, state):
        ...         state["reward"] = float(state["trajectory"][-1]["completion"][-1]["content"] == state["answer"])
        >>> class OneTurn:
        ...     rubric = Rubric()
        ...
        ...     async def init_state(self, row, client, model):
        ...         return {**row, "trajectory": []}
        ...
        ...     async def setup_state(self, state):
        ...         return state
        ...
        ...     async def get_prompt_messages(self, state):
        ...         return state["prompt"]
        ...
        ...     async def add_trajectory_step(self, state, step):
        ...         state["trajectory"].append(step)
        ...
        ...     async def is_completed(self, state):
        ...         return len(state["trajectory"]) == 1
        >>> async def play(environment, task, action):
        ...     state, prompt = await environment.reset(task)
        ...     return prompt, *(await environment.step(state, action))[1:]
        >>> task = {"prompt": "1+1?", "answer": "2"}
        >>> asyncio.run(play(VerifiersEnvironment(OneTurn()), task, "2"))
        ('1+1?', '', 1.0, True)

    Reference: verifiers, verifiers/envs/multiturn_env.py.
    """

    env: Any
    show: Callable[[list[dict[str, Any]], bool], Any] = show_contents
    speak: Callable[[str], Mapping[str, Any]] = as_assistant

    def __post_init__(self) -> None:
        missing = [name for name in _NEEDED if not hasattr(self.env, name)]
        if missing:
            raise ValueError(
                f"{type(self.env).__name__} has no {missing[0]!r}: it must be a MultiTurnEnv of verifiers 0.1.14 to "
                f"0.3, or have {', '.join(_NEEDED)}"
            )
        if getattr(self.env.rubric, "has_group_rewards", False):
            raise ValueError(
                "the environment's rubric has functions of whole groups, which one conversation cannot be scored with; "
                "leave them out of it"
            )

    async def reset(self, task: Mapping[str, Any]) -> tuple[Turn, Any]:
        """A new conversation about a problem.

        Args:
            task: a problem of `data.verifiers_problems`.

        Returns:
            The state and what the policy reads first.

        Raises:
            RuntimeError: if the environment has ended before the first turn, with its error.
        """
        package = _package(self.env)
        row = {name: value for name, value in task.items() if name not in ("prompt_messages", "prompt_id")}
        row["prompt"] = task.get("prompt_messages") or task["prompt"]
        row.setdefault("example_id", task.get("prompt_id", 0))
        state = await self.env.init_state(row, package.client, "policy")
        try:
            state = await self.env.setup_state(state) or state
        except package.error as error:
            state["error"] = error
        if await self.env.is_completed(state):
            raise RuntimeError(f"the environment ended before the first turn: {state.get('error')!r}")
        messages = package.messages(await self.env.get_prompt_messages(state))
        return Turn(state, messages), self.show([_plain(message) for message in messages], True)

    async def step(self, turn: Turn, action: str) -> tuple[Turn, Any, float, bool]:
        """What the environment answers.

        Args:
            turn: of `reset` or the step before.
            action: what the policy said.

        Returns:
            The state, what the policy reads next, the reward and whether the conversation is over.

        Raises:
            ValueError: if the environment changes messages that are already there.
        """
        package, env, state = _package(self.env), self.env, turn.state
        said = package.messages([self.speak(action)])
        turns = len(state["trajectory"])
        before = {name: _copied(x) for name, x in state.items() if name != "trajectory"}
        step = {"prompt": turn.messages, "completion": said, "response": None, "tokens": None, "reward": None}
        more = {"advantage": None, "is_truncated": False, "trajectory_id": state.get("trajectory_id"), "extras": {}}
        try:
            try:
                await env.add_trajectory_step(state, {**step, **more})
            except package.error as error:
                state["error"] = error
            after, over = await self._answer(package, state, [*turn.messages, *said])
            reward = await self._score(state) if over else 0.0
        except BaseException:  # a time-out too: whoever goes on does so from the state before
            del state["trajectory"][turns:]
            for name in set(state) - {*before, "trajectory"}:
                del state[name]
            state.update(before)
            raise
        new = [_plain(message) for message in after[len(turn.messages) + len(said) :]]
        return Turn(state, after), self.show(new, False) if new else "", reward, over

    async def _answer(self, package: _Package, state: Any, so_far: list[Any]) -> tuple[list[Any], bool]:
        """All messages after a turn of the policy, and whether these are the last."""
        after = so_far
        over = await self.env.is_completed(state)
        if not over:
            try:
                after = package.messages(await self.env.get_prompt_messages(state))
            except package.error as error:
                state["error"] = error
            ends = state.get("final_env_response") is not None or state.get("error") is not None
            over = ends and await self.env.is_completed(state)
        if state.get("final_env_response") is not None:
            after = [*so_far, *package.messages(state["final_env_response"])]
        if after[: len(so_far)] != so_far:
            raise ValueError(
                f"{type(self.env).__name__} changes the messages of earlier turns, whose tokens cannot change; it must "
                f"only add messages"
            )
        return after, over

    async def _score(self, state: Any) -> float:
        if hasattr(self.env, "cleanup"):  # which also gathers the turns into state["completion"]
            await self.env.cleanup(state)
        elif hasattr(self.env, "render_completion"):
            await self.env.render_completion(state)
        rubric = self.env.rubric
        await rubric.score_rollout(state)
        if hasattr(rubric, "cleanup"):
            await rubric.cleanup(state)
        return float(state["reward"])


def _copied(value: Any) -> Any:
    """A copy of a container that a step may change; what cannot be copied (a client, a lock) is itself."""
    if not isinstance(value, dict | list | set):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:
        return value


class _Package(NamedTuple):
    """What `verifiers` has for its environments, and what takes the place of it for others.

    Attributes:
        client: stands where a client must, and is not used.
        messages: text or messages as the environment's list of messages.
        error: what the package's loop catches.
    """

    client: Any
    messages: Callable[[Any], list[Any]]
    error: type[Exception] | tuple[()]


def _package(env: Any) -> _Package:
    if not any(kind.__module__.partition(".")[0] == "verifiers" for kind in type(env).__mro__):
        return _Package(None, _messages, ())
    base = importlib.import_module("verifiers.clients").Client

    def unused(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the policy speaks through step; the environment must not ask a client")

    silent = type("NoClient", (base,), dict.fromkeys((*base.__abstractmethods__, "get_response"), unused))
    normalize = importlib.import_module("verifiers.utils.message_utils").normalize_messages
    return _Package(object.__new__(silent), normalize, importlib.import_module("verifiers.errors").Error)


def _messages(value: Any) -> list[Any]:
    return [{"role": "user", "content": value}] if isinstance(value, str) else list(value)


def _plain(message: Any) -> dict[str, Any]:
    return message.model_dump(exclude_none=True) if hasattr(message, "model_dump") else dict(message)


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text", "") for part in content)

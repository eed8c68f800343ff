"""An environment of plain Python functions that the policy calls by writing `<tool_call>{...}</tool_call>`.

Turns, time-outs and tokens are `host.host_turns`'s.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxrl_post.rollout.host_calls import call, describe
from jaxrl_post.rollout.host_environment import Step

_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)


class ToolCall(NamedTuple):
    """What the policy asked for.

    Attributes:
        name: of the tool.
        arguments: by name.
        error: why it is no call, for the policy to read; None if it is one.
    """

    name: str = ""
    arguments: Mapping[str, Any] = {}
    error: str | None = None


def parse_tool_calls(text: str) -> list[ToolCall]:
    """The calls in a text, as Hermes and Qwen models write them; what is reasoned before `</think>` is not looked at.

    Args:
        text: of one action.

    Returns:
        One for each `<tool_call>` in order; with an `error` where what follows is not a JSON object with a `name` and
        `arguments`, or the closing tag is missing.

    Example:
        >>> parse_tool_calls('So: <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
        [ToolCall(name='add', arguments={'a': 1}, error=None)]
        >>> parse_tool_calls("<tool_call>add(1)</tool_call>")[0].error
        'a tool call must be a JSON object with "name" and "arguments"'

    Reference: Hermes function calling, https://github.com/NousResearch/Hermes-Function-Calling.
    """
    return [_parsed(match[1], match[2]) for match in _CALL.finditer(text.rpartition("</think>")[2])]


def _parsed(inside: str, closing: str) -> ToolCall:
    if not closing:
        return ToolCall(error="a tool call must end with </tool_call>")
    try:
        found = json.loads(inside)
        arguments = found.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if isinstance(found["name"], str) and isinstance(arguments, dict):
            return ToolCall(found["name"], arguments)
    except (ValueError, AttributeError, KeyError, RecursionError):
        pass
    return ToolCall(error='a tool call must be a JSON object with "name" and "arguments"')


@dataclasses.dataclass(frozen=True)
class ToolEnvironment:
    """What `tool_environment` makes; its state is the task.

    Attributes:
        tools: functions by name, plain or async.
        prompt: `(task) -> str`.
        reward: `(task, answer) -> float`, or None.
        around: text before and behind the responses to one action.
    """

    tools: Mapping[str, Callable[..., Any]]
    prompt: Callable[[Any], Any]
    reward: Callable[[Any, str], Any] | None
    around: tuple[str, str]

    async def reset(self, task: Any) -> tuple[Any, str]:
        """The task and its prompt."""
        return task, await call(self.prompt, task)

    async def step(self, state: Any, action: str) -> Step:
        """The responses to the calls of an action; an action without any is the answer."""
        calls = parse_tool_calls(action)
        if not calls:
            reward = 0.0 if self.reward is None else await call(self.reward, state, action)
            return Step(state, "", reward, True)
        results = await asyncio.gather(*map(self._response, calls))
        before, behind = self.around
        text = "\n".join(f"<tool_response>\n{text}\n</tool_response>" for text, _ in results)
        return Step(state, f"{before}{text}{behind}", failed=any(failed for _, failed in results))

    async def _response(self, wanted: ToolCall) -> tuple[str, bool]:
        """What a call gives, as a text, and whether the tool has failed."""
        if wanted.error is not None:
            return f"error: {wanted.error}", False
        if wanted.name not in self.tools:
            return f"error: there is no tool {wanted.name!r}; there are: {', '.join(self.tools)}", False
        function = self.tools[wanted.name]
        try:
            inspect.signature(function).bind(**wanted.arguments)
        except TypeError as error:
            return f"error: {wanted.name}: {error}", False
        except ValueError:
            pass  # some functions written in C have no signature that can be read
        try:
            value = await call(function, **wanted.arguments)
            return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str), False
        except (Exception, SystemExit) as error:
            return f"error: {describe(error)}", True


def tool_environment(
    tools: Mapping[str, Callable[..., Any]],
    *,
    prompt: Callable[[Any], Any] = str,
    reward: Callable[[Any, str], Any] | None = None,
    around: tuple[str, str] = ("", ""),
) -> ToolEnvironment:
    r"""An environment in which an action calls tools, or is the answer.

    The calls of an action, see `parse_tool_calls`, are made at the same time. The observation has a
    `<tool_response>` for each: a text as it is, anything else as JSON. What the policy got wrong, an unknown tool or
    arguments that do not fit, it is told there. A tool that raises counts as a failure of the environment, see
    `host_turns`: for what is the policy's mistake let it return a text. The text of a policy is never evaluated.

    Args:
        tools: functions by name, plain or async; they take arguments by name.
        prompt: `(task) -> str`, or token ids; it must tell the policy of the tools.
        reward: `(task, answer) -> float` for an action without a call, which ends the sequence; None: 0.
        around: text before and behind the responses, the chat template's change of speakers: for Qwen
            `("\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")`.

    Returns:
        The environment.

    Raises:
        ValueError: if there are no tools, or a tool is no function.

    Example:
        >>> environment = tool_environment({"add": lambda a, b: a + b}, reward=lambda task, answer: answer == "3")
        >>> action = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
        >>> asyncio.run(environment.step("1+2", action)).observation
        '<tool_response>\n3\n</tool_response>'
        >>> asyncio.run(environment.step("1+2", "3")).reward
        True
    """
    if not tools:
        raise ValueError("tools must hold at least one function by name")
    for name, function in tools.items():
        if not callable(function):
            raise ValueError(f"tools must be functions by name, got {function!r} for {name!r}")
    return ToolEnvironment(dict(tools), prompt, reward, around)

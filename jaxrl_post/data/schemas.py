"""What kind of data a row is, by its columns, and the problem that it becomes.

The kinds are those that TRL's trainers take, each with plain text or with conversations, and verl's rows. Which file a
row comes from is not known here: what is wrong with a row is a ValueError, to which the reader adds the place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

from jaxrl_post.data.problems import Problem
from jaxrl_post.data.templates import digits

Message: TypeAlias = dict[str, Any]
"""One message of a conversation: `role`, `content`, and what a chat template reads besides, e.g. `tool_calls`."""

_COLUMNS = {  # in the order in which they are looked for: the first whose columns are all there
    "verl": ("prompt", "data_source", "reward_model"),
    "stepwise": ("prompt", "completions", "labels"),
    "preference": ("chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "completion": ("prompt", "completion"),
    "prompt": ("prompt",),
    "conversation": ("messages",),
    "question": ("question",),
}
_TEXT = ("prompt", "completion", "chosen", "rejected")  # or messages
_SAYS = {
    "verl": "verl's prompts with a ground truth",
    "stepwise": "prompts with steps and a label for each",
    "preference": "preference pairs",
    "unpaired": "completions labelled good or bad",
    "completion": "prompts with completions",
    "prompt": "prompts",
    "conversation": "conversations, whose last message is the completion if an assistant wrote it",
    "question": "questions, which are the prompts",
}


class RowType(NamedTuple):
    """What kind of data a row is.

    Attributes:
        kind: `"prompt"`, `"completion"`, `"preference"`, `"unpaired"`, `"stepwise"`, `"conversation"`,
            `"question"` or `"verl"`.
        conversational: whether it holds messages rather than text.
        implicit_prompt: whether a pair has no prompt of its own: it is what both completions begin with.
    """

    kind: str
    conversational: bool = False
    implicit_prompt: bool = False

    def __str__(self) -> str:
        form = "messages" if self.conversational else "text"
        implicit = "; the prompt is what both begin with" if self.implicit_prompt else ""
        return f"{_SAYS[self.kind]} ({', '.join(_COLUMNS[self.kind])}; as {form}{implicit})"


def detect(row: Mapping[str, Any], *, kind: str | None = None) -> RowType:
    """What kind of data a row is, by the names of its columns; columns that are None do not count.

    Args:
        row: e.g. the first of a file.
        kind: takes the place of what the columns say, e.g. `"prompt"` for rows that hold completions as well.

    Returns:
        `RowType`; its text says what it is in words.

    Raises:
        ValueError: if the columns are those of no kind, or lack one that `kind` needs.

    Example:
        >>> detect({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}).kind
        'preference'
        >>> print(detect({"chosen": "The sky is blue.", "rejected": "The sky is green."}))
        preference pairs (chosen, rejected; as text; the prompt is what both begin with)
        >>> detect({"prompt": [{"role": "user", "content": "What color is the sky?"}]})
        RowType(kind='prompt', conversational=True, implicit_prompt=False)

    Reference: TRL's dataset formats and types; verl's data preparation.
    """
    if kind is not None and kind not in _COLUMNS:
        raise ValueError(f"kind must be one of {', '.join(_COLUMNS)}, got {kind!r}")
    present = [name for name, value in row.items() if value is not None]
    for name in _COLUMNS if kind is None else (kind,):
        if all(column in present for column in _COLUMNS[name]):
            spoken = any(_is_list(row[column]) for column in _COLUMNS[name] if column in _TEXT)
            implicit = name == "preference" and not _prompt_belongs(row)
            return RowType(name, spoken or name == "conversation", implicit)
    columns = f"its columns are {', '.join(present) or 'none'}"
    if kind is not None:
        missing = [column for column in _COLUMNS[kind] if column not in present]
        raise ValueError(f"no column {missing[0]!r}, which {_SAYS[kind]} need; {columns}")
    raise ValueError(
        f"no known kind of data: {columns}, and a row needs one of "
        f"{'; '.join(' + '.join(columns) for columns in _COLUMNS.values())}. Make them by a mapping, e.g. prompt: "
        f"'{{problem}}'"
    )


def to_problem(row: Mapping[str, Any], kind: str) -> Problem:
    """A row as a problem.

    Text stays text. A conversation becomes messages for the tokenizer's chat template (`prompt_messages`,
    `chosen_messages`, ...) and, under the plain name, text to show, compare and score.

    Args:
        row: columns.
        kind: as `detect` names it.

    Returns:
        Every column of the row, with `prompt` and, by kind, `completion`, `chosen` and `rejected`, `label`, `steps` and
        `labels`, `answer`; and `prompt_messages`, ... for conversations. A number in `answer` becomes text. The columns
        `messages` of a conversation and `completions` of steps are gone, whose contents now have other names.

    Raises:
        ValueError: if a column is missing or of the wrong type, naming it.

    Example:
        >>> to_problem({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "preference")
        {'chosen': ' blue.', 'rejected': ' green.', 'prompt': 'The sky is'}
        >>> turn = {"role": "user", "content": "1+1?"}
        >>> to_problem({"prompt": [turn], "answer": 2}, "prompt")
        {'prompt': '1+1?', 'answer': '2', 'prompt_messages': [{'role': 'user', 'content': '1+1?'}]}

    Reference: TRL's dataset formats and types; verl's data preparation.
    """
    for column in _COLUMNS[kind]:
        if row.get(column) is None:
            state = "is null" if column in row else f"is missing; the columns are {', '.join(row) or 'none'}"
            raise ValueError(f"column {column!r} {state}")
    problem = dict(row)
    if kind == "conversation":
        problem.update(_conversation(problem.pop("messages")))
    elif kind == "preference":
        problem.update(_pair(row))
    else:
        problem.update(_text_or_messages("prompt", row["question" if kind == "question" else "prompt"]))
    if kind in ("completion", "unpaired"):
        problem.update(_completion("completion", row["completion"], problem))
    if kind == "unpaired":
        problem["label"] = _label(row["label"], "label")
    if kind == "stepwise":
        problem.update(_steps(problem.pop("completions"), row["labels"]))
    if kind == "verl" and "answer" not in row:
        problem["answer"] = _ground_truth(row["reward_model"])
    answer = problem.get("answer")
    if isinstance(answer, float):  # NaN is how data frames write that there is none
        problem["answer"] = None if math.isnan(answer) else digits(answer)
    elif isinstance(answer, int):
        problem["answer"] = str(answer)
    if problem.get("answer", "") is None:
        del problem["answer"]
    if not problem["prompt"]:
        raise ValueError("column 'prompt' is empty; a prompt needs at least one character")
    if "prompt_messages" in problem:
        problem.update(_template_options(row))
    return problem


def show_messages(messages: list[Message]) -> str:
    r"""A conversation as text, for people and for comparison: the content of a single message, else a part for each.

    Example:
        >>> show_messages([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
        'system: Be brief.\n\nuser: Hi'
    """
    if len(messages) == 1:
        return _content(messages[0])
    return "\n\n".join(f"{message['role']}: {_content(message)}" for message in messages)


def as_messages(value: Any, name: str) -> list[Message]:
    """Messages, checked and without the None entries that Arrow adds so that all have the same keys.

    Args:
        value: a list of dicts with a `role`, and `content` (text, or parts that are text) or calls of tools.
        name: what they are, for the message.

    Returns:
        New dicts; a message without content has the empty text.

    Raises:
        ValueError: if it is anything else.

    Example:
        >>> as_messages([{"role": "user", "content": "Hi", "tool_calls": None}], "prompt")
        [{'role': 'user', 'content': 'Hi'}]
    """
    if not _is_list(value) or not value:
        raise ValueError(f"{name} must be a list of at least one message, got {_shown(value)}")
    messages = []
    for place, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"message {place} of {name} must have a 'role' and a 'content', as "
                f"{{'role': 'user', 'content': 'Hello'}}; got {_shown(message)}"
            )
        made = {"role": message["role"], "content": "", **_without_nulls(message)}
        content = made["content"]
        if _is_list(content):
            if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
                raise ValueError(f"message {place} of {name} has parts that are not text: {_shown(content)}")
        elif not isinstance(content, str):
            raise ValueError(f"the content of message {place} of {name} must be text, got {_shown(content)}")
        messages.append(made)
    return messages


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if _is_list(value) else value


def _content(message: Message) -> str:
    content = message["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    calls = message.get("tool_calls")
    return text if not calls else f"{text}{json.dumps(calls, ensure_ascii=False)}"


def _text_or_messages(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {name: value}
    if not _is_list(value):
        raise ValueError(f"column {name!r} must be text or a list of messages, got {_shown(value)}")
    messages = as_messages(value, name)
    return {name: show_messages(messages), f"{name}_messages": messages}


def _completion(name: str, value: Any, problem: Mapping[str, Any]) -> dict[str, Any]:
    made = _text_or_messages(name, value)
    prompt = problem.get("prompt_messages")
    if prompt is None:
        if f"{name}_messages" in made:
            raise ValueError(f"column 'prompt' is text but {name!r} a list of messages; both must be messages, or text")
        return made
    messages = made.get(f"{name}_messages", [{"role": "assistant", "content": made[name]}])
    if len(messages) > len(prompt) and messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"column {name!r} must be one message of the assistant after the prompt, got messages of: {roles}; put "
            f"what comes before it into the prompt"
        )
    return {name: _content(messages[0]), f"{name}_messages": messages}


def _prompt_belongs(row: Mapping[str, Any]) -> bool:
    """Whether a pair's prompt goes with its completions: text before messages is a copy of the first of them."""
    prompt = row.get("prompt")
    return prompt is not None and not (isinstance(prompt, str) and _is_list(row["chosen"]))


def _pair(row: Mapping[str, Any]) -> dict[str, Any]:
    if _prompt_belongs(row):
        made = _text_or_messages("prompt", row["prompt"])
        pair = {"chosen": row["chosen"], "rejected": row["rejected"]}
    else:
        made, pair = _split_pair(row["chosen"], row["rejected"])
    for name, value in pair.items():
        made.update(_completion(name, value, made))
    return made


def _split_pair(chosen: Any, rejected: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The prompt that both begin with, and what is left of each."""
    if type(chosen) is not type(rejected) or not isinstance(chosen, str | list):
        raise ValueError(
            f"columns 'chosen' and 'rejected' must both be text or both messages, got {_shown(chosen)} and "
            f"{_shown(rejected)}"
        )
    if not isinstance(chosen, str):
        chosen, rejected = as_messages(chosen, "chosen"), as_messages(rejected, "rejected")
    common = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    if isinstance(chosen, str) and common and chosen[common - 1] == " ":
        common -= 1  # a tokenizer takes the space together with the word behind it
    if not common or chosen == rejected:
        what = "are the same" if chosen == rejected else "have no beginning in common that could be the prompt"
        raise ValueError(f"columns 'chosen' and 'rejected' {what}; give a column 'prompt'")
    return _text_or_messages("prompt", chosen[:common]), {"chosen": chosen[common:], "rejected": rejected[common:]}


def _conversation(value: Any) -> dict[str, Any]:
    messages = as_messages(value, "messages")
    if messages[-1]["role"] != "assistant":
        return _text_or_messages("prompt", messages)
    if len(messages) == 1:
        raise ValueError("column 'messages' holds an answer only; something must be asked before it")
    made = _text_or_messages("prompt", messages[:-1])
    return {**made, **_completion("completion", messages[-1:], made)}


def _label(value: Any, name: str) -> bool:
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise ValueError(f"column {name!r} must be true or false, got {_shown(value)}")


def _steps(completions: Any, labels: Any) -> dict[str, Any]:
    if not (_is_list(completions) and completions and all(isinstance(step, str) for step in completions)):
        raise ValueError(f"column 'completions' must be a list of the steps' texts, got {_shown(completions)}")
    if not _is_list(labels) or len(labels) != len(completions):
        raise ValueError(f"column 'labels' must hold one label for each of {len(completions)} steps: {_shown(labels)}")
    return {"steps": list(completions), "labels": [_label(label, "labels") for label in labels]}


def _ground_truth(reward_model: Any) -> Any:
    if not isinstance(reward_model, Mapping) or "ground_truth" not in reward_model:
        raise ValueError(f"column 'reward_model' must hold a 'ground_truth', got {_shown(reward_model)}")
    return reward_model["ground_truth"]


def _template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a chat template gets besides the messages."""
    made: dict[str, Any] = {}
    tools = row.get("tools")
    if isinstance(tools, str):  # Arrow cannot hold tools of unlike parameters otherwise
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"column 'tools' is text that is not JSON ({error.msg})") from error
    if tools is not None:
        if not _is_list(tools) or not all(isinstance(tool, Mapping) for tool in tools):
            raise ValueError(f"column 'tools' must be a list of descriptions of functions, got {_shown(tools)}")
        made["tools"] = _without_nulls(tools)
    options = row.get("chat_template_kwargs")
    if options is not None:
        if not isinstance(options, Mapping):
            raise ValueError(f"column 'chat_template_kwargs' must be a dictionary, got {_shown(options)}")
        made["chat_template_kwargs"] = _without_nulls(options)
    return made

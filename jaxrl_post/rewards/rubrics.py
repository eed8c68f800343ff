"""Rubrics of `verifiers` as reward functions: all the functions of one, with the weights that it gives them.

A single function is adapted in `adapters`, which does the work here too. The package itself is not needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_origin

from jaxrl_post.rewards.adapters import from_verifiers
from jaxrl_post.rewards.scoring import Reward, RewardFunction, score

_OF_GROUPS = {"states", "prompts", "completions", "answers", "tasks", "infos"}


class _Message(dict):
    """A message whose fields are keys and attributes, as functions of older and newer rubrics read them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"a message of {', '.join(self)} has no {name!r}") from None


def rubric_functions(rubric: Any) -> list[RewardFunction]:
    """The functions of a rubric, or of a group of rubrics, as components of a reward.

    Each gets what the rubric would give it by name: `prompt` and `completion` as messages, `answer`, `info`, `task`,
    `state`, the rubric's own objects (`parser`, `judge`, ...) and the columns of the data. A prompt is the problem's
    `prompt_messages`, or else one message of the user. Unlike in the rubric, a function that raises does not score 0:
    it fails, and `score` decides what becomes of that.

    Args:
        rubric: has `funcs` and `weights`, or `rubrics`, and usually `class_objects`.

    Returns:
        One component for each function, metrics with weight 0 among them. Of equal names, all but the first get a
        number.

    Raises:
        ValueError: for a function that scores a whole group at once, and for what is not a rubric.

    Example:
        >>> from types import SimpleNamespace
        >>> def right(completion, answer):
        ...     return float(completion[-1]["content"] == answer)
        >>> def turns(state):
        ...     return len(state["trajectory"])
        >>> rubric = SimpleNamespace(funcs=[right, turns], weights=[1.0, 0.0], class_objects={})
        >>> scored = score(rubric_functions(rubric), ["1+1=", "1+2="], ["2", "4"], {"answer": ["2", "3"]})
        >>> scored.total.tolist(), scored.components["turns"].tolist()
        ([1.0, 0.0], [1.0, 1.0])

    Reference: verifiers, verifiers/rubrics/rubric.py and rubric_group.py.
    """
    found: list[RewardFunction] = []
    for function, weight, objects in _functions(rubric):
        plain = getattr(function, "__name__", type(function).__name__)
        taken = sum(part.name == plain or part.name.startswith(f"{plain}_#") for part in found)
        name = plain if not taken else f"{plain}_#{taken + 1}"
        found.append(RewardFunction(name, _reward(function, objects), float(weight)))
    return found


def from_rubric(rubric: Any) -> Reward:
    """A rubric as one reward function: the weighted sum of its functions.

    `rubric_functions` gives them one by one, with metrics, and lets rows fail one by one.

    Args:
        rubric: see `rubric_functions`.

    Returns:
        `reward(prompts, completions, **columns)`; None where every function gives None. It raises `RewardError` naming
        function and row where one fails.

    Raises:
        ValueError: as `rubric_functions`, and if no function has a weight.

    Example:
        >>> from types import SimpleNamespace
        >>> def right(completion, answer):
        ...     return float(completion[-1]["content"] == answer)
        >>> def short(completion):
        ...     return float(len(completion[-1]["content"]) < 2)
        >>> rubric = SimpleNamespace(funcs=[right, short], weights=[1.0, 0.5])
        >>> from_rubric(rubric)(["1+1=", "1+2="], ["2", "4"], answer=["2", "3"])
        [1.5, 0.5]
    """
    parts = [part for part in rubric_functions(rubric) if part.weight]
    if not parts:
        raise ValueError("the rubric has no function of nonzero weight, so nothing is rewarded; give one a weight")

    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
        scored = score(parts, prompts, completions, columns)
        return [float(x) if valid else None for x, valid in zip(scored.total, scored.valid, strict=True)]

    return reward


def _functions(rubric: Any) -> list[tuple[Callable[..., Any], float, Mapping[str, Any]]]:
    """Function, weight and the objects of its rubric."""
    if getattr(rubric, "rubrics", None):
        return [each for part in rubric.rubrics for each in _functions(part)]
    if not hasattr(rubric, "funcs") or not hasattr(rubric, "weights"):
        raise ValueError(
            f"a rubric has funcs and weights, or rubrics; {type(rubric).__name__} has not. verifiers from 0.4 on has "
            f"no rubrics; take 0.1.14 to 0.3"
        )
    for function in rubric.funcs:
        signature = inspect.signature(function)
        result = signature.return_annotation
        if _OF_GROUPS & set(signature.parameters) or result is list or get_origin(result) is list:
            raise ValueError(
                f"the rubric's function {getattr(function, '__name__', function)!r} scores a whole group at once and "
                f"sees no single row; leave it out of the rubric, or write it as reward(prompts, completions, "
                f"**columns)"
            )
    objects = getattr(rubric, "class_objects", None) or {}
    return [(function, weight, objects) for function, weight in zip(rubric.funcs, rubric.weights, strict=True)]


def _reward(function: Callable[..., Any], objects: Mapping[str, Any]) -> Reward:
    adapted = from_verifiers(function)

    def columns_of(
        prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> tuple[list[Any], list[Any], dict[str, Sequence[Any]]]:
        talks = columns.get("prompt_messages") or [None] * len(prompts)
        asked = [
            [_Message(message) for message in talk or [{"role": "user", "content": prompt}]]
            for prompt, talk in zip(prompts, talks, strict=True)
        ]
        said = [[_Message(role="assistant", content=completion)] for completion in completions]
        rows = [{name: values[i] for name, values in columns.items()} for i in range(len(prompts))]
        states = [_state(*row) for row in zip(asked, said, rows, strict=True)]
        shared = {name: [value] * len(rows) for name, value in objects.items()}
        return asked, said, {**columns, "state": states, **shared}

    # An adapted function is a coroutine function if the rubric's is, which `score` must be able to see.
    if inspect.iscoroutinefunction(adapted):

        async def reward_async(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> Any:
            asked, said, known = columns_of(prompts, completions, columns)
            return await adapted(asked, said, **known)

        return reward_async

    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> Any:
        asked, said, known = columns_of(prompts, completions, columns)
        return adapted(asked, said, **known)

    return reward


def _state(prompt: list[_Message], completion: list[_Message], row: Mapping[str, Any]) -> dict[str, Any]:
    """What a rollout of one turn leaves behind."""
    turn = {"prompt": prompt, "completion": completion, "reward": None, "advantage": None, "is_truncated": False}
    return {
        "input": dict(row),
        "prompt": prompt,
        "completion": completion,
        "answer": row.get("answer", ""),
        "info": row.get("info") or {},
        "task": row.get("task", "default"),
        "trajectory": [{**turn, "extras": {}}],
        "is_completed": True,
        "is_truncated": False,
        "error": None,
    }

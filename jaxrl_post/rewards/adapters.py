"""Reward functions written for other systems, as reward functions of this library.

Both score one completion at a time; a row that raises is reported by itself and does not spoil the batch.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxrl_post.rewards.scoring import Reward, RowErrors, pick
from jaxrl_post.rewards.verifiable import row_by_row


def from_verl(compute_score: Callable[..., Any], *, data_source: str = "unknown") -> Reward:
    """A reward from verl's `compute_score(data_source, solution_str, ground_truth, extra_info=None)`.

    The ground truth is the column `ground_truth`, or `reward_model["ground_truth"]` as in verl's data files, or
    `answer`. The function may name fewer of the four parameters; plain and coroutine functions both do. Of a dict that
    it returns, `"score"` counts.

    Args:
        compute_score: verl's function.
        data_source: stands in where the data has no column `data_source`.

    Returns:
        `reward(prompts, completions, **columns)`.

    Example:
        >>> def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        ...     return {"score": float(solution_str == ground_truth), "length": len(solution_str)}
        >>> from_verl(compute_score)(["1+1=", "1+2="], ["2", "4"], answer=["2", "3"])
        [1.0, 0.0]
    """

    def arguments(prompt: str, completion: str, row: Mapping[str, Any]) -> dict[str, Any]:
        del prompt
        known = {
            "data_source": row.get("data_source", data_source),
            "solution_str": completion,
            "extra_info": row.get("extra_info"),
        }
        truth = _ground_truth(row)
        return known if truth is None else {**known, "ground_truth": truth}

    def number(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        if "score" not in value:
            raise ValueError(f"compute_score returned a dict without 'score', only {sorted(value)}")
        return value["score"]

    return _per_row(compute_score, arguments, number)


def from_verifiers(function: Callable[..., Any]) -> Reward:
    """A reward from a function of a `verifiers` rubric, which names what it wants to see of one rollout.

    It may name `prompt`, `completion`, `answer`, `state`, `task`, `info`, `parser` and any column of the data. Where
    the data has no such column, `answer` is `""`, `state` holds prompt, completion, answer, task and info, `task` is
    `"default"`, `info` is `{}` and `parser` is None. Plain and coroutine functions both do; functions of whole groups
    do not.

    Args:
        function: the rubric's function.

    Returns:
        `reward(prompts, completions, **columns)`.

    Example:
        >>> def right(completion, answer):
        ...     return 1.0 if completion == answer else 0.0
        >>> from_verifiers(right)(["1+1=", "1+2="], ["2", "4"], answer=["2", "3"])
        [1.0, 0.0]
    """

    def arguments(prompt: str, completion: str, row: Mapping[str, Any]) -> dict[str, Any]:
        known = {"answer": "", "task": "default", "info": {}, "parser": None, **row}
        known |= {"prompt": prompt, "completion": completion}
        state = {name: known[name] for name in ("prompt", "completion", "answer", "task", "info")}
        return {"state": state, **known}

    return _per_row(function, arguments, lambda value: value)


def _per_row(
    function: Callable[..., Any],
    arguments: Callable[[str, str, Mapping[str, Any]], dict[str, Any]],
    number: Callable[[Any], Any],
) -> Reward:
    parameters = inspect.signature(function).parameters

    def call(prompt: str, completion: str, row: Mapping[str, Any]) -> Any:
        available = arguments(prompt, completion, row)
        chosen, missing = pick(parameters, available)
        if missing:
            raise ValueError(
                f"the function needs {', '.join(map(repr, missing))}, but the row has {', '.join(sorted(available))}; "
                f"add the column to the data or give the parameter a default"
            )
        return function(**chosen)

    def rows(prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> list[Any]:
        return [
            (prompt, completion, {name: values[i] for name, values in columns.items()})
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]

    if not (inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))):  # noqa: B004

        def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[Any]:
            batch = rows(prompts, completions, columns)
            return row_by_row(len(batch), lambda row: number(call(*batch[row])))

        return reward

    async def reward_async(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[Any]:
        async def one(row: tuple[str, str, Mapping[str, Any]]) -> Any:
            return number(await call(*row))

        batch = rows(prompts, completions, columns)
        results = await asyncio.gather(*map(one, batch), return_exceptions=True)
        failures = {row: result for row, result in enumerate(results) if isinstance(result, Exception)}
        values = [None if row in failures else result for row, result in enumerate(results)]
        if failures:
            raise RowErrors(values, failures)
        return values

    return reward_async


def _ground_truth(row: Mapping[str, Any]) -> Any:
    if row.get("ground_truth") is not None:
        return row["ground_truth"]
    reward_model = row.get("reward_model")
    if isinstance(reward_model, Mapping) and reward_model.get("ground_truth") is not None:
        return reward_model["ground_truth"]
    return row.get("answer")

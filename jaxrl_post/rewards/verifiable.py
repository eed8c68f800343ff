"""Rewards that compare a completion with what is known of the problem.

Nothing here looks at a model; every function follows `reward(prompts, completions, **columns) -> list[float | None]`.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxrl_post.rewards.scoring import Reward, RowErrors, as_number


def exact_match(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[Any]) -> list[float | None]:
    """1 where the completion is the answer, apart from white space at both ends, otherwise 0.

    Args:
        prompts: `N` texts; not looked at.
        completions: `N` texts.
        answer: `N` answers; one that is not a text is compared as Python writes it.

    Returns:
        `N` rewards; None where there is no answer to compare with.

    Example:
        >>> exact_match(["1+1=", "2+2=", "?"], ["2 ", "5", "x"], answer=["2", 4, None])
        [1.0, 0.0, None]
    """
    del prompts
    return [
        None if expected is None else float(completion.strip() == str(expected).strip())
        for completion, expected in zip(completions, answer, strict=True)
    ]


def task_score(
    score_answer: Callable[[str, Mapping[str, Any]], float], *, threshold: float | None = None
) -> Callable[..., list[float | None]]:
    """A reward from the scorer of a task, e.g. `ReasoningGymSource.score_answer`.

    Many scorers give partial credit, which a policy may learn to collect without ever being right; `threshold` turns
    the score into right or wrong. Some scorers raise on text that they cannot parse: where the same scorer accepts the
    problem's own answer, the completion is at fault and gets 0.

    Args:
        score_answer: `(completion, entry) -> score`.
        threshold: if given, the reward is 1 where the score is at least this, else 0.

    Returns:
        `reward(prompts, completions, entry)`; `entry` is the column with the task's records, and None in it gives None.

    Raises:
        ValueError: if the threshold is not finite.

    Example:
        >>> def letters_right(text, entry):
        ...     return sum(a == b for a, b in zip(text, entry["answer"])) / len(entry["answer"])
        >>> entry = [{"answer": "abcd"}, {"answer": "abcd"}]
        >>> task_score(letters_right)(["", ""], ["abcd", "abxx"], entry=entry)
        [1.0, 0.5]
        >>> task_score(letters_right, threshold=0.999)(["", ""], ["abcd", "abxx"], entry=entry)
        [1.0, 0.0]
    """

    def one(completion: str, entry: Mapping[str, Any]) -> float:
        try:
            return score_answer(completion, entry)
        except Exception:
            score_answer(entry["answer"], entry)  # raises if the fault is the scorer's or the problem's
            return 0.0

    def reward(
        prompts: Sequence[str], completions: Sequence[str], entry: Sequence[Mapping[str, Any] | None]
    ) -> list[float | None]:
        del prompts
        pairs = list(zip(completions, entry, strict=True))

        def of_row(row: int) -> float | None:
            completion, record = pairs[row]
            return None if record is None else one(completion, record)

        return row_by_row(len(pairs), of_row)

    return reward if threshold is None else thresholded(reward, threshold)


def task_solved(score_answer: Callable[[str, Mapping[str, Any]], float]) -> Callable[..., list[float | None]]:
    """1 where the scorer gives a completion exactly what it gives the problem's own answer, otherwise 0.

    Stricter than a threshold: a scorer that adds up partial credit can come within rounding of full marks, or above
    them, for a completion that only begins like the answer, and a policy finds that.

    Args:
        score_answer: `(completion, entry) -> score`, e.g. `ReasoningGymSource.score_answer`.

    Returns:
        `reward(prompts, completions, entry)`; `entry` is the column with the task's records, and None in it gives None.

    Example:
        >>> def letters_right(text, entry):
        ...     return 1.0 if text == entry["answer"] else 0.99 * float(text.startswith(entry["answer"]))
        >>> entry = [{"answer": "abcdef"}, {"answer": "abcdef"}]
        >>> task_score(letters_right)(["", ""], ["abcdef", "abcdefg"], entry=entry)
        [1.0, 0.99]
        >>> task_solved(letters_right)(["", ""], ["abcdef", "abcdefg"], entry=entry)
        [1.0, 0.0]
    """
    score = task_score(score_answer)

    def reward(
        prompts: Sequence[str], completions: Sequence[str], entry: Sequence[Mapping[str, Any] | None]
    ) -> list[float | None]:
        full = [None if record is None else score_answer(record["answer"], record) for record in entry]
        given = score(prompts, completions, entry)
        return [None if mark is None else float(mark == best) for mark, best in zip(given, full, strict=True)]

    return reward


def thresholded(function: Reward, threshold: float) -> Reward:
    """The reward function that is 1 where `function` gives at least `threshold`, else 0.

    Args:
        function: a reward function, plain or coroutine.
        threshold: the least score that counts.

    Returns:
        A reward function of the same parameters. None stays None, and what is not a finite number stays as it is, so
        that a failure is still seen.

    Raises:
        ValueError: if the threshold is not finite.

    Example:
        >>> def half(completions):
        ...     return [0.5, None, 1.0]
        >>> thresholded(half, 0.9)(completions=["a", "b", "c"])
        [0.0, None, 1.0]
    """
    if not math.isfinite(threshold):
        raise ValueError(f"threshold must be a finite number, got {threshold}")

    def cut(value: Any) -> Any:
        number = as_number(value)
        return value if number is None or not math.isfinite(number) else float(number >= threshold)

    def cut_all(values: Any) -> Any:
        # What is no list of values is left for `score` to report.
        return (
            [cut(value) for value in values] if hasattr(values, "__iter__") and not isinstance(values, str) else values
        )

    async def later(waiting: Any) -> Any:
        try:
            return cut_all(await waiting)
        except RowErrors as error:
            raise RowErrors(cut_all(error.values), error.failures) from error

    @functools.wraps(function)
    def reward(*args: Any, **kwargs: Any) -> Any:
        try:
            values = function(*args, **kwargs)
        except RowErrors as error:
            raise RowErrors(cut_all(error.values), error.failures) from error
        return later(values) if inspect.isawaitable(values) else cut_all(values)

    return reward


def row_by_row(rows: int, one: Callable[[int], Any]) -> list[Any]:
    """`[one(0), ..., one(rows - 1)]`, where a row that raises does not keep the others from being scored.

    Raises:
        RowErrors: after the last row, with the values of the others, if any row raised.

    Example:
        >>> row_by_row(3, lambda row: row / 2)
        [0.0, 0.5, 1.0]
    """
    values: list[Any] = []
    failures: dict[int, Exception] = {}
    for row in range(rows):
        try:
            values.append(one(row))
        except Exception as error:
            values.append(None)
            failures[row] = error
    if failures:
        raise RowErrors(values, failures)
    return values

"""Scores from reward functions: call them, check what they return, weigh and add.

A reward function takes a whole batch of texts and gives one number per row, or None where it cannot tell. What counts
as an error, and what becomes of it, is decided here and nowhere else; what a reward means is not.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

_FAILURE = (Exception, SystemExit)
"""What a function may raise and have it counted as its failure. It may call exit(), which must not end a run that
trains: the run would look as if it had been finished. Ctrl-C is not the function's doing."""

Reward: TypeAlias = Callable[..., Any]
"""`reward(prompts, completions, **columns) -> list[float | None]`, or a coroutine function that returns one."""


class RewardError(ValueError):
    """A reward function failed: it raised, or returned something that is not one finite number or None per row."""


class RowErrors(RewardError):
    """What a function that scores rows one by one raises: some rows failed, the others have values.

    Attributes:
        values: a number or None for every row, None where it failed.
        failures: what each failed row raised, by row.
    """

    def __init__(self, values: list[Any], failures: dict[int, Exception]):
        row, first = next(iter(failures.items()))
        super().__init__(f"row {row}: {type(first).__name__}: {first} ({len(failures)} of {len(values)} rows failed)")
        self.values = values
        self.failures = failures


class RewardFunction(NamedTuple):
    """One component of the reward.

    Attributes:
        name: the name in the metrics; unique among the components.
        function: `reward(prompts, completions, **columns) -> list[float | None]`. It is given the columns it names, or
            all of them if it takes `**`.
        weight: factor in the total; 0 makes the component a mere metric.
    """

    name: str
    function: Reward
    weight: float = 1.0


class Scored(NamedTuple):
    """What the reward functions said of `N` rows.

    Attributes:
        total: `[N]` float32, weighted sum of the components; 0 where the row is not valid.
        components: by name, `[N]` float32, unweighted; NaN where the function gave None or failed.
        valid: `[N]` bool; False where no component of nonzero weight could be scored, or one failed.
        errors: by name, number of rows at which the function failed.
    """

    total: NDArray[np.float32]
    components: dict[str, NDArray[np.float32]]
    valid: NDArray[np.bool_]
    errors: dict[str, int]


def score(
    functions: Sequence[RewardFunction],
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]] | None = None,
    *,
    on_error: str = "stop",
) -> Scored:
    """Score completions with every reward function and add up the results.

    `total[n] = sum_k weight_k * r_k[n]` over the functions `k` that did not return None for row `n`.

    A failure is an exception (also the one of `exit()`), a result of the wrong length, and a value that is neither None
    nor a finite number. Under `on_error="invalid"` a row at which any function failed is not valid: a total that lacks
    a component must not be compared with totals that have it. Coroutine functions of one call run concurrently.

    Args:
        functions: the components; names must differ, and one weight at least must not be zero.
        prompts: `N` texts.
        completions: `N` texts, without stop tokens.
        columns: further columns of the problems, `N` values each.
        on_error: `"stop"` raises at a failure; `"invalid"` gives up the rows concerned (all of them for an exception or
            a wrong length) and counts them.

    Returns:
        `Scored`, of `N` rows.

    Raises:
        RewardError: names function and row of a failure, under `"stop"`.
        ValueError: for arguments that do not fit together, e.g. a column that a function needs and that is not there;
            whatever `on_error` says, since no row could ever be scored.

    Example:
        >>> def short(completions):
        ...     return [1.0 if len(c) <= 2 else 0.0 for c in completions]
        >>> def right(completions, answer):
        ...     return [None if a is None else float(a == c) for a, c in zip(answer, completions)]
        >>> parts = [RewardFunction("right", right), RewardFunction("short", short, weight=0.5)]
        >>> result = score(parts, ["1+1=", "2+2=", "?"], ["2", "four", "x"], {"answer": ["2", "4", None]})
        >>> result.total.tolist(), result.valid.tolist()
        ([1.5, 0.0, 0.5], [True, True, True])
    """
    columns = dict(columns or {})
    rows = len(prompts)
    _check_arguments(functions, rows, completions, columns, on_error)
    calls = [_arguments(function, prompts, completions, columns) for function in functions]
    outcomes = _call_all([(part.function, *call) for part, call in zip(functions, calls, strict=True)])

    components: dict[str, NDArray[np.float32]] = {}
    errors: dict[str, int] = {}
    total = np.zeros(rows)
    scored = np.zeros(rows, bool)
    failed = np.zeros(rows, bool)
    for part, outcome in zip(functions, outcomes, strict=True):
        values, failures = _read(part.name, outcome, rows)
        if failures and on_error == "stop":
            raise _stop(part.name, failures)
        for row in failures:
            failed[row] = True
        components[part.name] = values
        errors[part.name] = len(failures)
        if part.weight != 0.0:
            present = ~np.isnan(values)
            total += np.where(present, part.weight * values.astype(np.float64), 0.0)
            scored |= present
    for row in np.flatnonzero(scored & ~failed & ~(np.abs(total) < 1e38)):
        if on_error == "stop":
            raise RewardError(f"the weighted total of row {row} is {total[row]:g}, which is no finite float32 number")
        failed[row] = True
    valid = scored & ~failed
    return Scored(np.where(valid, total, 0.0).astype(np.float32), components, valid, errors)


def _check_arguments(
    functions: Sequence[RewardFunction],
    rows: int,
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    on_error: str,
) -> None:
    if on_error not in ("stop", "invalid"):
        raise ValueError(f"on_error must be 'stop' or 'invalid', got {on_error!r}")
    names = [part.name for part in functions]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"reward functions must have distinct names, and one at least is needed; got {names}")
    for part in functions:
        if not callable(part.function):
            raise ValueError(f"reward function {part.name!r} is not callable: {part.function!r}")
        if not math.isfinite(part.weight):
            raise ValueError(f"the weight of reward function {part.name!r} must be finite, got {part.weight}")
    if all(part.weight == 0.0 for part in functions):
        raise ValueError(f"every reward function has weight 0 ({names}), so nothing is rewarded; give one a weight")
    if len(completions) != rows:
        raise ValueError(f"need as many completions as prompts, got {len(completions)} and {rows}")
    for name, values in columns.items():
        if len(values) != rows:
            raise ValueError(f"column {name!r} must hold {rows} values, one per completion, got {len(values)}")


def check_columns(functions: Sequence[RewardFunction], names: Iterable[str]) -> None:
    """Check that the data has what reward functions ask for, without calling them.

    Args:
        functions: as in `score`.
        names: of the data's columns.

    Raises:
        ValueError: as `score`, for a column that a function needs and that is not there.

    Example:
        >>> def right(completions, answer):
        ...     return [float(a == c) for a, c in zip(answer, completions)]
        >>> check_columns([RewardFunction("right", right)], ["answer", "prompt_id"])
    """
    for part in functions:
        _chosen(part, dict.fromkeys([*names, "prompts", "completions"]))


def _arguments(
    part: RewardFunction, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
) -> tuple[list[Any], dict[str, Any]]:
    available = {**columns, "prompts": prompts, "completions": completions}
    return _chosen(part, {name: list(values) for name, values in available.items()})


def _chosen(part: RewardFunction, available: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """What of `available` a function is given, by position and by name."""
    try:
        parameters = inspect.signature(part.function).parameters
    except (TypeError, ValueError):  # some functions written in C have no signature to read
        return [available["prompts"], available["completions"]], {}
    chosen, missing = pick(parameters, available)
    if missing:
        raise ValueError(
            f"reward function {part.name!r} needs {', '.join(map(repr, missing))}, but the data has "
            f"{', '.join(sorted(available))}; add the column to the data or rename the parameter"
        )
    positional = [chosen.pop(name) for name, p in parameters.items() if p.kind is p.POSITIONAL_ONLY and name in chosen]
    return positional, chosen


def pick(parameters: Mapping[str, inspect.Parameter], available: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The arguments that a function asks for by name, and the names that it needs and cannot have.

    Args:
        parameters: of the function's signature.
        available: what can be passed, by name.

    Returns:
        Arguments by name (all of `available` if the function takes `**`), and the missing names.

    Example:
        >>> import inspect
        >>> pick(inspect.signature(lambda answer, scale=2, *, depth: 0).parameters, {"answer": 1, "other": 2})
        ({'answer': 1}, ['depth'])
    """
    named = [p for p in parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [p.name for p in named if p.name not in available and p.default is p.empty]
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(available), missing
    return {p.name: available[p.name] for p in named if p.name in available}, missing


def _call_all(calls: list[tuple[Reward, list[Any], dict[str, Any]]]) -> list[Any]:
    """The result of every call, or the exception that it raised."""
    outcomes: list[Any] = []
    for function, positional, named in calls:
        try:
            outcomes.append(function(*positional, **named))
        except _FAILURE as error:
            outcomes.append(error)
    waiting = [index for index, outcome in enumerate(outcomes) if inspect.isawaitable(outcome)]
    if waiting:
        for index, result in zip(waiting, _gather([outcomes[index] for index in waiting]), strict=True):
            outcomes[index] = result
    return outcomes


def _gather(awaitables: list[Awaitable[Any]]) -> list[Any]:
    async def one(awaitable: Awaitable[Any]) -> Any:
        try:
            return await awaitable
        except _FAILURE as error:  # within the task: a SystemExit that leaves one ends its whole loop
            return error

    async def together() -> list[Any]:
        return await asyncio.gather(*map(one, awaitables), return_exceptions=True)

    thread, loop = _shared_loop()
    if threading.current_thread() is thread:  # a coroutine function scores: the loop cannot wait for itself
        with ThreadPoolExecutor(1) as elsewhere:
            return elsewhere.submit(asyncio.run, together()).result()
    everything = asyncio.run_coroutine_threadsafe(together(), loop)
    try:
        return everything.result()
    except BaseException:  # Ctrl-C
        everything.cancel()
        raise


_choosing = threading.Lock()
_loops: list[tuple[threading.Thread, asyncio.AbstractEventLoop]] = []  # the one in use, if there is one


def _shared_loop() -> tuple[threading.Thread, asyncio.AbstractEventLoop]:
    """The loop of all reward functions for as long as the process lives, and its thread.

    So what a function keeps of a loop (a client's session, a semaphore) serves every batch, and it goes where another
    loop runs already, as in a notebook.
    """
    with _choosing:
        if not (_loops and _loops[0][0].is_alive()):  # a process that was forked has no threads
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=_run, args=(loop,), name="jaxrl_post rewards", daemon=True)
            thread.start()
            _loops[:] = [(thread, loop)]
        return _loops[0]


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    while True:
        # An exit() or Ctrl-C in a task ends `run_forever`; who waits for the task is told, and the others go on.
        with suppress(SystemExit, KeyboardInterrupt):
            loop.run_forever()


def _read(name: str, outcome: Any, rows: int) -> tuple[NDArray[np.float32], dict[int, BaseException | str]]:
    """The values of one function, NaN where there is none, and its failures by row."""
    nothing = np.full(rows, np.nan, np.float32)
    if isinstance(outcome, RowErrors):
        values, failures = outcome.values, dict(outcome.failures)
    elif isinstance(outcome, _FAILURE):
        return nothing, dict.fromkeys(range(rows), outcome)
    elif isinstance(outcome, BaseException):
        raise outcome  # e.g. KeyboardInterrupt from a coroutine: not the reward's doing
    else:
        values, failures = outcome, {}
    try:
        if isinstance(values, str | bytes | Mapping):
            raise TypeError("not a list")
        values = list(values)
    except Exception:
        wrong = f"returned {type(values).__name__} in place of a list of {rows} numbers"
        return nothing, dict.fromkeys(range(rows), wrong)
    if len(values) != rows:
        wrong = f"returned {len(values)} rewards for {rows} completions; return one per completion, None to skip one"
        return nothing, dict.fromkeys(range(rows), wrong)
    result = nothing
    found: dict[int, BaseException | str] = dict(failures)
    for row, value in enumerate(values):
        if value is None or row in found:
            continue
        number = as_number(value)
        if number is None:
            found[row] = f"returned {value!r} ({type(value).__name__}); expected a number, or None if it cannot tell"
        elif not abs(number) < 1e38:  # also true of NaN
            found[row] = f"returned {value!r}; expected a finite float32 number, or None if it cannot tell"
        else:
            result[row] = number
    return result, found


def as_number(value: Any) -> float | None:
    """`value` as a float if it is a number, a bool or an array of one; None for anything else, strings included.

    Example:
        >>> as_number(True), as_number(np.float32(0.5)), as_number("1")
        (1.0, 0.5, None)
    """
    if isinstance(value, str | bytes):
        return None
    try:
        array = np.asarray(value.item() if hasattr(value, "item") else value)  # of any library's array, of any float
        if array.size != 1 or array.dtype.kind not in "biuf":
            return None
        return float(array.reshape(()))
    except Exception:  # what an object of another library raises is its own affair
        return None


def _stop(name: str, failures: Mapping[int, BaseException | str]) -> RewardError:
    row, first = next(iter(failures.items()))
    cause = first if isinstance(first, BaseException) else None
    what = f"raised {type(cause).__name__}: {cause}" if cause else first
    whole = len(set(map(id, failures.values()))) == 1 and len(failures) > 1
    where = f"rows 0 to {max(failures)} (the whole batch)" if whole else f"row {row}"
    advice = (
        "; return None for a row that cannot be scored, or set on_reward_error to 'invalid' to leave such rows out and "
        "count them"
    )
    if whole and cause is None:
        advice = ""  # a list of another length, or what is no list, is no row's doing
    place = "" if cause is None else _place(cause)
    error = RewardError(f"reward function {name!r} {what}, at {where}{place}{advice}")
    error.__cause__ = cause
    return error


def _place(error: BaseException) -> str:
    """Where in the user's code an error was raised, as the end of a sentence."""
    others = (str(Path(__file__).parents[1]), sys.prefix, sys.base_prefix)
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith(others)]
    return f", in {frames[-1].filename}:{frames[-1].lineno}" if frames else ""

"""Calls of other people's functions, all at once, each within a time of its own: what hangs, raises or blocks costs its
own row only. What is called, and what becomes of the values, is not known here.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import inspect
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

GRACE = 5.0
"""Seconds beyond a call's time in which none begins or ends: after these the event loop itself counts as blocked."""

_choosing = threading.Lock()

ERROR_CHARACTERS = 200
"""Of a longer message the rest is left out."""


class Outcome(NamedTuple):
    """What a call gave.

    Attributes:
        value: what was returned; None if nothing was.
        error: what went wrong, as a text; None if nothing did.
        timed_out: whether it did not come back in time.
    """

    value: Any = None
    error: str | None = None
    timed_out: bool = False


def describe(error: BaseException) -> str:
    """An exception as a short text.

    Example:
        >>> describe(ValueError("no such city"))
        'ValueError: no such city'
    """
    name = type(error).__name__
    try:
        text = str(error)
    except Exception:
        text = ""
    return f"{name}: {text}"[:ERROR_CHARACTERS] if text else name


async def call(function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Any:
    """What a function returns: a coroutine function runs in the loop, any other in a thread of its own.

    The thread is a daemon and belongs to no pool, so that one that never ends keeps neither others nor the end of the
    process waiting.

    Args:
        function: plain or async.
        *arguments: of it.
        **named: of it.

    Example:
        >>> asyncio.run(call(divmod, 7, 2))
        (3, 1)
    """
    if inspect.iscoroutinefunction(function):
        return await function(*arguments, **named)
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

    def deliver(value: Any, error: BaseException | None) -> None:
        if not answer.done():  # nobody may be waiting any more
            answer.set_result((value, error))

    def work() -> None:
        value, error = None, None
        try:
            value = function(*arguments, **named)
        except BaseException as caught:
            error = caught
        with suppress(RuntimeError):  # the loop may have been closed since
            loop.call_soon_threadsafe(deliver, value, error)

    threading.Thread(target=work, name="jaxrl_post call", daemon=True).start()
    value, error = await answer
    if error is not None:
        raise error
    return await value if inspect.isawaitable(value) else value


class Caller:
    """Makes many calls at a time, in one event loop that all callers share for as long as the process lives.

    So what an environment keeps of a loop (a session, a lock) serves all its rollouts. The loop runs in a thread of its
    own, so that it goes where another loop runs already, as in a notebook. If a call blocks it, the loop is left to
    itself with all calls that have begun, and those that have not are made in a new one. Plain functions run in
    threads, which share the interpreter: what computes rather than waits takes its time from the others.

    Example:
        >>> caller = Caller(timeout=5.0)
        >>> [outcome.value or outcome.error for outcome in caller([(divmod, (7, 2)), (int, ("x", 8))])]
        [(3, 1), "ValueError: invalid literal for int() with base 8: 'x'"]
    """

    def __init__(self, *, timeout: float, concurrency: int = 256):
        """Calls with limits.

        Args:
            timeout: seconds for each call, from its beginning.
            concurrency: calls at a time.

        Raises:
            ValueError: if the time is not positive and finite, or no call could be made.
        """
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout must be positive and finite, in seconds, got {timeout}")
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1 call at a time, got {concurrency}")
        self.timeout = timeout
        self.concurrency = concurrency

    def __call__(self, calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Outcome]:
        """One outcome for each function with its arguments, in order."""
        if not calls:
            return []
        late = Outcome(error=f"timed out after {self.timeout:g} s", timed_out=True)
        outcomes = [late] * len(calls)
        rows = list(range(len(calls)))
        while rows:
            loop, batch = _shared_loop(), _Batch(calls, outcomes)
            everything = asyncio.run_coroutine_threadsafe(self._make_all(batch, rows), loop)
            while not everything.done() and (left := batch.moved + self.timeout + GRACE - time.monotonic()) > 0:
                concurrent.futures.wait([everything], left)
            if everything.done():
                everything.result()
                break
            batch.left = True
            _leave(loop)
            waiting = [row for row in rows if row not in batch.begun]
            rows = waiting if len(waiting) < len(rows) else []
        return list(outcomes)

    async def _make_all(self, batch: _Batch, rows: Sequence[int]) -> None:
        free = asyncio.Semaphore(self.concurrency)

        async def one(row: int) -> None:
            async with free:
                if batch.left:
                    return
                batch.begun.add(row)
                batch.moved = time.monotonic()
                outcome = await self._make(*batch.calls[row], batch.outcomes[row])
                batch.moved = time.monotonic()
                if not batch.left:
                    batch.outcomes[row] = outcome

        await asyncio.gather(*map(one, rows))

    async def _make(self, function: Callable[..., Any], arguments: tuple[Any, ...], late: Outcome) -> Outcome:
        limit = asyncio.timeout(self.timeout)
        try:
            async with limit:
                return Outcome(await call(function, *arguments))
        # An environment may exit or be cancelled from within, or raise what is no Exception otherwise.
        except BaseException as error:
            return late if limit.expired() else Outcome(error=describe(error))


@dataclasses.dataclass
class _Batch:
    """Calls that one loop makes.

    Attributes:
        calls: all of them.
        outcomes: of all, changed in place.
        begun: the rows of those that the loop has begun.
        moved: when one has last begun or ended, by `time.monotonic`.
        left: whether nobody waits for the loop any more: it begins nothing then.
    """

    calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]
    outcomes: list[Outcome]
    begun: set[int] = dataclasses.field(default_factory=set)
    moved: float = dataclasses.field(default_factory=time.monotonic)
    left: bool = False


_loops: list[asyncio.AbstractEventLoop] = []  # the one in use, if there is one


def _shared_loop() -> asyncio.AbstractEventLoop:
    """The loop of all callers; a new one where there is none, or a task of an environment has ended it."""
    with _choosing:
        if not (_loops and _loops[0].is_running()):
            _loops[:] = [_started_loop()]
        return _loops[0]


def _leave(loop: asyncio.AbstractEventLoop) -> None:
    """No longer use a loop; what still runs in it ends when it can."""
    with _choosing:
        if _loops and _loops[0] is loop:
            _loops.clear()
    with suppress(RuntimeError):  # it may have ended already
        loop.call_soon_threadsafe(_end, loop)


def _started_loop() -> asyncio.AbstractEventLoop:
    loop, begun = asyncio.new_event_loop(), threading.Event()

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.call_soon(begun.set)
        try:
            loop.run_forever()
        finally:
            loop.close()

    threading.Thread(target=run, name="jaxrl_post loop", daemon=True).start()
    begun.wait()
    return loop


def _end(loop: asyncio.AbstractEventLoop) -> None:
    async def drain() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)  # a coroutine may refuse to be cancelled
        loop.stop()

    loop.create_task(drain())

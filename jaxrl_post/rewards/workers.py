"""Processes that call one function for many rows, each within a time of its own.

For functions that may hang, die, eat memory or use signals, as verifiers do. Each process is a fresh interpreter that
runs this file and the file of the function, and nothing else: it inherits no threads or locks of JAX, does not see the
accelerator, and does not run the user's main script again, as `multiprocessing` would. What goes back and forth is
JSON. It is no sandbox: the function itself must be trusted, its arguments need not be.

The file imports the standard library only, since it is also what the processes run.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

_GRACE = 5.0
"""Seconds after which a process ends itself that should have been killed; its parent may be gone."""


@dataclass(eq=False)
class _Worker:
    """One process. `row` is what it works on; `deadline` is for that, or for its start while it is not `ready`."""

    process: subprocess.Popen[bytes]
    deadline: float
    ready: bool = False
    row: int | None = None
    received: bytearray = field(default_factory=bytearray)

    def fileno(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()


class Workers:
    """A pool of processes, started when first used and closed at exit.

    Attributes:
        lost: how many rows gave no value so far: `"timed out"`, `"died"` (the process), `"failed"` (the function
            raised).
        last_error: what the function last raised, as a text; None if it never did.

    Example:
        >>> import textwrap
        >>> with Workers(textwrap.__file__, "dedent", processes=1) as workers:
        ...     workers.map([[" a"], ["  b"]])
        ['a', 'b']
    """

    def __init__(
        self,
        file: str | Path,
        function: str,
        *,
        timeout: float = 5.0,
        processes: int | None = None,
        memory: int = 2**31,
        start_timeout: float = 120.0,
    ):
        """A pool for one function.

        Args:
            file: the Python file that defines the function. It is imported by itself, without its package.
            function: its name there. It takes what JSON can hold and returns such.
            timeout: seconds of wall-clock time for a row.
            processes: how many at most; None for one per core, and no more than 8.
            memory: bytes of address space for each process, where the system can limit it.
            start_timeout: seconds that a process may take until it has imported the file.

        Raises:
            ValueError: if a time is not positive and finite, or there would be no process.
        """
        for name, seconds in (("timeout", timeout), ("start_timeout", start_timeout)):
            if not 0 < seconds < math.inf:
                raise ValueError(f"{name} must be positive and finite, in seconds, got {seconds}")
        if processes is not None and processes < 1:
            raise ValueError(f"processes must be at least 1, or None for one per core, got {processes}")
        self.lost: Counter[str] = Counter()
        self.last_error: str | None = None
        self._settings = {
            "file": str(Path(file).resolve()),
            "function": function,
            "memory": memory,
            "alarm": 2 * timeout + _GRACE,
        }
        self._timeout = timeout
        self._start_timeout = start_timeout
        self._processes = processes or min(8, _cores())
        self._workers: list[_Worker] = []
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def map(self, rows: Sequence[Sequence[Any]]) -> list[Any]:
        """`[function(*row) for row in rows]`; None for a row that ran out of time, raised, or ended its process.

        Such a row is counted in `lost`, and its process, if it hangs or has died, is replaced. Calls from several
        threads take turns.

        Raises:
            RuntimeError: if a process cannot start, with the reason.
        """
        with self._lock:
            self._forget_the_dead()
            values: list[Any] = [None] * len(rows)
            waiting = deque(range(len(rows)))
            try:
                while waiting or any(worker.row is not None for worker in self._workers):
                    for worker in [w for w in self._workers if w.ready and w.row is None][: len(waiting)]:
                        self._give(worker, waiting.popleft(), rows)
                    starting = sum(not worker.ready for worker in self._workers)
                    for _ in range(min(self._processes - len(self._workers), len(waiting) - starting)):
                        self._start()
                    self._collect(values)
            finally:  # an answer that comes after an interruption must not be taken for that of a later row
                for worker in [w for w in self._workers if w.row is not None]:
                    self._stop(worker)
            return values

    def close(self) -> None:
        """End all processes. A later `map` starts new ones."""
        with self._lock:
            self._forget_the_dead()
            for worker in self._workers.copy():
                self._stop(worker)
            atexit.unregister(self.close)

    def _forget_the_dead(self) -> None:
        if self._owner != os.getpid():  # after a fork the processes are the parent's
            self._workers, self._owner = [], os.getpid()
        for worker in [w for w in self._workers if w.process.poll() is not None]:
            self._stop(worker)

    def _start(self) -> None:
        process = subprocess.Popen(
            # -P: this folder holds a module that would hide `math`.
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the parent to handle
        )
        self._workers.append(worker := _Worker(process, time.monotonic() + self._start_timeout))
        atexit.unregister(self.close)
        atexit.register(self.close)
        _send(worker, {**self._settings, "path": sys.path})

    def _give(self, worker: _Worker, row: int, rows: Sequence[Sequence[Any]]) -> None:
        worker.row, worker.deadline = row, time.monotonic() + self._timeout
        _send(worker, list(rows[row]))

    def _collect(self, values: list[Any]) -> None:
        """Wait until a process answers or is late, and take note of it."""
        active = [worker for worker in self._workers if worker.row is not None or not worker.ready]
        if not active:
            return
        left = min(worker.deadline for worker in active) - time.monotonic()
        heard = wait([worker.fileno() for worker in active], max(0.0, left))
        for worker in active:
            if worker.fileno() in heard:
                self._hear(worker, values)
            elif worker.deadline <= time.monotonic():
                self._lose(worker, "timed out")

    def _hear(self, worker: _Worker, values: list[Any]) -> None:
        received = os.read(worker.fileno(), 65536)
        if not received:
            self._lose(worker, "died")
            return
        worker.received += received
        if not worker.received.endswith(b"\n"):
            return
        message = json.loads(worker.received)
        worker.received.clear()
        if not worker.ready:
            if "error" in message:
                self._lose(worker, message["error"])
            worker.ready = True
            return
        if "error" in message:
            self.lost["failed"] += 1
            self.last_error = message["error"]
        elif worker.row is not None:
            values[worker.row] = message["value"]
        worker.row = None

    def _lose(self, worker: _Worker, why: str) -> None:
        self._stop(worker)
        if not worker.ready:
            what = f"{self._settings['function']} of {self._settings['file']}"
            raise RuntimeError(f"a process that calls {what} could not start: {why}")
        self.lost[why] += 1
        worker.row = None

    def _stop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.process.kill()
        worker.process.wait()
        for stream in (worker.process.stdin, worker.process.stdout):
            if stream is not None:
                stream.close()


def _send(worker: _Worker, message: Any) -> None:
    stream = worker.process.stdin
    assert stream is not None
    text = memoryview(json.dumps(message).encode() + b"\n")
    with suppress(BrokenPipeError):  # it has died, which is seen where its answer is read
        while text:
            text = text[stream.write(text) :]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load(file: str, name: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location(Path(file).stem + "_in_worker", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be loaded as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def _limit(memory: int) -> None:
    for kind, limit in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0)):
        with suppress(ValueError, OSError):  # not every system has every limit
            hard = resource.getrlimit(kind)[1]
            limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(kind, (limit, hard))


def _serve() -> None:
    """What a process does: import the function, say so, then answer row after row."""
    with os.fdopen(os.dup(0), "r") as requests, os.fdopen(os.dup(1), "w") as replies:
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 0)  # what the function prints is not taken for an answer, nor does it read the next row
        os.dup2(nowhere, 1)

        def reply(message: dict[str, Any]) -> None:
            replies.write(json.dumps(message) + "\n")
            replies.flush()

        settings = json.loads(requests.readline())
        sys.path[:] = settings["path"]
        _limit(settings["memory"])
        try:
            function = _load(settings["file"], settings["function"])
        except BaseException as error:
            reply({"error": f"{type(error).__name__}: {error}"})
            return
        reply({"ready": True})
        for line in requests:
            # The default action ends the process even inside a long computation in C, should the parent be gone.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, settings["alarm"])
            try:
                answer = {"value": function(*json.loads(line))}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            signal.setitimer(signal.ITIMER_REAL, 0)
            reply(answer)


if __name__ == "__main__":
    _serve()

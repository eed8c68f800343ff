"""Several processes as one run: how they find each other, agree, and stop together.

Arrays on the mesh need none of this, because every process runs the same program. What a program cannot see is what
happens on one host alone: its rewards, its errors, its signals, its death.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from numpy.typing import NDArray

HEARTBEAT_SECONDS = 30
"""A process that has not been heard of for so long is dead, and the others stop."""

SHUTDOWN_SECONDS = 15
"""How long a process waits for the others once all of them have come to the end of their `session`."""

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_LOST = ("gloo", "closed by peer", "connection reset", "coordination service", "heartbeat", "another task died")

Result = TypeVar("Result")


class DistributedError(ValueError):
    """The processes of a run cannot be brought together; the message says what to change."""


class PeerError(ValueError):
    """Another process of the run failed, so that this one stops too."""


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and every process does, after the same step."""


def initialize(environment: Mapping[str, str] = os.environ) -> int:
    """Join the processes of this run, before any device is touched; a process on its own needs nothing.

    On TPU pods, and wherever else JAX detects a cluster (Slurm, Open MPI, GKE), everything is found automatically.
    Elsewhere the environment says it: `JAX_COORDINATOR_ADDRESS` (`host:port` of process 0), `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`, for each process. A process that dies makes the others stop within a minute, see `session`.

    Args:
        environment: where the variables are looked up.

    Returns:
        The number of processes.

    Raises:
        DistributedError: for variables that are missing or no numbers, or processes that cannot find each other.

    Example:
        >>> initialize({"JAX_PLATFORMS": "cpu"})
        1
        >>> initialize({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"})
        Traceback (most recent call last):
        ...
        jaxrl_post.training.distributed.DistributedError: JAX_NUM_PROCESSES is set but JAX_COORDINATOR_ADDRESS is not; \
set all of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID, or none
    """
    if jax.distributed.is_initialized():
        return jax.process_count()
    given = _given(environment)
    timeouts: dict[str, Any] = {
        "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
        "shutdown_timeout_seconds": SHUTDOWN_SECONDS,
    }
    if given is not None:
        address, count, index = given
        try:
            jax.distributed.initialize(address, count, index, cluster_detection_method="deactivate", **timeouts)
        except RuntimeError as error:
            raise DistributedError(
                f"process {index} of {count} could not join the others at {address}: {_first_line(error)}; see that "
                "all of them are started, with the same JAX_COORDINATOR_ADDRESS, which every host can reach"
            ) from error
        return jax.process_count()
    if environment.get("JAX_PLATFORMS", "").strip() == "cpu":
        return 1
    try:
        jax.distributed.initialize(**timeouts)
    except ValueError as error:
        if "should be defined" in str(error) or "must be defined" in str(error):
            return 1  # no cluster was detected
        raise
    return jax.process_count()


@contextlib.contextmanager
def session(report: Callable[[Exception], int]) -> Iterator[None]:
    """Join the processes of this run; leave together at its end, and at once if something goes wrong here.

    At the end the first process still has files to write when the others are done, which wait for it. After an error
    nobody waits: the others are in the middle of a step, and see that a process is gone only when it is. They exit with
    75 (`os.EX_TEMPFAIL`), or with 134 (SIGABRT) where the runtime of JAX notices first and aborts the process.

    Args:
        report: tells the user about an error of this process, and returns the exit status.
    """
    initialize()
    try:
        try:
            yield
        except Stopped:
            any_process(False)
            raise
        any_process(False)
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if lost_peer(error):
            print(
                f"process {jax.process_index()} of {jax.process_count()} stops: another one has died or cannot be "
                f"reached ({_first_line(error)}). Its own output says why. The same command, started again on all "
                "hosts, goes on from the last checkpoint",
                file=sys.stderr,
            )
            status = os.EX_TEMPFAIL
        else:
            status = report(error)
        sys.stdout.flush()
        sys.stderr.flush()
        if is_main():
            time.sleep(1)  # the others lose their coordinator with it, and may be about to say why they stop
        os._exit(status)


def _given(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    found = {name: environment[name] for name in _VARIABLES if environment.get(name)}
    if not found:
        return None
    if missing := [name for name in _VARIABLES if name not in found]:
        # On TPU pods the address alone may be given, to say where the coordinator is; JAX reads it itself.
        if list(found) == _VARIABLES[:1]:
            return None
        raise DistributedError(
            f"{next(iter(found))} is set but {missing[0]} is not; set all of {', '.join(_VARIABLES)}, or none"
        )
    address, count, index = (found[name] for name in _VARIABLES)
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise DistributedError(f"JAX_COORDINATOR_ADDRESS must be host:port of process 0, got {address!r}")
    if not count.isdigit() or not index.isdigit() or not int(index) < int(count):
        raise DistributedError(
            f"JAX_NUM_PROCESSES must be a number and JAX_PROCESS_ID one below it, got {count!r} and {index!r}"
        )
    return address, int(count), int(index)


def is_main() -> bool:
    """Whether this is the process that writes metrics, completions and plots and shows progress."""
    return jax.process_index() == 0


def gather(arrays: Mapping[str, NDArray]) -> list[dict[str, NDArray]]:
    """What each process gives, on every process, in the order of their numbers. Called by all of them.

    Args:
        arrays: host arrays of numbers or text, by name; names and shapes may differ between processes.

    Example:
        >>> [found["rows"].tolist() for found in gather({"rows": np.arange(2)})]
        [[0, 1]]
    """
    if jax.process_count() == 1:
        return [dict(arrays)]
    from jax.experimental import multihost_utils

    buffer = io.BytesIO()
    given: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
    np.savez(buffer, **given)
    payload = np.frombuffer(buffer.getvalue(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.asarray([payload.size], np.int32)))
    # A power of two, so that few shapes are compiled.
    width = 1 << int(sizes.max() - 1).bit_length()
    padded = np.zeros(width, np.uint8)
    padded[: payload.size] = payload
    every = np.asarray(multihost_utils.process_allgather(padded)).reshape(-1, width)
    found = []
    for row, size in zip(every, sizes, strict=True):
        with np.load(io.BytesIO(row[:size].tobytes()), allow_pickle=False) as read:
            found.append({name: read[name] for name in read.files})
    return found


def exchange(work: Callable[[], Mapping[str, NDArray]]) -> list[dict[str, NDArray]]:
    """Do what may fail on one process alone, and `gather` the results; one failure stops all processes.

    Args:
        work: makes what this process gives.

    Raises:
        PeerError: `work` failed on another process.
        Exception: what `work` raised here.

    Example:
        >>> exchange(lambda: {"total": np.ones(2)})[0]["total"].tolist()
        [1.0, 1.0]
    """
    if jax.process_count() == 1:
        return [dict(work())]
    failure: Exception | None = None
    try:
        given = work()
    except Exception as error:
        failure, given = error, {"error": np.asarray(json.dumps(_first_line(error)))}
    every = gather(given)
    if failure is not None:
        raise failure
    for index, found in enumerate(every):
        if "error" in found:
            raise PeerError(f"process {index} failed, so that process {jax.process_index()} stops: {_read(found)}")
    return every


def _read(found: Mapping[str, NDArray]) -> str:
    return json.loads(str(found["error"]))


def together(work: Callable[[], Result]) -> Result:
    """Run `work` on every process; if it fails on one, all stop.

    Args:
        work: may fail on some processes only, e.g. because a host lacks a file.

    Returns:
        What it returned here.

    Raises:
        PeerError: it failed on another process.
        Exception: what it raised here.

    Example:
        >>> together(lambda: 3)
        3
    """
    results: list[Result] = []

    def keep() -> dict[str, NDArray]:
        results.append(work())
        return {}

    exchange(keep)
    return results[0]


def on_main(work: Callable[[], bool]) -> bool:
    """Run `work` on process 0 alone; every process gets its answer, or stops if it fails.

    Example:
        >>> on_main(lambda: True)
        True
    """
    every = exchange(lambda: {"answer": np.asarray(work())} if is_main() else {})
    return bool(every[0]["answer"])


def any_process(flag: bool) -> bool:
    """Whether `flag` is true on any process: how all of them stop at the same step. Called by all of them."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray([flag]))))


def preemption_noticed(step: int) -> bool:
    """Whether JAX has been told that a host will be taken away, and `step` is where all processes are to stop.

    Args:
        step: number of the step taken, the same on every process.
    """
    if jax.process_count() == 1 or not getattr(jax.config, "jax_enable_preemption_service", True):
        return False
    from jax.experimental import multihost_utils

    return bool(multihost_utils.reached_preemption_sync_point(step))


def lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process is gone.

    Example:
        >>> lost_peer(jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"))
        True
        >>> lost_peer(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))
        False
    """
    # JAX raises a JaxRuntimeError or a ValueError, depending on where the collective was.
    raised_by_jax = isinstance(error, jax.errors.JaxRuntimeError) or type(error) is ValueError
    return raised_by_jax and any(words in str(error).lower() for words in _LOST)


def to_host(x: jax.Array) -> NDArray:
    """An array on every process, however it lies on the mesh. Called by all of them."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:500]

"""Stopping a run between two steps when it is asked to stop: Ctrl-C, or the notice before a machine is taken away."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """While the context lasts, the first SIGINT or SIGTERM is only noted; a second one interrupts at once.

    Yields:
        A function that tells whether a signal has come.

    Raises:
        KeyboardInterrupt: at the second signal.

    Example:
        >>> with stop_requests() as requested:
        ...     before = requested()
        ...     signal.raise_signal(signal.SIGTERM)
        ...     before, requested()
        (False, True)
    """
    seen = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        del number, frame
        if seen:
            raise KeyboardInterrupt
        seen = True
        os.write(2, b"\nstopping after the step under way; once more to stop at once\n")

    # Only the main thread of a process may handle signals; elsewhere nothing is ever requested.
    main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, note) for number in SIGNALS} if main else {}
    try:
        yield lambda: seen
    finally:
        for number, handler in previous.items():
            # None: a handler that was not set from Python, as the JAX runtime of several processes has one.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

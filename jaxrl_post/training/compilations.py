"""How many programs JAX compiles while a run goes on: none but in the first step and evaluation of a stage."""

from __future__ import annotations

from typing import Any

from jax import monitoring

_COMPILED = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Counts the programs of this process that are compiled, or read from JAX's cache; a context manager.

    Example:
        >>> import jax
        >>> with Compilations() as compilations:
        ...     double = jax.jit(lambda x: 2 * x)
        ...     counts = []
        ...     for x in (1.0, 2.0, 3):  # an integer needs a program of its own
        ...         _ = double(x)
        ...         counts.append(compilations.since()[0])
        >>> counts
        [1, 0, 1]
    """

    def __init__(self) -> None:
        self._count, self._seconds = 0, 0.0

    def __enter__(self) -> Compilations:
        monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def __exit__(self, *error: object) -> None:
        monitoring.unregister_event_duration_listener(self._heard)

    def since(self) -> tuple[int, float]:
        """Number and seconds since it was last asked."""
        found = self._count, self._seconds
        self._count, self._seconds = 0, 0.0
        return found

    def _heard(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        del kwargs
        if event == _COMPILED:
            self._count += 1
            self._seconds += duration_secs

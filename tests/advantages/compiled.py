"""Functions of the library each compiled as a whole: called op by op, every op is compiled for every shape by itself.

For tests alone, which call with many small shapes; the examples of the docstrings call op by op.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import numpy as np


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` of a function whose arguments are traced where they are arrays, and constants where they are not."""

    @functools.cache
    def with_constants(structure, constants):
        def run(arrays):
            given = iter(arrays)
            leaves = [next(given) if kind is None else constant for kind, constant in constants]
            args, kwargs = jax.tree.unflatten(structure, leaves)
            return function(*args, **kwargs)

        return jax.jit(run)

    @functools.wraps(function)
    def call(*args, **kwargs):
        leaves, structure = jax.tree.flatten((args, kwargs))
        arrays = [x for x in leaves if isinstance(x, jax.Array | np.ndarray)]
        # The type stands beside each, as 1, 1.0 and True are equal.
        constants = tuple((None, None) if isinstance(x, jax.Array | np.ndarray) else (type(x), x) for x in leaves)
        return with_constants(structure, constants)(arrays)

    return call


def all_compiled(module: ModuleType) -> Any:
    """The module's public names, its functions compiled."""
    public = {name: x for name, x in vars(module).items() if not name.startswith("_")}
    return SimpleNamespace(**{name: compiled(x) if inspect.isfunction(x) else x for name, x in public.items()})

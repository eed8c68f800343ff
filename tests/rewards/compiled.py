"""Functions under test as one program each, which is how training runs them and compiles less than op after op."""

import inspect
from collections.abc import Callable

import jax


def compiled(function: Callable) -> Callable:
    """`function` under `jax.jit`, whose keyword-only arguments are static."""
    parameters = inspect.signature(function).parameters.values()
    return jax.jit(function, static_argnames=[p.name for p in parameters if p.kind is p.KEYWORD_ONLY])

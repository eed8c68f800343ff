"""Compilation as users have it, for what is compared to the last digits: `conftest` turns the CPU's optimiser off."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax

_OPTIONS: dict[str, Any] = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
if int(version("jax").split(".")[1]) < 11:  # later ones have nothing else
    _OPTIONS["xla_cpu_use_fusion_emitters"] = True


def jit(function: Callable[..., Any]) -> Any:
    """`jax.jit` with the optimiser."""
    return jax.jit(function, compiler_options=_OPTIONS)

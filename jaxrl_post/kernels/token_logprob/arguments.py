"""What every function of tokens and their vocabulary refuses, with what was expected."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxrl_post.kernels.token_logprob.reference import OUTPUTS
from jaxrl_post.kernels.token_logprob.selection import check_mask
from jaxrl_post.types import Array


def check_arguments(
    hidden: Array,
    unembedding: Array,
    targets: Array,
    mask: Array | None,
    max_tokens: int | None,
    bias: Array | None,
    temperature: Array | float,
    softcap: float | None,
    outputs: tuple[str, ...],
    chunk_bytes: int | None,
) -> None:
    """Raise a ValueError for what does not fit; outside `jit` also for targets beyond `V` and temperatures below 0."""
    if hidden.ndim != 2 or unembedding.ndim != 2 or hidden.shape[1] != unembedding.shape[1]:
        raise ValueError(
            f"hidden must be [N, D] and unembedding [V, D], got shapes {hidden.shape} and {unembedding.shape}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [N] = [{hidden.shape[0]}], got shape {targets.shape}")
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets must be integers, got {targets.dtype}")
    if bias is not None and bias.shape != unembedding.shape[:1]:
        raise ValueError(f"bias must be [V] = [{unembedding.shape[0]}], got shape {bias.shape}")
    check_logit_arguments(temperature, softcap)
    if isinstance(outputs, str):
        raise ValueError(f"outputs must be a tuple of names, got the string {outputs!r}")
    if unknown := sorted(set(outputs) - set(OUTPUTS)):
        raise ValueError(f"unknown outputs {unknown}; there are {list(OUTPUTS)}")
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be at least 1, got {chunk_bytes}")
    check_mask(hidden.shape[0], mask, max_tokens)
    _check_targets(hidden, targets, mask, unembedding.shape[0])


def check_logit_arguments(temperature: Array | float, softcap: float | None, prefix: str = "") -> None:
    """Raise a ValueError unless these are a positive scalar and None or a positive number known when traced."""
    if jnp.ndim(temperature) != 0:
        raise ValueError(f"{prefix}temperature must be a scalar, got shape {jnp.shape(temperature)}")
    if isinstance(temperature, int | float | np.number) and not temperature > 0:
        raise ValueError(f"{prefix}temperature must be positive, got {temperature}")
    if softcap is not None and (isinstance(softcap, Tracer) or not softcap > 0):
        raise ValueError(f"{prefix}softcap must be None or a positive number known when traced, got {softcap}")


def _check_targets(hidden: Array, targets: Array, mask: Array | None, vocab_size: int) -> None:
    if any(isinstance(x, Tracer) for x in (hidden, targets, mask)):
        return
    wrong = (np.asarray(targets) < 0) | (np.asarray(targets) >= vocab_size)
    if mask is not None:
        wrong &= np.asarray(mask) != 0
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"targets must be in [0, {vocab_size}), got {int(np.asarray(targets)[first])} at {first}; "
            "mask tokens that are not to be scored"
        )

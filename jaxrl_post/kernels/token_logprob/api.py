"""The public function, which picks an implementation or takes the one it is told."""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax.numpy as jnp

from jaxrl_post.kernels.ambient import vary_alike, without_typed_shardings
from jaxrl_post.kernels.platform import current_device
from jaxrl_post.kernels.token_logprob import core, pallas_tpu
from jaxrl_post.kernels.token_logprob.arguments import check_arguments
from jaxrl_post.kernels.token_logprob.reference import TokenLogprob, token_logprob_reference
from jaxrl_post.kernels.token_logprob.selection import Selection
from jaxrl_post.types import Array

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("reference", "chunked", "pallas_tpu")
SMALL_BYTES = 16 * 2**20
"""Logits that are not worth going through twice."""


def token_logprob(
    hidden: Array,
    unembedding: Array,
    targets: Array,
    *,
    mask: Array | None = None,
    max_tokens: int | None = None,
    temperature: Array | float = 1.0,
    softcap: float | None = None,
    bias: Array | None = None,
    outputs: tuple[str, ...] = ("logp",),
    implementation: str | None = None,
    chunk_bytes: int | None = None,
) -> TokenLogprob:
    """Log-probs of given tokens, and more, without holding an array of tokens by vocabulary.

    With `z = softcap(hidden @ unembedding.T + bias) / temperature`: `logp = z[target] - logsumexp(z)`. Exact gradients
    for any per-token cotangent of every real-valued output; float32 accumulation throughout; the gradient of the logits
    is rounded once to the inputs' dtype. Inputs that need no gradient (a frozen unembedding) cost none.

    Under a mesh (`jax.set_mesh`) tokens are split over all its axes but `tensor`, and an unembedding split over
    `tensor` is never gathered; one split over `fsdp` is gathered once a pass.

    Args:
        hidden: `[N, D]`, bfloat16, float32 or float64.
        unembedding: `[V, D]`.
        targets: `[N]` int32 in `[0, V)`; inside `jit` the log-prob of any other unmasked target is NaN.
        mask: `[N]`; where it is 0 the outputs are 0 and no gradient flows, whatever `hidden` and `targets` hold.
        max_tokens: static bound on the number of unmasked tokens; given together with `mask`, masked tokens cost
            nothing, as far as the bound is below a device's number of tokens. If more tokens than that are unmasked,
            the surplus ones come out as NaN (`argmax`: -1).
        temperature: positive scalar, may be traced.
        softcap: logits become `softcap * tanh(logits / softcap)`.
        bias: `[V]`.
        outputs: fields to compute, of `logp, entropy, logsumexp, argmax, max_prob, mean_logp, sum_p_squared`.
        implementation: `"reference"` (all logits at once), `"chunked"` (XLA, part of the vocabulary at a time) or
            `"pallas_tpu"` (kernels that keep logits on the chip: bfloat16 or float32, `D` a multiple of 128, no bias,
            no gradient of the temperature). None takes the kernels on a TPU where they can do the call, the reference
            where logits are no more than 16 MiB, else chunks; a debug message of this module's logger says which.
        chunk_bytes: how many bytes of float32 logits the chunked form may hold at once.

    Returns:
        A `TokenLogprob` with the asked-for fields, `[N]` float32 or wider.

    Raises:
        TypeError: of JAX, for forward-mode differentiation of anything but the reference implementation.
        ValueError: for wrong ranks or sizes, an unknown output or implementation, `max_tokens` without `mask` or
            below 1, something that the named implementation cannot do, and outside `jit` for a target that is no token.

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> print(token_logprob(hidden, weight, jnp.array([0, 0])).logp.round(4))
        [-0.5514 -1.5514]
    """
    targets = jnp.asarray(targets)
    check_arguments(hidden, unembedding, targets, mask, max_tokens, bias, temperature, softcap, outputs, chunk_bytes)
    if chunk_bytes is not None and implementation not in (None, "chunked"):
        raise ValueError(f"chunk_bytes is for implementation='chunked', not {implementation!r}")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; there are {sorted(IMPLEMENTATIONS)}")
    run = functools.partial(
        _token_logprob,
        max_tokens=max_tokens,
        softcap=None if softcap is None else float(softcap),
        outputs=tuple(outputs),
        implementation=implementation,
        chunk_bytes=chunk_bytes,
    )
    given = vary_alike((hidden, unembedding, targets.astype(jnp.int32), mask, bias, temperature))
    return without_typed_shardings(run, targets)(*given)


def _token_logprob(
    hidden: Array,
    unembedding: Array,
    targets: Array,
    mask: Array | None,
    bias: Array | None,
    temperature: Array | float,
    *,
    max_tokens: int | None,
    softcap: float | None,
    outputs: tuple[str, ...],
    implementation: str | None,
    chunk_bytes: int | None,
) -> TokenLogprob:
    at = core.layout(*unembedding.shape)
    chosen = Selection(hidden.shape[0], mask, max_tokens, at)
    hidden, targets = chosen.take((chosen.zero_masked(hidden), targets))
    if implementation is None:
        implementation = choose(at, hidden, unembedding, bias) if chunk_bytes is None else "chunked"
    elif implementation == "pallas_tpu" and (reason := pallas_tpu.unsupported(hidden, unembedding, bias)):
        raise ValueError(f"implementation='pallas_tpu': {reason}")
    logger.debug("token_logprob: %s for N=%d, V=%d, D=%d", implementation, hidden.shape[0], *unembedding.shape)
    given: dict[str, Any] = {"softcap": softcap, "outputs": outputs}
    if implementation == "reference" or hidden.shape[0] == 0:
        result = token_logprob_reference(hidden, unembedding, targets, temperature=temperature, bias=bias, **given)
    else:
        narrow = jnp.promote_types(hidden.dtype, unembedding.dtype)
        temperature = jnp.asarray(temperature, jnp.promote_types(narrow, jnp.float32))
        problem = core.Problem(
            **given,
            implementation=implementation,
            vocab_size=unembedding.shape[0],
            layout=at,
            chunk_bytes=chunk_bytes,
        )
        result: TokenLogprob = core.token_logprob(problem, hidden, unembedding, bias, temperature, targets)
    return TokenLogprob(*(None if field is None else chosen.put_back(field) for field in result))


def choose(at: core.Layout, hidden: Array, unembedding: Array, bias: Array | None) -> str:
    """The implementation for a call: the kernels on a TPU that can do it, else XLA, in chunks unless it is small."""
    if current_device().platform == "tpu" and pallas_tpu.unsupported(hidden, unembedding, bias) is None:
        return "pallas_tpu"
    # The reference leaves it to the compiler to gather an unembedding, which it does whole.
    large = bool(at.width) and unembedding.size * unembedding.dtype.itemsize > core.GATHERED_BYTES
    return "reference" if 4 * hidden.shape[0] * unembedding.shape[0] <= SMALL_BYTES and not large else "chunked"

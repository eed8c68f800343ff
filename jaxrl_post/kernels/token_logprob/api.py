"""The public function, which picks an implementation or takes the one it is told."""

from __future__ import annotations

import logging

import jax.numpy as jnp

from jaxrl_post.kernels.platform import current_device
from jaxrl_post.kernels.token_logprob import core, pallas_tpu
from jaxrl_post.kernels.token_logprob.reference import OUTPUTS, TokenLogprob, token_logprob_reference
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
    for any per-token cotangent of every real-valued output; float32 accumulation throughout.

    Args:
        hidden: `[N, D]`, bfloat16, float32 or float64.
        unembedding: `[V, D]`.
        targets: `[N]` int32 in `[0, V)`; the log-prob of any other unmasked target is NaN.
        mask: `[N]`; where it is 0 the outputs are 0 and no gradient flows, whatever `hidden` and `targets` hold.
        max_tokens: static bound on the number of unmasked tokens; given together with `mask`, masked tokens cost
            nothing. If more tokens than that are unmasked, the surplus ones come out as NaN (`argmax`: -1).
        temperature: positive scalar, may be traced.
        softcap: logits become `softcap * tanh(logits / softcap)`.
        bias: `[V]`.
        outputs: fields to compute, of `logp, entropy, logsumexp, argmax, max_prob, mean_logp, sum_p_squared`.
        implementation: `"reference"` or `"chunked"`; None picks by size.

    Returns:
        A `TokenLogprob` with the asked-for fields, `[N]` float32 or wider.

    Raises:
        ValueError: for wrong ranks or sizes, an unknown output or implementation, `max_tokens` without `mask` or
            below 1.

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> print(token_logprob(hidden, weight, jnp.array([0, 0])).logp.round(4))
        [-0.5514 -1.5514]
    """
    if hidden.ndim != 2 or unembedding.ndim != 2 or hidden.shape[1] != unembedding.shape[1]:
        raise ValueError(
            f"hidden must be [N, D] and unembedding [V, D], got shapes {hidden.shape} and {unembedding.shape}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [N] = [{hidden.shape[0]}], got shape {targets.shape}")
    if mask is not None and mask.shape != targets.shape:
        raise ValueError(f"mask must be [N] = [{hidden.shape[0]}], got shape {mask.shape}")
    if bias is not None and bias.shape != unembedding.shape[:1]:
        raise ValueError(f"bias must be [V] = [{unembedding.shape[0]}], got shape {bias.shape}")
    if unknown := sorted(set(outputs) - set(OUTPUTS)):
        raise ValueError(f"unknown outputs {unknown}; token_logprob computes {list(OUTPUTS)}")
    if max_tokens is not None and mask is None:
        raise ValueError("max_tokens bounds the unmasked tokens and needs a mask")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}; an empty mask needs no smaller bound")
    if chunk_bytes is not None and implementation not in (None, "chunked"):
        raise ValueError(f"chunk_bytes is for implementation='chunked', not {implementation!r}")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; there are {sorted(IMPLEMENTATIONS)}")

    num_tokens = hidden.shape[0]
    kept = None
    if mask is not None:
        # A zero cotangent alone would not do: 0 * NaN is NaN in the unembedding's gradient.
        hidden = jnp.where(mask[:, None] != 0, hidden, jnp.zeros((), hidden.dtype))
    if max_tokens is not None and max_tokens < num_tokens:
        kept = jnp.argsort(mask == 0, stable=True)[:max_tokens]
        hidden, targets = hidden[kept], targets[kept]
    if implementation is None:
        implementation = choose(hidden, unembedding, bias) if chunk_bytes is None else "chunked"
    elif implementation == "pallas_tpu" and (reason := pallas_tpu.unsupported(hidden, unembedding, bias)):
        raise ValueError(f"implementation='pallas_tpu': {reason}")
    logger.debug("token_logprob: %s for N=%d, V=%d, D=%d", implementation, hidden.shape[0], *unembedding.shape)
    if implementation == "reference":
        result = token_logprob_reference(
            hidden, unembedding, targets, temperature=temperature, softcap=softcap, bias=bias, outputs=tuple(outputs)
        )
    else:
        result = _with_core(
            hidden, unembedding, targets, temperature, softcap, bias, tuple(outputs), implementation, chunk_bytes
        )

    def finish(field: Array | None) -> Array | None:
        if field is None or mask is None:
            return field
        if kept is not None:
            lost = jnp.nan if jnp.issubdtype(field.dtype, jnp.floating) else -1
            field = jnp.full((num_tokens,), lost, field.dtype).at[kept].set(field)
        return jnp.where(mask != 0, field, jnp.zeros((), field.dtype))

    return TokenLogprob(*(finish(field) for field in result))


def choose(hidden: Array, unembedding: Array, bias: Array | None) -> str:
    """The implementation for a call: the kernels on a TPU that can do it, else XLA, in chunks unless it is small."""
    if current_device().platform == "tpu" and pallas_tpu.unsupported(hidden, unembedding, bias) is None:
        return "pallas_tpu"
    return "reference" if 4 * hidden.shape[0] * unembedding.shape[0] <= SMALL_BYTES else "chunked"


def _with_core(
    hidden: Array,
    unembedding: Array,
    targets: Array,
    temperature: Array | float,
    softcap: float | None,
    bias: Array | None,
    outputs: tuple[str, ...],
    implementation: str,
    chunk_bytes: int | None = None,
) -> TokenLogprob:
    """An implementation that shares the rule of differentiation, on tokens padded to what the mesh needs."""
    num_tokens = hidden.shape[0]
    if num_tokens == 0:
        return token_logprob_reference(hidden, unembedding, targets, bias=bias, outputs=outputs)
    at = core.layout(*unembedding.shape)
    padding = -num_tokens % at.row_shards
    hidden, targets = jnp.pad(hidden, ((0, padding), (0, 0))), jnp.pad(targets, (0, padding))
    temperature = jnp.asarray(temperature, jnp.promote_types(hidden.dtype, jnp.float32))
    problem = core.Problem(outputs, softcap, implementation, unembedding.shape[0], at, chunk_bytes)
    result: TokenLogprob = core.token_logprob(problem, hidden, unembedding, bias, temperature, targets)
    return TokenLogprob(*(None if field is None else field[:num_tokens] for field in result))

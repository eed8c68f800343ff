"""The public function, which picks an implementation or takes the one it is told."""

from __future__ import annotations

import logging

import jax.numpy as jnp

from jaxrl_post.kernels.token_logprob.chunked import chunk_count, token_logprob_chunked
from jaxrl_post.kernels.token_logprob.reference import OUTPUTS, TokenLogprob, token_logprob_reference
from jaxrl_post.types import Array

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = {"reference": token_logprob_reference, "chunked": token_logprob_chunked}


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
        implementation = "reference" if chunk_count(hidden.shape[0], unembedding.shape[0]) == 1 else "chunked"
        logger.debug("token_logprob: %s for N=%d, V=%d", implementation, hidden.shape[0], unembedding.shape[0])
    result = IMPLEMENTATIONS[implementation](
        hidden, unembedding, targets, temperature=temperature, softcap=softcap, bias=bias, outputs=tuple(outputs)
    )

    def finish(field: Array | None) -> Array | None:
        if field is None or mask is None:
            return field
        if kept is not None:
            lost = jnp.nan if jnp.issubdtype(field.dtype, jnp.floating) else -1
            field = jnp.full((num_tokens,), lost, field.dtype).at[kept].set(field)
        return jnp.where(mask != 0, field, jnp.zeros((), field.dtype))

    return TokenLogprob(*(finish(field) for field in result))

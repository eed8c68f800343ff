"""The plainly right implementation: all logits at once, differentiated by JAX itself."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_post.types import Array

OUTPUTS = ("logp", "entropy", "logsumexp", "argmax", "max_prob", "mean_logp", "sum_p_squared")


class TokenLogprob(NamedTuple):
    """What is known of each token; all `[N]` float32 or wider (`argmax` int32), None where not asked for.

    Attributes:
        logp: log-prob of the target, nats.
        entropy: entropy of the distribution, nats.
        logsumexp: log of the sum of the exponentiated (capped, tempered) logits.
        argmax: the most probable token.
        max_prob: its probability.
        mean_logp: mean over the vocabulary of the log-probs, nats.
        sum_p_squared: sum over the vocabulary of the squared probabilities.
    """

    logp: Array | None = None
    entropy: Array | None = None
    logsumexp: Array | None = None
    argmax: Array | None = None
    max_prob: Array | None = None
    mean_logp: Array | None = None
    sum_p_squared: Array | None = None


def raise_to_float32(x: Array) -> Array:
    """Float32, or what it was if that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def matmul(a: Array, b: Array, contracting: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    """A product summed in float32 or wider; float32 inputs are multiplied as float32 on every device."""
    narrow = jnp.promote_types(a.dtype, b.dtype)
    wide = jnp.promote_types(narrow, jnp.float32)
    # TPUs and GPUs round float32 factors to bfloat16 or TF32 unless told not to.
    precision = None if narrow == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(
        a.astype(narrow), b.astype(narrow), (contracting, ((), ())), precision=precision, preferred_element_type=wide
    )


def soft_cap(logits: Array, softcap: float | None) -> Array:
    """`softcap * tanh(logits / softcap)`, or the logits themselves."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def tempered_logits(
    hidden: Array, unembedding: Array, bias: Array | None, temperature: Array | float, softcap: float | None
) -> Array:
    """`[N, V]` logits in float32 or wider: product, bias, soft-cap, temperature, in this order."""
    return temper(matmul(hidden, unembedding, ((1,), (1,))), bias, temperature, softcap)


def temper(logits: Array, bias: Array | None, temperature: Array | float, softcap: float | None) -> Array:
    """Bias, soft-cap and temperature applied to raw logits, in this order."""
    logits = raise_to_float32(logits)
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)
    return soft_cap(logits, softcap) / jnp.asarray(temperature, logits.dtype)


def stats_of_logits(logits: Array, targets: Array, outputs: tuple[str, ...]) -> TokenLogprob:
    """The asked-for fields from `[..., V]` logits and `[...]` targets."""
    # Everything but logsumexp itself comes from logits minus their maximum, so that a common offset of 1e4 costs no
    # digits. The maximum is a constant to the gradient, which does not depend on it.
    highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    centered = logits - highest
    log_sum = jnp.log(jnp.sum(jnp.exp(centered), axis=-1))
    # A comparison instead of a gather: it stays local when the vocabulary is split over devices.
    vocabulary = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    target_logit = jnp.sum(jnp.where(vocabulary == targets[..., None], centered, 0.0), axis=-1)
    # Without this a target that is no token would pass for the most probable one.
    is_token = (targets >= 0) & (targets < logits.shape[-1])
    logp = jnp.where(is_token, target_logit - log_sum, jnp.nan)
    fields: dict[str, Array] = {"logp": logp, "logsumexp": highest[..., 0] + log_sum}
    if "entropy" in outputs or "sum_p_squared" in outputs:
        log_p = centered - log_sum[..., None]
        p = jnp.exp(log_p)
        # 0 log 0 = 0, and no NaN in the gradient where a bias of -inf forbids a token.
        fields["entropy"] = -jnp.sum(p * jnp.where(p > 0, log_p, 0.0), axis=-1)
        fields["sum_p_squared"] = jnp.sum(p * p, axis=-1)
    if "argmax" in outputs or "max_prob" in outputs:
        best = jnp.argmax(logits, axis=-1)
        fields["argmax"] = best.astype(jnp.int32)
    if "max_prob" in outputs:
        # Not by `max`, whose gradient looks for equals of the maximum, which a compiler may have rounded otherwise.
        best_logit = jnp.sum(jnp.where(vocabulary == best[..., None], centered, 0.0), axis=-1)
        fields["max_prob"] = jnp.exp(best_logit - log_sum)
    if "mean_logp" in outputs:
        fields["mean_logp"] = jnp.mean(centered, axis=-1) - log_sum
    return TokenLogprob(**{name: fields[name] for name in outputs})


def token_logprob_reference(
    hidden: Array,
    unembedding: Array,
    targets: Array,
    *,
    temperature: Array | float = 1.0,
    softcap: float | None = None,
    bias: Array | None = None,
    outputs: tuple[str, ...] = ("logp",),
) -> TokenLogprob:
    """`token_logprob` with one `[N, V]` array of logits."""
    return stats_of_logits(tempered_logits(hidden, unembedding, bias, temperature, softcap), targets, outputs)

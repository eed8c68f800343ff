"""What is recorded of a draw: the token's log-prob, the entropy, and the tokens that were likely besides.

What changes the distribution that is drawn from is in `transforms`.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post.sampling.vocabulary import highest
from jaxrl_post.types import Array


def token_statistics(logits: Array, tokens: Array) -> tuple[Array, Array]:
    r"""Log-prob of each row's token and entropy of the row, without an array of the vocabulary's size between.

    With $d_v = z_v - \max z$ and $s = \sum_v e^{d_v}$: $\log p_v = d_v - \log s$ and
    $H = \log s - \frac1s \sum_v e^{d_v} d_v$, where forbidden tokens ($d_v = -\infty$) contribute nothing.

    Args:
        logits: `[R, V]`, any real dtype, -inf for a forbidden token.
        tokens: `[R]` int32.

    Returns:
        `[R]` and `[R]`, nats, float32 or wider; NaN where a logit of the row is NaN or no token is allowed.

    Raises:
        ValueError: if the rows of tokens and logits differ.

    Example:
        >>> logp, entropy = token_statistics(jnp.array([[0.0, 0.0, -jnp.inf]]), jnp.array([1]))
        >>> [round(float(x), 4) for x in (logp[0], entropy[0])]
        [-0.6931, 0.6931]

    Reference: A Mathematical Theory of Communication, Bell System Technical Journal 27 (1948).
    """
    if logits.ndim != 2 or tokens.shape != logits.shape[:1]:
        raise ValueError(f"logits must be [R, V] and tokens [R], got {logits.shape} and {tokens.shape}")
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    highest = jnp.max(logits, axis=-1)
    below = logits - highest[:, None]
    weight = jnp.exp(below)
    total = jnp.sum(weight, axis=-1)
    spread = jnp.sum(weight * jnp.where(weight > 0, below, 0.0), axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    # Of large logits the best may lie above `highest`, by the rounding of what they were made from.
    logp = jnp.minimum(chosen - highest - jnp.log(total), 0.0)
    return logp, jnp.maximum(jnp.log(total) - spread / total, 0.0)


def alternatives(log_probs: Array, k: int) -> tuple[Array, Array]:
    """The `k` most probable tokens of each row, the most probable first; of equal ones the smaller id.

    Args:
        log_probs: `[R, V]`, nats; logits do as well, and are normalised.
        k: how many, static.

    Returns:
        tokens: `[R, k]` int32.
        logp: `[R, k]`, nats, float32 or wider; -inf for a token that is forbidden.

    Raises:
        ValueError: if `k` is not between 1 and the size of the vocabulary.

    Example:
        >>> tokens, logp = alternatives(jnp.log(jnp.array([[0.125, 0.5, 0.25, 0.125]])), 2)
        >>> tokens.tolist(), jnp.exp(logp).tolist()
        ([[1, 2]], [[0.5, 0.25]])

    Reference: none; what servers of language models return as `top_logprobs`.
    """
    if not 1 <= k <= log_probs.shape[-1]:
        raise ValueError(f"alternatives must be between 1 and the vocabulary of {log_probs.shape[-1]}, got {k}")
    log_probs = log_probs.astype(jnp.promote_types(log_probs.dtype, jnp.float32))
    logp, tokens = highest(log_probs, k)
    # The best token comes off first: a sum of large logits would round what is left of them.
    total = jnp.sum(jnp.exp(log_probs - logp[:, :1]), axis=-1, keepdims=True)
    return tokens, logp - logp[:, :1] - jnp.log(total)

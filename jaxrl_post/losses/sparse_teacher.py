"""A teacher that is asked once: the few largest probabilities of each distribution, kept and learned from later."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def sparsify(probabilities: Array, k: int) -> tuple[Array, Array]:
    """The `k` largest probabilities of each distribution, and which they are: what is kept of a teacher.

    Args:
        probabilities: `[..., V]` float.
        k: how many, in [1, V].

    Returns:
        Values `[..., k]`, float32 or wider, from the largest, and ids `[..., k]` int32.

    Raises:
        ValueError: if `k` is not in [1, V].

    Example:
        >>> values, ids = sparsify(jnp.array([0.05, 0.6, 0.05, 0.3]), 2)
        >>> [round(float(v), 2) for v in values], ids.tolist()
        ([0.6, 0.3], [1, 3])

    Reference: Reinforce Data, Multiply Impact: Improved Model Accuracy and Robustness with Dataset Reinforcement
    (arXiv 2303.08983).
    """
    probabilities = masked.as_float(probabilities)
    if not 1 <= k <= probabilities.shape[-1]:
        raise ValueError(f"k must be in [1, {probabilities.shape[-1]}], the number of classes, got {k}")
    return jax.lax.top_k(probabilities, k)


def _with_rest(values: Array) -> tuple[Array, Array]:
    """Values that sum to 1 at most, and what is left."""
    values = masked.as_float(values)
    total = jnp.sum(values, axis=-1, keepdims=True)
    values = values / jnp.maximum(total, 1.0)
    return values, jnp.maximum(1.0 - total, 0.0)


def densify(values: Array, ids: Array, vocab_size: int) -> Array:
    r"""A distribution from its largest probabilities: what they leave is spread evenly over all other classes.

    Args:
        values: `[..., k]` float, of `sparsify`. Of values that sum to more than 1 by rounding, their shares.
        ids: `[..., k]` int, which classes these are.
        vocab_size: `V`.

    Returns:
        `[..., V]`, float32 or wider, which sums to 1; with `k = V - 1` or more exactly what was sparsified.

    Raises:
        ValueError: if `ids` has another shape than `values`.

    Example:
        >>> dense = densify(jnp.array([0.6, 0.3]), jnp.array([1, 3]), 4)
        >>> [round(float(p), 2) for p in dense]
        [0.05, 0.6, 0.05, 0.3]

    Reference: Reinforce Data, Multiply Impact (arXiv 2303.08983), whose code takes a softmax of values that sum to
    more than 1.
    """
    values, rest = _with_rest(values)
    masked.check_like("ids", ids, "values", values)
    spread = rest / max(vocab_size - values.shape[-1], 1)
    dense = jnp.broadcast_to(spread, (*values.shape[:-1], vocab_size))
    return jnp.put_along_axis(dense, jnp.asarray(ids), values, axis=-1, inplace=False)


def sparse_kl(logits: Array, values: Array, ids: Array) -> Array:
    r"""KL from a kept teacher to a student, $\sum_v p_v \log(p_v / q_v)$ with $p$ of `densify`, which is not formed.

    Args:
        logits: `[..., V]` float, the student's.
        values: `[..., k]` float, of `sparsify`. A constant.
        ids: `[..., k]` int.

    Returns:
        `[...]`, nats, float32 or wider; of tokens, a per-token loss for `aggregate`.

    Raises:
        ValueError: if `ids` has another shape than `values`, or `logits` other leading axes.

    Example:
        >>> loss = sparse_kl(jnp.zeros(4), jnp.array([0.6, 0.3]), jnp.array([1, 3]))
        >>> round(float(loss), 5)
        0.41903

    Reference: Reinforce Data, Multiply Impact (arXiv 2303.08983).
    """
    log_q = jax.nn.log_softmax(masked.as_float(logits))
    values, rest = _with_rest(jax.lax.stop_gradient(values))
    masked.check_like("ids", ids, "values", values)
    if values.shape[:-1] != log_q.shape[:-1]:
        raise ValueError(f"logits {log_q.shape} and values {values.shape} must agree in all but their last axis")
    of_ids = jnp.take_along_axis(log_q, jnp.asarray(ids), axis=-1)
    others = max(log_q.shape[-1] - values.shape[-1], 1)
    entropy = jnp.sum(jax.scipy.special.entr(values), axis=-1) + others * jax.scipy.special.entr(rest[..., 0] / others)
    of_others = (jnp.sum(log_q, axis=-1) - jnp.sum(of_ids, axis=-1)) / others
    return -entropy - jnp.sum(values * of_ids, axis=-1) - rest[..., 0] * of_others

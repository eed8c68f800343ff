"""What preferences say of a target policy: the distribution of the ratio to the reference, and who should lose."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def differential_information(logp: Array, ref_logp: Array) -> Array:
    r"""The normalised ratio of two policies, $\log q(y) = \log \frac{\pi(y)}{\pi_{ref}(y)} - \log \sum_{y'} \ldots$

    Args:
        logp: `[..., K]` float, nats: $\log\pi$ of all answers.
        ref_logp: the same shape, $\log\pi_{ref}$; where it is $-\infty$ so must `logp` be.

    Returns:
        `[..., K]`, float32 or wider, nats: $\log q$.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> found = differential_information(jnp.log(jnp.array([0.5, 0.3, 0.2])), jnp.log(jnp.array([0.25, 0.25, 0.5])))
        >>> [round(float(q), 4) for q in jnp.exp(found)]
        [0.5556, 0.3333, 0.1111]

    Reference: Differential Information: An Information-Theoretic Perspective on Preference Optimization
    (arXiv 2505.23761).
    """
    logp, ref_logp = masked.as_float(logp), masked.as_float(ref_logp)
    masked.check_like("ref_logp", ref_logp, "logp", logp)
    there = ref_logp > -jnp.inf
    ratio = jnp.where(there, logp - jnp.where(there, ref_logp, 0.0), -jnp.inf)
    return jax.nn.log_softmax(ratio, axis=-1)


def differential_entropy(logp: Array, ref_logp: Array) -> Array:
    r"""Entropy of `differential_information`: low where a target reinforces few answers, high where it smooths.

    Args:
        logp: `[..., K]` float, nats.
        ref_logp: the same shape.

    Returns:
        `[...]`, float32 or wider, nats.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> same = jnp.log(jnp.full(4, 0.25))
        >>> round(float(differential_entropy(same, same)), 4)
        1.3863

    Reference: Differential Information: An Information-Theoretic Perspective on Preference Optimization
    (arXiv 2505.23761).
    """
    found = differential_information(logp, ref_logp)
    return -jnp.sum(jnp.where(found > -jnp.inf, jnp.exp(found) * found, 0.0), axis=-1)


def optimal_rejected(target_logp: Array, ref_logp: Array, *, beta: float) -> Array:
    r"""The policy that rejected answers must be of for DPO to find its target.

    $$\pi_l \propto \pi_{ref} (\pi_{ref} / \pi^\ast)^\beta$$

    Args:
        target_logp: `[..., K]` float, nats: $\log\pi^\ast$.
        ref_logp: the same shape, of the reference, from which chosen answers come.
        beta: $\beta$ of DPO, above 0.

    Returns:
        `[..., K]`, float32 or wider, nats.

    Raises:
        ValueError: if the shapes differ, or `beta` is not above 0.

    Example:
        >>> target, reference = (jnp.log(jnp.array(p)) for p in ([0.5, 0.3, 0.2], [0.25, 0.25, 0.5]))
        >>> [round(float(p), 4) for p in jnp.exp(optimal_rejected(target, reference, beta=1.0))]
        [0.0789, 0.1316, 0.7895]

    Reference: Differential Information: An Information-Theoretic Perspective on Preference Optimization
    (arXiv 2505.23761).
    """
    if isinstance(beta, float | int) and not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    target_logp, ref_logp = masked.as_float(target_logp), masked.as_float(ref_logp)
    masked.check_like("ref_logp", ref_logp, "target_logp", target_logp)
    return jax.nn.log_softmax((1 + beta) * ref_logp - beta * target_logp, axis=-1)

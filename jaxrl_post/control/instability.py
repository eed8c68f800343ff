"""In which direction of its input a policy is least stable, and whether two sets of states share it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def state_gradients(logits: Callable[[Array], Array], states: Array) -> Array:
    r"""How a policy's loss on its own choice changes with what it sees, $g(s) = \nabla_s -\log\pi(a^\ast(s) | s)$.

    Args:
        logits: `[D] -> [A]`, logits or values of actions; $a^\ast$ is the largest and a constant.
        states: `[N, D]` float.

    Returns:
        `[N, D]`, float32 or wider.

    Raises:
        ValueError: if `states` is not `[N, D]`.

    Example:
        >>> found = state_gradients(lambda s: jnp.stack([s[0], 0 * s[0]]), jnp.zeros((1, 2)))
        >>> found.tolist()
        [[-0.5, 0.0]]

    Reference: Understanding and Diagnosing Deep Reinforcement Learning (arXiv 2406.16979).
    """
    states = masked.as_float(states)
    masked.check_axes("states", states, "[N, D]")

    def loss(state: Array) -> Array:
        found = logits(state)
        return -jax.nn.log_softmax(found)[jnp.argmax(jax.lax.stop_gradient(found))]

    return jax.vmap(jax.grad(loss))(states)


def principal_direction(gradients: Array, *, normalize: bool = False) -> Array:
    r"""The direction in which gradients agree most: the first eigenvector of $\sum_s g(s) g(s)^\top$.

    Args:
        gradients: `[N, D]` float.
        normalize: give every state the same weight.

    Returns:
        `[D]`, float32 or wider, of norm 1; its sign is that of its largest entry, made positive.

    Raises:
        ValueError: if `gradients` is not `[N, D]`.

    Example:
        >>> principal_direction(jnp.array([[3.0, 0.0], [0.0, 1.0]])).tolist()
        [1.0, 0.0]

    Reference: Understanding and Diagnosing Deep Reinforcement Learning (arXiv 2406.16979).
    """
    gradients = _gradients(gradients, normalize)
    _, _, rows = jnp.linalg.svd(gradients, full_matrices=False)
    first = rows[0]
    return first * jnp.where(first[jnp.argmax(jnp.abs(first))] < 0, -1.0, 1.0)


def shared_instability(gradients: Array, other: Array, *, normalize: bool = False) -> Array:
    r"""The share of one set's instability that lies in the other's direction, $v^\top L' v / \lambda_{max}(L')$.

    Args:
        gradients: `[N, D]` float, of which $v$ is the `principal_direction`.
        other: `[M, D]` float, $L'$ the sum of their outer products.
        normalize: give every state the same weight.

    Returns:
        Scalar in [0, 1], float32 or wider; 1 for the same set, 0 where the other has no gradient.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> here, there = jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> round(float(shared_instability(here, there)), 4)
        0.25

    Reference: Understanding and Diagnosing Deep Reinforcement Learning (arXiv 2406.16979). The quotient is a
    reconstruction from descriptions of it.
    """
    other = _gradients(other, normalize)
    direction = principal_direction(gradients, normalize=normalize)
    if other.shape[1:] != direction.shape:
        raise ValueError(f"other must be [M, D] with D = {direction.size}, got {other.shape}")
    largest = jnp.square(jnp.linalg.norm(other, ord=2))
    along = jnp.sum(jnp.square(other @ direction))
    return jnp.where(largest > 0, along / jnp.where(largest > 0, largest, 1.0), 0.0)


def _gradients(gradients: Array, normalize: bool) -> Array:
    gradients = masked.as_float(gradients)
    masked.check_axes("gradients", gradients, "[N, D]")
    if not normalize:
        return gradients
    norm = jnp.linalg.norm(gradients, axis=1, keepdims=True)
    return gradients / jnp.where(norm > 0, norm, 1.0)

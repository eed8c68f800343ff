"""Better samples without a gradient through the sampler: a drift along a reward, edits of actions, the best of many."""

from __future__ import annotations

import chex
import jax.numpy as jnp

from jaxrl_post.types import Array


def guided_mean(
    mean: Array, gradient: Array, elapsed: Array | float, *, strength: float = 0.01, normalize: bool = False
) -> Array:
    r"""A stochastic step's mean, moved along the gradient of a process reward.

    $$\mu' = \mu + \kappa |t' - t| \nabla_x R(x, t)$$

    Sampled with it and scored without it, a step teaches the model what the guidance did.

    Args:
        mean: `[..., D]`, the first of what `sde_step` gives.
        gradient: `[..., D]`, of the reward at the latent before the step.
        elapsed: scalar, $|t' - t|$.
        strength: $\kappa$: the variance's factor by twice the weight of the KL, or fixed.
        normalize: divides the gradient by its norm.

    Returns:
        `[..., D]`; `mean` where `strength` is 0.

    Example:
        >>> guided_mean(jnp.array([1.0]), jnp.array([4.0]), 0.25, strength=0.5).tolist()
        [1.5]

    Reference: Euphonium (2602.04928), released code.
    """
    chex.assert_equal_shape([mean, gradient])
    if normalize:
        square = jnp.sum(jnp.square(gradient), axis=-1, keepdims=True)
        gradient = jnp.where(square > 0, gradient / jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return mean + strength * jnp.abs(elapsed) * gradient


def edited(actions: Array, edits: Array, *, scale: float = 0.05, bound: float | None = 1.0) -> Array:
    r"""Actions of an expressive policy, nudged: $\mathrm{clip}(a + s \tanh(e), -b, b)$.

    Args:
        actions: `[..., D]`.
        edits: `[..., D]`, samples of a Gaussian policy before they are squashed.
        scale: $s$, the largest edit; 0 leaves the actions.
        bound: $b$; None for none.

    Returns:
        `[..., D]`.

    Example:
        >>> [round(x, 4) for x in edited(jnp.array([0.98, 0.2]), jnp.array([30.0, -30.0]), scale=0.1).tolist()]
        [1.0, 0.1]

    Reference: EXPO (2507.07986).
    """
    moved = actions + scale * jnp.tanh(edits)
    return moved if bound is None else jnp.clip(moved, -bound, bound)


def best_candidate(candidates: Array, values: Array) -> tuple[Array, Array]:
    r"""The candidate of the largest value, for acting and for the target of the critic alike: $\max_i Q(s, a_i)$.

    Args:
        candidates: `[..., N, D]`, base and `edited` actions.
        values: `[..., N]`.

    Returns:
        The first best, `[..., D]`, and its value, `[...]`.

    Example:
        >>> action, value = best_candidate(jnp.array([[0.2], [0.8], [0.3]]), jnp.array([-0.09, -0.09, -0.04]))
        >>> round(float(action[0]), 4), round(float(value), 4)
        (0.3, -0.04)

    Reference: EXPO (2507.07986), algorithm 1.
    """
    chosen = jnp.argmax(values, axis=-1)[..., None]
    action = jnp.take_along_axis(candidates, chosen[..., None], axis=-2)[..., 0, :]
    return action, jnp.take_along_axis(values, chosen, axis=-1)[..., 0]

"""A reward that is a cosine of embeddings, without the direction that all prompts share."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post.types import Array


def guided_reward(output: Array, prompt: Array, direction: Array, *, scale: float = 1.5) -> Array:
    r"""Cosine of an output with its prompt's embedding, moved along a learned direction.

    $$R = \cos(e_x, \tilde e), \quad \tilde e = e_- + \omega (e_+ - e_-), \quad e_\pm = \frac{e \pm b}{|e \pm b|}$$

    Args:
        output: `[..., D]`, $e_x$, embeddings of outputs.
        prompt: `[..., D]`, $e$, of length 1.
        direction: `[D]`, $b$; learned on samples with generator and encoders frozen, as what makes this reward largest.
        scale: $\omega$.

    Returns:
        `[...]`, in -1 to 1; without a direction the plain cosine.

    Example:
        >>> output, prompt, b = jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
        >>> round(float(guided_reward(output, prompt, b)), 4)
        0.8944

    Reference: Taming Preference Mode Collapse via Directional Decoupling Alignment in Diffusion Reinforcement Learning
    (2512.24146), equations 5 to 10.
    """

    def unit(x: Array) -> Array:
        square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        return jnp.where(square > 0, x / jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)

    plus, minus = unit(prompt + direction), unit(prompt - direction)
    return jnp.sum(unit(output) * unit(minus + scale * (plus - minus)), axis=-1)

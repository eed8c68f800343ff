"""Learning from finished samples, noised again: no trajectory and no log-prob of a sampler is needed."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from jaxrl_post.types import Array


def noised(x0: Array, noise: Array, time: Array) -> Array:
    r"""$x_t = (1 - t) x_0 + t \epsilon$.

    Args:
        x0: `[B, D]`, data.
        noise: `[B, D]`.
        time: `[B]`, in 0 (data) to 1.

    Returns:
        `[B, D]`.

    Example:
        >>> noised(jnp.array([[1.0]]), jnp.array([[3.0]]), jnp.array([0.5])).tolist()
        [[2.0]]

    Reference: Flow Straight and Fast (2209.03003).
    """
    return (1.0 - time[:, None]) * x0 + time[:, None] * noise


def flow_matching(velocity: Array, x0: Array, noise: Array) -> Array:
    r"""The regression of a velocity on the one of a sample: $\mathrm{mean}_d (v - (\epsilon - x_0))^2$.

    Args:
        velocity: `[..., D]`, of the model at `noised(x0, noise, time)`.
        x0: `[..., D]`.
        noise: `[..., D]`.

    Returns:
        `[...]`.

    Example:
        >>> flow_matching(jnp.array([1.0]), jnp.array([1.0]), jnp.array([3.0])).tolist()
        1.0

    Reference: Flow Matching for Generative Modeling (2210.02747).
    """
    chex.assert_equal_shape([velocity, x0, noise])
    return jnp.mean(jnp.square(velocity - (noise - x0)), axis=-1)


def reward_weights(rewards: Array, *, temperature: float = 1.0, clip: float = 10.0) -> Array:
    r"""Weights of samples in a regression, of mean 1 and without gradient.

    $$w_i \propto \min(\exp(T z_i), c), \quad z = (R - \mathrm{mean}) / \mathrm{std}$$

    Args:
        rewards: `[N]`.
        temperature: $T$; it multiplies, as in the source.
        clip: $c$.

    Returns:
        `[N]`; ones if all rewards are equal.

    Example:
        >>> [round(x, 4) for x in reward_weights(jnp.array([1.0, 2.0, 3.0])).tolist()]
        [0.2701, 0.7342, 1.9957]

    Reference: FlowBoost (2601.18005), released code (standard deviation with n - 1).
    """
    chex.assert_rank(rewards, 1, custom_message="rewards")
    spread = jnp.std(rewards, ddof=1) if rewards.shape[0] > 1 else jnp.zeros(())
    z = (rewards - jnp.mean(rewards)) / jnp.maximum(spread, 1e-8)
    weights = jnp.minimum(jnp.exp(jnp.minimum(temperature * z, 20.0)), clip)
    return jax.lax.stop_gradient(weights / jnp.mean(weights))


def optimality(advantages: Array, *, clip: float = 5.0) -> Array:
    r"""How much a sample counts as a good one: $r = \mathrm{clip}(1/2 + A / (2 c), 0, 1)$.

    Args:
        advantages: any shape, normalised.
        clip: $c$.

    Returns:
        The shape of `advantages`, in 0 to 1.

    Example:
        >>> optimality(jnp.array([2.5, 0.0, -9.0])).tolist()
        [0.75, 0.5, 0.0]

    Reference: DiffusionNFT (2509.16117); UniWorld-V2 (2510.16888), released code.
    """
    return jnp.clip(0.5 + advantages / (2.0 * clip), 0.0, 1.0)


def nft(
    velocity: Array, old_velocity: Array, x0: Array, x_t: Array, time: Array, optimality: Array, *, beta: float = 1.0
) -> Array:
    r"""Towards good samples, and away from bad ones by the mirror image of the old velocity.

    $$\ell = \frac{r\, \ell_+ + (1 - r)\, \ell_-}{\beta}, \quad v_+ = \beta v + (1 - \beta) v_\mathrm{old}, \quad
      v_- = (1 + \beta) v_\mathrm{old} - \beta v, \quad
      \ell_\pm = \frac{\mathrm{mean}_d (x_t - t v_\pm - x_0)^2}{\mathrm{sg}(\mathrm{mean}_d |x_t - t v_\pm - x_0|)}$$

    Args:
        velocity: `[B, D]`, of the model at `x_t`.
        old_velocity: `[B, D]`, of the one that sampled; without gradient.
        x0: `[B, D]`, samples.
        x_t: `[B, D]`, `noised` ones.
        time: `[B]`.
        optimality: `[B]`, $r$, in 0 to 1.
        beta: $\beta$, above 0.

    Returns:
        `[B]`. Where $r = 1/2$ and the velocity is the old one its gradient is 0.

    Example:
        >>> one = jnp.ones((1, 2))
        >>> nft(one, one, one, 2 * one, jnp.array([0.5]), jnp.array([0.5])).tolist()
        [0.5]

    Reference: DiffusionNFT (2509.16117); UniWorld-V2 (2510.16888), released code.
    """
    chex.assert_equal_shape([velocity, old_velocity, x0, x_t])
    old = jax.lax.stop_gradient(old_velocity)

    def error(v: Array) -> Array:
        off = x_t - time[:, None] * v - x0
        scale = jnp.maximum(jnp.mean(jnp.abs(off), axis=-1), 1e-5)
        return jnp.mean(jnp.square(off), axis=-1) / jax.lax.stop_gradient(scale)

    good = error(beta * velocity + (1.0 - beta) * old)
    bad = error((1.0 + beta) * old - beta * velocity)
    return (optimality * good + (1.0 - optimality) * bad) / beta


def gdro(scores: Array, rewards: Array, *, temperature: float = 0.05) -> Array:
    r"""A ranking of a group by implicit rewards, as soft as the explicit rewards are.

    $$\ell = \sum_{i<K} \Big[\log \sum_{m \ge i} e^{s_m} - \sum_{j \ge i} q_i(j) s_j\Big], \quad
      q_i(j) = \frac{e^{r_j / \tau}}{\sum_{m \ge i} e^{r_m / \tau}}, \quad r_1 \ge \dots \ge r_K$$

    Args:
        scores: `[P, K]`, $-\beta$ times what `flow_matching` is larger for the model than for the reference, at the
            same noise and time.
        rewards: `[P, K]`, in any order.
        temperature: $\tau$; 0 ranks by rewards alone, which for two is Diffusion-DPO.

    Returns:
        `[P]`.

    Example:
        >>> found = gdro(jnp.array([[0.2, -0.1, 0.0]]), jnp.array([[1.0, 0.5, 0.0]]), temperature=0.5)
        >>> round(float(found[0]), 3)
        1.749

    Reference: GDRO (2601.02036), equations 2 to 9 (from a summary of them).
    """
    chex.assert_equal_shape([scores, rewards])
    order = jnp.argsort(-rewards, axis=-1, stable=True)
    s = jnp.take_along_axis(scores, order, axis=-1)
    r = jax.lax.stop_gradient(jnp.take_along_axis(rewards, order, axis=-1))
    count = s.shape[-1]
    left = jnp.arange(count) >= jnp.arange(count - 1)[:, None]
    if temperature == 0:
        wanted = jnp.broadcast_to(jnp.eye(count - 1, count), (*s.shape[:-1], count - 1, count))
    else:
        wanted = jax.nn.softmax(jnp.where(left, (r / temperature)[..., None, :], -jnp.inf), axis=-1)
    of_left = jax.nn.logsumexp(jnp.where(left, s[..., None, :], -jnp.inf), axis=-1)
    return jnp.sum(of_left - jnp.sum(wanted * s[..., None, :], axis=-1), axis=-1)

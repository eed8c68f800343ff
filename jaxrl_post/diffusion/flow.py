"""Rectified flows as policies: the deterministic and the stochastic step, and what log-prob a stochastic step has.

Time runs from 1 (noise) to 0 (data): `x_t = (1 - t) x_0 + t noise`, and a velocity is that towards noise,
`noise - x_0`.
"""

from __future__ import annotations

from typing import Literal

import chex
import jax.numpy as jnp

from jaxrl_post.types import Array


def flow_times(steps: int, *, shift: float = 1.0) -> Array:
    r"""The times of a sampler, from 1 to 0.

    $$t_k = \frac{s u_k}{1 + (s - 1) u_k}, \quad u_k = 1 - k / S$$

    Args:
        steps: `S`.
        shift: $s$; above 1 more of the steps are near noise.

    Returns:
        `[S + 1]` float32.

    Example:
        >>> flow_times(4).tolist()
        [1.0, 0.75, 0.5, 0.25, 0.0]

    Reference: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (2403.03206).
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    even = jnp.linspace(1.0, 0.0, steps + 1)
    return shift * even / (1.0 + (shift - 1.0) * even)


def ode_step(x: Array, velocity: Array, time: Array | float, next_time: Array | float) -> Array:
    r"""A deterministic step: $x + (t' - t) v$.

    Args:
        x: `[..., D]`, at `time`.
        velocity: `[..., D]`, there.
        time: scalar.
        next_time: scalar, below `time`.

    Returns:
        `[..., D]`, at `next_time`.

    Example:
        >>> ode_step(jnp.array([1.0]), jnp.array([2.0]), 1.0, 0.5).tolist()
        [0.0]

    Reference: Flow Straight and Fast (2209.03003).
    """
    return x + (next_time - time) * velocity


def sde_step(
    x: Array,
    velocity: Array,
    time: Array | float,
    next_time: Array | float,
    *,
    level: Array | float = 0.7,
    limit: float = 0.95,
) -> tuple[Array, Array]:
    r"""A stochastic step that keeps the marginals of the deterministic one, as a Gaussian.

    $$\mu = x + \left(v + \frac{\sigma_t^2}{2 t} (x + (1 - t) v)\right) (t' - t), \qquad
      \sigma_t = a \sqrt{t / (1 - t)}, \qquad s = \sigma_t \sqrt{t - t'}$$

    Args:
        x: `[..., D]`, at `time`.
        velocity: `[..., D]`, there.
        time: scalar, above 0.
        next_time: scalar, below `time`.
        level: $a$; 0 gives the deterministic step.
        limit: in $1 - t$ a time above it counts as `limit`, since the noise has no bound at 1.

    Returns:
        Mean `[..., D]` and standard deviation, a scalar.

    Example:
        >>> mean, std = sde_step(jnp.array([1.0]), jnp.array([2.0]), 0.5, 0.25, level=1.0)
        >>> float(mean[0]), float(std)
        (0.0, 0.5)

    Reference: Flow-GRPO (2505.05470).
    """
    time = jnp.asarray(time, jnp.result_type(x, jnp.float32))
    elapsed = time - next_time
    variance = level**2 * time / (1.0 - jnp.minimum(time, limit))
    drift = velocity + variance / (2.0 * time) * (x + (1.0 - time) * velocity)
    return x - elapsed * drift, jnp.sqrt(variance * elapsed)


def gaussian_logp(x: Array, mean: Array, std: Array | float, *, reduce: Literal["mean", "sum"] = "mean") -> Array:
    r"""Log-density of a step.

    $$\log \pi = \sum_d -\frac{(x_d - \mu_d)^2}{2 s^2} - \log s - \tfrac12 \log 2 \pi$$

    Args:
        x: `[..., D]`, what was sampled.
        mean: `[..., D]`.
        std: broadcasts against `[..., 1]`, above 0.
        reduce: `"sum"` is the log-density; `"mean"` over the dimensions is what released trainers of flows take for it,
            with clips that are narrow in that unit.

    Returns:
        `[...]`, nats (per dimension).

    Example:
        >>> round(float(gaussian_logp(jnp.array([0.3]), jnp.array([0.0]), 0.5)), 4)
        -0.4058

    Reference: Flow-GRPO (2505.05470).
    """
    if reduce not in ("mean", "sum"):
        raise ValueError(f'reduce must be "mean" or "sum", got {reduce!r}')
    chex.assert_equal_shape([x, mean])
    std = jnp.asarray(std, mean.dtype)
    each = -0.5 * jnp.square((x - mean) / std) - jnp.log(std) - 0.5 * jnp.log(2.0 * jnp.pi)
    return jnp.mean(each, axis=-1) if reduce == "mean" else jnp.sum(each, axis=-1)

"""A flow to two modes on a line, whose velocity is exact, and a small network that is added to it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import diffusion
from jaxrl_post.types import Array

TIMES = diffusion.flow_times(8)
STEPS = 8
MODES = jnp.array([-1.5, 1.5])
WIDTH = 0.4


def velocity(x: Array, time: Array) -> Array:
    """The exact velocity `[..., 1]` at `x` `[..., 1]`; `time` broadcasts."""
    variance = ((1 - time) * WIDTH) ** 2 + time**2
    off = x[..., None] - (1 - time)[..., None] * MODES if jnp.ndim(time) else x[..., None] - (1 - time) * MODES
    scaled = off / (variance[..., None] if jnp.ndim(time) else variance)
    share = jax.nn.softmax(-0.5 * off * scaled, axis=-1)
    t = time[..., None] if jnp.ndim(time) else time
    each = t * scaled - (MODES + (1 - t) * WIDTH**2 * scaled)
    return jnp.sum(share * each, axis=-1)


def network(key: Array, width: int = 16) -> dict[str, Array]:
    """Parameters of a network that adds nothing yet."""
    first, second = jax.random.split(key)
    return {
        "in": jax.random.normal(first, (2, width)),
        "bias": jax.random.normal(second, (width,)),
        "out": jnp.zeros((width, 1)),
    }


def learned(params: dict[str, Array], x: Array, time: Array) -> Array:
    """`velocity` with a network added; `x` `[B, 1]`, `time` a scalar or `[B, 1]`."""
    given = jnp.concatenate([x, jnp.broadcast_to(time, x.shape)], axis=-1)
    return velocity(x, time) + jnp.tanh(given @ params["in"] + params["bias"]) @ params["out"]


def samples(params: dict[str, Array], key: Array, count: int) -> Array:
    """`[count, 1]` by the deterministic sampler."""

    def step(x, both):
        return diffusion.ode_step(x, learned(params, x, both[0]), *both), None

    noise = jax.random.normal(key, (count, 1))
    return jax.lax.scan(step, noise, (TIMES[:-1], TIMES[1:]))[0]


def completed(x: Array, first: Array, noise: Array, level: float) -> Array:
    """`x` `[..., 1]` at the `first`-th time, carried to data with noise `[STEPS, ..., 1]`."""

    def step(x, given):
        number, time, after, noise = given
        mean, std = diffusion.sde_step(x, velocity(x, time), time, after, level=level)
        return jnp.where(number >= first, mean + std * noise, x), None

    return jax.lax.scan(step, x, (jnp.arange(STEPS), TIMES[:-1], TIMES[1:], noise))[0]

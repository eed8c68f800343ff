"""A velocity as a policy: trajectories of its stochastic sampler as rollouts, and their log-probs as a score.

Any method that reads log-probs trains a flow with these two, by the same step as a language model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import chex
import jax
import jax.numpy as jnp

from jaxrl_post.diffusion.flow import gaussian_logp, sde_step
from jaxrl_post.types import FINISH_STOP, Array, Params, Rollouts, Score, TokenStats

Velocity: TypeAlias = Callable[[Params, Array, Array, Array], Array]
"""`(params, x[B, D], time, condition[B, ...]) -> [B, D]`."""


def generate(
    velocity: Velocity,
    params: Params,
    conditions: Array,
    key: Array,
    *,
    times: Array,
    dimensions: int,
    group_size: int,
    level: float = 0.7,
    reduce: Literal["mean", "sum"] = "mean",
    version: Array | int = 0,
) -> Rollouts:
    """Trajectories from noise to data by `sde_step`; rewards are to be filled in.

    Args:
        velocity: the model.
        params: its parameters.
        conditions: `[P, ...]`, what each prompt asks for.
        key: of all noise; that of a trajectory depends on it and on the trajectory's `id`.
        times: `[S + 1]`, from 1 to 0.
        dimensions: `D`.
        group_size: `G`.
        level: of noise.
        reduce: of `gaussian_logp`.
        version: of the policy.

    Returns:
        `Rollouts` of `S + 1` positions: `tokens` are the latents `[B, S + 1, D]`, the noise at position 0, which is
        masked, data at the last; `extras["condition"]` are the conditions.

    Example:
        >>> from jaxrl_post.diffusion import flow_times
        >>> made = generate(
        ...     lambda params, x, time, condition: x, None, jnp.zeros((2, 1)), jax.random.key(0),
        ...     times=flow_times(4), dimensions=3, group_size=2,
        ... )
        >>> made.tokens.shape, made.logp.shape
        ((4, 5, 3), (4, 5))

    Reference: Flow-GRPO (2505.05470).
    """
    chex.assert_rank(times, 1, custom_message="times")
    prompts, steps = conditions.shape[0], times.shape[0] - 1
    batch, shape = prompts * group_size, (prompts, group_size)
    condition = jnp.repeat(conditions, group_size, axis=0)
    ids = jnp.arange(batch, dtype=jnp.uint32)
    draw = jax.vmap(lambda own: jax.random.normal(jax.random.fold_in(key, own), (steps + 1, dimensions)))
    noise = jnp.moveaxis(draw(ids), 1, 0)

    def step(x, given):
        time, after, noise = given
        mean, std = sde_step(x, velocity(params, x, time, condition), time, after, level=level)
        x = mean + std * noise
        return x, (x, gaussian_logp(x, mean, std, reduce=reduce))

    _, (latents, logp) = jax.lax.scan(step, noise[0], (times[:-1], times[1:], noise[1:]))
    after_noise = ((0, 0), (1, 0))
    positions = jnp.broadcast_to(jnp.arange(-1, steps, dtype=jnp.int32), (batch, steps + 1))
    return Rollouts(
        tokens=jnp.moveaxis(jnp.concatenate([noise[:1], latents]), 0, 1),
        mask=jnp.pad(jnp.ones((batch, steps)), after_noise),
        logp=jnp.pad(logp.T, after_noise),
        step=positions,
        version=jnp.where(positions >= 0, jnp.asarray(version, jnp.int32), -1),
        reward=jnp.zeros(shape),
        rewards={},
        valid=jnp.ones(shape, bool),
        length=jnp.full(shape, steps + 1, jnp.int32),
        finish=jnp.full(shape, FINISH_STOP, jnp.int8),
        id=ids.reshape(shape),
        prompt_id=jnp.arange(prompts, dtype=jnp.int32),
        extras={"condition": conditions},
    )


def score(velocity: Velocity, *, times: Array, level: float = 0.7, reduce: Literal["mean", "sum"] = "mean") -> Score:
    """What a velocity says of the steps of given trajectories: the `Score` that training takes.

    Args:
        velocity: the model.
        times: `[S + 1]`, those of `generate`, as are the next two.
        level: of noise.
        reduce: of `gaussian_logp`.

    Returns:
        A `Score` whose stats have `logp`.

    Raises:
        ValueError: if another field is asked for.

    Example:
        >>> from jaxrl_post.diffusion import flow_times
        >>> still, times = (lambda params, x, time, condition: x), flow_times(4)
        >>> made = generate(
        ...     still, None, jnp.zeros((2, 1)), jax.random.key(0), times=times, dimensions=3, group_size=2
        ... )
        >>> found = score(still, times=times)(None, made, frozenset({"logp"}), jax.random.key(0))
        >>> bool(jnp.allclose(found.logp, made.logp, atol=1e-5))
        True

    Reference: Flow-GRPO (2505.05470).
    """

    def apply(params: Params, rollouts: Rollouts, fields: frozenset[str], key: Array) -> TokenStats:
        del key
        if unknown := sorted(fields - {"logp"}):
            raise ValueError(f"a flow's steps have logp, not {', '.join(unknown)}")
        condition = jnp.repeat(rollouts.extras["condition"], rollouts.group_size, axis=0)

        def step(x, after, time, next_time):
            mean, std = sde_step(x, velocity(params, x, time, condition), time, next_time, level=level)
            return gaussian_logp(after, mean, std, reduce=reduce)

        latents = rollouts.tokens
        logp = jax.vmap(step, in_axes=(1, 1, 0, 0), out_axes=1)(latents[:, :-1], latents[:, 1:], times[:-1], times[1:])
        return TokenStats(logp=jnp.pad(logp, ((0, 0), (1, 0))))

    return apply

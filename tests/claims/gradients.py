"""Estimates of the policy gradient by a method's own targets and loss, beside the exact gradient of the laboratory."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import losses
from jaxrl_post.types import Array, Method, Rollouts
from tests.claims import lab


def estimates(
    task: lab.Task, method: Method | lab.Either, params: Array, key: Array, *, group_size: int, batches: int
) -> Array:
    """`[batches, D]`: the direction of steepest descent of the method's loss on as many batches."""

    def one(key: Array) -> Array:
        rollouts = lab.sample(task, params, key, group_size)
        return lab.pick(method, lambda method: direction(method, rollouts, key))

    def direction(method: Method, rollouts: Rollouts, key: Array) -> Array:
        fields = method.needs["policy"]
        stats = {"policy": lab.score(params, rollouts, fields, key)}
        targets, _ = method.targets(method.init(rollouts, task.prompts), rollouts, stats, key)

        def loss(params: Array) -> Array:
            terms = method.loss({"policy": lab.score(params, rollouts, fields, key)}, rollouts, targets)
            return sum(
                (
                    term.weight * losses.aggregate(term.value, term.mask, term.mode, horizon=term.horizon)
                    for term in terms.values()
                ),
                jnp.zeros(()),
            )

        return -jax.grad(loss)(params).reshape(-1)

    # Mapped, not vmapped: the random numbers of a second level of vmap are most of what there is to compile.
    return jax.lax.map(one, jax.random.split(key, batches))


def exact(task: lab.Task, params: Array, rewards: Array) -> Array:
    """`[D]`: the gradient of the expected reward, mean over prompts; `rewards` is `[P, V**L]` or `[V**L]`."""

    def expected(params: Array) -> Array:
        return jnp.mean(jnp.sum(lab.probabilities(params, task.length) * rewards, axis=-1))

    return jax.grad(expected)(params).reshape(-1)


def variance(found: Array) -> Array:
    """Scalar: the trace of the covariance of `[batches, D]` estimates."""
    return jnp.sum(jnp.var(found, axis=0, ddof=1))


def squared_error(found: Array, truth: Array) -> Array:
    """Scalar: mean squared distance of `[batches, D]` estimates from `[D]`, relative to its squared length."""
    return jnp.mean(jnp.sum(jnp.square(found - truth), axis=1)) / jnp.sum(jnp.square(truth))


def cosine(found: Array, truth: Array) -> Array:
    """Scalar: mean cosine of the angle between `[batches, D]` estimates and `[D]`; 0 for an estimate of 0."""
    length = jnp.linalg.norm(found, axis=1) * jnp.linalg.norm(truth)
    return jnp.mean(jnp.where(length > 0, found @ truth / jnp.where(length > 0, length, 1.0), 0.0))

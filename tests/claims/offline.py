"""Training on given answers: pairs, demonstrations, segments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrl_post import losses
from jaxrl_post.data import to_rollouts
from jaxrl_post.types import Array, Method, Rollouts, TokenStats


def answers(tokens: Array) -> Rollouts:
    """Given answers `[P, G, T]`, after a prompt of one token."""
    prompts, group, length = tokens.shape
    some = to_rollouts([[0]] * prompts, [[[0] * length] * group] * prompts, length=length + 1)
    return some.replace(tokens=some.tokens.at[:, 1:].set(tokens.reshape(-1, length)))


def learned(
    method: Method,
    logp: Callable[[Any], Array],
    params: Any,
    rollouts: Rollouts,
    *,
    steps: int,
    learning_rate: float,
    roles: Mapping[str, Any] = {},
) -> Any:
    """Parameters that a method learns from given answers.

    Args:
        method: the method.
        logp: `params -> [B, T]`, log-probs of the answers' tokens.
        params: those that training starts from, and of every role that is not given.
        rollouts: the answers.
        steps: updates by Adam, each on all answers.
        learning_rate: of Adam.
        roles: parameters by role.
    """
    optimizer = optax.adam(learning_rate)

    def stats(params: Any) -> TokenStats:
        return TokenStats(logp=jnp.where(rollouts.mask > 0, logp(params), 0.0))

    frozen = {role: stats(roles.get(role, params)) for role in method.needs if role != "policy"}

    def loss(params: Any) -> Array:
        found = {"policy": stats(params), **frozen}
        targets, _ = method.targets((), rollouts, found, jax.random.key(0))
        terms = method.loss(found, rollouts, targets).values()
        return sum((t.weight * losses.aggregate(t.value, t.mask, t.mode) for t in terms), start=jnp.zeros(()))

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)[0][0]

"""Values of policies and of rewards in a decision process that is known: tables `[S, A]`, in float32 or wider."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def check_process(transitions: Array, reward: Array, gamma: float) -> tuple[Array, Array]:
    """Both as floats; ValueError unless they are `[S, A, S]` and `[S, A]`, and `gamma` is in [0, 1)."""
    transitions, reward = masked.as_float(transitions), masked.as_float(reward)
    masked.check_axes("transitions", transitions, "[S, A, S]")
    masked.check_like("reward", reward, "the states and actions of transitions", transitions[..., 0])
    if transitions.shape[0] != transitions.shape[2]:
        raise ValueError(f"transitions must be [S, A, S], got {transitions.shape}")
    if isinstance(gamma, float | int) and not 0 <= gamma < 1:
        raise ValueError(f"gamma must be at least 0 and below 1, got {gamma}")
    return transitions, reward


def action_values(
    transitions: Array, reward: Array, policy: Array, *, gamma: float, horizon: int | None = None
) -> Array:
    r"""What an action is worth if a policy follows, $Q_h(s, a) = E[\sum_{t=0}^h \gamma^t r_t]$.

    Args:
        transitions: `[S, A, S]` float, $P(s' | s, a)$; a row of zeros ends the episode.
        reward: `[S, A]` float.
        policy: `[S, A]` float, probabilities of the actions from the second step on.
        gamma: $\gamma$ in [0, 1).
        horizon: $h$, steps after the first; 0 is the reward itself, None for all.

    Returns:
        `[S, A]`, float32 or wider; linear in `reward`.

    Raises:
        ValueError: if the shapes do not fit, `gamma` is out of its range or `horizon` below 0.

    Example:
        >>> stay = jnp.eye(2)[:, None]  # one action, which leaves the state as it is
        >>> action_values(stay, jnp.array([[1.0], [0.0]]), jnp.ones((2, 1)), gamma=0.5, horizon=1).tolist()
        [[1.5], [0.0]]

    Reference: Reward Design for Reinforcement Learning Agents (arXiv 2503.21949).
    """
    transitions, reward = check_process(transitions, reward, gamma)
    policy = masked.as_float(policy)
    masked.check_like("policy", policy, "reward", reward)
    if horizon is not None:
        if horizon < 0:
            raise ValueError(f"horizon must be at least 0, got {horizon}")
        ahead = lambda q: reward + gamma * transitions @ jnp.sum(policy * q, axis=1)  # noqa: E731
        return jax.lax.fori_loop(0, horizon, lambda _, q: ahead(q), reward)
    of_policy = jnp.einsum("sa,sat->st", policy, transitions)
    value = jnp.linalg.solve(jnp.eye(len(of_policy)) - gamma * of_policy, jnp.sum(policy * reward, axis=1))
    return reward + gamma * transitions @ value


def best_policy(transitions: Array, reward: Array, *, gamma: float, steps: int = 1000) -> Array:
    """The best actions, by value iteration; of equally good ones each with the same probability.

    Args:
        transitions: `[S, A, S]` float; a row of zeros ends the episode.
        reward: `[S, A]` float.
        gamma: in [0, 1).
        steps: of value iteration.

    Returns:
        `[S, A]`, float32 or wider. Actions whose values differ by less than $10^{-4}$ of the largest count as equal.

    Raises:
        ValueError: if the shapes do not fit or `gamma` is out of its range.

    Example:
        >>> move = jnp.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]])  # stay, or go to the second state
        >>> best_policy(move, jnp.array([[0.0, 0.0], [1.0, 1.0]]), gamma=0.9).tolist()
        [[0.0, 1.0], [0.5, 0.5]]

    Reference: Reinforcement Learning: An Introduction (Sutton & Barto, 2018), section 4.4.
    """
    transitions, reward = check_process(transitions, reward, gamma)
    ahead = lambda q: reward + gamma * transitions @ jnp.max(q, axis=1)  # noqa: E731
    q = jax.lax.fori_loop(0, steps, lambda _, q: ahead(q), reward)
    equal = q >= jnp.max(q, axis=1, keepdims=True) - 1e-4 * jnp.maximum(jnp.max(jnp.abs(q)), 1e-30)
    return equal / jnp.sum(equal, axis=1, keepdims=True).astype(reward.dtype)


def action_gaps(
    transitions: Array, reward: Array, teacher: Array, *, gamma: float, horizon: int | None = None
) -> Array:
    r"""How much worse an action is than the teacher's, $\sum_b \pi(b | s)\, Q_h(s, b) - Q_h(s, a)$.

    Args:
        transitions: `[S, A, S]` float.
        reward: `[S, A]` float.
        teacher: `[S, A]` float, probabilities, which it also follows afterwards.
        gamma: in [0, 1).
        horizon: $h$ of `action_values`.

    Returns:
        `[S, A]`, float32 or wider; at least 0 without a horizon, if the teacher is optimal for `reward`.

    Raises:
        ValueError: as `action_values`.

    Example:
        >>> end = jnp.zeros((1, 2, 1))
        >>> action_gaps(end, jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 0.0]]), gamma=0.9).tolist()
        [[0.0, 1.0]]

    Reference: Reward Design for Reinforcement Learning Agents (arXiv 2503.21949).
    """
    q = action_values(transitions, reward, teacher, gamma=gamma, horizon=horizon)
    return jnp.sum(masked.as_float(teacher) * q, axis=1, keepdims=True) - q

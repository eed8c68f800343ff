"""Decision processes whose policy pays for leaving a prior, and what becomes of a policy when its reward changes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.control.tables import best_policy, check_process
from jaxrl_post.types import Array


def soft_policy(
    transitions: Array,
    reward: Array,
    *,
    gamma: float,
    temperature: float,
    prior: Array | None = None,
    steps: int = 1000,
) -> tuple[Array, Array]:
    r"""The best policy for reward less the KL to a prior, by value iteration.

    $$Q = r + \gamma P V, \qquad V(s) = \tau \log \sum_a \pi_0(a|s)\, e^{Q(s, a) / \tau}, \qquad
    \pi \propto \pi_0\, e^{Q / \tau}$$

    Args:
        transitions: `[S, A, S]` float; a row of zeros ends the episode.
        reward: `[S, A]` float.
        gamma: in [0, 1).
        temperature: $\tau$, above 0: weight of the KL.
        prior: `[S, A]` float, $\pi_0$, such as a clone of demonstrations; None for an entropy bonus in its place, that
            is, $\pi_0 = 1$.
        steps: of value iteration.

    Returns:
        policy: `[S, A]`, float32 or wider.
        value: `[S]`, $V$.

    Raises:
        ValueError: if the shapes do not fit, or a number is out of its range.

    Example:
        >>> end, reward, prior = jnp.zeros((1, 2, 1)), jnp.array([[1.0, 0.0]]), jnp.array([[0.9, 0.1]])
        >>> policy, value = soft_policy(end, reward, gamma=0.0, temperature=1.0, prior=prior)
        >>> [round(float(p), 4) for p in policy[0]], round(float(value[0]), 4)
        ([0.9607, 0.0393], 0.9347)

    References:
        Demonstration-Regularized RL (arXiv 2310.17303); with the entropy, The Policy Cliff: A Theoretical Analysis of
        Reward-Policy Maps in Large Language Models (arXiv 2507.20150).
    """
    if isinstance(temperature, float | int) and not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}; best_policy is its limit")
    transitions, reward = check_process(transitions, reward, gamma)
    weight = jnp.ones_like(reward) if prior is None else masked.as_float(prior)
    masked.check_like("prior", weight, "reward", reward)

    def values(q: Array) -> Array:
        return temperature * jax.nn.logsumexp(q / temperature, axis=1, b=weight)

    q = jax.lax.fori_loop(0, steps, lambda _, q: reward + gamma * transitions @ values(q), reward)
    log_prior = jnp.where(weight > 0, jnp.log(jnp.where(weight > 0, weight, 1.0)), -jnp.inf)
    return jax.nn.softmax(q / temperature + log_prior, axis=1), values(q)


def clone(counts: Array) -> Array:
    r"""Behaviour cloning from counts, smoothed by Laplace, $\pi(a|s) = \frac{n(s, a) + 1}{n(s) + A}$.

    Args:
        counts: `[S, A]`, how often a demonstration took each action.

    Returns:
        `[S, A]`, float32 or wider.

    Raises:
        ValueError: if `counts` is not `[S, A]`.

    Example:
        >>> clone(jnp.array([[2, 0], [0, 0]])).tolist()
        [[0.75, 0.25], [0.5, 0.5]]

    Reference: Demonstration-Regularized RL (arXiv 2310.17303).
    """
    counts = masked.as_float(counts)
    masked.check_axes("counts", counts, "[S, A]")
    return (counts + 1) / jnp.sum(counts + 1, axis=1, keepdims=True)


def policy_cliff(
    key: Array,
    transitions: Array,
    reward: Array,
    *,
    gamma: float,
    size: float,
    temperature: float | None = None,
    draws: int = 64,
) -> Array:
    r"""How much a small change of the reward may change the best policy, $\max_{\|\delta\|_\infty \le \epsilon} TV$.

    Where two actions are equally good, any change decides between them; an entropy bonus bounds it by
    $\frac{\epsilon}{\tau (1 - \gamma)}$ in $L_1$.

    Args:
        key: of the changes, which have the size at every state and action, and a random sign.
        transitions: `[S, A, S]` float.
        reward: `[S, A]` float.
        gamma: in [0, 1).
        size: $\epsilon$, at least 0, in units of the reward.
        temperature: $\tau$ of `soft_policy`; None for `best_policy`.
        draws: number of changes.

    Returns:
        Scalar in [0, 1], float32 or wider: the largest total variation at any state, between the policies before and
        after a change.

    Raises:
        ValueError: if the shapes do not fit, or a number is out of its range.

    Example:
        >>> end, reward = jnp.zeros((1, 3, 1)), jnp.array([[1.0, 1.0, 0.0]])
        >>> policy_cliff(jax.random.key(0), end, reward, gamma=0.0, size=0.01).item()  # from a tie to one of both
        0.5

    Reference: The Policy Cliff: A Theoretical Analysis of Reward-Policy Maps in Large Language Models
    (arXiv 2507.20150).
    """
    transitions, reward = check_process(transitions, reward, gamma)
    if size < 0 or draws < 1:
        raise ValueError(f"size must be at least 0 and draws at least 1, got {size} and {draws}")

    def policy(reward: Array) -> Array:
        if temperature is None:
            return best_policy(transitions, reward, gamma=gamma)
        return soft_policy(transitions, reward, gamma=gamma, temperature=temperature)[0]

    signs = jax.random.rademacher(key, (draws, *reward.shape), reward.dtype)
    changed = jax.vmap(policy)(reward + size * signs)
    return jnp.max(jnp.sum(jnp.abs(changed - policy(reward)), axis=2)) / 2

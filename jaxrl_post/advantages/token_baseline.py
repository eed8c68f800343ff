"""A baseline of its own for every token of a group, weighted by how much each rollout moves the policy."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.advantages.layout import as_groups
from jaxrl_post.types import Array


def otb(
    rewards: Array,
    mask: Array,
    logp: Array,
    sum_p_squared: Array,
    *,
    group_size: int,
    ratio: Array | None = None,
    handle_zero_tail: bool = True,
) -> Array:
    r"""Optimal token baseline: reward-to-go less its mean over the group, weighted by the energy spent so far.

    $$w_t = 1 - 2 \pi(y_t) + \sum_v \pi(v)^2, \qquad W_t = \sum_{s \le t} w_s, \qquad
    A_{g,t} = G_{g,t} - \frac{\sum_j W_{j,t} G_{j,t}}{\sum_j W_{j,t}}$$

    $w_t$ is the squared norm of the gradient of $\log \pi(y_t)$ with respect to the logits. Time counts trained tokens:
    rollouts are compared at the same number of own actions, so that tool output of different lengths in between does
    not shift them against each other (the form for multi-turn rollouts; without tool output there is no difference).

    Args:
        rewards: `[B, T]` float; read where the mask is 1. `on_last_token` puts a sequence's reward there.
        mask: `[B, T]`, nonzero where the policy chose the token; rows that do not count are all 0.
        logp: `[B, T]` float, nats; log-prob of the token under the policy that sampled it.
        sum_p_squared: `[B, T]` float; the sum over the vocabulary of that policy's squared probabilities.
        group_size: `G`, rollouts per prompt; rows are prompt-major.
        ratio: `[B, T]` float, importance ratio to the policy that sampled, if the loss is weighted by it; the energy is
            then $\rho_t^2 w_t$. None for 1.
        handle_zero_tail: where only one rollout of the group is left, its own return would be its baseline and its
            advantage 0. True takes no baseline there; False leaves the 0.

    Returns:
        `[B, T]`, float32 or wider; 0 where the mask is, and in a group with one rollout. Where all energies are 0 the
        baseline is the plain mean.

    Raises:
        ValueError: if the arrays are not `[B, T]` of one shape, or `group_size` does not divide `B`.

    Example:
        >>> rewards, mask = jnp.array([[0.0, 1.0], [0.0, 0.0]]), jnp.ones((2, 2))
        >>> logp, sum_p_squared = jnp.log(jnp.array([[0.5, 0.5], [0.5, 0.9]])), jnp.array([[0.5, 0.5], [0.5, 0.82]])
        >>> advantages = otb(rewards, mask, logp, sum_p_squared, group_size=2)
        >>> [[round(a, 4) for a in row] for row in advantages.tolist()]
        [[0.5, 0.3421], [-0.5, -0.6579]]

    Reference: The Optimal Token Baseline: Variance Reduction for Long-Horizon LLM-RL (Proceedings of Machine Learning
    Research 306, 2026).
    """
    mask = jnp.asarray(mask)
    masked.check_axes("mask", mask, "[B, T]")
    acts = mask != 0
    arrays = {"rewards": rewards, "logp": logp, "sum_p_squared": sum_p_squared}
    if ratio is not None:
        arrays["ratio"] = ratio
    arrays = {name: masked.as_float(x) for name, x in arrays.items()}
    for name, x in arrays.items():
        masked.check_like(name, x, "mask", mask)
    arrays = {name: jnp.where(acts, x, 0.0) for name, x in arrays.items()}
    # Never negative on paper: 1 - 2 p + p^2 and the other squares. Rounding is kept from making it so.
    energy = jnp.maximum(1 - 2 * jnp.exp(arrays["logp"]) + arrays["sum_p_squared"], 0.0)
    if ratio is not None:
        energy = energy * jnp.square(arrays["ratio"])

    action, there = _to_actions(acts)

    def compact(x: Array) -> Array:
        rows = jnp.arange(x.shape[0])[:, None]
        return jnp.zeros_like(x).at[rows, action].add(jnp.where(acts, x, 0.0), mode="drop")

    def group(x: Array) -> Array:
        return x.reshape(-1, group_size, x.shape[1])

    as_groups(acts[:, 0], group_size)  # for its message
    to_go = jnp.cumsum(compact(arrays["rewards"])[:, ::-1], axis=1)[:, ::-1]
    spent = jnp.where(there, jnp.cumsum(compact(energy), axis=1), 0.0)
    alive = group(there)
    # Weighing what is centered already keeps equal returns at exactly 0 and falls back to the plain mean.
    centered = masked.center(group(to_go), alive, 1)
    difference = centered - masked.mean(centered, group(spent), 1, keepdims=True)
    rollouts = jnp.sum(jnp.any(alive, axis=2), axis=1)[:, None, None]
    if handle_zero_tail:
        alone = (jnp.sum(alive, axis=1, keepdims=True) == 1) & (rollouts > 1)
        difference = jnp.where(alone, group(to_go), difference)
    flat = jnp.where(alive, difference, 0.0).reshape(mask.shape)
    spread_out = jnp.take_along_axis(flat, jnp.minimum(action, mask.shape[1] - 1), axis=1)
    return jnp.where(acts, spread_out, 0.0)


def _to_actions(acts: Array) -> tuple[Array, Array]:
    """Which action of its row each token is, `[B, T]` (T where it is none), and which actions exist, `[B, T]`."""
    steps = acts.shape[1]
    action = jnp.where(acts, jnp.cumsum(acts, axis=1) - 1, steps)
    return action, jnp.arange(steps) < jnp.sum(acts, axis=1, keepdims=True)

"""Rewards of diminishing returns: set functions of what a trajectory has visited, and what each step adds to them.

Each set function gives `[B, T]`: its value on the states visited up to and including that step. `marginal_gains` turns
it into rewards per step, whose sum is the value of the whole trajectory; `advantages.reinforce_plus_plus(gains, mask,
whiten=False)` is their reward-to-go. Steps without mask visit nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def _check(states: Array, mask: Array | None) -> tuple[Array, Array]:
    states = jnp.asarray(states)
    masked.check_axes("states", states, "[B, T]")
    mask = jnp.ones(states.shape, bool) if mask is None else jnp.asarray(mask) != 0
    masked.check_like("mask", mask, "states", states)
    return states, mask


def _table(name: str, table: Array) -> Array:
    table = masked.as_float(table)
    masked.check_axes(name, table, "[S, V]")
    return table


def coverage(states: Array, sets: Array, mask: Array | None = None, *, weights: Array | None = None) -> Array:
    r"""Weight of the union of what the visited states cover, $F(\tau_{0:t}) = \sum_{v \in \cup_{j \le t} C(s_j)} w_v$.

    Args:
        states: `[B, T]` int, index of the state visited at each step.
        sets: `[S, V]`, nonzero where state `s` covers item `v`.
        mask: `[B, T]`, nonzero where the step visits its state; None for all.
        weights: `[V]` float, not negative; None for 1 each.

    Returns:
        `[B, T]`, float32 or wider: the value of each prefix.

    Raises:
        ValueError: if a shape does not fit, or a state that counts and is known (not traced) is not in the table; a
            traced one gives NaN.

    Example:
        >>> sets = jnp.array([[1, 1, 0], [0, 1, 1], [0, 1, 0]])
        >>> coverage(jnp.array([[0, 1, 2]]), sets).tolist()
        [[2.0, 3.0, 3.0]]

    Reference: Submodular Reinforcement Learning (arXiv 2307.13372).
    """
    sets = _table("sets", sets)
    weights = jnp.ones(sets.shape[1], sets.dtype) if weights is None else masked.as_float(weights)
    masked.check_like("weights", weights, "a row of sets", sets[0])
    return facility_location(states, (sets != 0) * weights, mask)


def facility_location(states: Array, similarity: Array, mask: Array | None = None) -> Array:
    r"""How well the visited states represent all items, $F(\tau_{0:t}) = \sum_v \max_{j \le t} \mathrm{sim}(s_j, v)$.

    Args:
        states: `[B, T]` int, index of the state visited at each step.
        similarity: `[S, V]` float, not negative; similarity of state `s` to item `v`.
        mask: `[B, T]`, nonzero where the step visits its state; None for all.

    Returns:
        `[B, T]`, float32 or wider: the value of each prefix.

    Raises:
        ValueError: if a shape does not fit, or a state that counts and is known (not traced) is not in the table; a
            traced one gives NaN.

    Example:
        >>> facility_location(jnp.array([[0, 1]]), jnp.array([[0.5, 0.25], [0.25, 1.0]])).tolist()
        [[0.75, 1.5]]

    Reference: Submodular Reinforcement Learning (arXiv 2307.13372).
    """
    states, mask = _check(states, mask)
    similarity = _table("similarity", similarity)
    masked.check_indices("states", states, len(similarity), mask)
    known = similarity.at[states].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    visited = jnp.where(mask[:, :, None], known, 0.0)
    return jnp.sum(jax.lax.cummax(visited, axis=1), axis=2)


def information_gain(states: Array, kernel: Array, mask: Array | None = None, *, noise_variance: float = 1.0) -> Array:
    r"""Information of noisy observations of the visited states, $F(\tau) = \frac12 \log\det(I + K_\tau / \sigma^2)$.

    Args:
        states: `[B, T]` int, index of the state visited at each step.
        kernel: `[S, S]` float, positive semi-definite; covariance of the states' values.
        mask: `[B, T]`, nonzero where the step visits its state; None for all.
        noise_variance: $\sigma^2$, in units of the kernel, above 0.

    Returns:
        `[B, T]`, float32 or wider, nats: the value of each prefix.

    Raises:
        ValueError: if a shape does not fit, the noise is not above 0, or a state that counts and is known (not traced)
            is not in the table; a traced one gives NaN.

    Example:
        >>> gain = information_gain(jnp.array([[0, 1]]), jnp.eye(2))
        >>> [round(x, 4) for x in gain[0].tolist()]
        [0.3466, 0.6931]

    Reference: Submodular Reinforcement Learning (arXiv 2307.13372).
    """
    states, mask = _check(states, mask)
    kernel = _table("kernel", kernel)
    if kernel.shape[0] != kernel.shape[1]:
        raise ValueError(f"kernel must be [S, S], got shape {kernel.shape}")
    if isinstance(noise_variance, float | int) and noise_variance <= 0:
        raise ValueError(f"noise_variance must be above 0, got {noise_variance}")
    masked.check_indices("states", states, len(kernel), mask)
    visits = mask[:, :, None] & mask[:, None, :]
    pairs = kernel.at[states[:, :, None], states[:, None, :]]
    known = pairs.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    visited = jnp.where(visits, known, 0.0) / noise_variance
    # The determinant of a prefix is the product of the first squared diagonal entries of one Cholesky factor.
    factor = jnp.linalg.cholesky(visited + jnp.eye(states.shape[1], dtype=visited.dtype))
    return jnp.cumsum(jnp.log(jnp.diagonal(factor, axis1=1, axis2=2)), axis=1)


def distinct_ngrams(tokens: Array, mask: Array | None = None, *, n: int = 1) -> Array:
    """Number of different n-grams among the unmasked tokens so far: a set function of text that needs no table.

    Args:
        tokens: `[B, T]` int.
        mask: `[B, T]`, nonzero where a token counts; an n-gram counts if all its tokens do. None for all.
        n: length of the n-grams, at least 1.

    Returns:
        `[B, T]` float32: the value of each prefix.

    Raises:
        ValueError: if `tokens` is not `[B, T]`, the mask has another shape, or `n` is below 1.

    Example:
        >>> tokens = jnp.array([[5, 7, 5, 7]])
        >>> distinct_ngrams(tokens).tolist(), distinct_ngrams(tokens, n=2).tolist()
        ([[1.0, 2.0, 2.0, 2.0]], [[0.0, 1.0, 2.0, 2.0]])

    Reference: Submodular Reinforcement Learning (arXiv 2307.13372), for rewards of this kind.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    tokens, mask = _check(tokens, mask)
    length = tokens.shape[1]

    def shifted(x: Array, by: int) -> Array:
        return jnp.pad(x, ((0, 0), (by, 0)))[:, :length]

    same = jnp.ones((*tokens.shape, length), bool)
    complete = jnp.ones(tokens.shape, bool)
    for back in range(min(n, length + 1)):
        token, there = shifted(tokens, back), shifted(mask, back)
        same &= token[:, :, None] == token[:, None, :]
        complete &= there
    earlier = jnp.tril(jnp.ones((length, length), bool), -1)
    seen = jnp.any(same & complete[:, None, :] & earlier, axis=2)
    return jnp.cumsum((complete & ~seen).astype(jnp.float32), axis=1)


def marginal_gains(values: Array, mask: Array | None = None) -> Array:
    r"""What each step adds to a set function, $F(\tau_{0:t}) - F(\tau_{0:t-1})$ with $F(\emptyset) = 0$.

    Used as rewards per step, with the reward-to-go as weight of each log-prob, they give the policy gradient of
    $E[F(\tau)]$; the immediate gain alone is the greedy form.

    Args:
        values: `[B, T]` float; the value of each prefix, see `coverage`; also where the mask is 0.
        mask: `[B, T]`, nonzero where the step counts; None for all.

    Returns:
        `[B, T]`, float32 or wider, in units of `values`; 0 where the mask is.

    Raises:
        ValueError: if `values` is not `[B, T]` or the mask has another shape.

    Example:
        >>> marginal_gains(jnp.array([[2.0, 3.0, 3.0]])).tolist()
        [[2.0, 1.0, 0.0]]

    Reference: Submodular Reinforcement Learning (arXiv 2307.13372).
    """
    values, mask = _check(masked.as_float(values), mask)
    before = jnp.pad(values, ((0, 0), (1, 0)))[:, :-1]
    return jnp.where(mask, values - before, 0.0)

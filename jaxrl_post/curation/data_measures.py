"""Two numbers that say what a data set of trajectories is good for: how well it does, and how much it has seen."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxrl_post import masked
from jaxrl_post.types import Array


def trajectory_quality(returns: Array, *, random: float, best: float) -> Array:
    r"""TQ: the mean return between that of a random policy and the best known, $\frac{\bar G - G_0}{G^\ast - G_0}$.

    Args:
        returns: `[N]` float, of the trajectories; of answers their rewards.
        random: $G_0$.
        best: $G^\ast$, of a policy that was trained online.

    Returns:
        Scalar, float32 or wider; NaN where the two are equal.

    Raises:
        ValueError: if `returns` is not `[N]`.

    Example:
        >>> trajectory_quality(jnp.array([5.0, 7.0]), random=2.0, best=10.0).item()
        0.5

    Reference: A Dataset Perspective on Offline Reinforcement Learning (arXiv 2111.04714).
    """
    returns = masked.as_float(returns)
    masked.check_axes("returns", returns, "[N]")
    gap = best - random
    return (jnp.mean(returns) - random) / gap if gap else jnp.full((), jnp.nan, returns.dtype)


def count_pairs(states: ArrayLike, actions: ArrayLike, *, bins: int | None = None) -> int:
    """The number of different pairs of state and action, on the host.

    Args:
        states: `[N, D]` or `[N]`, numbers; of answers, hashes.
        actions: `[N, A]` or `[N]`.
        bins: continuous numbers are counted by this many bins between the least and the largest of each dimension; None
            counts them as they are.

    Returns:
        The count.

    Raises:
        ValueError: if there is not an action for every state, or `bins` is below 1.

    Example:
        >>> count_pairs([[0, 1], [0, 1], [1, 1]], [0, 0, 0])
        2

    Reference: A Dataset Perspective on Offline Reinforcement Learning (arXiv 2111.04714), with 100 bins.
    """
    if bins is not None and bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    parts = [x[:, None] if x.ndim == 1 else x for x in map(np.asarray, (states, actions))]
    if len(parts[0]) != len(parts[1]):
        raise ValueError(f"there must be an action for each of {len(parts[0])} states, got {len(parts[1])}")
    rows = np.concatenate([part.astype(np.float64) for part in parts], axis=1)
    if bins is not None and len(rows):
        low, high = rows.min(axis=0), rows.max(axis=0)
        rows = np.minimum(np.floor((rows - low) / np.where(high > low, high - low, 1.0) * bins), bins - 1)
    return len(np.unique(rows, axis=0))


def coverage_ratio(pairs: int, reference_pairs: int, *, log: bool = False) -> float:
    """SACo: different pairs of state and action, over those in as many steps of a policy's training online.

    Args:
        pairs: `count_pairs` of the data.
        reference_pairs: of as many steps of the online policy's replay.
        log: the ratio of logarithms, lSACo.

    Returns:
        The ratio; it may exceed 1.

    Raises:
        ValueError: if a count is below 1, or the logarithm of the reference is 0.

    Example:
        >>> coverage_ratio(30, 40)
        0.75

    Reference: A Dataset Perspective on Offline Reinforcement Learning (arXiv 2111.04714).
    """
    if pairs < 1 or reference_pairs < (2 if log else 1):
        raise ValueError(f"counts must be at least 1 (for log, the reference's 2), got {pairs} and {reference_pairs}")
    return float(np.log(pairs) / np.log(reference_pairs)) if log else pairs / reference_pairs

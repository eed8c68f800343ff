"""How good a reward model is for what it is used for: to tell right from wrong, and not to be hacked."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


class OneToMany(NamedTuple):
    """Scalars in [0, 1]: how often the right answer beats all wrong ones, and the mean of one over its rank."""

    accuracy: Array
    mean_reciprocal_rank: Array


def one_to_many(scores: Array) -> OneToMany:
    r"""A benchmark of one right and many wrong answers to each problem, $\mathrm{rank} = 1 + \sum_j [s_j \ge s_0]$.

    Args:
        scores: `[P, N]` float, of the right answer in column 0 and of wrong ones. A tie counts against the model.

    Returns:
        `OneToMany`. Scores by chance give $1 / N$ and the mean of $1 / k$.

    Raises:
        ValueError: if `scores` is not `[P, N]` with a wrong answer at least.

    Example:
        >>> found = one_to_many(jnp.array([[0.7, 0.9, 0.1], [0.7, 0.6, 0.1]]))
        >>> float(found.accuracy), float(found.mean_reciprocal_rank)
        (0.5, 0.75)

    Reference: Evaluating Robustness of Reward Models for Mathematical Reasoning (arXiv 2410.01729).
    """
    scores = masked.as_float(scores)
    masked.check_axes("scores", scores, "[P, N]")
    if scores.shape[1] < 2:
        raise ValueError(f"scores must have a right answer and a wrong one at least, got shape {scores.shape}")
    rank = 1 + jnp.sum(scores[:, 1:] >= scores[:, :1], axis=1)
    return OneToMany(jnp.mean(rank == 1, dtype=scores.dtype), jnp.mean(1 / rank.astype(scores.dtype)))


def overoptimization(gold: Array) -> Array:
    """What is lost from the peak of the true score to the end, as optimisation goes on; 0 if it ends at its peak.

    Args:
        gold: `[..., K]` float, the true score at more and more optimisation.

    Returns:
        `[...]`, float32 or wider, at least 0.

    Example:
        >>> overoptimization(jnp.array([1.0, 3.0, 2.5])).item()
        0.5

    Reference: Evaluating Robustness of Reward Models for Mathematical Reasoning (arXiv 2410.01729).
    """
    gold = masked.as_float(gold)
    return jnp.max(gold, axis=-1) - gold[..., -1]


def hacking_onset(proxy: Array, held_out: Array, *, window: int = 3) -> Array:
    """The first checkpoint from which the trained reward rises while held-out rewards fall, so many times in a row.

    Args:
        proxy: `[K]` float, the trained reward at each checkpoint.
        held_out: `[K]` float, the mean of rewards that are not trained on.
        window: checkpoints in a row.

    Returns:
        Scalar int32; -1 for never.

    Raises:
        ValueError: if the shapes differ, or `window` is below 1.

    Example:
        >>> hacking_onset(jnp.arange(6.0), jnp.array([0.0, 1.0, 2.0, 1.5, 1.0, 0.5]), window=3).item()
        2

    Reference: Understanding Reward Hacking in Text-to-Image Reinforcement Learning (arXiv 2601.03468).
    """
    proxy, held_out = masked.as_float(proxy), masked.as_float(held_out)
    masked.check_axes("proxy", proxy, "[K]")
    masked.check_like("held_out", held_out, "proxy", proxy)
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    apart = (jnp.diff(proxy) > 0) & (jnp.diff(held_out) < 0)
    if len(apart) < window:
        return jnp.int32(-1)
    runs = jnp.convolve(apart.astype(jnp.int32), jnp.ones(window, jnp.int32), mode="valid") == window
    return jnp.where(jnp.any(runs), jnp.argmax(runs), -1).astype(jnp.int32)


def hacking_gap(proxy: Array, held_out: Array) -> Array:
    """How far the trained reward has come ahead of held-out ones, each in its own standard deviations.

    Args:
        proxy: `[K]` float, the trained reward at each checkpoint.
        held_out: `[K]` float, the mean of rewards that are not trained on.

    Returns:
        `[K]`, float32 or wider.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> hacking_gap(jnp.array([0.0, 2.0]), jnp.array([5.0, 1.0])).round(3).tolist()
        [-2.0, 2.0]

    Reference: Understanding Reward Hacking in Text-to-Image Reinforcement Learning (arXiv 2601.03468).
    """
    proxy, held_out = masked.as_float(proxy), masked.as_float(held_out)
    masked.check_axes("proxy", proxy, "[K]")
    masked.check_like("held_out", held_out, "proxy", proxy)

    def standard(x: Array) -> Array:
        every = jnp.ones(x.shape, bool)
        std = masked.std(x, every, ddof=0)
        return masked.center(x, every) / jnp.where(std > 0, std, 1.0)

    return standard(proxy) - standard(held_out)

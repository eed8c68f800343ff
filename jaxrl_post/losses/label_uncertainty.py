"""How far the label of a pair is to be trusted, from a judge that doubts itself."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array

SmoothingRule: TypeAlias = Literal["information_gain", "printed"]


def information_gain(probabilities: Array) -> Array:
    r"""BALD: what a judge's parameters would learn from a pair's label, from its answers under dropout.

    $$B = H\big(\tfrac1T \sum_t p_t\big) - \tfrac1T \sum_t H(p_t), \qquad H(p) = -p \log p - (1 - p) \log(1 - p)$$

    It is large where each pass is certain and they disagree; where all of them are undecided alike it is 0.

    Args:
        probabilities: `[T, B]` float in [0, 1], that the chosen answer is the better one, from `T` passes.

    Returns:
        `[B]`, nats in [0, log 2], float32 or wider.

    Raises:
        ValueError: if `probabilities` is not `[T, B]`.

    Example:
        >>> [round(float(b), 6) for b in information_gain(jnp.array([[0.9, 0.7], [0.1, 0.7]]))]
        [0.368064, 0.0]

    Reference: Self-Evolutionary Large Language Models through Uncertainty-Enhanced Preference Optimization
    (arXiv 2409.11212), after Bayesian Active Learning for Classification and Preference Learning (arXiv 1112.5745).
    """
    p = masked.as_float(probabilities)
    masked.check_axes("probabilities", p, "[T, B]")

    def entropy(p: Array) -> Array:
        return jax.scipy.special.entr(p) + jax.scipy.special.entr(1 - p)

    return jnp.maximum(entropy(jnp.mean(p, axis=0)) - jnp.mean(entropy(p), axis=0), 0.0)


def certainty(uncertainty: Array, valid: Array | None = None, *, mu: float = 1.0) -> Array:
    r"""Share of each pair in what is learned, $P_j = (1 - B_j)^\mu / \sum_k (1 - B_k)^\mu$.

    Args:
        uncertainty: `[B]` float, `information_gain` of each pair, nats.
        valid: `[B]` bool, False where a pair does not count; None for all.
        mu: $\mu$, at least 0; 0 treats all alike.

    Returns:
        `[B]`, float32 or wider, that sum to 1, without gradient; 0 where not valid.

    Raises:
        ValueError: if `uncertainty` is not `[B]`, `valid` has another shape, or `mu` is below 0.

    Example:
        >>> [round(float(p), 4) for p in certainty(jnp.array([0.0, 0.5]))]
        [0.6667, 0.3333]

    Reference: Self-Evolutionary Large Language Models through Uncertainty-Enhanced Preference Optimization
    (arXiv 2409.11212).
    """
    if isinstance(mu, float | int) and mu < 0:
        raise ValueError(f"mu must be at least 0, got {mu}; below it uncertain pairs would come more often")
    uncertainty = masked.as_float(uncertainty)
    masked.check_axes("uncertainty", uncertainty, "[B]")
    there = jnp.ones(uncertainty.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", there, "uncertainty", uncertainty)
    weight = jnp.where(there, jnp.clip(1 - uncertainty, 0.0, 1.0) ** mu, 0.0)
    total = jnp.sum(weight)
    return jax.lax.stop_gradient(weight / jnp.where(total > 0, total, 1.0))


def uncertain_smoothing(
    uncertainty: Array,
    valid: Array | None = None,
    *,
    rule: SmoothingRule = "information_gain",
    mu: float = 1.0,
) -> Array:
    r"""Label smoothing of each pair by its uncertainty, for `losses.dpo`.

    | rule | $\epsilon_j$ |
    |---|---|
    | `information_gain` | $B_j / (2 \log 2)$, in [0, 1/2] |
    | `printed` | $1 / (P_j + 1)$, as the paper prints it, with $P_j$ of `certainty` |

    The printed rule is above 1/2 wherever $P_j < 1$, which reverses every preference; it is here to be compared with.

    Args:
        uncertainty: `[B]` float, `information_gain` of each pair, nats.
        valid: of `certainty`.
        rule: of the table.
        mu: of `certainty`.

    Returns:
        `[B]`, float32 or wider, without gradient.

    Raises:
        ValueError: if `uncertainty` is not `[B]`, or for an unknown rule.

    Example:
        >>> [round(float(e), 4) for e in uncertain_smoothing(jnp.array([0.0, 0.6931472]))]
        [0.0, 0.5]

    Reference: Self-Evolutionary Large Language Models through Uncertainty-Enhanced Preference Optimization
    (arXiv 2409.11212), equations 7 to 15.
    """
    if rule not in get_args(SmoothingRule):
        raise ValueError(f"rule must be one of {', '.join(get_args(SmoothingRule))}, got {rule!r}")
    if rule == "printed":
        return 1 / (certainty(uncertainty, valid, mu=mu) + 1)
    uncertainty = masked.as_float(uncertainty)
    masked.check_axes("uncertainty", uncertainty, "[B]")
    return jax.lax.stop_gradient(jnp.clip(uncertainty / (2 * math.log(2)), 0.0, 0.5))

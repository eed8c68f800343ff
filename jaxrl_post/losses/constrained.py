"""Interior-point policy optimisation: one objective is raised while others must stay above their limits.

A log-barrier keeps the others feasible. Which objective is raised from where is decided in `curation.pareto`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.arguments import as_logp
from jaxrl_post.losses.policy import importance_ratio
from jaxrl_post.types import Array


def _check(t: float, floor: float) -> None:
    for name, number in (("t", t), ("floor", floor)):
        if isinstance(number, float | int) and not number > 0:
            raise ValueError(f"{name} must be above 0, got {number}")


def log_barrier(returns: Array, limits: Array, *, t: float = 20.0, floor: float = 1e-3) -> Array:
    r"""Log-barrier of returns that must stay above limits, per objective.

    $$b_j = -\frac{1}{t (m - 1)} \log(G_j - d_j), \qquad
    b_j = -\frac{1}{t (m - 1)} \Big(\log f + \frac{G_j - d_j - f}{f}\Big)\ \text{where}\ G_j - d_j < f$$

    Below the floor `f` the logarithm goes on as its tangent, so that a policy that has left the feasible region is led
    back instead of being lost.

    Args:
        returns: `[M]` float, expected returns `G_j`; the objective that is raised has a limit of -inf.
        limits: `[M]`, what each must exceed, e.g. `beta` times the return at the start. A constant.
        t: sharpness; the larger, the closer to the limits it lets the returns come.
        floor: slack below which the barrier is linear.

    Returns:
        `[M]`, float32 or wider, to be minimised; 0 where the limit is -inf. `m - 1` is the number of the other ones.

    Raises:
        ValueError: if shapes differ, or `t` or `floor` is not above 0.

    Example:
        >>> log_barrier(jnp.array([1.0, 1.0]), jnp.array([-jnp.inf, 0.0]), t=1.0).tolist()  # -log(1)
        [0.0, -0.0]

    References:
        C-MORL: Multi-Objective Reinforcement Learning through Efficient Discovery of Pareto Front, arXiv 2410.02236;
        IPO: Interior-point Policy Optimization under Constraints, arXiv 1910.09615. The tangent is this library's: the
        released code has a constant there, whose gradient is 0.
    """
    _check(t, floor)
    returns = masked.as_float(returns)
    limits = jax.lax.stop_gradient(jnp.asarray(limits, returns.dtype))
    masked.check_like("limits", limits, "returns", returns)
    bound = limits > -jnp.inf
    slack = jnp.where(bound, returns - jnp.where(bound, limits, 0.0), 1.0)
    inside = jnp.maximum(slack, floor)
    value = jnp.log(inside) + jnp.minimum(slack - floor, 0.0) / floor
    return jnp.where(bound, -value / (t * jnp.maximum(jnp.sum(bound), 1)), 0.0)


def barrier_weights(returns: Array, limits: Array, *, t: float = 20.0, floor: float = 1e-3) -> Array:
    r"""Weights of the objectives' policy gradients in that of the constrained problem.

    $$\nabla \Big[G_l - \sum_{j \ne l} b_j\Big] = \nabla G_l + \sum_{j \ne l} \lambda_j \nabla G_j, \qquad
    \lambda_j = \frac{1}{t (m - 1)\, \max(G_j - d_j, f)}$$

    An advantage is linear in the reward (without division by a standard deviation), so the objectives' advantages are
    added up with these weights and go into any surrogate.

    Args:
        returns: `[M]` float, expected returns `G_j`.
        limits: `[M]`; -inf for the objective `l` that is raised, whose weight is 1.
        t: see `log_barrier`.
        floor: see `log_barrier`.

    Returns:
        `[M]`, float32 or wider.

    Raises:
        ValueError: as `log_barrier`.

    Example:
        >>> barrier_weights(jnp.array([1.0, 1.0]), jnp.array([-jnp.inf, 0.9])).round(4).tolist()
        [1.0, 0.5]

    Reference: as `log_barrier`; derived from it.
    """
    slopes = jax.grad(lambda g: jnp.sum(log_barrier(g, limits, t=t, floor=floor)))(masked.as_float(returns))
    return jnp.where(jnp.asarray(limits) > -jnp.inf, -slopes, 1.0)


def ratio_barrier(
    logp: Array,
    old_logp: Array,
    returns: Array,
    *,
    beta: float = 0.9,
    t: float = 20.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    floor: float = 1e-3,
) -> Array:
    r"""The barrier as the authors of C-MORL released it: per token, of the clipped ratio times the mean return.

    $$\ell = -\frac{1}{t\,(m - 1)} \sum_{j \ne l} \log \max(\mathrm{clip}(r, 1 - \epsilon_{low}, 1 + \epsilon_{high})\,
    \bar G_j - \beta \bar G_j,\ f)$$

    It is added to the surrogate of the objective that is raised. The return is the batch's mean for every token alike,
    so at $r = 1$ the expectation of its gradient is 0: it holds the policy near the one that sampled (by Jensen's
    inequality) rather than the returns above their limits. `barrier_weights` is the gradient of the problem as it is
    stated.

    Args:
        logp: `[B, T]` or `[B]` float, nats; log-prob under the trained policy.
        old_logp: `logp`'s shape, nats. A constant.
        returns: `[M - 1]` float, the batch's mean returns of the constrained objectives; positive. A constant.
        beta: share of the return that must be kept.
        t: sharpness.
        clip_low: distance of the ratio's lower bound from 1.
        clip_high: distance of the ratio's upper bound from 1.
        floor: smallest argument of the logarithm; the gradient is 0 there.

    Returns:
        `logp`'s shape, float32 or wider.

    Raises:
        ValueError: if shapes differ, `returns` is not a vector, or `t` or `floor` is not above 0.

    Example:
        >>> at_one = ratio_barrier(jnp.zeros(1), jnp.zeros(1), jnp.array([1.0]))  # -log(0.1) / 20
        >>> round(float(at_one[0]), 4)
        0.1151

    Reference: C-MORL, arXiv 2410.02236, and its released `ipo_update`.
    """
    _check(t, floor)
    logp = as_logp(logp)
    returns = jax.lax.stop_gradient(masked.as_float(returns))
    masked.check_axes("returns", returns, "[M - 1]", "one mean return per constrained objective")
    ratio = jnp.clip(importance_ratio(logp, old_logp), 1.0 - clip_low, 1.0 + clip_high)
    slack = jnp.maximum((ratio[..., None] - beta) * returns, floor)
    return -jnp.mean(jnp.log(slack), axis=-1) / t

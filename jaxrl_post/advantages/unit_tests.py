"""Credit for programs from which of their unit tests pass: a test that few pass counts more."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def unit_test_weights(
    passes: Array, exists: Array | None = None, *, alpha: float = 2.0, sigma: float = 0.1, delta: float = 1e-6
) -> Array:
    r"""Weights of unit tests by how few programs of a group pass them, less where many tests are alike.

    $$w_u = \frac{e^{-\alpha \rho_u}}{\hat N_u + \delta}, \qquad \rho_u = \mathrm{mean}_{g,k}\, p_{g,k,u}, \quad
    \hat N_u = \sum_{v} e^{-(\rho_u - \rho_v)^2 / (2 \sigma^2)}$$

    Args:
        passes: `[P, G, S, U]`, nonzero where the program of a turn passes a test.
        exists: `[P, G, S]`, nonzero where there is such a turn; None for all.
        alpha: $\alpha$, at least 0: how much more a rare success counts.
        sigma: $\sigma$, at least 0, of pass rates: how near they must be for tests to be alike. 0 for none alike,
            $\hat N = 1$.
        delta: $\delta$, at least 0.

    Returns:
        `[P, U]`, float32 or wider.

    Raises:
        ValueError: if the shapes do not fit, or a number is below 0.

    Example:
        >>> passes = jnp.array([[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 1, 0]])[None, :, None]
        >>> [round(float(w), 5) for w in unit_test_weights(passes, delta=0.0)[0]]
        [0.06767, 0.06767, 0.60653]

    Reference: VeRPO: Verifiable Dense Reward Policy Optimization for Code Generation (arXiv 2601.03525).
    """
    for name, value in (("alpha", alpha), ("sigma", sigma), ("delta", delta)):
        if isinstance(value, float | int) and value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    passes, exists = _passes(passes, exists)
    rate = masked.mean(passes, jnp.broadcast_to(exists[..., None], passes.shape), (1, 2))
    weights = jnp.exp(-alpha * rate)
    if isinstance(sigma, float | int) and sigma == 0:
        return weights / (1.0 + delta)
    alike = jnp.exp(-jnp.square(rate[:, :, None] - rate[:, None, :]) / (2 * sigma**2))
    return weights / (jnp.sum(alike, axis=2) + delta)


def verpo(
    passes: Array,
    exists: Array | None = None,
    valid: Array | None = None,
    *,
    alpha: float = 2.0,
    sigma: float = 0.1,
    delta: float = 1e-6,
    gamma: float = 1.0,
    beta: float = 1.0,
) -> Array:
    r"""VeRPO: a turn's advantage is that of its program's tests, weighted, and that of the trajectory's end.

    $$A_{g,k} = R_g - \mathrm{mean}_G R + \beta\, \big(r_{g,k} - \mathrm{mean}_{G,K}\, r\big), \qquad
    r_{g,k} = \sum_u w_u p_{g,k,u}, \quad R_g = \gamma^{K_g} \prod_u p_{g,K_g,u}$$

    There is no division by a standard deviation.

    Args:
        passes: `[P, G, S, U]`, nonzero where the program of a turn passes a test.
        exists: `[P, G, S]`, nonzero where there is such a turn; None for all.
        valid: `[P, G]` bool, False where the trajectory does not count; None for all.
        alpha: of `unit_test_weights`, as are the next two.
        sigma: how near pass rates must be for tests to be alike.
        delta: added to the number of tests that are alike.
        gamma: $\gamma$ in (0, 1], discount by the number of turns $K_g$.
        beta: $\beta$, weight of the turns.

    Returns:
        `[P, G, S]`, float32 or wider; 0 where there is no turn, or the trajectory is not valid.

    Raises:
        ValueError: if the shapes do not fit, or a number is out of its range.

    Example:
        >>> passes = jnp.array([[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 1, 0]])[None, :, None]
        >>> [round(float(a), 4) for a in verpo(passes, delta=0.0).ravel()]
        [1.2049, -0.4016, -0.4016, -0.4016]

    Reference: VeRPO: Verifiable Dense Reward Policy Optimization for Code Generation (arXiv 2601.03525).
    """
    if isinstance(gamma, float | int) and not 0 < gamma <= 1:
        raise ValueError(f"gamma must be above 0 and at most 1, got {gamma}")
    passes, exists = _passes(passes, exists)
    if valid is not None:
        masked.check_like("valid", jnp.asarray(valid), "the trajectories of passes", passes[:, :, 0, 0])
        exists = exists & (jnp.asarray(valid) != 0)[:, :, None]
    weights = unit_test_weights(passes, exists, alpha=alpha, sigma=sigma, delta=delta)
    by_turn = jnp.einsum("pgsu,pu->pgs", passes, weights)
    count = jnp.sum(exists, axis=2)
    last = exists & (jnp.cumsum(exists, axis=2) == count[..., None])
    solved = jnp.any(last & jnp.all(passes > 0, axis=3), axis=2)
    outcome = jnp.where(solved, jnp.asarray(gamma, passes.dtype) ** count, 0.0)
    outcome = masked.center(outcome, count > 0, 1)
    return jnp.where(exists, outcome[..., None] + beta * masked.center(by_turn, exists, (1, 2)), 0.0)


def _passes(passes: Array, exists: Array | None) -> tuple[Array, Array]:
    """0 or 1 where a test is passed, and which turns there are."""
    passes = jnp.asarray(passes)
    masked.check_axes("passes", passes, "[P, G, S, U]")
    exists = jnp.ones(passes.shape[:3], bool) if exists is None else jnp.asarray(exists) != 0
    masked.check_like("exists", exists, "the turns of passes", passes[..., 0])
    return masked.as_float((passes != 0) & exists[..., None]), exists

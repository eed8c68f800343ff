"""Credit for whether an update really helped: the next batch's reward against those of the batches before."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def improvement_signal(
    mean_reward: Array,
    history: Array,
    *,
    penalty: float = 0.1,
    clamp: float | None = None,
    min_std: float = 1e-6,
) -> Array:
    r"""Standardised improvement over a window of past mean rewards, weaker where it is negative.

    $$\xi = \frac{\mu_t - \bar\mu}{\max(\sigma_\mu, \epsilon)}, \qquad
    \phi = \begin{cases} \xi & \xi \ge 0 \\ \lambda \xi & \xi < 0 \end{cases}$$

    with mean and unbiased standard deviation of the window.

    Args:
        mean_reward: scalar, mean reward $\mu_t$ of the batch sampled after the update that is judged.
        history: `[K]`, mean rewards of the K batches before.
        penalty: $\lambda$, factor of negative signals; 0 reinforces only.
        clamp: bound on $|\xi|$; None for no bound.
        min_std: $\epsilon$, smallest standard deviation.

    Returns:
        Scalar, float32 or wider.

    Raises:
        ValueError: if `history` is not a vector of at least two, or `penalty` or `clamp` is negative.

    Example:
        >>> history = jnp.array([0.40, 0.42, 0.44, 0.46])
        >>> [round(float(improvement_signal(jnp.array(mean), history)), 4) for mean in (0.47, 0.40)]
        [1.5492, -0.1162]

    Reference: Policy Improvement Reinforcement Learning (PIPO), arXiv 2604.00860.
    """
    history = masked.as_float(history)
    masked.check_axes("history", history, "[K]")
    if history.shape[0] < 2:
        raise ValueError(f"history needs at least two mean rewards for a standard deviation, got {history.shape[0]}")
    for name, number in (("penalty", penalty), ("clamp", clamp)):
        if isinstance(number, float | int) and number < 0:
            raise ValueError(f"{name} must be at least 0, got {number}")
    every = jnp.ones_like(history)
    spread = jnp.maximum(masked.std(history, every), min_std)
    xi = (masked.as_float(mean_reward) - masked.mean(history, every)) / spread
    xi = xi if clamp is None else jnp.clip(xi, -clamp, clamp)
    return jnp.where(xi >= 0, xi, penalty * xi)


def attribution(advantages: Array, valid: Array | None = None) -> Array:
    r"""Advantages on a scale of their own: $a_i = G A_i / \sum_j |A_j|$, whose absolute values have mean 1.

    Args:
        advantages: `[P, G]` float.
        valid: `[P, G]` bool, sequences that count; None for all. `G` is then their number.

    Returns:
        `[P, G]`, float32 or wider; 0 for groups whose advantages are all 0, and for what is not valid.

    Raises:
        ValueError: for wrong shapes.

    Example:
        >>> attribution(jnp.array([[0.5, 0.5, -0.5, -0.5], [0.0, 0.0, 0.0, 0.0]])).tolist()
        [[1.0, 1.0, -1.0, -1.0], [0.0, 0.0, 0.0, 0.0]]

    Reference: Policy Improvement Reinforcement Learning (PIPO), arXiv 2604.00860.
    """
    advantages = masked.as_float(advantages)
    masked.check_axes("advantages", advantages, "[P, G]", "reshape with as_groups(advantages, group_size=8)")
    valid = jnp.ones(advantages.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", valid, "advantages", advantages)
    scale = masked.mean(jnp.abs(advantages), valid, 1, keepdims=True)
    scaled = advantages / jnp.where(scale > 0, scale, 1.0)
    return jnp.where(valid & (scale > 0), scaled, 0.0)

"""Credit of denoising steps: what a step gained of what the deterministic completion would have reached.

Rewards of latents are those of the data that `ode_step` makes of them: `[P, G, S + 1]`, of the noise first, of the
sample last. `jax.vmap(advantages.grpo, in_axes=2, out_axes=2)` compares what comes out among the group, step by step.
"""

from __future__ import annotations

import chex
import jax.numpy as jnp

from jaxrl_post.types import Array


def step_gains(latent_rewards: Array) -> Array:
    r"""What each step changed of the reward to be expected: $r_k = R_k - R_{k-1}$.

    Args:
        latent_rewards: `[..., S + 1]`.

    Returns:
        `[..., S]`; their sum is the sample's reward less that of its noise.

    Example:
        >>> [round(x, 4) for x in step_gains(jnp.array([0.2, 0.5, 0.6])).tolist()]
        [0.3, 0.1]

    Reference: DenseGRPO (2601.20218), equation 8.
    """
    return jnp.diff(latent_rewards, axis=-1)


def turning_point_rewards(latent_rewards: Array, final_reward: Array | None = None) -> Array:
    r"""`step_gains`, but all that is still gained for a step that turns a trajectory to where it ends.

    $$r_k = R - R_{k-1} \text{ if } s_{k-1} < 0 < s_k \text{ and } d_k (R - R_k) > 0, \quad
      \text{else } d_k = R_k - R_{k-1}; \qquad s_k = \mathrm{sign}(d_k (R - R_0))$$

    The first step needs no $s_{k-1} < 0$.

    Args:
        latent_rewards: `[..., S + 1]`.
        final_reward: `[...]`, $R$, that of the sample if the last steps are deterministic; None for the last of
            `latent_rewards`.

    Returns:
        `[..., S]`.

    Example:
        >>> [round(x, 4) for x in turning_point_rewards(jnp.array([0.5, 0.4, 0.7, 0.8])).tolist()]
        [-0.1, 0.4, 0.1]

    Reference: Alleviating Sparse Rewards by Modeling Step-Wise and Long-Term Sampling Effects in Flow-Based GRPO
    (2602.06422) and its released code.
    """
    final = latent_rewards[..., -1:] if final_reward is None else final_reward[..., None]
    gains = step_gains(latent_rewards)
    along = jnp.sign(gains) * jnp.sign(final - latent_rewards[..., :1])
    turned = jnp.concatenate([jnp.ones_like(along[..., :1], bool), along[..., :-1] < 0], axis=-1)
    first = jnp.arange(gains.shape[-1]) == 0
    agrees = jnp.sign(gains) * jnp.sign(final - latent_rewards[..., 1:]) > 0
    turns = agrees & turned & (first | (along > 0))
    return jnp.where(turns, final - latent_rewards[..., :-1], gains)


def noise_weights(std: Array) -> Array:
    r"""Weights of steps by the noise that they explore with, of mean 1: $w_k = s_k / \mathrm{mean}_j s_j$.

    Args:
        std: `[S]`, the second of what `sde_step` gives.

    Returns:
        `[S]`; ones where no step has any noise.

    Example:
        >>> [round(x, 4) for x in noise_weights(jnp.array([0.6, 0.3, 0.3])).tolist()]
        [1.5, 0.75, 0.75]

    Reference: TempFlow-GRPO (2508.04324), equation 7.
    """
    chex.assert_rank(std, 1, custom_message="std")
    mean = jnp.mean(std)
    return jnp.where(mean > 0, std / jnp.where(mean > 0, mean, 1.0), 1.0)


def calibrate_level(
    levels: Array, gains: Array, *, balance: float, step: float = 0.05, low: float = 0.1, high: float = 1.0
) -> Array:
    r"""Noise of each step, more where as many trajectories gain as lose, and less where they do not.

    $$a_k \leftarrow \mathrm{clip}(a_k \pm \delta), \quad + \text{ iff }
      \left| \#\{r_k > 0\} - \#\{r_k < 0\} \right| < \epsilon N$$

    Args:
        levels: `[S]`, of `sde_step`.
        gains: `[..., S]`, of all `N` trajectories.
        balance: $\epsilon$, a share of the trajectories (the paper counts them).
        step: $\delta$.
        low: least level.
        high: largest.

    Returns:
        `[S]`.

    Example:
        >>> gains = jnp.array([[0.1, 0.1], [-0.1, 0.1]])
        >>> [round(x, 4) for x in calibrate_level(jnp.array([0.7, 0.7]), gains, balance=0.5).tolist()]
        [0.75, 0.65]

    Reference: DenseGRPO (2601.20218), algorithm 1.
    """
    difference = jnp.mean(jnp.sign(gains).reshape(-1, gains.shape[-1]), axis=0)
    return jnp.clip(jnp.where(jnp.abs(difference) < balance, levels + step, levels - step), low, high)

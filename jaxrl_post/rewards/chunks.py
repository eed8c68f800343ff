"""How well a chunk of actions agrees with a demonstrated one: in its tokens, and in what they decode to."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def token_agreement(tokens: Array, reference: Array) -> Array:
    r"""Share of places where two chunks have the same token, $|\{k : a_k = a^\ast_k\}| / \max(U, V)$.

    Args:
        tokens: `[N, U]` int; -1 for no token, at the end.
        reference: `[N, V]` int; -1 likewise.

    Returns:
        `[N]` float32 in [0, 1]; 0 where both are empty.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> token_agreement(jnp.array([[5, 7, 9]]), jnp.array([[5, 8, 9, 2]])).tolist()
        [0.5]

    Reference: Towards Long-Lived Robots: Continual Learning VLA Models via Reinforcement Fine-Tuning
    (arXiv 2602.10503).
    """
    tokens, reference = jnp.asarray(tokens), jnp.asarray(reference)
    masked.check_axes("tokens", tokens, "[N, U]")
    if reference.ndim != 2 or len(reference) != len(tokens):
        raise ValueError(f"reference must be [N, V] with N = {len(tokens)}, got shape {reference.shape}")
    both = min(tokens.shape[1], reference.shape[1])
    same = (tokens[:, :both] == reference[:, :both]) & (tokens[:, :both] >= 0)
    longest = jnp.maximum(jnp.sum(tokens >= 0, axis=1), jnp.sum(reference >= 0, axis=1))
    return jnp.sum(same, axis=1) / jnp.maximum(longest, 1).astype(jnp.float32)


def trajectory_agreement(
    pose: Array, reference_pose: Array, gripper: Array, reference_gripper: Array, *, alpha: float, beta: float
) -> Array:
    r"""How near decoded actions are, $\mathrm{mean}_t\, \beta e^{-\alpha d_t} + (1 - \beta) [g_t = g^\ast_t]$.

    Args:
        pose: `[N, H, D]` float; $d_t$ is the mean absolute difference of its `D` numbers.
        reference_pose: the same shape.
        gripper: `[N, H]`, discrete.
        reference_gripper: the same shape.
        alpha: $\alpha$, at least 0, per unit of the pose.
        beta: $\beta$ in [0, 1], share of the pose.

    Returns:
        `[N]` in [0, 1], float32 or wider.

    Raises:
        ValueError: if the shapes do not fit, or a number is out of its range.

    Example:
        >>> pose, zero = jnp.array([[[0.1], [0.3]]]), jnp.zeros((1, 2, 1))
        >>> found = trajectory_agreement(pose, zero, jnp.array([[1, 0]]), jnp.array([[1, 1]]), alpha=2.0, beta=0.8)
        >>> round(found.item(), 5)
        0.64702

    Reference: Towards Long-Lived Robots: Continual Learning VLA Models via Reinforcement Fine-Tuning
    (arXiv 2602.10503).
    """
    if isinstance(alpha, float | int) and alpha < 0:
        raise ValueError(f"alpha must be at least 0, got {alpha}")
    if isinstance(beta, float | int) and not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
    pose, reference_pose = masked.as_float(pose), masked.as_float(reference_pose)
    gripper, reference_gripper = jnp.asarray(gripper), jnp.asarray(reference_gripper)
    masked.check_axes("pose", pose, "[N, H, D]")
    masked.check_like("reference_pose", reference_pose, "pose", pose)
    masked.check_like("gripper", gripper, "the places of pose", pose[..., 0])
    masked.check_like("reference_gripper", reference_gripper, "gripper", gripper)
    near = jnp.exp(-alpha * jnp.mean(jnp.abs(pose - reference_pose), axis=2))
    return jnp.mean(beta * near + (1 - beta) * (gripper == reference_gripper), axis=1)


def chunk_reward(
    tokens: Array, trajectory: Array, decodes: Array, *, token_weight: float = 0.7, format_weight: float = 0.1
) -> Array:
    r"""A chunk's reward from both agreements and its form, $w r_{tok} + (1 - w) r_{traj} + \lambda$; 0 if undecodable.

    Args:
        tokens: any shape, `token_agreement`.
        trajectory: the same shape, `trajectory_agreement`.
        decodes: the same shape, nonzero where the chunk has the length and the dimension it must have.
        token_weight: $w$ in [0, 1].
        format_weight: $\lambda$.

    Returns:
        The shape of `tokens`, float32 or wider.

    Raises:
        ValueError: if the shapes differ, or `token_weight` is outside [0, 1].

    Example:
        >>> found = chunk_reward(jnp.full(2, 0.5), jnp.full(2, 0.64702), jnp.array([1, 0]))
        >>> [round(float(r), 4) for r in found]
        [0.6441, 0.0]

    Reference: Towards Long-Lived Robots: Continual Learning VLA Models via Reinforcement Fine-Tuning
    (arXiv 2602.10503).
    """
    if isinstance(token_weight, float | int) and not 0 <= token_weight <= 1:
        raise ValueError(f"token_weight must be in [0, 1], got {token_weight}")
    tokens, trajectory, decodes = masked.as_float(tokens), masked.as_float(trajectory), jnp.asarray(decodes)
    masked.check_like("trajectory", trajectory, "tokens", tokens)
    masked.check_like("decodes", decodes, "tokens", tokens)
    whole = token_weight * tokens + (1 - token_weight) * trajectory + format_weight
    return jnp.where(decodes != 0, whole, 0.0)

"""A reward model that learns to tell reference samples from what the policy makes, while the policy trains on it.

The head and its features are the caller's. Where a scorer of pairs is trained in its place, the loss is `bradley_terry`
of the scores of reference and sample.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.arguments import check_at_least
from jaxrl_post.types import Array


def discriminator_hinge(
    reference: Array, generated: Array, reference_mask: Array | None = None, generated_mask: Array | None = None
) -> Array:
    r"""Hinge loss of a discriminator of samples or of their patches.

    $$\ell = \tfrac12 \big[\mathrm{mean}\,(1 - h(z_{ref}))_+ + \mathrm{mean}\,(1 + h(z_{gen}))_+\big]$$

    Args:
        reference: any shape, float: $h$ of reference samples, or of their patches.
        generated: any shape, float: of what the policy made. There may be another number of them.
        reference_mask: of the shape of `reference`, nonzero where it counts; None for all.
        generated_mask: of the shape of `generated`, likewise.

    Returns:
        Scalar, float32 or wider. A loss with patches is that of whole samples plus 0.3 times that of patches. A part
        that is empty adds 0.

    Raises:
        ValueError: if a mask has another shape.

    Example:
        >>> round(float(discriminator_hinge(jnp.array([0.4]), jnp.array([-0.2]))), 6)
        0.7

    Reference: The Image as Its Own Reward: Reinforcement Learning with Adversarial Reward for Image Generation
    (arXiv 2511.20256).
    """
    parts = []
    for name, logits, mask, sign in (
        ("reference_mask", reference, reference_mask, 1),
        ("generated_mask", generated, generated_mask, -1),
    ):
        logits = masked.as_float(logits)
        counts = jnp.ones(logits.shape) if mask is None else jnp.asarray(mask)
        masked.check_like(name, counts, name.removesuffix("_mask"), logits)
        parts.append(masked.mean(jnp.maximum(1 - sign * logits, 0.0), counts))
    return (parts[0] + parts[1]) / 2


def patch_reward(whole: Array, patches: Array, *, patch_weight: float = 0.3) -> Array:
    r"""Reward from a discriminator of samples and of their patches, $(1 - w)\, h(z) + w\, \mathrm{mean}_n h(p_n)$.

    Args:
        whole: `[B]` float, $h$ of the samples. Its features should be scaled as in the head's training.
        patches: `[B, N]` float, of some of their patches.
        patch_weight: $w$ in [0, 1].

    Returns:
        `[B]`, float32 or wider.

    Raises:
        ValueError: if the shapes do not fit or `patch_weight` is not in [0, 1].

    Example:
        >>> round(float(patch_reward(jnp.array([1.0]), jnp.array([[0.0, -1.0]]))[0]), 4)
        0.55

    Reference: The Image as Its Own Reward: Reinforcement Learning with Adversarial Reward for Image Generation
    (arXiv 2511.20256).
    """
    if not 0 <= patch_weight <= 1:
        raise ValueError(f"patch_weight must be in [0, 1], got {patch_weight}")
    whole, patches = masked.as_float(whole), masked.as_float(patches)
    masked.check_axes("whole", whole, "[B]")
    masked.check_axes("patches", patches, "[B, N]")
    if patches.shape[0] != whole.shape[0] or patches.shape[1] == 0:
        raise ValueError(f"patches must be [B, N] with B = {whole.shape[0]} and some patches, got {patches.shape}")
    return (1 - patch_weight) * whole + patch_weight * jnp.mean(patches, axis=1)


def scorer_is_fooled(reference: Array, generated: Array) -> Array:
    """Whether the policy's samples score higher than the references on average: only then is a scorer of pairs updated.

    Args:
        reference: `[N]` float, scores of the references.
        generated: `[B]` float, of the policy's samples.

    Returns:
        Scalar bool.

    Raises:
        ValueError: if they are not `[N]` and `[B]`.

    Example:
        >>> bool(scorer_is_fooled(jnp.array([1.0, 2.0]), jnp.array([3.0])))
        True

    Reference: The Image as Its Own Reward: Reinforcement Learning with Adversarial Reward for Image Generation
    (arXiv 2511.20256).
    """
    reference, generated = masked.as_float(reference), masked.as_float(generated)
    masked.check_axes("reference", reference, "[N]")
    masked.check_axes("generated", generated, "[B]")
    return jnp.mean(reference) < jnp.mean(generated)


def discriminators_turn(step: Array | int, *, updates: int) -> Array:
    """Whether the reward model is what a step trains: so many of its updates, then one of the policy, and again.

    Args:
        step: scalar int, from 0.
        updates: of the reward model for each one of the policy; 0 freezes it.

    Returns:
        Scalar bool.

    Raises:
        ValueError: if `updates` is negative.

    Example:
        >>> [bool(discriminators_turn(step, updates=2)) for step in range(6)]
        [True, True, False, True, True, False]

    Reference: The Image as Its Own Reward: Reinforcement Learning with Adversarial Reward for Image Generation
    (arXiv 2511.20256).
    """
    check_at_least("updates", updates, 0)
    return jnp.mod(step, updates + 1) < updates

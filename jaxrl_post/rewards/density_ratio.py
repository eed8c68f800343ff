"""A reward from two language models without any training: how much likelier the better aligned one makes an answer."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def density_ratio_reward(
    strong_logp: Array,
    weak_logp: Array,
    mask: Array,
    weak_mask: Array | None = None,
    *,
    per_token: bool = False,
) -> Array:
    r"""Log-density ratio of a better over a less aligned model, $r = \sum_t \log\pi_{strong} - \sum_t \log\pi_{weak}$.

    Both may read the same instruction and examples in front of the prompt, chosen by its kind. With a policy trained by
    DPO over its reference it is DPO's implicit reward but for the scale, which no ranking depends on.

    Args:
        strong_logp: `[B, T]` float, nats; log-prob of the token under the better aligned model.
        weak_logp: `[B, T]` float, nats; under the other. Of another length where that has another tokenizer.
        mask: `[B, T]`, nonzero where the token is the answer's.
        weak_mask: of the shape of `weak_logp`, for its own tokens; None for `mask`.
        per_token: take means over tokens in the place of sums, which grow with the length; the paper takes sums.

    Returns:
        `[B]`, float32 or wider, nats; 0 for an answer without tokens.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> strong, weak = jnp.array([[-4.0, -6.0], [-5.0, -6.0]]), jnp.array([[-6.0, -6.0], [-5.5, -6.0]])
        >>> density_ratio_reward(strong, weak, jnp.ones((2, 2))).tolist()
        [2.0, 0.5]

    Reference: CDR: Customizable Density Ratios of Strong-over-weak LLMs for Preference Annotation (arXiv 2411.02481).
    """
    strong, weak = masked.as_float(strong_logp), masked.as_float(weak_logp)
    mask = jnp.asarray(mask)
    weak_mask = mask if weak_mask is None else jnp.asarray(weak_mask)
    masked.check_axes("strong_logp", strong, "[B, T]")
    masked.check_like("mask", mask, "strong_logp", strong)
    masked.check_like("weak_mask", weak_mask, "weak_logp", weak, "give weak_mask for tokens of another tokenizer")
    if weak.shape[0] != strong.shape[0]:
        raise ValueError(f"weak_logp must have the {strong.shape[0]} rows of strong_logp, got {weak.shape}")
    reduce = masked.mean if per_token else masked.sum
    return reduce(strong, mask, 1) - reduce(weak, weak_mask, 1)


def pair_accuracy(better: Array, worse: Array, valid: Array | None = None) -> Array:
    """Share of labelled pairs that a reward ranks as they are labelled; a tie counts half.

    Args:
        better: `[B]` float, rewards of the preferred answers.
        worse: `[B]` float, of the others.
        valid: `[B]` bool, False where a pair does not count; None for all.

    Returns:
        Scalar, float32 or wider, in [0, 1]; 0 if no pair counts.

    Raises:
        ValueError: if the arrays are not `[B]` of one length.

    Example:
        >>> float(pair_accuracy(jnp.array([2.0, 1.0]), jnp.array([0.5, 1.0])))
        0.75

    Reference: RewardBench: Evaluating Reward Models for Language Modeling (arXiv 2403.13787).
    """
    better, worse = masked.as_float(better), masked.as_float(worse)
    masked.check_axes("better", better, "[B]")
    masked.check_like("worse", worse, "better", better)
    counts = jnp.ones(better.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", counts, "better", better)
    return masked.mean((1 + jnp.sign(better - worse)) / 2, counts)

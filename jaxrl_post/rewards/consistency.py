"""A reward that pays for coherence only where the result is right."""

from __future__ import annotations

from jaxrl_post import masked
from jaxrl_post.types import Array


def consistency_reward(
    result: Array,
    consistency: Array,
    format: Array,
    *,
    consistency_weight: float = 0.5,
    format_weight: float = 0.5,
) -> Array:
    r"""Right result, scaled up if the reasoning agrees with it, plus form: $r_{res}(1 + w_c r_{con}) + w_f r_{form}$.

    An agreement that were added instead would also pay for a wrong verdict that is argued well.

    Args:
        result: any shape, 1 where the answer is right, else 0.
        consistency: of the same shape, 1 where the end of the reasoning agrees with the answer, else 0 (or -1).
        format: of the same shape, 1 where the form is kept, else 0.
        consistency_weight: $w_c$.
        format_weight: $w_f$.

    Returns:
        The shape of `result`, float32 or wider.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> result, ones = jnp.array([1.0, 0.0]), jnp.ones(2)
        >>> consistency_reward(result, ones, ones).tolist()
        [2.0, 0.5]

    Reference: R1-Reward: Training Multimodal Reward Model Through Stable Reinforcement Learning (arXiv 2505.02835).
    """
    result, consistency, format = masked.as_float(result), masked.as_float(consistency), masked.as_float(format)
    masked.check_like("consistency", consistency, "result", result)
    masked.check_like("format", format, "result", result)
    return result * (1 + consistency_weight * consistency) + format_weight * format

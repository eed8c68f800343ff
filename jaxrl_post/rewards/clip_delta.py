"""Process scores as rewards that cannot be farmed by more steps."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def clip_delta(
    scores: Array, exists: Array | None = None, *, threshold: float | None = None, delta: bool = True
) -> Array:
    r"""Process rewards whose sum does not grow with the number of steps: clipped, then differences to the next step.

    $$c_k = \min(q_k - \eta, 0), \qquad d_k = c_k - c_{k+1} \ (k < K - 1), \quad d_{K-1} = c_{K-1}, \quad d_K = 0$$

    Clipped, only bad steps cost something; of differences the return from step $k$ is $c_k$, and 0 from the last, which
    holds the answer.

    Args:
        scores: `[B, S]` float, a process reward model's score of each step; NaN where there is none, which earns 0.
        exists: `[B, S]`, nonzero where the step exists; None for all.
        threshold: $\eta$, such as a high quantile of the scores of good steps; None for no clip, $c = q$.
        delta: take the differences; False gives $c$.

    Returns:
        `[B, S]`, float32 or wider; 0 where the step does not exist.

    Raises:
        ValueError: if `scores` is not `[B, S]` or `exists` has another shape.

    Example:
        >>> found = clip_delta(jnp.array([[0.9, 0.8, 0.95]]), threshold=0.85)
        >>> [round(float(d), 4) for d in found[0]]
        [0.05, -0.05, 0.0]

    Reference: On Designing Effective RL Reward at Training Time for LLM Reasoning (arXiv 2410.15115).
    """
    scores = masked.as_float(scores)
    masked.check_axes("scores", scores, "[B, S]")
    exists = jnp.ones(scores.shape, bool) if exists is None else jnp.asarray(exists) != 0
    masked.check_like("exists", exists, "scores", scores)
    counts = exists & ~jnp.isnan(scores)
    cost = jnp.where(counts, scores, 0.0)
    if threshold is not None:
        cost = jnp.where(counts, jnp.minimum(cost - threshold, 0.0), 0.0)
    if not delta:
        return cost
    # The next step that exists is the next place: steps are counted from 0 without gaps.
    is_last = exists & ~jnp.pad(exists[:, 1:], ((0, 0), (0, 1)))
    cost = jnp.where(is_last, 0.0, cost)
    return cost - jnp.pad(cost[:, 1:], ((0, 0), (0, 1)))

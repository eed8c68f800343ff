"""Scores of traces of thought: targets for a model that judges steps, and what its scores are used for.

Steps of a trace are in the second axis, thoughts and the steps of the final response that they belong to. Embeddings
are the caller's, from an encoder that is not trained. The judge's loss is `losses.trace_loss`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.arguments import check_at_least
from jaxrl_post.losses.consistency import check_positive
from jaxrl_post.types import Array


def _cosine(first: Array, second: Array) -> Array:
    square = jnp.sum(jnp.square(first), axis=-1) * jnp.sum(jnp.square(second), axis=-1)
    scale = jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return jnp.sum(first * second, axis=-1) * scale


def step_alignment(steps: Array, responses: Array) -> Array:
    r"""How near a step of thought is to the step of the response that it led to, the cosine of their embeddings.

    Args:
        steps: `[B, S, D]` float, of the steps of thought.
        responses: `[B, S, D]` float, of the step of the response that belongs to each.

    Returns:
        `[B, S]`, float32 or wider, in [-1, 1]; 0 where an embedding is 0.

    Raises:
        ValueError: if the arrays are not `[B, S, D]` of one shape.

    Example:
        >>> step_alignment(jnp.array([[[1.0, 0.0], [0.0, 2.0]]]), jnp.array([[[0.0, 1.0], [0.0, 1.0]]])).tolist()
        [[0.0, 1.0]]

    Reference: ReasonFlux-PRM: Trajectory-Aware PRMs for Long Chain-of-Thought Reasoning in LLMs (arXiv 2506.18896).
    """
    steps, responses = masked.as_float(steps), masked.as_float(responses)
    masked.check_axes("steps", steps, "[B, S, D]")
    masked.check_like("responses", responses, "steps", steps)
    return _cosine(steps, responses)


def step_coherence(steps: Array, negatives: Array, *, tau: float = 1.0) -> Array:
    r"""How well a step follows the one before it, rather than steps of other traces.

    $$r_t = \log \frac{e^{c(s_t)}}{e^{c(s_t)} + \sum_n e^{c(s_n)}}, \qquad c(s) = \cos(s_{t-1}, s) / \tau$$

    Args:
        steps: `[B, S, D]` float, embeddings of the steps of thought.
        negatives: `[N, D]` float, of steps of other traces.
        tau: $\tau$, above 0.

    Returns:
        `[B, S]`, float32 or wider, nats, at most 0; 0 for the first step, which follows none.

    Raises:
        ValueError: if the shapes do not fit or `tau` is not above 0.

    Example:
        >>> steps, negatives = jnp.array([[[1.0, 0.0], [1.0, 0.0]]]), jnp.array([[0.0, 1.0]])
        >>> [round(r, 4) for r in step_coherence(steps, negatives)[0].tolist()]  # e / (e + 1)
        [0.0, -0.3133]

    Reference: ReasonFlux-PRM: Trajectory-Aware PRMs for Long Chain-of-Thought Reasoning in LLMs (arXiv 2506.18896).
    """
    check_positive("tau", tau)
    steps, negatives = masked.as_float(steps), masked.as_float(negatives)
    masked.check_axes("steps", steps, "[B, S, D]")
    masked.check_axes("negatives", negatives, "[N, D]")
    if negatives.shape[1] != steps.shape[2]:
        raise ValueError(f"negatives must be [N, D] with the D of steps, {steps.shape[2]}, got {negatives.shape}")
    before = steps[:, :-1]
    own = _cosine(before, steps[:, 1:])[..., None]
    others = _cosine(before[:, :, None], negatives)
    follows = jax.nn.log_softmax(jnp.concatenate([own, others], axis=-1) / tau, axis=-1)[..., 0]
    return jnp.pad(follows, ((0, 0), (1, 0)))


def mixed_step_score(*scores: Array) -> Array:
    r"""Several scores of a step as one, weighted by their softmax, $r = \sum_k \mathrm{softmax}_k(r_1, \dots)\, r_k$.

    The larger of them counts more, so that a step that is good in one respect is not bad for lack of another.

    Args:
        *scores: of one shape: alignment, judged quality in [0, 1] and coherence.

    Returns:
        That shape, float32 or wider; at least their mean.

    Raises:
        ValueError: if there are none, or the shapes differ.

    Example:
        >>> round(float(mixed_step_score(jnp.array(0.2), jnp.array(0.8), jnp.array(0.5))), 6)
        0.559117

    Reference: ReasonFlux-PRM: Trajectory-Aware PRMs for Long Chain-of-Thought Reasoning in LLMs (arXiv 2506.18896).
    """
    if not scores:
        raise ValueError("there are no scores to mix; give at least one array")
    first, *rest = (masked.as_float(x) for x in scores)
    for x in rest:
        masked.check_like("every score", x, "the first", first)
    stacked = jnp.stack([first, *rest])
    return jnp.sum(jax.nn.softmax(stacked, axis=0) * stacked, axis=0)


def trace_score(step_scores: Array, mask: Array, trace_scores: Array, *, alpha: float = 1.0) -> Array:
    r"""One score of a trace, by which traces are chosen, $\hat r = \mathrm{mean}_t R_t + \alpha R$.

    Args:
        step_scores: `[B, S]` float, of steps. Their mean is the paper's; the released code reads the first alone.
        mask: `[B, S]`, nonzero where there is a step.
        trace_scores: `[B]` float, of whole traces.
        alpha: $\alpha$, at least 0.

    Returns:
        `[B]`, float32 or wider.

    Raises:
        ValueError: if the shapes do not fit or `alpha` is negative.

    Example:
        >>> trace_score(jnp.array([[0.25, 0.75]]), jnp.ones((1, 2)), jnp.array([1.0])).tolist()
        [1.5]

    Reference: ReasonFlux-PRM: Trajectory-Aware PRMs for Long Chain-of-Thought Reasoning in LLMs (arXiv 2506.18896).
    """
    check_at_least("alpha", alpha, 0)
    step_scores, trace_scores = masked.as_float(step_scores), masked.as_float(trace_scores)
    masked.check_axes("step_scores", step_scores, "[B, S]")
    masked.check_like("trace_scores", trace_scores, "one number per row of step_scores", step_scores[:, 0])
    return masked.mean(step_scores, mask, 1) + alpha * trace_scores


def blended(rule: Array, score: Array, *, share: float = 0.75) -> Array:
    r"""A rule's verdict and a model's score as one reward, $(1 - \beta)\, r_{rule} + \beta\, \hat r$.

    Args:
        rule: any shape, float.
        score: of the same shape.
        share: $\beta$ in [0, 1], of the score.

    Returns:
        That shape, float32 or wider. GRPO's normalisation of the group comes after.

    Raises:
        ValueError: if the shapes differ or `share` is not in [0, 1].

    Example:
        >>> round(float(blended(jnp.array(0.0), jnp.array(0.8))), 4)
        0.6

    Reference: ReasonFlux-PRM: Trajectory-Aware PRMs for Long Chain-of-Thought Reasoning in LLMs (arXiv 2506.18896).
    """
    if isinstance(share, float | int) and not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    rule, score = masked.as_float(rule), masked.as_float(score)
    masked.check_like("score", score, "rule", rule)
    return (1 - share) * rule + share * score

"""A bonus for right answers that a model finds likely after the reasoning that led to them."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def answer_confidence(logp: Array, answer: Array, *, maximum: float = 0.95) -> Array:
    r"""Geometric mean of the probabilities of an answer's tokens, $\min(e^{\mathrm{mean}_t \log p_t}, c)$.

    Args:
        logp: `[B, T]` float, nats, of the tokens after their reasoning.
        answer: `[B, T]`, nonzero on the tokens of the answer.
        maximum: $c$.

    Returns:
        `[B]`, float32 or wider; 0 without an answer.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> logp = jnp.log(jnp.array([[0.5, 0.9, 0.4], [0.5, 0.5, 0.5]]))
        >>> [round(float(c), 4) for c in answer_confidence(logp, jnp.array([[0, 1, 1], [0, 0, 0]]))]
        [0.6, 0.0]

    Reference: GRPO-CARE: Consistency-Aware Reinforcement Learning for Multimodal Reasoning (arXiv 2506.16141).
    """
    logp, answer = masked.as_float(logp), jnp.asarray(answer) != 0
    masked.check_axes("logp", logp, "[B, T]")
    masked.check_like("answer", answer, "logp", logp)
    found = jnp.minimum(jnp.exp(masked.mean(logp, answer, 1)), maximum)
    return jnp.where(jnp.any(answer, axis=1), found, 0.0)


def confidence_bonus(
    correct: Array,
    confidence: Array,
    valid: Array | None = None,
    *,
    weight: float = 0.5,
    margin: float = 0.01,
    correct_above: float = 0.1,
) -> Array:
    r"""A bonus for the right answers of a group that are as likely as its right answers are on average.

    $$b_i = w\, r_i\, [i \in S]\, [c_i \ge \mathrm{mean}_S c - \delta], \qquad
    S = \{i : r_i > 0.1,\ r_i \ge \mathrm{mean}_G r\}$$

    Args:
        correct: `[P, G]` float in [0, 1], $r$: how right an answer is.
        confidence: `[P, G]` float, $c$, such as `answer_confidence`.
        valid: `[P, G]` bool, False where an answer does not count; None for all.
        weight: $w$.
        margin: $\delta$.
        correct_above: what `correct` must be above to earn a bonus.

    Returns:
        `[P, G]`, float32 or wider, to be added to the reward.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> confidence_bonus(jnp.array([[1.0, 1, 1, 0]]), jnp.array([[0.9, 0.8, 0.5, 0.7]])).tolist()
        [[0.5, 0.5, 0.0, 0.0]]

    Reference: GRPO-CARE: Consistency-Aware Reinforcement Learning for Multimodal Reasoning (arXiv 2506.16141).
    """
    correct, confidence = masked.as_float(correct), masked.as_float(confidence)
    masked.check_axes("correct", correct, "[P, G]")
    masked.check_like("confidence", confidence, "correct", correct)
    counts = jnp.ones(correct.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", counts, "correct", correct)
    chosen = counts & (correct > correct_above) & (correct >= masked.mean(correct, counts, 1, keepdims=True))
    likely = confidence >= masked.mean(confidence, chosen, 1, keepdims=True) - margin
    return jnp.where(chosen & likely, weight * correct, 0.0)

"""Losses of models that judge steps of a solution."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.arguments import as_tokens
from jaxrl_post.losses.consistency import check_positive
from jaxrl_post.types import Array


def success_bce(logits: Array, success_rate: Array) -> Array:
    r"""Cross-entropy of a predicted success rate with a counted one, $-q \log \sigma(z) - (1 - q) \log \sigma(-z)$.

    It trains a process verifier: $q$ is the share of tries from a prefix that came out right. Its minimum, at
    $\sigma(z) = q$, is the entropy of $q$, not 0.

    Args:
        logits: `[B, T]` or `[B]` float: $z$, the verifier's output after each prefix.
        success_rate: of the same shape, in [0, 1]. A constant.

    Returns:
        The same shape, float32 or wider, nats.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> [round(loss, 4) for loss in success_bce(jnp.array([0.0, 20.0]), jnp.array([0.25, 1.0])).tolist()]
        [0.6931, 0.0]

    Reference: Rewarding Progress: Scaling Automated Process Verifiers for LLM Reasoning (arXiv 2410.08146).
    """
    logits, success_rate = masked.as_float(logits), masked.as_float(success_rate)
    masked.check_axes("logits", logits, "[B, T] or [B]")
    masked.check_like("success_rate", success_rate, "logits", logits)
    rate = jax.lax.stop_gradient(jnp.clip(success_rate, 0, 1))
    return rate * jax.nn.softplus(-logits) + (1 - rate) * jax.nn.softplus(logits)


def implicit_outcome_bce(logp: Array, ref_logp: Array, outcome: Array, mask: Array, *, beta: float = 0.05) -> Array:
    r"""Cross-entropy of outcomes with the reward that a language model implies, $-\log\sigma(\pm\beta \sum_t q_t)$.

    $q_t = \log\pi_\phi(y_t) - \log\pi_{ref}(y_t)$; the sign is that of the outcome. No step has a label, and yet
    $\beta q_t$ becomes a reward of the token (see `implicit_reward`): the sum up to any token says what the model
    expects of the answer by then.

    Args:
        logp: `[B, T]` float, nats; log-prob of the token under the trained model.
        ref_logp: `[B, T]` float, nats; under the reference. A constant.
        outcome: `[B]`, in [0, 1]: 1 for a right answer. A constant.
        mask: `[B, T]`, nonzero where the token counts.
        beta: $\beta$, above 0.

    Returns:
        `[B]`, float32 or wider, nats; log 2 with zero gradient for an answer without tokens.

    Raises:
        ValueError: if the shapes do not fit or `beta` is not above 0.

    Example:
        >>> logp, ref_logp = jnp.array([[-1.0, -2.0]]), jnp.array([[-2.0, -3.0]])
        >>> loss = implicit_outcome_bce(logp, ref_logp, jnp.ones(1), jnp.ones((1, 2)))
        >>> round(float(loss[0]), 6)
        0.644397

    Reference: Process Reinforcement through Implicit Rewards (arXiv 2502.01456).
    """
    check_positive("beta", beta)
    logp, ref_logp, mask = as_tokens(logp, ref_logp, mask)
    return success_bce(beta * masked.sum(logp - ref_logp, mask, 1), outcome)


def trace_loss(
    step_scores: Array,
    step_targets: Array,
    mask: Array,
    trace_scores: Array,
    success_rate: Array,
    *,
    step_weight: float = 1.0,
    trace_weight: float = 1.0,
) -> Array:
    r"""Squared errors of a judge of steps and of whole traces.

    $$\ell = \lambda_s\, \mathrm{mean}_t (R_t - r_t)^2 + \lambda_f (R - r)^2$$

    Args:
        step_scores: `[B, S]` float, the judge's, of steps.
        step_targets: `[B, S]` float, see `rewards.mixed_step_score`. A constant.
        mask: `[B, S]`, nonzero where there is a step.
        trace_scores: `[B]` float, the judge's, of whole traces.
        success_rate: `[B]` float in [0, 1], of answers by a template that was made of the trace. A constant.
        step_weight: $\lambda_s$.
        trace_weight: $\lambda_f$.

    Returns:
        `[B]`, float32 or wider; a trace without steps has the second term alone.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> scores, mask = jnp.array([[0.5, 9.0]]), jnp.array([[1, 0]])
        >>> trace_loss(scores, jnp.zeros((1, 2)), mask, jnp.ones(1), jnp.array([0.5])).tolist()
        [0.5]

    Reference: ReasonFlux-PRM: Trajectory-Aware PRMs for Long Chain-of-Thought Reasoning in LLMs (arXiv 2506.18896).
    """
    step_scores, mask = masked.as_float(step_scores), jnp.asarray(mask)
    masked.check_axes("step_scores", step_scores, "[B, S]")
    masked.check_like("mask", mask, "step_scores", step_scores)
    trace_scores, success_rate = masked.as_float(trace_scores), masked.as_float(success_rate)
    masked.check_like("trace_scores", trace_scores, "one number per row of step_scores", step_scores[:, 0])
    masked.check_like("success_rate", success_rate, "trace_scores", trace_scores)
    step_targets = masked.as_float(step_targets)
    masked.check_like("step_targets", step_targets, "step_scores", step_scores)
    step_targets, success_rate = jax.lax.stop_gradient((step_targets, success_rate))
    inside = mask != 0
    error = jnp.where(inside, step_scores, 0.0) - jnp.where(inside, step_targets, 0.0)
    return step_weight * masked.mean(jnp.square(error), mask, 1) + trace_weight * jnp.square(
        trace_scores - success_rate
    )

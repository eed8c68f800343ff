"""DisCO: raise the scores of right answers over those of wrong ones, within a trust region that is a penalty.

Scores are sequence-level and length-normalised; nothing is clipped, and no prompt is weighed by its difficulty.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.consistency import check_positive, log_mean_exp, prepare_group
from jaxrl_post.losses.policy import importance_ratio, log_ratio
from jaxrl_post.types import Array

HingeEstimator = Literal["k1", "k3"]


def log_likelihood_score(logp: Array, mask: Array) -> Array:
    r"""DisCO's "log-L" score of a sequence, the mean log-prob of its tokens, $s = \frac{1}{|o|} \sum_t \log\pi(o_t)$.

    Args:
        logp: `[B, T]` float, nats; log-prob of the token under the trained policy.
        mask: `[B, T]`, nonzero where the token is trained.

    Returns:
        `[B]`, float32 or wider, nats per token; 0 for a sequence without trained tokens.

    Raises:
        ValueError: if the arrays are not `[B, T]` of one shape.

    Example:
        >>> log_likelihood_score(jnp.array([[-9.0, -1.0, -2.0]]), jnp.array([[0, 1, 1]])).tolist()
        [-1.5]

    Reference: DisCO: Reinforcing Large Reasoning Models with Discriminative Constrained Optimization
    (arXiv 2505.12366).
    """
    logp, mask = masked.as_float(logp), jnp.asarray(mask)
    masked.check_axes("logp", logp, "[B, T]")
    masked.check_like("mask", mask, "logp", logp)
    return masked.mean(logp, mask, 1)


def likelihood_ratio_score(logp: Array, old_logp: Array, mask: Array) -> Array:
    r"""DisCO's "L-ratio" score of a sequence, $s = \frac{1}{|o|} \sum_t \pi(o_t) / \pi_{old}(o_t)$, unclipped.

    Args:
        logp: `[B, T]` float, nats; log-prob of the token under the trained policy.
        old_logp: `[B, T]` float, nats; under the policy at the start of the step. A constant.
        mask: `[B, T]`, nonzero where the token is trained.

    Returns:
        `[B]`, float32 or wider; 0 for a sequence without trained tokens.

    Raises:
        ValueError: if the arrays are not `[B, T]` of one shape.

    Example:
        >>> score = likelihood_ratio_score(jnp.log(jnp.array([[0.5, 0.2]])), jnp.log(jnp.array([[0.5, 0.1]])),
        ...                                jnp.ones((1, 2)))
        >>> round(float(score[0]), 6)
        1.5

    Reference: DisCO: Reinforcing Large Reasoning Models with Discriminative Constrained Optimization
    (arXiv 2505.12366).
    """
    logp, mask = masked.as_float(logp), jnp.asarray(mask)
    masked.check_axes("logp", logp, "[B, T]")
    masked.check_like("mask", mask, "logp", logp)
    trained = mask != 0
    old_logp = masked.as_float(old_logp)
    masked.check_like("old_logp", old_logp, "logp", logp)
    ratio = importance_ratio(jnp.where(trained, logp, 0.0), jnp.where(trained, old_logp, 0.0))
    return masked.mean(ratio, mask, 1)


def disco(
    scores: Array, correct: Array, valid: Array | None = None, *, tau: float = 10.0, weights: Array | None = None
) -> Array:
    r"""DisCO's discriminative loss of each prompt: mean score of right answers against a soft maximum of wrong ones.

    $$\ell = -\Big[\frac{1}{n_+} \sum_+ s - \tau \log \frac{1}{n_-} \sum_- e^{s / \tau}\Big]$$

    A wrong answer's weight in the gradient is its softmax at temperature $\tau$: the wrong answers that score highest
    are pushed hardest, which holds up when there are many of them. $\tau \to \infty$ gives the plain difference of
    means (DisCO-b). The logarithm is the true one; the released code has a surrogate with the same gradient.

    Args:
        scores: `[P, G]` float; see `log_likelihood_score` and `likelihood_ratio_score`.
        correct: `[P, G]`, nonzero where the answer is right.
        valid: `[P, G]` bool, False where the answer does not count; None for all.
        tau: temperature in units of the score, or `math.inf`; the paper has 10 for log-likelihoods, 1 for ratios.
        weights: `[P, G]` float, at least 0: what each right answer counts in their mean, of any scale; wrong answers'
            are not read. A constant. None for equal weights; see `length_weights`.

    Returns:
        `[P]`, float32 or wider: the loss of each prompt; 0 with zero gradient for a prompt without a right and a wrong
        answer. Such prompts count in the paper's mean over prompts.

    Raises:
        ValueError: if the arrays are not `[P, G]` of one shape, or `tau` is not above 0.

    Example:
        >>> scores, correct = jnp.array([[-0.3, -0.5, -0.2, -1.0]]), jnp.array([[1, 1, 0, 0]])
        >>> [round(float(disco(scores, correct, tau=tau)[0]), 6) for tau in (1.0, math.inf)]
        [-0.122047, -0.2]

    Reference: DisCO: Reinforcing Large Reasoning Models with Discriminative Constrained Optimization
    (arXiv 2505.12366).
    """
    check_positive("tau", tau)
    scores = masked.as_float(scores)
    masked.check_axes("scores", scores, "[P, G]", "reshape with as_groups(scores, group_size=8)")
    weights = jnp.ones_like(scores) if weights is None else weights
    scores, valid, (right, weights) = prepare_group(scores, valid, correct=correct, weights=weights)
    right = valid & (right != 0)
    wrong = valid & ~right
    positive = masked.mean(scores, jnp.where(right, weights, 0.0), 1)
    if isinstance(tau, float) and math.isinf(tau):
        negative = masked.mean(scores, wrong, 1)
    else:
        negative = tau * log_mean_exp(scores / tau, wrong)
    both = jnp.any(right, axis=1) & jnp.any(wrong, axis=1)
    return jnp.where(both, negative - positive, 0.0)


def kl_hinge(
    logp: Array,
    old_logp: Array,
    mask: Array,
    *,
    beta: float = 1e3,
    delta: float = 1e-4,
    estimator: HingeEstimator = "k1",
    level: Array | None = None,
) -> Array:
    r"""Penalty for a policy that has left a trust region, with the gradient of $\frac\beta2 [KL - \delta]_+^2$.

    $$\ell_t = \mathrm{sg}(\beta [KL - \delta]_+)\, k_t, \qquad KL = \mathrm{mean}_t\, k_t, \qquad
    k_t = \log\pi_{old} - \log\pi \;\;(\text{k1}) \quad\text{or}\quad
    \log\pi_{old} - \log\pi + \pi / \pi_{old} - 1 \;\;(\text{k3})$$

    The mean of $\ell$ over all tokens has that gradient; $KL$ is an estimate of $KL(\pi_{old} \| \pi)$ over the whole
    batch. That of k1 may be negative, which the hinge takes for a policy inside the region.

    Args:
        logp: `[B, T]` float, nats; log-prob of the token under the trained policy.
        old_logp: `[B, T]` float, nats; under the policy at the start of the step. A constant.
        mask: `[B, T]`, nonzero where the token is trained.
        beta: strength of the penalty.
        delta: $\delta$, nats per token; radius of the trust region.
        estimator: `"k1"`, the paper's, or `"k3"`, never negative, which the code released with DRPO also has.
        level: scalar, nats per token: $KL$ of the whole batch, where these rows are a part of it; None where they are
            the whole.

    Returns:
        `[B, T]`, float32 or wider: the penalty of each token; 0 where the mask is, and everywhere inside the region.

    Raises:
        ValueError: if the arrays are not `[B, T]` of one shape, `beta` or `delta` is negative, or `estimator` is
            unknown.

    Example:
        >>> inside = kl_hinge(jnp.array([[-1.0]]), jnp.array([[-1.0]]), jnp.ones((1, 1)))
        >>> outside = kl_hinge(jnp.array([[-1.5]]), jnp.array([[-1.0]]), jnp.ones((1, 1)), beta=2.0, delta=0.25)
        >>> float(inside[0, 0]), float(outside[0, 0])
        (0.0, 0.25)

    Reference: DisCO: Reinforcing Large Reasoning Models with Discriminative Constrained Optimization
    (arXiv 2505.12366).
    """
    if estimator not in get_args(HingeEstimator):
        raise ValueError(f"estimator must be one of {', '.join(get_args(HingeEstimator))}, got {estimator!r}")
    for name, number in (("beta", beta), ("delta", delta)):
        if isinstance(number, float | int) and number < 0:
            raise ValueError(f"{name} must be at least 0, got {number}")
    logp, mask = masked.as_float(logp), jnp.asarray(mask)
    masked.check_axes("logp", logp, "[B, T]")
    masked.check_like("mask", mask, "logp", logp)
    old_logp = jax.lax.stop_gradient(masked.as_float(old_logp))
    masked.check_like("old_logp", old_logp, "logp", logp)
    trained = mask != 0
    logp, old_logp = jnp.where(trained, logp, 0.0), jnp.where(trained, old_logp, 0.0)
    gap = old_logp - logp
    if estimator == "k3":
        gap = jnp.expm1(log_ratio(logp, old_logp)) + gap
    level = masked.mean(gap, mask) if level is None else level
    return jax.lax.stop_gradient(beta * jnp.maximum(level - delta, 0.0)) * gap

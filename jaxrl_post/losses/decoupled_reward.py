"""DRPO: a preference for short answers that weighs the right ones among themselves, and so never speaks against one.

The discriminative objective and its trust region are those of `discriminative`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.consistency import check_positive
from jaxrl_post.losses.discriminative import disco
from jaxrl_post.types import Array

_GROUP = 1  # the axis of G


def length_weights(
    lengths: Array, correct: Array, valid: Array | None = None, *, max_length: float, lam: float = 0.1
) -> Array:
    r"""What each right answer of a prompt counts: a softmax of how much of the token budget it leaves.

    $$\omega_i = \frac{e^{\ell_i / \lambda}}{\sum_{k \in +} e^{\ell_k / \lambda}}, \qquad \ell_i = 1 - |o_i| / L_{max}$$

    These are the probabilities, relative to the policy's own, of the distribution over right answers that has the
    largest mean of $\ell$ less $\lambda$ times its KL to the policy.

    Args:
        lengths: `[P, G]` int or float, tokens of each answer.
        correct: `[P, G]`, nonzero where the answer is right.
        valid: `[P, G]` bool, False where the answer does not count; None for all.
        max_length: $L_{max}$, tokens: the budget. Twice the budget is half the preference.
        lam: $\lambda$; the smaller, the shorter. `math.inf` for equal weights; towards 0 the shortest alone counts.

    Returns:
        `[P, G]`, float32 or wider, a constant; they add up to 1 over the right answers of a prompt and are 0 elsewhere.

    Raises:
        ValueError: if the arrays are not `[P, G]` of one shape, or `max_length` or `lam` is not above 0.

    Example:
        >>> lengths, correct = jnp.array([[100, 300, 50]]), jnp.array([[1, 1, 0]])
        >>> [round(w, 6) for w in length_weights(lengths, correct, max_length=1000)[0].tolist()]
        [0.880797, 0.119203, 0.0]

    Reference: DRPO: Efficient Reasoning via Decoupled Reward Policy Optimization (arXiv 2510.04474).
    """
    check_positive("max_length", max_length)
    check_positive("lam", lam)
    lengths, correct = masked.as_float(lengths), jnp.asarray(correct)
    masked.check_axes("lengths", lengths, "[P, G]", "reshape with as_groups(lengths, group_size=8)")
    masked.check_like("correct", correct, "lengths", lengths)
    valid = jnp.ones(lengths.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", valid, "lengths", lengths)
    right = valid & (correct != 0)
    # Relative to the shortest, so that no exponential overflows and the largest of them is 1.
    excess = jnp.where(right, lengths - masked.min(lengths, right, _GROUP, keepdims=True), 0.0)
    weights = jnp.where(right, jnp.exp(-excess / (max_length * lam)), 0.0)
    total = jnp.sum(weights, axis=_GROUP, keepdims=True)
    return jax.lax.stop_gradient(weights / jnp.where(total > 0, total, 1.0))


def drpo(
    scores: Array,
    lengths: Array,
    correct: Array,
    valid: Array | None = None,
    *,
    max_length: float,
    lam: float = 0.1,
    tau: float = 10.0,
) -> Array:
    r"""DRPO's loss of each prompt: short right answers' mean score against a soft maximum of wrong ones.

    $$\ell = -\Big[\sum_+ \omega_i s_i - \tau \log \frac{1}{n_-} \sum_- e^{s_j / \tau}\Big]$$

    A long right answer gets a small weight, never a negative one; a reward less a length penalty, centred in its group,
    can give it a negative advantage. $\lambda \to \infty$ is DisCO.

    Args:
        scores: `[P, G]` float; see `log_likelihood_score`.
        lengths: `[P, G]` int or float, tokens of each answer.
        correct: `[P, G]`, nonzero where the answer is right.
        valid: `[P, G]` bool, False where the answer does not count; None for all.
        max_length: see `length_weights`.
        lam: $\lambda$, see `length_weights`.
        tau: temperature over wrong answers in units of the score, or `math.inf`.

    Returns:
        `[P]`, float32 or wider: the loss of each prompt; 0 with zero gradient for a prompt without a right and a wrong
        answer. Such prompts count in the paper's mean over prompts.

    Raises:
        ValueError: if the arrays are not `[P, G]` of one shape, or `max_length`, `lam` or `tau` is not above 0.

    Example:
        >>> scores, lengths = jnp.array([[-0.5, -0.4, -0.6, -0.8]]), jnp.array([[100, 300, 200, 400]])
        >>> correct = jnp.array([[1, 1, 0, 0]])
        >>> round(float(drpo(scores, lengths, correct, max_length=1000)[0]), 4)
        -0.2114

    Reference: DRPO: Efficient Reasoning via Decoupled Reward Policy Optimization (arXiv 2510.04474). The authors' code
    has a surrogate of the logarithm with the same gradient.
    """
    scores = masked.as_float(scores)
    masked.check_like("lengths", jnp.asarray(lengths), "scores", scores)
    weights = length_weights(lengths, correct, valid, max_length=max_length, lam=lam)
    return disco(scores, correct, valid, tau=tau, weights=weights)

"""Win probabilities from a generative judge of pairs, which says 1 or 2 for the answer that it finds better.

`judging.from_judge` turns them into a reward. The judge is trained by the log-prob of the right label, in both orders:
`losses.bradley_terry` of the logits of the right and of the wrong label is that, among the two.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.arguments import check_at_least
from jaxrl_post.types import Array

_SLOPES = 1e-3, 1e3  # between which the inverse temperature is searched
_HALVINGS = 50


def symmetric_win_probability(logits: Array, swapped_logits: Array, *, temperature: float | Array = 1.0) -> Array:
    r"""Probability that answer 1 is better, mean over both orders in which a judge is shown the two.

    $$p = \tfrac12 \big[P(\texttt{1} \mid y_1, y_2) + P(\texttt{2} \mid y_2, y_1)\big]$$

    Each $P$ is among the two labels. By construction $p(y_1 \succ y_2) + p(y_2 \succ y_1) = 1$, so that a liking for
    the first place cancels between equal answers.

    Args:
        logits: `[..., 2]` float: logits, or log-probs, of the labels 1 and 2 where $y_1$ is shown first.
        swapped_logits: of the same shape, where $y_2$ is shown first.
        temperature: divides the logits; see `fit_temperature`.

    Returns:
        `[...]`, float32 or wider, in [0, 1].

    Raises:
        ValueError: if the shapes differ, or the last axis does not have the two labels.

    Example:
        >>> shown, swapped = jnp.log(jnp.array([0.8, 0.2])), jnp.log(jnp.array([0.4, 0.6]))
        >>> [round(float(symmetric_win_probability(*x)), 4) for x in ((shown, swapped), (swapped, shown))]
        [0.7, 0.3]

    Reference: A Unified Pairwise Framework for RLHF: Bridging Generative Reward Modeling and Policy Optimization
    (arXiv 2504.04950).
    """
    logits, swapped = masked.as_float(logits), masked.as_float(swapped_logits)
    masked.check_like("swapped_logits", swapped, "logits", logits)
    if logits.ndim == 0 or logits.shape[-1] != 2:
        raise ValueError(f"logits must be [..., 2], of the labels 1 and 2, got shape {logits.shape}")
    lead = (logits[..., 0] - logits[..., 1]) / temperature
    swapped_lead = (swapped[..., 1] - swapped[..., 0]) / temperature
    return (jax.nn.sigmoid(lead) + jax.nn.sigmoid(swapped_lead)) / 2


def fit_temperature(logits: Array, won: Array, valid: Array | None = None) -> Array:
    r"""Temperature at which a judge's probabilities fit held-out comparisons best, $\arg\min_T -\log p(\text{won})$.

    $p = \sigma(z / T)$; the minimum is found by bisection, as the loss is convex in $1 / T$.

    Args:
        logits: `[B]` float: $z$, the logit of label 1 less that of label 2.
        won: `[B]`, in [0, 1]: 1 where the first answer is better.
        valid: `[B]` bool, False where the pair does not count; None for all.

    Returns:
        Scalar, float32 or wider, within 0.001 and 1000, which it is where all or none of the signs are right; 1 if no
        pair counts.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> round(float(fit_temperature(jnp.full(4, 2.0), jnp.array([1, 1, 1, 0]))), 4)  # 2 / log(3)
        1.8205

    Reference: On Calibration of Modern Neural Networks (arXiv 1706.04599).
    """
    z, won = masked.as_float(logits), masked.as_float(won)
    masked.check_axes("logits", z, "[B]")
    masked.check_like("won", won, "logits", z)
    counts = jnp.ones(z.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", counts, "logits", z)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        slope = masked.mean((jax.nn.sigmoid(z * jnp.exp(middle)) - won) * z, counts)
        return jnp.where(slope > 0, low, middle), jnp.where(slope > 0, middle, high)

    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, tuple(jnp.log(jnp.asarray(x, z.dtype)) for x in _SLOPES))
    return jnp.where(jnp.any(counts), jnp.exp(-(low + high) / 2), 1.0)


def calibration_error(probability: Array, won: Array, valid: Array | None = None, *, bins: int = 10) -> Array:
    r"""Expected calibration error, $\sum_b \frac{n_b}{n} |\mathrm{mean}_b\, p - \mathrm{mean}_b\, \text{won}|$.

    Args:
        probability: `[B]` float in [0, 1], that the first answer is better.
        won: `[B]`, in [0, 1]: 1 where it is.
        valid: `[B]` bool, False where the pair does not count; None for all.
        bins: of equal width, between 0 and 1.

    Returns:
        Scalar, float32 or wider, in [0, 1]; 0 if no pair counts.

    Raises:
        ValueError: if the shapes differ or `bins` is not at least 1.

    Example:
        >>> round(float(calibration_error(jnp.array([0.9, 0.9, 0.3]), jnp.array([1, 0, 0]))), 4)
        0.3667

    Reference: On Calibration of Modern Neural Networks (arXiv 1706.04599).
    """
    check_at_least("bins", bins, 1)
    probability, won = masked.as_float(probability), masked.as_float(won)
    masked.check_axes("probability", probability, "[B]")
    masked.check_like("won", won, "probability", probability)
    counts = jnp.ones(won.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", counts, "probability", probability)
    which = jnp.clip(jnp.floor(jnp.where(counts, probability, 0.0) * bins), 0, bins - 1).astype(jnp.int32)
    gap = jnp.where(counts, probability - won, 0.0)
    of_bins = jax.ops.segment_sum(gap, which, num_segments=bins)
    return jnp.sum(jnp.abs(of_bins)) / jnp.maximum(jnp.sum(counts), 1)

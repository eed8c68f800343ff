r"""Losses on preferences that judge each answer by its own implicit reward, and not by the margin of a pair.

All take log-probs of whole sequences, summed over tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.arguments import check_at_least
from jaxrl_post.losses.preference import check_beta, check_label_smoothing, implicit_reward, log_ratios, smoothed
from jaxrl_post.types import Array


def _rewards(beta: float, *logps: Array) -> tuple[Array, Array]:
    check_beta(beta)
    chosen, rejected = log_ratios(*logps)
    return beta * chosen, beta * rejected


def nca(
    chosen_logp: Array,
    rejected_logp: Array,
    ref_chosen_logp: Array,
    ref_rejected_logp: Array,
    *,
    beta: float = 0.1,
) -> Array:
    r"""Noise contrastive alignment of a pair: the chosen answer's own likelihood must not fall.

    $$\ell = -\log\sigma(r_w) - \tfrac12 \log\sigma(-r_w) - \tfrac12 \log\sigma(-r_l), \qquad
    r = \beta (\log\pi - \log\pi_{ref})$$

    Args:
        chosen_logp: `[B]` float, nats; log-prob of the chosen sequence under the trained policy, summed over tokens.
        rejected_logp: `[B]` float, nats; of the rejected one.
        ref_chosen_logp: `[B]` float, nats; of the chosen one under the frozen reference. A constant.
        ref_rejected_logp: `[B]` float, nats; of the rejected one under the frozen reference. A constant.
        beta: strength of the KL constraint, above 0.

    Returns:
        `[B]`, float32 or wider.

    Raises:
        ValueError: if the inputs are not `[B]` of one length, or `beta` is not above 0.

    Example:
        >>> zero = jnp.zeros(1)
        >>> round(float(nca(zero, zero, zero, zero)[0]), 6)  # 2 log 2
        1.386294

    Reference: Noise Contrastive Alignment of Language Models with Explicit Rewards (arXiv 2402.05369).
    """
    won, lost = _rewards(beta, chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    return -jax.nn.log_sigmoid(won) - 0.5 * jax.nn.log_sigmoid(-won) - 0.5 * jax.nn.log_sigmoid(-lost)


def bco(
    chosen_logp: Array,
    rejected_logp: Array,
    ref_chosen_logp: Array,
    ref_rejected_logp: Array,
    *,
    beta: float = 0.1,
    shift: Array | float = 0.0,
) -> Array:
    r"""Binary classifier optimisation: a classifier of good and bad answers, whose logit is the implicit reward.

    $$\ell = -\log\sigma(r_w - \delta) - \log\sigma(-(r_l - \delta)), \qquad r = \beta (\log\pi - \log\pi_{ref})$$

    Args:
        chosen_logp: `[B]` float, nats; as in `nca`, as are the other log-probs.
        rejected_logp: `[B]`.
        ref_chosen_logp: `[B]`, a constant.
        ref_rejected_logp: `[B]`, a constant.
        beta: strength of the KL constraint, above 0.
        shift: $\delta$, the paper's running mean of the rewards of all answers; a constant, a scalar or `[B]`. 0 is
            what TRL's `bco_pair` takes.

    Returns:
        `[B]`, float32 or wider.

    Raises:
        ValueError: if the inputs are not `[B]` of one length, or `beta` is not above 0.

    Example:
        >>> zero = jnp.zeros(1)
        >>> round(float(bco(zero, zero, zero, zero)[0]), 6)  # 2 log 2
        1.386294

    Reference: Binary Classifier Optimization for Large Language Model Alignment (arXiv 2404.04656).
    """
    won, lost = _rewards(beta, chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    shift = jax.lax.stop_gradient(shift)
    return -jax.nn.log_sigmoid(won - shift) - jax.nn.log_sigmoid(shift - lost)


def sppo(
    chosen_logp: Array,
    rejected_logp: Array,
    ref_chosen_logp: Array,
    ref_rejected_logp: Array,
    *,
    beta: float = 0.1,
    probability: Array | float = 1.0,
) -> Array:
    r"""Self-play preference optimisation: log-ratios are regressed on how probable it is that the answer wins.

    $$\ell = \Big(\log\frac{\pi(y_w)}{\pi_{ref}(y_w)} - \frac{P - 1/2}{\beta}\Big)^2
    + \Big(\log\frac{\pi(y_l)}{\pi_{ref}(y_l)} + \frac{P - 1/2}{\beta}\Big)^2$$

    Args:
        chosen_logp: `[B]` float, nats; as in `nca`, as are the other log-probs.
        rejected_logp: `[B]`.
        ref_chosen_logp: `[B]`, a constant; the paper's reference is the policy of the iteration before.
        ref_rejected_logp: `[B]`, a constant.
        beta: $1/\eta$ of the paper, above 0.
        probability: `P`, that the chosen answer wins, a scalar or `[B]` in [0, 1]; 1 where only the label is known
            (`sppo_hard` of TRL).

    Returns:
        `[B]`, float32 or wider, nats squared.

    Raises:
        ValueError: if the inputs are not `[B]` of one length, or `beta` is not above 0.

    Example:
        >>> one = jnp.ones(1)
        >>> float(sppo(-10 * one, -12 * one, -11 * one, -11 * one, beta=0.1)[0])  # (1 - 5)^2 + (-1 + 5)^2
        32.0

    Reference: Self-Play Preference Optimization for Language Model Alignment (arXiv 2405.00675), equation 4.7.
    """
    check_beta(beta)
    won, lost = log_ratios(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    target = (jax.lax.stop_gradient(probability) - 0.5) / beta
    return jnp.square(won - target) + jnp.square(lost + target)


def apo_zero(
    chosen_logp: Array,
    rejected_logp: Array,
    ref_chosen_logp: Array,
    ref_rejected_logp: Array,
    *,
    beta: float = 0.1,
) -> Array:
    r"""Anchored preference optimisation, where chosen answers are better than the policy's own: they become likelier.

    $$\ell = 1 - \sigma(r_w) + \sigma(r_l), \qquad r = \beta (\log\pi - \log\pi_{ref})$$

    Args:
        chosen_logp: `[B]` float, nats; as in `nca`, as are the other log-probs.
        rejected_logp: `[B]`.
        ref_chosen_logp: `[B]`, a constant.
        ref_rejected_logp: `[B]`, a constant.
        beta: strength of the KL constraint, above 0.

    Returns:
        `[B]` in (0, 2), float32 or wider.

    Raises:
        ValueError: if the inputs are not `[B]` of one length, or `beta` is not above 0.

    Example:
        >>> zero = jnp.zeros(1)
        >>> float(apo_zero(zero, zero, zero, zero)[0])
        1.0

    Reference: Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment
    (arXiv 2408.06266), equation 7.
    """
    won, lost = _rewards(beta, chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    return jax.nn.sigmoid(-won) + jax.nn.sigmoid(lost)


def apo_down(
    chosen_logp: Array,
    rejected_logp: Array,
    ref_chosen_logp: Array,
    ref_rejected_logp: Array,
    *,
    beta: float = 0.1,
) -> Array:
    r"""Anchored preference optimisation, for chosen answers that are worse than the policy's own: both become rarer.

    $$\ell = \sigma(r_w) + 1 - \sigma(r_w - r_l), \qquad r = \beta (\log\pi - \log\pi_{ref})$$

    Args:
        chosen_logp: `[B]` float, nats; as in `nca`, as are the other log-probs.
        rejected_logp: `[B]`.
        ref_chosen_logp: `[B]`, a constant.
        ref_rejected_logp: `[B]`, a constant.
        beta: strength of the KL constraint, above 0.

    Returns:
        `[B]` in (0, 2), float32 or wider.

    Raises:
        ValueError: if the inputs are not `[B]` of one length, or `beta` is not above 0.

    Example:
        >>> zero = jnp.zeros(1)
        >>> float(apo_down(zero, zero, zero, zero)[0])
        1.0

    Reference: Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment
    (arXiv 2408.06266), equation 8.
    """
    won, lost = _rewards(beta, chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    return jax.nn.sigmoid(won) + jax.nn.sigmoid(lost - won)


def kto_anchor(logp: Array, ref_logp: Array, valid: Array | None = None) -> Array:
    r"""KTO's point of reference, $z_0 = \max(0, \text{mean}(\log\pi - \log\pi_{ref}))$: an estimate of the KL.

    Args:
        logp: `[B]` float, nats; of answers to *other* prompts than their own (each prompt with the next one's answer),
            so that what is learned of the labels does not enter.
        ref_logp: `[B]` float, nats; of the same under the reference.
        valid: `[B]`, which count; all if None.

    Returns:
        Scalar, nats, without gradient; 0 where none counts.

    Raises:
        ValueError: if the inputs are not `[B]` of one length.

    Example:
        >>> float(kto_anchor(jnp.array([-1.0, -5.0]), jnp.array([-3.0, -4.0])))
        0.5

    Reference: KTO: Model Alignment as Prospect Theoretic Optimization (arXiv 2402.01306), section 4.1.
    """
    ratio = implicit_reward(logp, ref_logp, beta=1.0)
    counts = jnp.ones(ratio.shape, bool) if valid is None else valid
    masked.check_like("valid", counts, "logp", ratio)
    return jax.lax.stop_gradient(jax.nn.relu(masked.mean(ratio, counts.astype(ratio.dtype))))


def kto(
    logp: Array,
    ref_logp: Array,
    desirable: Array,
    *,
    anchor: Array | float = 0.0,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Array:
    r"""Kahneman-Tversky optimisation: answers that are labelled good or bad, each by itself.

    $$\ell = \lambda_D \big(1 - \sigma(\beta (h - z_0))\big) \text{ of a good answer}, \qquad
    \lambda_U \big(1 - \sigma(\beta (z_0 - h))\big) \text{ of a bad one}, \qquad h = \log\pi - \log\pi_{ref}$$

    Args:
        logp: `[B]` float, nats; log-prob of the sequence under the trained policy, summed over tokens.
        ref_logp: `[B]` float, nats; the same under the frozen reference. A constant.
        desirable: `[B]`, whether the answer is good: bool, or a number that is above 0 for the good ones (rewards of
            +-1).
        anchor: $z_0$, nats, from `kto_anchor`; a constant. 0 gives `apo_zero` of answers without pairs.
        beta: strength of the KL constraint, above 0.
        desirable_weight: $\lambda_D$. With as many as $n_D$ good and $n_U$ bad answers, $\lambda_D n_D / (\lambda_U
            n_U)$ is to be between 1 and 4/3.
        undesirable_weight: $\lambda_U$.

    Returns:
        `[B]`, float32 or wider.

    Raises:
        ValueError: if the inputs are not `[B]` of one length, `beta` is not above 0, or a weight is negative.

    Example:
        >>> zero = jnp.zeros(2)
        >>> kto(zero, zero, jnp.array([True, False]), undesirable_weight=2.0).tolist()
        [0.5, 1.0]

    Reference: KTO: Model Alignment as Prospect Theoretic Optimization (arXiv 2402.01306), equations 7 and 8.
    """
    check_beta(beta)
    check_at_least("desirable_weight", desirable_weight, 0)
    check_at_least("undesirable_weight", undesirable_weight, 0)
    ratio = implicit_reward(logp, jax.lax.stop_gradient(ref_logp), beta=1.0)
    masked.check_like("desirable", desirable, "logp", ratio)
    gain = beta * (ratio - jax.lax.stop_gradient(anchor))
    good = desirable_weight * jax.nn.sigmoid(-gain)
    return jnp.where(desirable > 0, good, undesirable_weight * jax.nn.sigmoid(gain))


def aot(
    chosen_logp: Array,
    rejected_logp: Array,
    ref_chosen_logp: Array,
    ref_rejected_logp: Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    paired: bool = True,
    valid: Array | None = None,
) -> Array:
    r"""Alignment by optimal transport: the distribution of rewards of a whole batch dominates, and not each pair.

    Both sides are sorted, and the logistic loss is of what stands at the same rank:

    $$\ell_i = -(1 - \epsilon) \log\sigma(\beta d_i) - \epsilon \log\sigma(-\beta d_i), \qquad d_i = u_{(i)} - v_{(i)}$$

    Paired, `u` is $\log\pi(y_w) - \log\pi(y_l)$ and `v` the same of the reference; unpaired, `u` is $\log\pi(y_w) -
    \log\pi_{ref}(y_w)$ and `v` that of the rejected answers.

    Args:
        chosen_logp: `[B]` float, nats; as in `nca`, as are the other log-probs.
        rejected_logp: `[B]`.
        ref_chosen_logp: `[B]`, a constant.
        ref_rejected_logp: `[B]`, a constant.
        beta: strength of the KL constraint, above 0.
        label_smoothing: $\epsilon$ in [0, 0.5).
        paired: which of the two.
        valid: `[B]`, which pairs count; all if None.

    Returns:
        `[B]`, float32 or wider, in the order of the ranks; those that do not count are last, with 0.

    Raises:
        ValueError: if the inputs are not `[B]` of one length, `beta` is not above 0, or `label_smoothing` is outside
            [0, 0.5).

    Example:
        >>> zero = jnp.zeros(2)
        >>> aot(jnp.array([3.0, 1.0]), zero, jnp.array([1.0, 3.0]), zero, beta=1.0).tolist()  # nothing to gain
        [0.6931471824645996, 0.6931471824645996]

    Reference: Distributional Preference Alignment of LLMs via Optimal Transport (arXiv 2406.05882).
    """
    check_beta(beta)
    check_label_smoothing(label_smoothing)
    left, right = log_ratios(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    if paired:
        left, right = (
            masked.as_float(x) - masked.as_float(y)
            for x, y in ((chosen_logp, rejected_logp), jax.lax.stop_gradient((ref_chosen_logp, ref_rejected_logp)))
        )
    counts = jnp.ones(left.shape, bool) if valid is None else jnp.asarray(valid, bool)
    masked.check_like("valid", counts, "chosen_logp", left)
    # What does not count has no value, and comes last.
    left, right = (jnp.sort(jnp.where(counts, x, jnp.inf)) for x in (left, right))
    inside = jnp.arange(len(left)) < jnp.sum(counts)
    margin = beta * (jnp.where(inside, left, 0.0) - jnp.where(inside, right, 0.0))
    return jnp.where(inside, smoothed(margin, label_smoothing), 0.0)

r"""Losses on pairs of answers: functions of the margin between their implicit rewards.

All take log-probs of whole sequences, summed over tokens. Those that judge each answer by itself are in
`answer_preference`, those that need no reference in `reference_free`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array

_SUM = "sum log-probs over the tokens with masked.sum(logp, mask, axis=1)"


def implicit_reward(logp: Array, ref_logp: Array, *, beta: float = 0.1) -> Array:
    r"""Reward that a policy implies relative to its reference, $\beta (\log\pi - \log\pi_{ref})$.

    Args:
        logp: `[B]` float, nats; sum of the log-probs of the sequence's tokens. Or `[B, T]`, of the tokens themselves.
        ref_logp: the same under the reference.
        beta: strength of the KL constraint.

    Returns:
        The inputs' shape, float32 or wider. Of sequences it is the reward up to a constant per prompt. Of tokens it is
        their credit: where the policy is the optimum of a reward of tokens, its soft optimal advantage
        $r(s_t, a_t) + V^*(s_{t+1}) - V^*(s_t)$, so that the token of an answer with the least is where it went wrong.

    Raises:
        ValueError: if the inputs are not `[B]` or `[B, T]` of one shape.

    Example:
        >>> implicit_reward(jnp.array([-3.0]), jnp.array([-5.0]), beta=0.5).tolist()
        [1.0]

    References: Direct Preference Optimization: Your Language Model is Secretly a Reward Model (arXiv 2305.18290); of
    tokens, From r to Q*: Your Language Model is Secretly a Q-Function (arXiv 2404.12358).
    """
    logp, ref_logp = masked.as_float(logp), masked.as_float(ref_logp)
    masked.check_axes("logp", logp, "[B, T] or [B]")
    masked.check_like("ref_logp", ref_logp, "logp", logp)
    return beta * (logp - ref_logp)


def log_ratios(
    chosen_logp: Array, rejected_logp: Array, ref_chosen_logp: Array, ref_rejected_logp: Array
) -> tuple[Array, Array]:
    r"""$\log\pi - \log\pi_{ref}$ of the chosen and of the rejected answer; the reference is a constant.

    Args:
        chosen_logp: `[B]` float, nats; of the chosen answers under the trained policy.
        rejected_logp: `[B]` float, nats; of the rejected ones.
        ref_chosen_logp: `[B]` float, nats; of the chosen ones under the frozen reference.
        ref_rejected_logp: `[B]` float, nats; of the rejected ones under the frozen reference.

    Returns:
        `[B]` and `[B]`, nats, float32 or wider.

    Raises:
        ValueError: if the inputs are not `[B]` of one length.

    Example:
        >>> chosen, rejected = log_ratios(*(jnp.array([x]) for x in (-1.0, -4.0, -3.0, -5.0)))
        >>> chosen.tolist(), rejected.tolist()
        ([2.0], [1.0])

    Reference: Direct Preference Optimization: Your Language Model is Secretly a Reward Model (arXiv 2305.18290).
    """
    chosen = masked.as_float(chosen_logp)
    masked.check_axes("chosen_logp", chosen, "[B]", _SUM)
    others = []
    for name, logp in (
        ("rejected_logp", rejected_logp),
        ("ref_chosen_logp", ref_chosen_logp),
        ("ref_rejected_logp", ref_rejected_logp),
    ):
        others.append(masked.as_float(logp))
        masked.check_like(name, others[-1], "chosen_logp", chosen)
    rejected, *references = others
    ref_chosen, ref_rejected = jax.lax.stop_gradient(references)
    return chosen - ref_chosen, rejected - ref_rejected


def check_beta(beta: float, advice: str = "") -> None:
    """Raise ValueError if the strength of the KL constraint, where it is known, is not above 0.

    Example:
        >>> check_beta(0.0)
        Traceback (most recent call last):
            ...
        ValueError: beta must be above 0, got 0.0
    """
    if isinstance(beta, float | int) and not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}" + (f"; {advice}" if advice else ""))


def check_label_smoothing(label_smoothing: float | Array, *, positive: bool = False) -> None:
    """Raise ValueError if the share of flipped labels, where it is known, is not in [0, 0.5), or 0 where it must not.

    Example:
        >>> check_label_smoothing(0.5)
        Traceback (most recent call last):
            ...
        ValueError: label_smoothing must be in [0, 0.5), got 0.5; swap the pairs for more than half
    """
    if isinstance(label_smoothing, float | int):
        low, enough = ("(0", label_smoothing > 0) if positive else ("[0", label_smoothing >= 0)
        if not (enough and label_smoothing < 0.5):
            raise ValueError(
                f"label_smoothing must be in {low}, 0.5), got {label_smoothing}; swap the pairs for more than half"
            )


def _margin(beta: float, *logps: Array, advice: str = "") -> Array:
    check_beta(beta, advice)
    chosen, rejected = log_ratios(*logps)
    return beta * (chosen - rejected)


def smoothed(margin: Array, label_smoothing: float | Array) -> Array:
    r"""Logistic loss of labels of which a share is flipped, $-(1 - \epsilon) \log\sigma(z) - \epsilon \log\sigma(-z)$.

    Args:
        margin: float of any shape.
        label_smoothing: $\epsilon$, a number or of a shape that goes with it.

    Returns:
        The shape of `margin`.

    Example:
        >>> round(float(smoothed(jnp.zeros(()), 0.3)), 6)
        0.693147

    Reference: A note on DPO with noisy preferences (Mitchell, 2023).
    """
    loss = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin)
    if isinstance(label_smoothing, float | int) and label_smoothing == 0:
        return loss  # also of a margin that is infinite
    return loss - label_smoothing * jax.nn.log_sigmoid(-margin)


def dpo(
    chosen_logp: Array,
    rejected_logp: Array,
    ref_chosen_logp: Array,
    ref_rejected_logp: Array,
    *,
    beta: float = 0.1,
    label_smoothing: float | Array = 0.0,
) -> Array:
    r"""Direct preference optimisation: logistic loss on the margin of implicit rewards.

    $$\ell = -(1 - \epsilon) \log\sigma(\beta h) - \epsilon \log\sigma(-\beta h), \qquad
    h = (\log\pi(y_w) - \log\pi_{ref}(y_w)) - (\log\pi(y_l) - \log\pi_{ref}(y_l))$$

    Args:
        chosen_logp: `[B]` float, nats; log-prob of the chosen sequence under the trained policy, summed over tokens.
        rejected_logp: `[B]` float, nats; of the rejected one.
        ref_chosen_logp: `[B]` float, nats; of the chosen one under the frozen reference. A constant.
        ref_rejected_logp: `[B]` float, nats; of the rejected one under the frozen reference. A constant.
        beta: strength of the KL constraint, above 0.
        label_smoothing: $\epsilon$ in [0, 0.5), the assumed share of flipped labels (conservative DPO), or `[B]`, of
            each pair.

    Returns:
        `[B]`, float32 or wider: the loss of each pair. An identical pair gives log 2.

    Raises:
        ValueError: if the inputs are not `[B]` of one length, `beta` is not above 0, or `label_smoothing` is outside
            [0, 0.5).

    Example:
        >>> one = jnp.ones(1)
        >>> round(float(dpo(-10 * one, -12 * one, -11 * one, -11 * one, beta=0.1)[0]), 6)
        0.598139

    Reference: Direct Preference Optimization: Your Language Model is Secretly a Reward Model (arXiv 2305.18290); label
    smoothing as in A note on DPO with noisy preferences (Mitchell, 2023).
    """
    check_label_smoothing(label_smoothing)
    logps = chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp
    return smoothed(_margin(beta, *logps, advice="the paper uses 0.1 to 0.5"), label_smoothing)


def robust_dpo(
    chosen_logp: Array,
    rejected_logp: Array,
    ref_chosen_logp: Array,
    ref_rejected_logp: Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Array:
    r"""Robust DPO: of labels that are flipped with a known probability, an unbiased estimate of DPO's loss.

    $$\ell = \frac{-(1 - \epsilon) \log\sigma(\beta h) + \epsilon \log\sigma(-\beta h)}{1 - 2\epsilon}$$

    with `h` as in `dpo`. It is not bounded below, as the estimate of a single pair cannot be.

    Args:
        chosen_logp: `[B]` float, nats; as in `dpo`, as are the other log-probs.
        rejected_logp: `[B]`.
        ref_chosen_logp: `[B]`, a constant.
        ref_rejected_logp: `[B]`, a constant.
        beta: strength of the KL constraint, above 0.
        label_smoothing: $\epsilon$ in [0, 0.5), the probability that a label is flipped.

    Returns:
        `[B]`, float32 or wider.

    Raises:
        ValueError: as in `dpo`.

    Example:
        >>> one = jnp.ones(1)
        >>> round(float(robust_dpo(-10 * one, -12 * one, -11 * one, -11 * one, label_smoothing=0.1)[0]), 6)
        0.573139

    Reference: Provably Robust DPO: Aligning Language Models with Noisy Feedback (arXiv 2403.00409).
    """
    check_label_smoothing(label_smoothing)
    margin = _margin(beta, chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    # Of log sigma(-z) = log sigma(z) - z, which leaves no difference of infinities.
    return -jax.nn.log_sigmoid(margin) - label_smoothing / (1 - 2 * label_smoothing) * margin


def ipo(
    chosen_logp: Array,
    rejected_logp: Array,
    ref_chosen_logp: Array,
    ref_rejected_logp: Array,
    *,
    beta: float = 0.1,
) -> Array:
    r"""Identity preference optimisation: the margin of log-ratios is drawn to a finite value, $1/(2\beta)$.

    $$\ell = \Big(h - \frac{1}{2\beta}\Big)^2$$

    with `h` as in `dpo`. With log-probs that are averaged over tokens, in place of sums, it does not grow with the
    length: TRL computes that, on the word of the authors that the paper's results do; OpenRLHF takes sums.

    Args:
        chosen_logp: `[B]` float, nats; as in `dpo`, as are the other log-probs.
        rejected_logp: `[B]`.
        ref_chosen_logp: `[B]`, a constant.
        ref_rejected_logp: `[B]`, a constant.
        beta: $\tau$ of the paper, above 0.

    Returns:
        `[B]`, float32 or wider, nats squared.

    Raises:
        ValueError: if the inputs are not `[B]` of one length, or `beta` is not above 0.

    Example:
        >>> one = jnp.ones(1)
        >>> float(ipo(-10 * one, -12 * one, -11 * one, -11 * one, beta=0.1)[0])
        9.0

    Reference: A General Theoretical Paradigm to Understand Learning from Human Preferences (arXiv 2310.12036).
    """
    check_beta(beta)
    chosen, rejected = log_ratios(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    return jnp.square(chosen - rejected - 1 / (2 * beta))


def hinge(
    chosen_logp: Array,
    rejected_logp: Array,
    ref_chosen_logp: Array,
    ref_rejected_logp: Array,
    *,
    beta: float = 0.1,
) -> Array:
    r"""Hinge loss on the margin of implicit rewards, $\ell = \max(0, 1 - \beta h)$ with `h` as in `dpo`.

    Args:
        chosen_logp: `[B]` float, nats; as in `dpo`, as are the other log-probs.
        rejected_logp: `[B]`.
        ref_chosen_logp: `[B]`, a constant.
        ref_rejected_logp: `[B]`, a constant.
        beta: one over the margin that is enough, above 0.

    Returns:
        `[B]`, float32 or wider.

    Raises:
        ValueError: if the inputs are not `[B]` of one length, or `beta` is not above 0.

    Example:
        >>> one = jnp.ones(1)
        >>> round(float(hinge(-10 * one, -12 * one, -11 * one, -11 * one, beta=0.1)[0]), 6)
        0.8

    Reference: Statistical Rejection Sampling Improves Preference Optimization (arXiv 2309.06657), after SLiC-HF:
    Sequence Likelihood Calibration with Human Feedback (arXiv 2305.10425).
    """
    return jax.nn.relu(1 - _margin(beta, chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp))


def exo(
    chosen_logp: Array,
    rejected_logp: Array,
    ref_chosen_logp: Array,
    ref_rejected_logp: Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
) -> Array:
    r"""Efficient exact optimisation for pairs: the reverse KL from the labels to the policy's preference.

    $$\ell = q \log\frac{q}{1 - \epsilon} + (1 - q) \log\frac{1 - q}{\epsilon}, \qquad q = \sigma(\beta h)$$

    with `h` as in `dpo`, whose loss is the forward KL.

    Args:
        chosen_logp: `[B]` float, nats; as in `dpo`, as are the other log-probs.
        rejected_logp: `[B]`.
        ref_chosen_logp: `[B]`, a constant.
        ref_rejected_logp: `[B]`, a constant.
        beta: strength of the KL constraint, above 0.
        label_smoothing: $\epsilon$ in (0, 0.5): with 0 the KL is infinite.

    Returns:
        `[B]`, nats, float32 or wider; 0 where `q` is $1 - \epsilon$.

    Raises:
        ValueError: if the inputs are not `[B]` of one length, `beta` is not above 0, or `label_smoothing` is outside
            (0, 0.5).

    Example:
        >>> zero = jnp.zeros(1)
        >>> round(float(exo(zero, zero, zero, zero, label_smoothing=0.1)[0]), 6)  # 0.5 log(0.25 / 0.09)
        0.510826

    Reference: Towards Efficient Exact Optimization of Language Model Alignment (arXiv 2402.00856), equation 16.
    """
    check_label_smoothing(label_smoothing, positive=True)
    margin = _margin(beta, chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    log_q, log_rest = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    right, wrong = log_q - jnp.log1p(-label_smoothing), log_rest - jnp.log(label_smoothing)
    return jnp.exp(log_q) * right + jnp.exp(log_rest) * wrong


def discopop(
    chosen_logp: Array,
    rejected_logp: Array,
    ref_chosen_logp: Array,
    ref_rejected_logp: Array,
    *,
    beta: float = 0.1,
    tau: float = 0.05,
) -> Array:
    r"""DiscoPOP, a loss that a language model found: logistic for pairs in the wrong order, exponential in the right.

    $$\ell = (1 - m) \cdot -\log\sigma(z) + m\, e^{-z}, \qquad z = \beta h, \quad m = \sigma(z / \tau)$$

    with `h` as in `dpo`. It is not convex: it has a local minimum near $z = -2.4\,\tau$.

    Args:
        chosen_logp: `[B]` float, nats; as in `dpo`, as are the other log-probs.
        rejected_logp: `[B]`.
        ref_chosen_logp: `[B]`, a constant.
        ref_rejected_logp: `[B]`, a constant.
        beta: strength of the KL constraint, above 0.
        tau: $\tau$, width of the change from one to the other, above 0.

    Returns:
        `[B]`, float32 or wider.

    Raises:
        ValueError: if the inputs are not `[B]` of one length, or `beta` or `tau` is not above 0.

    Example:
        >>> zero = jnp.zeros(1)
        >>> round(float(discopop(zero, zero, zero, zero)[0]), 6)  # (log 2 + 1) / 2
        0.846574

    Reference: Discovering Preference Optimization Algorithms with and for Large Language Models (arXiv 2406.08414).
    """
    if isinstance(tau, float | int) and not tau > 0:
        raise ValueError(f"tau must be above 0, got {tau}")
    margin = _margin(beta, chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    share = jax.nn.sigmoid(margin / tau)
    # Where the exponential would overflow its share is 0.
    return -(1 - share) * jax.nn.log_sigmoid(margin) + share * jnp.exp(jnp.minimum(-margin, 20.0))

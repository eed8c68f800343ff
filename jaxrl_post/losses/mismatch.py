r"""When the policy that sampled is not quite the policy that is trained: weights, masks and what to watch.

A sampling engine computes in other precision, with other kernels, from older parameters or from a cut distribution. Its
log-probs (`sampler_logp`) then differ from those that training computes at the start of a step (`old_logp`), and
$\rho = \pi_{old} / \pi_{sampler}$ is not 1. Give the log-probs of the distribution that was really sampled from: under
top-k or top-p that is the cut one, not the model's own.

Three functions hold what is published: `importance_weights` leaves every token in the batch and changes what it weighs,
`rejection_mask` takes tokens or sequences out of it, denominators included, and `off_policy_sequence_mask` looks at
sequences that the trained policy has already moved away from. All are constants of the loss.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.policy import LOG_RATIO_LIMIT, log_ratio
from jaxrl_post.types import Array, Metric

RatioLevel: TypeAlias = Literal["token", "sequence", "geometric"]
RejectionStatistic: TypeAlias = Literal["k1", "k2", "k3"]
RejectionReduction: TypeAlias = Literal["token", "seq_sum", "seq_mean", "seq_max"]


def _one_of(name: str, given: Any, literal: Any) -> None:
    if given not in get_args(literal):
        raise ValueError(f"{name} must be one of {', '.join(map(str, get_args(literal)))}, got {given!r}")


def _check_bounds(low: float | None, high: float | None) -> None:
    for name, bound in (("low", low), ("high", high)):
        if isinstance(bound, float | int) and bound < 0:
            raise ValueError(f"{name} must be >= 0 (a ratio, or a divergence), got {bound}")
    if isinstance(low, float | int) and isinstance(high, float | int) and low > high:
        raise ValueError(f"low must not be above high, got low={low} and high={high}")


def _log_rho(old_logp: Array, sampler_logp: Array, mask: Array) -> tuple[Array, Array]:
    old_logp, sampler_logp = masked.as_float(old_logp), masked.as_float(sampler_logp)
    masked.check_axes("old_logp", old_logp, "[B, T]")
    masked.check_like("sampler_logp", sampler_logp, "old_logp", old_logp)
    mask = masked.as_float(mask)
    masked.check_like("mask", mask, "old_logp", old_logp)
    x = jnp.where(mask != 0, log_ratio(old_logp, sampler_logp), 0.0)
    return jax.lax.stop_gradient(x), jax.lax.stop_gradient(mask)


def _ratio(x: Array, mask: Array, level: RatioLevel) -> Array:
    """`[B, T]`, or `[B, 1]` for one number per sequence; a sequence without tokens has ratio 1."""
    if level == "sequence":
        x = jnp.clip(masked.sum(x, mask, 1, keepdims=True), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    elif level == "geometric":
        x = masked.mean(x, mask, 1, keepdims=True)
    return jnp.exp(x)


def _inside(x: Array, low: float | None, high: float | None) -> Array:
    inside = jnp.ones(x.shape, bool)
    if low is not None:
        inside &= x >= low
    if high is not None:
        inside &= x <= high
    return inside


def importance_weights(
    old_logp: Array,
    sampler_logp: Array,
    mask: Array,
    *,
    level: RatioLevel = "token",
    low: float | None = None,
    high: float | None = 2.0,
    outside: Literal["clamp", "zero"] = "clamp",
    bounds_on: RatioLevel | None = None,
    batch_normalize: bool = False,
) -> Array:
    r"""Importance weights of tokens that another policy sampled, bounded.

    | level | ratio of a token | exact where unbounded |
    |---|---|---|
    | `token` | $\rho_t = \pi_{old}(y_t) / \pi_{sampler}(y_t)$ | for one token; over sequences it neglects the prefix |
    | `sequence` | $\prod_t \rho_t$ of its sequence | for whole sequences |
    | `geometric` | $(\prod_t \rho_t)^{1/L}$ of its sequence | never: small variance is all it has |

    Ratios outside `[low, high]` are moved to the bound (`"clamp"`) or get weight 0 (`"zero"`); either way the token
    keeps its place in the loss's denominator. The published corrections are rows of this function:

    | correction | keywords |
    |---|---|
    | TIS, truncated importance sampling | `high=2.0` |
    | IcePop, token MIS | `low=0.5, high=5.0, outside="zero"` |
    | MIS, masked importance sampling of sequences | `level="sequence", high=3.0, outside="zero"` |
    | sequence-masked TIS | `bounds_on="geometric", low=0.999, high=1.002, outside="zero"` |
    | TRL `token_truncate`, `token_mask`, `sequence_truncate`, `sequence_mask` | `level`, `outside`, `high=3.0` |

    Args:
        old_logp: `[B, T]` float, nats; log-prob under the trained policy at the start of the step.
        sampler_logp: `[B, T]` float, nats; log-prob under the distribution that was sampled from.
        mask: `[B, T]`; nonzero where the token counts.
        level: see the table.
        low: smallest ratio; None for no bound.
        high: largest ratio; None for no bound.
        outside: what happens beyond the bounds.
        bounds_on: level of the ratio that is held against the bounds, with `outside="zero"`; None for `level`.
        batch_normalize: divide by the mean weight over tokens (over sequences, if `level` is not `"token"`) of the rows
            given, which must be the whole batch.

    Returns:
        `[B, T]`, float32 or wider, without gradient; 0 where `mask` is.

    Raises:
        ValueError: if shapes differ, a name is unknown, the bounds are negative or in the wrong order, or `bounds_on`
            is given where ratios are clamped.

    Example:
        >>> old_logp, sampler_logp = jnp.log(jnp.array([[0.6, 0.2]])), jnp.log(jnp.array([[0.2, 0.4]]))
        >>> importance_weights(old_logp, sampler_logp, jnp.ones((1, 2))).round(4).tolist()
        [[2.0, 0.5]]
        >>> importance_weights(old_logp, sampler_logp, jnp.ones((1, 2)), level="sequence").round(4).tolist()
        [[1.5, 1.5]]
        >>> importance_weights(old_logp, sampler_logp, jnp.ones((1, 2)), outside="zero").round(4).tolist()
        [[0.0, 0.5]]

    References:
        Your Efficient RL Framework Secretly Brings You Off-Policy RL Training (Yao et al., 2025) for TIS; When Speed
        Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch (Liu et al., 2025) for sequence
        level and MIS; Every Step Evolves: Scaling Reinforcement Learning for Trillion-Scale Thinking Model
        (arXiv 2510.18855) for IcePop.
    """
    _one_of("level", level, RatioLevel)
    _one_of("outside", outside, Literal["clamp", "zero"])
    _check_bounds(low, high)
    if bounds_on is not None:
        _one_of("bounds_on", bounds_on, RatioLevel)
        if outside == "clamp":
            raise ValueError("bounds_on applies to outside='zero' only: a ratio is clamped to bounds of its own")
    x, mask = _log_rho(old_logp, sampler_logp, mask)
    ratio = _ratio(x, mask, level)
    if outside == "clamp":
        weights = ratio if low is None and high is None else jnp.clip(ratio, low, high)
    else:
        weights = jnp.where(_inside(_ratio(x, mask, bounds_on or level), low, high), ratio, 0.0)
    weights = jnp.where(mask != 0, weights, 0.0)
    if not batch_normalize:
        return weights
    if level == "token":
        mean = masked.mean(weights, mask)
    else:
        mean = masked.mean(jnp.max(weights, axis=1), jnp.any(mask != 0, axis=1))
    return weights / jnp.where(mean > 0, mean, 1.0)


def _statistic(x: Array, statistic: RejectionStatistic) -> Array:
    if statistic == "k1":
        return x
    if statistic == "k2":
        return 0.5 * jnp.square(x)
    return jnp.expm1(x) - x


def rejection_mask(
    old_logp: Array,
    sampler_logp: Array,
    mask: Array,
    *,
    statistic: RejectionStatistic = "k1",
    reduce: RejectionReduction = "token",
    low: float | None = None,
    high: float | None = 2.0,
) -> Array:
    r"""The mask without tokens or sequences on which sampler and trained policy disagree too much.

    With $x_t = \log\pi_{old} - \log\pi_{sampler}$, the statistic of a token is $x$ (`k1`), $x^2 / 2$ (`k2`) or
    $e^x - 1 - x$ (`k3`). It is compared token by token (`token`), or as sum, mean or maximum over a sequence, which
    then stays or goes whole. What goes leaves the loss's denominator too.

    The bounds of `k1` are ratios: $\mathrm{low} \le \exp(\text{reduced } x) \le \mathrm{high}$, so `reduce="seq_mean"`
    bounds the geometric mean of the ratio. `seq_max` asks every token of the sequence to be inside: with
    `low=1e-4, high=None` it is the veto of a token that the trained policy would almost never have chosen.

    Args:
        old_logp: `[B, T]` float, nats; log-prob under the trained policy at the start of the step.
        sampler_logp: `[B, T]` float, nats; log-prob under the distribution that was sampled from.
        mask: `[B, T]`; nonzero where the token counts.
        statistic: see above.
        reduce: see above.
        low: lower bound; None for `1 / high` with `k1`, and for no bound with the others, which are never negative.
        high: upper bound: a ratio with `k1`, nats with the others; None for no bound.

    Returns:
        `[B, T]`, float32 or wider, without gradient: `mask` where it is kept, 0 elsewhere.

    Raises:
        ValueError: if shapes differ, a name is unknown, or the bounds are negative or in the wrong order.

    Example:
        >>> old_logp, sampler_logp = jnp.log(jnp.array([[0.6, 0.2]])), jnp.log(jnp.array([[0.2, 0.4]]))
        >>> rejection_mask(old_logp, sampler_logp, jnp.ones((1, 2)), high=2.5).tolist()
        [[0.0, 1.0]]
        >>> rejection_mask(old_logp, sampler_logp, jnp.ones((1, 2)), high=2.5, reduce="seq_mean").tolist()
        [[1.0, 1.0]]

    Reference: When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch (Liu et al.,
    2025).
    """
    _one_of("statistic", statistic, RejectionStatistic)
    _one_of("reduce", reduce, RejectionReduction)
    if statistic == "k1":
        if isinstance(high, float | int) and high <= 0:
            raise ValueError(f"high must be above 0 (a ratio), got {high}; give e.g. high=2.0")
        if low is None and high is not None:
            low = 1 / high
    _check_bounds(low, high)
    x, mask = _log_rho(old_logp, sampler_logp, mask)
    value = _statistic(x, statistic)
    if reduce == "seq_sum":
        value = masked.sum(value, mask, 1, keepdims=True)
    elif reduce == "seq_mean":
        value = masked.mean(value, mask, 1, keepdims=True)
    if statistic == "k1":
        value = jnp.exp(jnp.clip(value, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    inside = _inside(value, low, high)
    if reduce == "seq_max":
        inside = jnp.all(inside | (mask == 0), axis=1, keepdims=True)
    return jnp.where(inside, mask, 0.0)


def off_policy_sequence_mask(
    logp: Array, old_logp: Array, advantages: Array, mask: Array, *, threshold: float = 0.5
) -> Array:
    r"""Indicator of the tokens that stay when bad sequences from far away are dropped (OPSM).

    $$M_t = 0 \ \text{ where }\ A_t < 0 \ \text{ and }\ \frac1L \sum_s m_s (\log\pi_{old} - \log\pi)_s > \delta,
    \quad 1 \text{ elsewhere}$$

    A sequence that the policy would hardly write any more teaches little by being pushed down further, and does so
    with a large gradient. Multiply the policy loss by the indicator; the denominator stays that of all tokens.

    Args:
        logp: `[B, T]` float, nats; log-prob under the trained policy. A constant here.
        old_logp: `[B, T]` float, nats; log-prob under the policy that sampled: the sampler's own where it is known.
        advantages: `[B, T]`.
        mask: `[B, T]`; nonzero where the token counts.
        threshold: $\delta$, nats per token. The paper names no value; 0.5 is the one that TRL's documentation proposes,
            1e-4 is slime's default.

    Returns:
        `[B, T]`, float32 or wider, 0 or 1, without gradient; 0 where `mask` is.

    Raises:
        ValueError: if shapes differ.

    Example:
        >>> logp, old_logp = jnp.array([[-3.0, -3.0], [-3.0, -3.0]]), jnp.full((2, 2), -1.0)
        >>> advantages = jnp.array([[1.0, 1.0], [-1.0, -1.0]])
        >>> off_policy_sequence_mask(logp, old_logp, advantages, jnp.ones((2, 2)), threshold=0.5).tolist()
        [[1.0, 1.0], [0.0, 0.0]]

    Reference: DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models (arXiv 2512.02556).
    """
    x, mask = _log_rho(logp, old_logp, mask)
    advantages = masked.as_float(advantages)
    masked.check_like("advantages", advantages, "logp", x)
    far = -masked.mean(x, mask, 1, keepdims=True) > threshold
    return jax.lax.stop_gradient((~(far & (advantages < 0)) & (mask != 0)).astype(x.dtype))


def effective_sample_size(weights: Array, mask: Array) -> Array:
    r"""Share of the samples that the weighted batch is worth, $(\sum w)^2 / (n \sum w^2)$.

    1 for equal weights, 1/n where one sample holds all; an estimate of $1 / (1 + \chi^2)$.

    Args:
        weights: any shape, float, not negative; e.g. `importance_weights` of tokens, or one number per sequence.
        mask: `weights`' shape; nonzero where it counts.

    Returns:
        Scalar in [0, 1], float32 or wider, without gradient; 0 for an empty mask.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> float(effective_sample_size(jnp.array([1.0, 1.0, 0.0, 0.0]), jnp.ones(4)))
        0.5
    """
    weights, mask = masked.as_float(weights), masked.as_float(mask)
    masked.check_like("mask", mask, "weights", weights)
    # Scaled by the largest weight, whose square could overflow.
    largest = masked.max(weights, mask)
    weights = weights / jnp.where(largest > 0, largest, 1.0)
    square = masked.mean(jnp.square(weights), mask)
    share = jnp.square(masked.mean(weights, mask)) / jnp.where(square > 0, square, 1.0)
    return jax.lax.stop_gradient(share)


def mismatch_metrics(
    old_logp: Array, sampler_logp: Array, mask: Array, *, low: float = 0.5, high: float = 2.0
) -> dict[str, Metric]:
    r"""How far the policy that sampled is from the one that is trained, from the ratio $\rho$ of the sampled tokens.

    | metric | per token or sequence | reduced |
    |---|---|---|
    | `sampling/kl_k1`, `sampling/kl_k3` | $-\log\rho$, $\rho - 1 - \log\rho$: KL(sampler \|\| trained) | mean |
    | `sampling/logp_difference/mean`, `/max` | $\lvert\log\rho\rvert$ | mean, max |
    | `sampling/ratio/mean`, `/min`, `/max` | $\rho$; 1 on average if the sampler's support is whole | as named |
    | `sampling/ratio/outside` | $\rho < \mathrm{low}$ or $\rho > \mathrm{high}$ | mean |
    | `sampling/chi2_token`, `sampling/chi2_sequence` | $\rho^2 - 1$, of tokens and of products over sequences | mean |
    | `sampling/perplexity_ratio` | $\exp(-\frac1L \sum_t \log\rho_t)$ of a sequence: trained over sampler | mean |

    Each is right for any split into micro-batches. The share of samples the batch is worth is about
    $1 / (1 + \chi^2)$; `effective_sample_size` gives it for the weights really used.

    Args:
        old_logp: `[B, T]` float, nats; log-prob under the trained policy at the start of the step.
        sampler_logp: `[B, T]` float, nats; log-prob under the distribution that was sampled from.
        mask: `[B, T]`; nonzero where the token counts.
        low: bound of `ratio/outside`.
        high: bound of `ratio/outside`.

    Returns:
        `Metric`s by name.

    Raises:
        ValueError: if shapes differ, or the bounds are negative or in the wrong order.

    Example:
        >>> same = jnp.log(jnp.array([[0.5, 0.2]]))
        >>> metrics = mismatch_metrics(same, same, jnp.ones((1, 2)))
        >>> float(metrics["sampling/kl_k3"].result()), float(metrics["sampling/ratio/max"].result())
        (0.0, 1.0)

    Reference: When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch (Liu et al.,
    2025).
    """
    _check_bounds(low, high)
    x, mask = _log_rho(old_logp, sampler_logp, mask)
    rho, sequences = jnp.exp(x), jnp.any(mask != 0, axis=1).astype(x.dtype)
    outside = (~_inside(rho, low, high)).astype(x.dtype)
    # The square of a product of ratios: its log is clamped at the limit, as every log-ratio's is.
    total = jnp.clip(2 * masked.sum(x, mask, 1), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return {
        "sampling/kl_k1": Metric.mean(-x, mask),
        "sampling/kl_k3": Metric.mean(_statistic(x, "k3"), mask),
        "sampling/logp_difference/mean": Metric.mean(jnp.abs(x), mask),
        "sampling/logp_difference/max": Metric.max(jnp.abs(x), mask),
        "sampling/ratio/mean": Metric.mean(rho, mask),
        "sampling/ratio/min": Metric.min(rho, mask),
        "sampling/ratio/max": Metric.max(rho, mask),
        "sampling/ratio/outside": Metric.mean(outside, mask),
        "sampling/chi2_token": Metric.mean(jnp.expm1(2 * x), mask),
        "sampling/chi2_sequence": Metric.mean(jnp.expm1(total), sequences),
        "sampling/perplexity_ratio": Metric.mean(jnp.exp(-masked.mean(x, mask, 1)), sequences),
    }

"""Estimators of the KL divergence to a reference policy, and the controller of its coefficient.

An estimator has a value and a gradient, and they answer different questions: `k3` is an unbiased and steady estimate of
the divergence whose gradient is that of another divergence. Names ending in `+` and `_weighted` repair the gradient.
Only the sampled token is used here; the divergence over the whole vocabulary is `jaxrl_post.kernels.token_divergence`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.policy import LOG_RATIO_LIMIT, importance_ratio
from jaxrl_post.types import Array

KLEstimator: TypeAlias = Literal["k1", "k2", "k3", "abs", "k1+", "k3+", "abs+", "k1_weighted", "k3_weighted"]


def _straight_through(value: Array, slope: Array, logp: Array) -> Array:
    """`value`, whose derivative with respect to `logp` is declared to be `slope`."""
    value, slope = jax.lax.stop_gradient((value, slope))
    return value + slope * (logp - jax.lax.stop_gradient(logp))


def kl(logp: Array, ref_logp: Array, estimator: KLEstimator = "k1", *, old_logp: Array | None = None) -> Array:
    r"""Estimate of KL(policy || reference) from the sampled token alone.

    With $x = \log\pi - \log\pi_{ref}$ of a sampled token and $r = \pi / \pi_{old}$ the ratio to the policy that
    sampled it (of value 1, with its gradient, where `old_logp` is not given):

    | estimator | value | mean over tokens | mean gradient with respect to the policy |
    |---|---|---|---|
    | `k1` | $x$ | KL | zero: of no use in a loss; subtract it from the reward |
    | `k2` | $x^2 / 2$ | biased | that of KL(policy \|\| reference) |
    | `k3` | $e^{-x} - 1 + x$ | KL, never negative | that of KL(reference \|\| policy) |
    | `abs` | $\lvert x \rvert$ | not a KL | not a KL's |
    | `k1+`, `k3+`, `abs+` | as without `+` | as without `+` | that of `k2`: KL(policy \|\| reference) |
    | `k1_weighted` | $r x$ | KL | that of KL(policy \|\| reference) |
    | `k3_weighted` | $r (e^{-x} - 1 + x)$ | KL, never negative | that of KL(policy \|\| reference) |

    The first seven are right for tokens of the present policy, the weighted ones for tokens of any policy whose
    log-probs are `old_logp`. The gradient of `k3_weighted` is $r x \nabla\log\pi$ (the exponentials of its two parts
    cancel, and are never computed), so at $r = 1$ it is `k3+`. All are divergences of the next token: what a token does
    to the divergence of later ones is only in the reward form.

    Args:
        logp: `[B, T]` or `[B]` float, nats; log-prob under the trained policy.
        ref_logp: `logp`'s shape, nats; log-prob under the reference. A constant: no gradient flows into it.
        estimator: one of the above.
        old_logp: `logp`'s shape, nats; log-prob under the policy that sampled, for the weighted estimators only. None:
            the present policy sampled. A constant.

    Returns:
        `logp`'s shape, float32 or wider, nats. `k3` is computed as `expm1(-x) + x`, which keeps its digits near
        `x = 0`; below `x = -20`, where the exponential would overflow, it is constant. The ratio is clamped at
        e^+-20; the gradient of `k3_weighted` stays $r x$ there.

    Raises:
        ValueError: if the shapes differ, the estimator is unknown, or `old_logp` is given to one without a ratio.

    Example:
        >>> logp, ref_logp = jnp.log(jnp.array([[0.5, 0.25]])), jnp.log(jnp.array([[0.25, 0.5]]))
        >>> [[round(value, 4) for value in kl(logp, ref_logp, name)[0].tolist()] for name in ("k1", "k2", "k3")]
        [[0.6931, -0.6931], [0.2402, 0.2402], [0.1931, 0.3069]]
        >>> slope = jax.grad(lambda logp, name: kl(logp, ref_logp, name).sum())
        >>> [[round(value, 4) for value in slope(logp, name)[0].tolist()] for name in ("k3", "k3+", "k3_weighted")]
        [[0.5, -1.0], [0.6931, -0.6931], [0.6931, -0.6931]]

    References:
        Approximating KL Divergence (Schulman, 2020, http://joschu.net/blog/kl-approx.html); for the gradients: On the
        Design of KL-Regularized Policy Gradient Algorithms for LLM Reasoning (arXiv 2505.17508); the weighted `k3` is
        of DeepSeek-V3.2 (arXiv 2512.02556).
    """
    if estimator not in get_args(KLEstimator):
        raise ValueError(f"estimator must be one of {', '.join(get_args(KLEstimator))}, got {estimator!r}")
    base, weighted = estimator.removesuffix("+").removesuffix("_weighted"), estimator.endswith("_weighted")
    if old_logp is not None and not weighted:
        raise ValueError(f"old_logp does not apply to estimator {estimator!r}; leave it out or use 'k3_weighted'")
    logp, ref_logp = masked.as_float(logp), masked.as_float(ref_logp)
    masked.check_axes("logp", logp, "[B, T] or [B]")
    masked.check_like("ref_logp", ref_logp, "logp", logp)
    x = logp - jax.lax.stop_gradient(ref_logp)
    value = _value(x, base)
    if estimator.endswith("+"):
        return _straight_through(value, x, logp)
    if not weighted:
        return value
    ratio = importance_ratio(logp, logp if old_logp is None else old_logp)
    return ratio * value if base == "k1" else _straight_through(ratio * value, ratio * x, logp)


def _value(x: Array, base: str) -> Array:
    if base == "k1":
        return x
    if base == "k2":
        return 0.5 * jnp.square(x)
    if base == "abs":
        return jax.lax.stop_gradient(jnp.sign(x)) * x  # whose slope at 0 is 0, that of jnp.abs is 1
    # Only the exponential's own side is bounded in the linear part too: bounding neither would leave its gradient of
    # +1 where the true one is hugely negative, and bounding both would stop the pull back from far above.
    return jnp.expm1(-jnp.clip(x, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)) + jnp.maximum(x, -LOG_RATIO_LIMIT)


def adaptive_kl_coefficient(
    coefficient: float | Array, kl: float | Array, *, target: float, horizon: float = 10_000.0, samples: int | Array = 1
) -> Array:
    r"""Next coefficient of the KL penalty, moved so that the measured KL approaches a target.

    $$\beta' = \beta\,(1 + \mathrm{clip}(\mathrm{KL} / \mathrm{target} - 1, -0.2, 0.2)\; n / \mathrm{horizon})$$

    Args:
        coefficient: scalar, the present $\beta$.
        kl: scalar, nats; the KL measured over the last step.
        target: nats, above 0; the KL aimed at.
        horizon: sequences over which $\beta$ changes by at most about 20 per cent.
        samples: $n$, sequences since the last update.

    Returns:
        Scalar, float32 or wider, without gradient.

    Raises:
        ValueError: if `target` or `horizon` is not above 0.

    Example:
        >>> round(float(adaptive_kl_coefficient(0.1, 0.3, target=0.1, horizon=1000, samples=100)), 6)
        0.102

    Reference: Fine-Tuning Language Models from Human Preferences (arXiv 1909.08593).
    """
    for name, number in (("target", target), ("horizon", horizon)):
        if isinstance(number, float | int) and number <= 0:
            raise ValueError(f"{name} must be above 0, got {number}; use a fixed coefficient for no adaptation")
    error = jnp.clip(masked.as_float(kl) / target - 1, -0.2, 0.2)
    return jax.lax.stop_gradient(masked.as_float(coefficient) * (1 + error * samples / horizon))

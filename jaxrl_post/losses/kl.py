"""Estimators of the KL divergence to a reference policy, and the controller of its coefficient."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.policy import LOG_RATIO_LIMIT
from jaxrl_post.types import Array

KLEstimator: TypeAlias = Literal["k1", "k2", "k3", "abs"]


def kl(logp: Array, ref_logp: Array, estimator: KLEstimator = "k1") -> Array:
    r"""Estimate of KL(policy || reference) from the sampled token alone.

    With $x = \log\pi - \log\pi_{ref}$ of a token sampled from the policy:

    | estimator | value | mean over tokens | mean gradient with respect to the policy |
    |---|---|---|---|
    | `k1` | $x$ | KL | zero: of no use in a loss; subtract it from the reward |
    | `k2` | $x^2 / 2$ | biased | that of KL(policy \|\| reference) |
    | `k3` | $e^{-x} - 1 + x$ | KL, never negative | that of KL(reference \|\| policy) |
    | `abs` | $\lvert x \rvert$ | not a KL | not a KL's |

    Args:
        logp: `[B, T]` or `[B]` float, nats; log-prob under the trained policy.
        ref_logp: `logp`'s shape, nats; log-prob under the reference. A constant: no gradient flows into it.
        estimator: one of the four above.

    Returns:
        `logp`'s shape, float32 or wider, nats. `k3` is computed as `expm1(-x) + x`, which keeps its digits near
        `x = 0`; below `x = -20`, where the exponential would overflow, it is constant.

    Raises:
        ValueError: if the shapes differ or the estimator is unknown.

    Example:
        >>> logp, ref_logp = jnp.log(jnp.array([[0.5, 0.25]])), jnp.log(jnp.array([[0.25, 0.5]]))
        >>> [[round(value, 4) for value in kl(logp, ref_logp, name)[0].tolist()] for name in ("k1", "k2", "k3")]
        [[0.6931, -0.6931], [0.2402, 0.2402], [0.1931, 0.3069]]

    Reference: Approximating KL Divergence (Schulman, 2020, http://joschu.net/blog/kl-approx.html).
    """
    if estimator not in get_args(KLEstimator):
        raise ValueError(f"estimator must be one of {', '.join(get_args(KLEstimator))}, got {estimator!r}")
    logp, ref_logp = masked.as_float(logp), masked.as_float(ref_logp)
    masked.check_axes("logp", logp, "[B, T] or [B]")
    masked.check_like("ref_logp", ref_logp, "logp", logp)
    x = logp - jax.lax.stop_gradient(ref_logp)
    if estimator == "k1":
        return x
    if estimator == "k2":
        return 0.5 * jnp.square(x)
    if estimator == "abs":
        return jnp.abs(x)
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

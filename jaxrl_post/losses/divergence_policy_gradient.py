"""f-DPG: policy gradients of any f-divergence between the policy and an explicit, unnormalised target distribution.

The target's log-score is e.g. `log ref(y) + r(y) / beta` (regularised reward maximisation), or the reference under a
constraint (-inf where it is violated). Which divergence is minimised decides how much diversity the policy keeps.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.consistency import check_positive, log_mean_exp, prepare_group
from jaxrl_post.losses.policy import LOG_RATIO_LIMIT, importance_ratio
from jaxrl_post.types import Array

Divergence: TypeAlias = Literal["forward_kl", "reverse_kl", "js", "tv", "forward_chi2", "reverse_chi2"]
"""`forward_`: $D(p \\| \\pi)$, the target first, which covers; `reverse_`: $D(\\pi \\| p)$, which seeks modes."""


def divergence_reward(log_t: Array, *, divergence: Divergence, max_log_t: float = LOG_RATIO_LIMIT) -> Array:
    r"""Pseudo-reward whose policy gradient descends an f-divergence: $R = -f'(t)$, $t = \pi(y) / p(y)$.

    | divergence | $D_f(\pi \| p) = E_p f(t)$ | $f'(t)$ |
    |---|---|---|
    | `forward_kl` | $KL(p \| \pi)$ | $-1/t$ |
    | `reverse_kl` | $KL(\pi \| p)$ | $\log t + 1$ |
    | `js` | $KL(p \| m) + KL(\pi \| m)$, $m = (p + \pi)/2$ | $\log\frac{2t}{1 + t}$ |
    | `tv` | $\frac12 \sum \lvert\pi - p\rvert$ | $\frac12 \mathrm{sign}(t - 1)$ |
    | `forward_chi2` | $\chi^2(p \| \pi) = \sum p^2/\pi - 1$ | $1 - t^{-2}$ |
    | `reverse_chi2` | $\chi^2(\pi \| p) = \sum \pi^2/p - 1$ | $2 (t - 1)$ |

    Then $\nabla D_f = E_{y \sim \pi}[f'(t) \nabla \log\pi(y)]$, and any constant may be taken from $f'$.

    Args:
        log_t: any shape, nats: $\log\pi(y) - \log p(y)$ with the normalised target; +inf where the target is 0.
        divergence: one of the names above.
        max_log_t: `log_t` is clipped to +- this, which bounds the divergences whose $f'$ is not (at most 80, so that
            its exponential is finite; the square, in `forward_chi2`, is clipped at half of it).

    Returns:
        `log_t`'s shape, float32 or wider, without gradient.

    Raises:
        ValueError: if `divergence` is unknown or `max_log_t` is not in (0, 80].

    Example:
        >>> log_2 = jnp.log(jnp.array(2.0))
        >>> kinds = ("forward_kl", "reverse_kl", "js", "tv", "forward_chi2", "reverse_chi2")
        >>> [round(float(divergence_reward(log_2, divergence=kind)), 4) for kind in kinds]
        [0.5, -1.6931, -0.2877, -0.5, -0.75, -2.0]

    Reference: Aligning Language Models with Preferences through f-divergence Minimization (arXiv 2302.08215).
    """
    if divergence not in get_args(Divergence):
        raise ValueError(f"divergence must be one of {', '.join(get_args(Divergence))}, got {divergence!r}")
    if isinstance(max_log_t, float | int) and not 0 < max_log_t <= 80:
        raise ValueError(f"max_log_t must be in (0, 80] nats, got {max_log_t}")
    log_t = jnp.clip(jax.lax.stop_gradient(masked.as_float(log_t)), -max_log_t, max_log_t)
    if divergence == "forward_kl":
        return jnp.exp(-log_t)
    if divergence == "reverse_kl":
        return -log_t - 1
    if divergence == "js":
        return jnp.logaddexp(0.0, -log_t) - math.log(2.0)
    if divergence == "tv":
        return -jnp.sign(log_t) / 2
    if divergence == "forward_chi2":
        return jnp.expm1(jnp.clip(-2 * log_t, -max_log_t, max_log_t))
    return -2 * jnp.expm1(log_t)


def log_partition(target_logscore: Array, proposal_logp: Array, valid: Array | None = None) -> Array:
    r"""Log-normaliser of the target by importance sampling, $\log Z = \log \frac1n \sum_i P(y_i) / q(y_i)$.

    Args:
        target_logscore: `[P, G]` float, nats; $\log P(y)$, not normalised; -inf where the target is 0. One row per
            context; an unconditional target is one row.
        proposal_logp: `[P, G]` float, nats; log-prob under the policy that sampled.
        valid: `[P, G]` bool, False where the sample does not count; None for all.

    Returns:
        `[P]`, float32 or wider, nats; -inf where the target is 0 on all samples, 0 without valid samples.

    Raises:
        ValueError: if the arrays are not `[P, G]` of one shape.

    Example:
        >>> q = jnp.log(jnp.array([[0.5, 0.5]]))
        >>> round(float(log_partition(jnp.log(jnp.array([[3.0, 1.0]])), q)[0]), 6)
        1.386294

    Reference: Aligning Language Models with Preferences through f-divergence Minimization (arXiv 2302.08215).
    """
    target_logscore = masked.as_float(target_logscore)
    masked.check_axes("target_logscore", target_logscore, "[P, G]", "an unconditional target is one row")
    proposal, valid, (score,) = prepare_group(proposal_logp, valid, target_logscore=target_logscore)
    return log_mean_exp(score - jax.lax.stop_gradient(proposal), valid)


def running_log_partition(log_z: Array, steps: Array | int, new_log_z: Array) -> Array:
    r"""Mean over steps of estimates of $Z$, in logs: $Z \leftarrow (n Z + Z_{new}) / (n + 1)$.

    Args:
        log_z: any shape, nats; the mean of the steps so far.
        steps: scalar or `log_z`'s shape, int, $n$: how many those were; at 0 the new estimate is returned.
        new_log_z: `log_z`'s shape, nats; this step's estimate.

    Returns:
        `log_z`'s shape, float32 or wider, nats.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> round(float(running_log_partition(jnp.log(jnp.array([2.0])), 3, jnp.log(jnp.array([6.0])))[0]), 6)
        1.098612

    Reference: Aligning Language Models with Preferences through f-divergence Minimization (arXiv 2302.08215).
    """
    log_z, new_log_z = masked.as_float(log_z), masked.as_float(new_log_z)
    masked.check_like("new_log_z", new_log_z, "log_z", log_z)
    n = jnp.asarray(steps, log_z.dtype)
    mixed = jnp.logaddexp(log_z + jnp.log(jnp.maximum(n, 1)), new_log_z) - jnp.log(n + 1)
    return jnp.where(n > 0, mixed, new_log_z)


def f_dpg(
    logp: Array,
    proposal_logp: Array,
    target_logscore: Array,
    log_z: Array,
    valid: Array | None = None,
    *,
    divergence: Divergence = "js",
    baseline: float | Array = 0.0,
    max_log_t: float = LOG_RATIO_LIMIT,
) -> Array:
    r"""f-DPG's loss of each sequence, on samples of a proposal $q$.

    $$\ell = -\mathrm{sg}\Big(\frac{\pi(y)}{q(y)} \big(R - b\big)\Big) \log\pi(y), \qquad R = -f'(t), \quad
    \log t = \log\pi(y) - \log P(y) + \log Z$$

    Its mean over samples of $q$ has the gradient of $D_f(\pi \| p)$.

    Args:
        logp: `[P, G]` float, nats; log-prob of the sequence under the trained policy, summed over tokens.
        proposal_logp: `[P, G]` float, nats; the same under the policy that sampled. A constant.
        target_logscore: `[P, G]` float, nats; $\log P(y)$, not normalised; -inf where the target is 0. A constant.
        log_z: `[P]` float, nats; see `log_partition`. 0 for a normalised target.
        valid: `[P, G]` bool, False where the sample does not count; None for all.
        divergence: see `divergence_reward`.
        baseline: $b$, scalar or `[P]`; the paper's is a moving average of $R$.
        max_log_t: see `divergence_reward`.

    Returns:
        `[P, G]`, float32 or wider: the loss of each sequence; 0 where not valid. Its value says nothing.

    Raises:
        ValueError: if the arrays are not `[P, G]` of one shape, `log_z` is not `[P]`, or `divergence` is unknown.

    Example:
        >>> logp = jnp.log(jnp.array([[0.4]]))
        >>> gradient = jax.grad(lambda x: f_dpg(x, logp, jnp.log(jnp.array([[0.2]])), jnp.zeros(1),
        ...                                     divergence="forward_kl").sum())(logp)
        >>> round(float(gradient[0, 0]), 6)
        -0.5

    Reference: Aligning Language Models with Preferences through f-divergence Minimization (arXiv 2302.08215).
    """
    check_positive("max_log_t", max_log_t)
    logp, valid, (proposal, score) = prepare_group(
        logp, valid, proposal_logp=proposal_logp, target_logscore=target_logscore
    )
    log_z = jax.lax.stop_gradient(masked.as_float(log_z))
    masked.check_like("log_z", log_z, "the prompts", logp[:, 0], "one number per prompt")
    # Without a single sample inside the target's support, Z is unknown and everything is far too likely.
    log_t = jnp.where(score == -jnp.inf, jnp.inf, jax.lax.stop_gradient(logp) - score + log_z[:, None])
    reward = divergence_reward(log_t, divergence=divergence, max_log_t=max_log_t)
    baseline = masked.as_float(baseline)
    baseline = baseline[:, None] if baseline.ndim == 1 else baseline
    weight = importance_ratio(logp, proposal) * (reward - baseline)
    return jnp.where(valid, -jax.lax.stop_gradient(weight) * logp, 0.0)

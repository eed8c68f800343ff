"""Surrogates of one token at a time that replace PPO's clipped ratio: CISPO, SAPO and DPPO.

Each reads the log-probs and the advantage of a token and of no other. What looks at a whole sequence is in
`sequence_ratio`, what is made for rollouts of another policy in `off_policy`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jaxrl_post.losses.arguments import as_constant, as_logp, check_at_least
from jaxrl_post.losses.policy import importance_ratio, log_ratio
from jaxrl_post.types import Array

BinaryDivergence: TypeAlias = Literal["tv", "kl"]

_DELTA = {"tv": 0.15, "kl": 0.05}


def cispo(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    *,
    clip_low: float | None = None,
    clip_high: float = 4.0,
    cap: Literal["distance", "ratio"] = "distance",
) -> Array:
    r"""Clipped importance weights: every token keeps its gradient, only the weight is bounded.

    $$\ell = -\mathrm{sg}(\mathrm{clip}(r, 1 - \epsilon_{low}, 1 + \epsilon_{high}))\, A \log\pi$$

    with $r = \exp(\log\pi - \log\pi_{old})$. Where neither bound acts, its gradient is that of $-r A$.

    Args:
        logp: `[B, T]` or `[B]` float, nats; log-prob of the token under the trained policy.
        old_logp: `logp`'s shape, nats; log-prob under the policy at the start of the step. A constant.
        advantages: `logp`'s shape. A constant.
        clip_low: $\epsilon_{low}$, distance of the lower bound from 1; None for no lower bound, as in the paper.
        clip_high: $\epsilon_{high}$. The paper tunes it and gives no number; 4 bounds the weight at 5.
        cap: what `clip_high` is: the `"distance"` of the upper bound from 1, as in the paper, or the bound itself, a
            `"ratio"` of at least 1 (TRL's `epsilon_high`).

    Returns:
        `logp`'s shape, float32 or wider: the loss of each token. Its value says nothing; its gradient does.

    Raises:
        ValueError: if shapes differ, a clip distance is negative, `cap` is unknown, or a ratio as cap is below 1: it
            would scale on-policy tokens down.

    Example:
        >>> logp, old_logp = jnp.log(jnp.array([[0.9, 0.2]])), jnp.log(jnp.array([[0.1, 0.1]]))
        >>> loss = lambda logp: cispo(logp, old_logp, jnp.ones((1, 2))).sum()
        >>> jax.grad(loss)(logp).round(4).tolist()
        [[-5.0, -2.0]]

    Reference: MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention (arXiv 2506.13585).
    """
    if cap not in ("distance", "ratio"):
        raise ValueError(f'cap must be "distance" or "ratio", got {cap!r}')
    check_at_least("clip_low", clip_low, 0, "a distance from 1, e.g. 0.2, or None for no bound")
    if cap == "ratio":
        check_at_least("clip_high", clip_high, 1, "with cap='ratio' it is the largest weight itself, e.g. 5.0")
    else:
        check_at_least("clip_high", clip_high, 0, "a distance from 1, e.g. 4.0")
    logp = as_logp(logp)
    low = 0.0 if clip_low is None else 1 - clip_low
    weight = jnp.clip(importance_ratio(logp, old_logp), low, clip_high if cap == "ratio" else 1 + clip_high)
    return -jax.lax.stop_gradient(weight) * as_constant("advantages", advantages, logp) * logp


def sapo(logp: Array, old_logp: Array, advantages: Array, *, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Array:
    r"""Soft gate in the place of the clip: the gradient fades as the ratio leaves 1, on both sides.

    $$\ell = -\frac{4}{\tau}\, \sigma(\tau (r - 1))\, A, \qquad \tau = \tau_{pos}\ \text{where}\ A > 0,\
    \tau_{neg}\ \text{elsewhere}$$

    with $r = \exp(\log\pi - \log\pi_{old})$. At $r = 1$ its gradient is that of `reinforce`, whatever $\tau$.

    Args:
        logp: `[B, T]` or `[B]` float, nats; log-prob of the token under the trained policy.
        old_logp: `logp`'s shape, nats; log-prob under the policy at the start of the step. A constant.
        advantages: `logp`'s shape. A constant.
        tau_pos: $\tau$ of positive advantages, above 0; the larger, the sooner the gradient fades.
        tau_neg: $\tau$ of the others. The paper takes it larger: what pushes a token down spreads over the vocabulary.

    Returns:
        `logp`'s shape, float32 or wider: the loss of each token.

    Raises:
        ValueError: if shapes differ or a temperature is not above 0.

    Example:
        >>> loss = sapo(jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.array([[1.0, -1.05]]))
        >>> loss.round(4).tolist()
        [[-2.0, 2.0]]

    Reference: Soft Adaptive Policy Optimization (arXiv 2511.20347).
    """
    for name, tau in (("tau_pos", tau_pos), ("tau_neg", tau_neg)):
        if isinstance(tau, float | int) and tau <= 0:
            raise ValueError(f"{name} must be above 0, got {tau}; near 0 the gate is open: the loss is then -r A")
    logp = as_logp(logp)
    advantages = as_constant("advantages", advantages, logp)
    tau = jnp.where(advantages > 0, tau_pos, tau_neg)
    return -4 / tau * jax.nn.sigmoid(tau * (importance_ratio(logp, old_logp) - 1)) * advantages


def _thresholds(divergence: BinaryDivergence, low: float | None, high: float | None) -> tuple[float, float]:
    if divergence not in get_args(BinaryDivergence):
        raise ValueError(f'divergence must be "tv" or "kl", got {divergence!r}')
    check_at_least("delta_low", low, 0, "a divergence")
    check_at_least("delta_high", high, 0, "a divergence")
    default = _DELTA[divergence]
    return default if low is None else low, default if high is None else high


def divergence_mask(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    *,
    divergence: BinaryDivergence = "tv",
    delta_low: float | None = None,
    delta_high: float | None = None,
) -> Array:
    r"""Indicator of the tokens that `dppo` trains: inside the trust region, or on their way back to it.

    A token is left out if its advantage pushes it further away from $\pi_{old}$ and the divergence of the two policies,
    reduced to "this token or another one", is above $\delta$:

    | divergence | $D$, with $p = \pi$ and $q = \pi_{old}$ of the token |
    |---|---|
    | `tv` | $\lvert p - q \rvert$ |
    | `kl` | $q \log(q / p) + (1 - q) \log((1 - q) / (1 - p))$ |

    Args:
        logp: `[B, T]` or `[B]` float, nats; log-prob of the token under the trained policy.
        old_logp: `logp`'s shape, nats; log-prob under the policy that sampled.
        advantages: `logp`'s shape; only the sign counts, and 0 counts as negative.
        divergence: see above.
        delta_low: $\delta$ where the advantage is not positive and $p < q$; None for 0.15 (`tv`) or 0.05 (`kl`).
        delta_high: $\delta$ where the advantage is positive and $p > q$; None for the same.

    Returns:
        `logp`'s shape, float32 or wider, 0 or 1, without gradient.

    Raises:
        ValueError: if shapes differ, a threshold is negative, or the divergence is unknown.

    Example:
        >>> logp, old_logp = jnp.log(jnp.array([[0.02, 0.9]])), jnp.log(jnp.array([[0.01, 0.7]]))
        >>> divergence_mask(logp, old_logp, jnp.ones((1, 2))).tolist()  # the ratio 2 stays, the ratio 1.29 does not
        [[1.0, 0.0]]

    Reference: Rethinking the Trust Region in LLM Reinforcement Learning (arXiv 2602.04879).
    """
    low, high = _thresholds(divergence, delta_low, delta_high)
    logp = jax.lax.stop_gradient(as_logp(logp))
    old_logp, advantages = as_constant("old_logp", old_logp, logp), as_constant("advantages", advantages, logp)
    p, q = jnp.exp(logp), jnp.exp(old_logp)
    if divergence == "tv":
        distance = jnp.abs(p - q)
    else:
        # log(1 - p) with p = exp(logp): expm1 keeps the digits of 1 - p where p is near 1; tiny keeps p = 1 finite.
        tiny = jnp.finfo(logp.dtype).tiny
        others, old_others = jnp.maximum(-jnp.expm1(logp), tiny), jnp.maximum(-jnp.expm1(old_logp), tiny)
        distance = -q * log_ratio(logp, old_logp) + old_others * (jnp.log(old_others) - jnp.log(others))
    outside = jnp.where(advantages > 0, (distance > high) & (p > q), (distance > low) & (p < q))
    return (~outside).astype(logp.dtype)


def dppo(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    *,
    divergence: BinaryDivergence = "tv",
    delta_low: float | None = None,
    delta_high: float | None = None,
    max_ratio: float | None = 20.0,
) -> Array:
    r"""Trust region on probabilities instead of ratios: $\ell = -M\, \mathrm{sg}(\min(r, c))\, A \log\pi$.

    $M$ is `divergence_mask`. A ratio clip lets a likely token move far and holds an unlikely one fast; the divergence
    does neither. Where the cap does not act, the gradient is that of $-M r A$.

    Args:
        logp: `[B, T]` or `[B]` float, nats; log-prob of the token under the trained policy.
        old_logp: `logp`'s shape, nats; log-prob under the policy that sampled. A constant.
        advantages: `logp`'s shape. A constant.
        divergence: `"tv"` or `"kl"`, see `divergence_mask`.
        delta_low: threshold of what is pushed down; None for 0.15 (`tv`) or 0.05 (`kl`).
        delta_high: threshold of what is pushed up; None for the same.
        max_ratio: $c$, bound of the weight; None for none. A small one biases the update.

    Returns:
        `logp`'s shape, float32 or wider: the loss of each token. Its value says nothing; its gradient does.

    Raises:
        ValueError: if shapes differ, a threshold is negative, `max_ratio` is below 1, or the divergence is unknown.

    Example:
        >>> logp, old_logp = jnp.log(jnp.array([[0.02, 0.9]])), jnp.log(jnp.array([[0.01, 0.7]]))
        >>> jax.grad(lambda logp: dppo(logp, old_logp, jnp.ones((1, 2))).sum())(logp).round(4).tolist()
        [[-2.0, -0.0]]

    Reference: Rethinking the Trust Region in LLM Reinforcement Learning (arXiv 2602.04879); the default thresholds are
    those of its scripts.
    """
    check_at_least("max_ratio", max_ratio, 1, "a ratio, e.g. 20.0, or None for no bound")
    logp = as_logp(logp)
    keep = divergence_mask(
        logp, old_logp, advantages, divergence=divergence, delta_low=delta_low, delta_high=delta_high
    )
    ratio = importance_ratio(logp, old_logp)
    weight = keep * (ratio if max_ratio is None else jnp.minimum(ratio, max_ratio))
    return -jax.lax.stop_gradient(weight) * as_constant("advantages", advantages, logp) * logp

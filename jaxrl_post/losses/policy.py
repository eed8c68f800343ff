"""Policy-gradient losses per token, the importance ratio they share, and what their clipping did.

Nothing is reduced here (see `aggregation`), and advantages come ready-made (see `jaxrl_post.advantages`).
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jaxrl_post.losses.arguments import as_constant, as_logp, check_at_least
from jaxrl_post.types import Array

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +- this before `exp`: e^20 is 4.9e8, far outside any clip range and safe in float32."""

DualClip: TypeAlias = Literal["loss", "ratio"]


def _check_clip(name: str, bound: float) -> None:
    if isinstance(bound, float | int) and bound < 0:
        raise ValueError(f"{name} must be >= 0 (a distance from 1), got {bound}; give e.g. {name}=0.2")


def log_ratio(logp: Array, old_logp: Array, *, limit: float = LOG_RATIO_LIMIT) -> Array:
    r"""Log of the importance ratio, clamped: $d = \mathrm{clip}(\log\pi - \log\pi_{old}, -20, 20)$.

    Args:
        logp: `[B, T]` or `[B]` float, nats; log-prob under the trained policy.
        old_logp: `logp`'s shape, nats; log-prob under the policy that is the ratio's denominator. A constant: no
            gradient flows into it.
        limit: nats, the clamp; above 20 the exponential is no longer safe in float32.

    Returns:
        `logp`'s shape, float32 or wider, nats. The gradient is zero where the clamp acts.

    Raises:
        ValueError: if the shapes differ or `limit` is negative.

    Example:
        >>> log_ratio(jnp.array([-1.0, -1.0]), jnp.array([-1.5, -99.0])).tolist()
        [0.5, 20.0]
    """
    check_at_least("limit", limit, 0)
    logp = as_logp(logp)
    return jnp.clip(logp - as_constant("old_logp", old_logp, logp), -limit, limit)


def importance_ratio(logp: Array, old_logp: Array) -> Array:
    r"""Importance ratio $r = \exp(\mathrm{clip}(\log\pi - \log\pi_{old}, -20, 20))$.

    Args:
        logp: `[B, T]` or `[B]` float, nats; log-prob under the trained policy.
        old_logp: `logp`'s shape, nats; log-prob under the policy that is the ratio's denominator. A constant: no
            gradient flows into it.

    Returns:
        `logp`'s shape, float32 or wider, in [e^-20, e^20].

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> importance_ratio(jnp.log(jnp.array([0.3])), jnp.log(jnp.array([0.2]))).round(4).tolist()
        [1.5]
    """
    return jnp.exp(log_ratio(logp, old_logp))


def ppo(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    dual_clip_of: DualClip = "loss",
    log_ratio_limit: float = LOG_RATIO_LIMIT,
) -> Array:
    r"""Clipped surrogate of PPO with two bounds, and optionally the dual clip.

    $$\ell = -\min(r A,\ \mathrm{clip}(r, 1 - \epsilon_{low}, 1 + \epsilon_{high})\, A), \qquad
    \ell_{dual} = \min(\ell, -c A)\ \text{where}\ A < 0$$

    with $r = \exp(\log\pi - \log\pi_{old})$. At $r = 1$ its gradient is that of `reinforce`. GRPO, DAPO
    (`clip_high=0.28`) and RLOO use it as it stands. With `log_ratio_limit=log(1000)` it is StableReinforce's pre-clip:
    the ratio is bounded before, not after, the exponential.

    Args:
        logp: `[B, T]` or `[B]` float, nats; log-prob of the token under the trained policy.
        old_logp: `logp`'s shape, nats; log-prob under the policy at the start of the step. A constant.
        advantages: `logp`'s shape. A constant.
        clip_low: $\epsilon_{low}$, distance of the lower bound from 1.
        clip_high: $\epsilon_{high}$, distance of the upper bound from 1.
        dual_clip: $c > 1$, the largest ratio that counts where the advantage is negative; None for no bound.
        dual_clip_of: what $c$ bounds: `"loss"`, as in the formula above, or `"ratio"`: the first term's $r$ becomes
            $\min(r, c)$ (TRL's `delta`). The two differ only for $c < 1 + \epsilon_{high}$.
        log_ratio_limit: nats, the clamp of the log-ratio.

    Returns:
        `logp`'s shape, float32 or wider: the loss of each token.

    Raises:
        ValueError: if shapes differ, a clip distance is negative, `dual_clip` is not above 1, or `dual_clip_of` is
            unknown.

    Example:
        >>> logp = jnp.log(jnp.array([[1.5, 0.5, 1.1]]))
        >>> [round(loss, 4) for loss in ppo(logp, jnp.zeros((1, 3)), jnp.array([[1.0, -1.0, 2.0]]))[0].tolist()]
        [-1.2, 0.8, -2.2]

    Reference: Proximal Policy Optimization Algorithms (arXiv 1707.06347); the dual clip is of Mastering Complex
    Control in MOBA Games with Deep Reinforcement Learning (arXiv 1912.09729), two bounds are of DAPO
    (arXiv 2503.14476), the pre-clip is of R1-Reward: Training Multimodal Reward Model Through Stable Reinforcement
    Learning (arXiv 2505.02835).
    """
    _check_clip("clip_low", clip_low)
    _check_clip("clip_high", clip_high)
    if isinstance(dual_clip, float | int) and dual_clip <= 1:
        raise ValueError(f"dual_clip must be above 1 (a ratio), got {dual_clip}; give e.g. dual_clip=3.0 or None")
    if dual_clip_of not in get_args(DualClip):
        raise ValueError(f'dual_clip_of must be "loss" or "ratio", got {dual_clip_of!r}')
    logp = as_logp(logp)
    ratio = jnp.exp(log_ratio(logp, old_logp, limit=log_ratio_limit))
    advantages = as_constant("advantages", advantages, logp)
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    if dual_clip is not None and dual_clip_of == "ratio":
        ratio = jnp.minimum(ratio, dual_clip)
    loss = jnp.maximum(-ratio * advantages, -clipped * advantages)
    if dual_clip is None or dual_clip_of == "ratio":
        return loss
    return jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)


def reinforce(logp: Array, advantages: Array) -> Array:
    r"""Plain policy gradient, $\ell = -A \log\pi$.

    Args:
        logp: `[B, T]` or `[B]` float, nats; log-prob of the token under the trained policy.
        advantages: `logp`'s shape. A constant: no gradient flows into it.

    Returns:
        `logp`'s shape, float32 or wider: the loss of each token. Its value says nothing; its gradient is the policy
        gradient.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> reinforce(jnp.array([[-1.0, -0.5]]), jnp.array([[2.0, -2.0]])).tolist()
        [[2.0, -1.0]]

    Reference: Simple statistical gradient-following algorithms for connectionist reinforcement learning
    (Williams, 1992).
    """
    logp = as_logp(logp)
    return -as_constant("advantages", advantages, logp) * logp


def _indicator(condition: Array, like: Array) -> Array:
    return jax.lax.stop_gradient(condition.astype(like.dtype))


def clipped_low(logp: Array, old_logp: Array, advantages: Array, *, clip_low: float = 0.2) -> Array:
    r"""Indicator of the tokens that `ppo` clips from below: $r < 1 - \epsilon_{low}$ and $A < 0$.

    They get no gradient. The mean under the mask is the metric `clip_ratio/low_mean`; it is 0 on the first pass over
    on-policy rollouts, where every ratio is 1.

    Args:
        logp: `[B, T]` or `[B]` float, nats; log-prob under the trained policy.
        old_logp: `logp`'s shape, nats.
        advantages: `logp`'s shape.
        clip_low: $\epsilon_{low}$, distance of the lower bound from 1.

    Returns:
        `logp`'s shape, float32 or wider, 0 or 1, without gradient.

    Raises:
        ValueError: if shapes differ or the clip distance is negative.

    Example:
        >>> logp = jnp.log(jnp.array([[0.5, 0.5, 1.5, 1.5]]))
        >>> clipped_low(logp, jnp.zeros((1, 4)), jnp.array([[-1.0, 1.0, -1.0, 1.0]])).tolist()
        [[1.0, 0.0, 0.0, 0.0]]
    """
    _check_clip("clip_low", clip_low)
    logp = as_logp(logp)
    ratio, advantages = importance_ratio(logp, old_logp), as_constant("advantages", advantages, logp)
    return _indicator((ratio < 1 - clip_low) & (advantages < 0), logp)


def clipped_high(logp: Array, old_logp: Array, advantages: Array, *, clip_high: float = 0.2) -> Array:
    r"""Indicator of the tokens that `ppo` clips from above: $r > 1 + \epsilon_{high}$ and $A > 0$.

    They get no gradient. The mean under the mask is the metric `clip_ratio/high_mean`.

    Args:
        logp: `[B, T]` or `[B]` float, nats; log-prob under the trained policy.
        old_logp: `logp`'s shape, nats.
        advantages: `logp`'s shape.
        clip_high: $\epsilon_{high}$, distance of the upper bound from 1.

    Returns:
        `logp`'s shape, float32 or wider, 0 or 1, without gradient.

    Raises:
        ValueError: if shapes differ or the clip distance is negative.

    Example:
        >>> logp = jnp.log(jnp.array([[0.5, 0.5, 1.5, 1.5]]))
        >>> clipped_high(logp, jnp.zeros((1, 4)), jnp.array([[-1.0, 1.0, -1.0, 1.0]])).tolist()
        [[0.0, 0.0, 0.0, 1.0]]
    """
    _check_clip("clip_high", clip_high)
    logp = as_logp(logp)
    ratio, advantages = importance_ratio(logp, old_logp), as_constant("advantages", advantages, logp)
    return _indicator((ratio > 1 + clip_high) & (advantages > 0), logp)


def clipped_region(
    logp: Array, old_logp: Array, advantages: Array, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> Array:
    r"""Indicator of the tokens that `ppo` clips on either side: `clipped_low` or `clipped_high`.

    The mean under the mask is the metric `clip_ratio/region_mean`.

    Args:
        logp: `[B, T]` or `[B]` float, nats; log-prob under the trained policy.
        old_logp: `logp`'s shape, nats.
        advantages: `logp`'s shape.
        clip_low: $\epsilon_{low}$, distance of the lower bound from 1.
        clip_high: $\epsilon_{high}$, distance of the upper bound from 1.

    Returns:
        `logp`'s shape, float32 or wider, 0 or 1, without gradient.

    Raises:
        ValueError: if shapes differ or a clip distance is negative.

    Example:
        >>> logp = jnp.log(jnp.array([[0.5, 0.5, 1.5, 1.5]]))
        >>> clipped_region(logp, jnp.zeros((1, 4)), jnp.array([[-1.0, 1.0, -1.0, 1.0]])).tolist()
        [[1.0, 0.0, 0.0, 1.0]]
    """
    # No token is in both: the two ask for advantages of opposite sign.
    return clipped_low(logp, old_logp, advantages, clip_low=clip_low) + clipped_high(
        logp, old_logp, advantages, clip_high=clip_high
    )

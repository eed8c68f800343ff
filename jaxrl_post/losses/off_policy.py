"""Policy gradients on rollouts of another policy, which give up the unbiased importance weight: TOPR, REC and DRO.

TOPR bounds the weight by the sign of the advantage, REC masks tokens that have gone far enough, DRO pulls back with a
quadratic penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.arguments import as_constant, as_tokens, check_at_least
from jaxrl_post.losses.policy import LOG_RATIO_LIMIT, log_ratio
from jaxrl_post.losses.sequence_ratio import sequence_log_ratio
from jaxrl_post.types import Array

Level: TypeAlias = Literal["token", "sequence"]
RecClip: TypeAlias = Literal["one_side", "two_side", "ring", "none"]
RecPenalty: TypeAlias = Literal["opmd", "asymre"]


def _check_level(level: str) -> None:
    if level not in get_args(Level):
        raise ValueError(f'level must be "token" or "sequence", got {level!r}')


def _check_bounds(name: str, bounds: Sequence[float]) -> None:
    if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1]:
        raise ValueError(f"{name} must be (lowest, highest) weight with 0 <= lowest <= highest, got {bounds}")


def topr(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    *,
    positive: Sequence[float] = (1.0, 1.0),
    negative: Sequence[float] = (0.0, 1.0),
    level: Level = "sequence",
) -> Array:
    r"""Tapered off-policy REINFORCE: bounds of the importance weight that depend on the advantage's sign.

    $$\ell_t = -\mathrm{sg}(\mathrm{clip}(\rho, a_\pm, b_\pm))\, A_t \log\pi_t, \qquad
    \rho = \exp\Big(\sum_t (\log\pi_t - \log\mu_t)\Big)$$

    What was good is learned at full weight however unlikely it is; what was bad is pushed down only as long as it is
    likely, so that nothing is pushed to $-\infty$. Reduce with `"seq_mean_token_sum"`. Other bounds give

    | positive | negative | level | |
    |---|---|---|---|
    | (1, 1) | (0, 1) | sequence | TOPR |
    | (0, 1) | (0, 1) | either | truncated importance weights (the truncated-ratio loss at token level) |
    | (1, 1) | (1, 1) | either | REINFORCE without correction |
    | (1, 1) | (0, 0) | either | learn from successes only |

    Args:
        logp: `[B, T]` float, nats; log-prob of the token under the trained policy.
        old_logp: `[B, T]`, nats; log-prob under the policy $\mu$ that sampled. A constant.
        advantages: `[B, T]`; in the paper the reward of the sequence, +1 or -1, less a constant. A constant.
        mask: `[B, T]`; 1 where the token counts.
        positive: $(a_+, b_+)$, bounds of the weight where the advantage is not negative.
        negative: $(a_-, b_-)$, bounds where it is negative.
        level: `"sequence"` as in the paper; `"token"` bounds the ratio of each token by itself.

    Returns:
        `[B, T]`, float32 or wider: the loss of each token. Its value says nothing; its gradient does.

    Raises:
        ValueError: if `logp` is not `[B, T]`, the others have another shape, bounds are out of order, or `level` is
            unknown.

    Example:
        >>> logp, mu = jnp.array([[-3.0], [-3.0]]), jnp.array([[-2.0], [-2.0]])
        >>> loss = topr(logp, mu, jnp.array([[1.0], [-1.0]]), jnp.ones((2, 1)))
        >>> [round(x, 5) for x in loss[:, 0].tolist()]
        [3.0, -1.10364]

    Reference: Tapered Off-Policy REINFORCE: Stable and efficient reinforcement learning for LLMs (arXiv 2503.14286).
    """
    _check_level(level)
    _check_bounds("positive", positive)
    _check_bounds("negative", negative)
    logp, old_logp, mask = as_tokens(logp, old_logp, mask)
    advantages = as_constant("advantages", advantages, logp)
    if level == "sequence":
        log_rho = sequence_log_ratio(logp, old_logp, mask, normalize_length=False)[:, None]
    else:
        log_rho = log_ratio(logp, old_logp)
    rho = jnp.exp(jax.lax.stop_gradient(log_rho))
    weight = jnp.where(advantages >= 0, jnp.clip(rho, *positive), jnp.clip(rho, *negative))
    return -weight * advantages * logp


def rec_mask(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    *,
    clip: RecClip = "one_side",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ring_low: float = 0.6,
    ring_high: float = 2.0,
    level: Level = "token",
) -> Array:
    r"""Indicator of the tokens that `rec` trains.

    | clip | kept, with the ratio $\rho$ |
    |---|---|
    | `one_side` | $A \geq 0,\ \rho \leq 1 + \epsilon_{high}$ or $A \leq 0,\ \rho \geq 1 - \epsilon_{low}$: as PPO |
    | `two_side` | $1 - \epsilon_{low} \leq \rho \leq 1 + \epsilon_{high}$ |
    | `ring` | `two_side` or $A \geq 0,\ \rho \leq 1 - \epsilon'_{low}$ or $A \leq 0,\ \rho \geq 1 + \epsilon'_{high}$ |
    | `none` | all |

    Args:
        logp: `[B, T]` float, nats; log-prob of the token under the trained policy.
        old_logp: `[B, T]`, nats; log-prob under the policy that sampled.
        advantages: `[B, T]`; only the sign counts.
        mask: `[B, T]`; 1 where the token counts.
        clip: see above.
        clip_low: $\epsilon_{low}$, distance of the lower bound from 1.
        clip_high: $\epsilon_{high}$, distance of the upper bound from 1.
        ring_low: $\epsilon'_{low}$ of `ring`.
        ring_high: $\epsilon'_{high}$ of `ring`.
        level: $\rho$ of the token, or of the sequence: $\exp(\mathrm{mean}_t d_t)$, as in `gspo`.

    Returns:
        `[B, T]`, float32 or wider, 0 or 1, without gradient; 0 where the mask is.

    Raises:
        ValueError: if `logp` is not `[B, T]`, the others have another shape, a distance is negative, or `clip` or
            `level` is unknown.

    Example:
        >>> logp, a = jnp.log(jnp.array([[1.5, 0.7, 3.0]])), jnp.array([[1.0, 1.0, -1.0]])
        >>> [rec_mask(logp, 0 * logp, a, a != 0, clip=c)[0].tolist() for c in ("one_side", "two_side", "ring")]
        [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]

    Reference: Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm (arXiv 2509.24203).
    """
    _check_level(level)
    if clip not in get_args(RecClip):
        raise ValueError(f"clip must be one of {', '.join(get_args(RecClip))}, got {clip!r}")
    for name, bound in (
        ("clip_low", clip_low),
        ("clip_high", clip_high),
        ("ring_low", ring_low),
        ("ring_high", ring_high),
    ):
        check_at_least(name, bound, 0, "a distance from 1")
    logp, old_logp, mask = as_tokens(jax.lax.stop_gradient(logp), old_logp, mask)
    up = as_constant("advantages", advantages, logp)
    down = up <= 0
    up = up >= 0
    if level == "sequence":
        rho = jnp.exp(sequence_log_ratio(logp, old_logp, mask))[:, None]
    else:
        rho = jnp.exp(log_ratio(logp, old_logp))
    inside = (rho >= 1 - clip_low) & (rho <= 1 + clip_high)
    keep = {
        "one_side": (up & (rho <= 1 + clip_high)) | (down & (rho >= 1 - clip_low)),
        "two_side": inside,
        "ring": inside | (up & (rho <= 1 - ring_low)) | (down & (rho >= 1 + ring_high)),
        "none": jnp.ones(logp.shape, bool),
    }[clip]
    return (keep & (mask != 0)).astype(logp.dtype)


def rec(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    *,
    clip: RecClip = "one_side",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ring_low: float = 0.6,
    ring_high: float = 2.0,
    level: Level = "token",
    importance_weight: bool = False,
    temperature: float | None = None,
    penalty: RecPenalty | None = None,
    tau: float = 0.1,
) -> Array:
    r"""Group-relative REINFORCE with what keeps it stable off policy: a clip, a penalty, or weights of the data.

    $$\ell_t = -M_t\, w_t\, A_t \log\pi_t + \Omega_t$$

    | family | |
    |---|---|
    | REC | $M$ is `rec_mask`; $w = 1$, or $w = \mathrm{sg}(\rho)$ with `importance_weight` |
    | RED-Weight | $w = e^{A / \mathrm{temperature}}$, with `temperature` |
    | REP, `penalty="opmd"` | $\Omega = \tau (\log\pi - \log\pi_{old})^2$ |
    | REP, `penalty="asymre"` | $\Omega = -\tau \log\pi$: a baseline lower by $\tau$ |

    GRPO is `importance_weight=True`, one-sided, with normalised advantages: the gradient is that of `ppo`. REINFORCE is
    `clip="none"`. Far wider clips (0.6, 2.0) learn faster and are still stable.

    Args:
        logp: `[B, T]` float, nats; log-prob of the token under the trained policy.
        old_logp: `[B, T]`, nats; log-prob under the policy that sampled. A constant.
        advantages: `[B, T]`, in the paper rewards less the group's mean. A constant.
        mask: `[B, T]`; 1 where the token counts.
        clip: which tokens are trained, see `rec_mask`.
        clip_low: see `rec_mask`.
        clip_high: see `rec_mask`.
        ring_low: see `rec_mask`.
        ring_high: see `rec_mask`.
        level: ratio of the token or of the sequence, see `rec_mask`.
        importance_weight: weigh by the ratio.
        temperature: of the weights of RED-Weight, in units of the advantage; None for none.
        penalty: None, `"opmd"` or `"asymre"`; it is not clipped.
        tau: $\tau$ of the penalty.

    Returns:
        `[B, T]`, float32 or wider: the loss of each token. Its value says nothing; its gradient does.

    Raises:
        ValueError: if `logp` is not `[B, T]`, the others have another shape, a number is out of range, or a name is
            unknown.

    Example:
        >>> logp, ones = jnp.log(jnp.array([[0.15, 0.3]])), jnp.ones((1, 2))
        >>> old_logp = jnp.log(jnp.array([[0.14, 0.1]]))
        >>> jax.grad(lambda logp: rec(logp, old_logp, ones, ones).sum())(logp).tolist()
        [[-1.0, -0.0]]

    Reference: Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm: Demystifying Some Myths About GRPO and Its
    Friends (arXiv 2509.24203).
    """
    if penalty is not None and penalty not in get_args(RecPenalty):
        raise ValueError(f'penalty must be None, "opmd" or "asymre", got {penalty!r}')
    if temperature is not None and isinstance(temperature, float | int) and temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}; None for equal weights")
    check_at_least("tau", tau, 0)
    keep = rec_mask(
        logp,
        old_logp,
        advantages,
        mask,
        clip=clip,
        clip_low=clip_low,
        clip_high=clip_high,
        ring_low=ring_low,
        ring_high=ring_high,
        level=level,
    )
    logp, old_logp, mask = as_tokens(logp, old_logp, mask)
    advantages = as_constant("advantages", advantages, logp)
    if temperature is not None:
        advantages = advantages * jnp.exp(jnp.minimum(advantages / temperature, LOG_RATIO_LIMIT))
    d = log_ratio(logp, old_logp)
    weight = keep
    if importance_weight:
        log_rho = d if level == "token" else sequence_log_ratio(logp, old_logp, mask)[:, None]
        weight = keep * jax.lax.stop_gradient(jnp.exp(log_rho))
    loss = -weight * advantages * logp
    if penalty == "opmd":
        return loss + tau * jnp.square(d)
    return loss - tau * logp if penalty == "asymre" else loss


def dro(
    logp: Array, old_logp: Array, advantages: Array, mask: Array, *, beta: float = 1.0, level: Level = "sequence"
) -> Array:
    r"""Policy gradient with a quadratic penalty on the log-ratio: $\ell = -A \log\pi + \frac\beta2 d^2$.

    With $d = \sum_t (\log\pi_t - \log\pi_{old,t})$ of the sequence its gradient is that of half the squared residual
    $(A - \beta d)^2 / \beta$ without the part of $A$ alone: the optimum is $\pi \propto \pi_{old}\, e^{A / \beta}$.

    Args:
        logp: `[B, T]` float, nats; log-prob of the token under the trained policy.
        old_logp: `[B, T]`, nats; log-prob under the policy that the penalty holds on to. A constant.
        advantages: `[B, T]`, the reward less an estimate of the (soft) value of the prompt. A constant.
        mask: `[B, T]`; 1 where the token counts.
        beta: $\beta$ above 0, in units of the advantage per nat.
        level: `"sequence"` as in the paper, where the sum over a sequence's tokens is its loss (reduce with
            `"seq_mean_token_sum"`); `"token"` squares the log-ratio of each token by itself.

    Returns:
        `[B, T]`, float32 or wider: the loss of each token.

    Raises:
        ValueError: if `logp` is not `[B, T]`, the others have another shape, `beta` is not above 0, or `level` is
            unknown.

    Example:
        >>> logp, ones = jnp.array([[-1.0, -2.0]]), jnp.ones((1, 2))
        >>> [float(dro(logp, 2 * logp, ones, ones, beta=0.5, level=level).sum()) for level in ("sequence", "token")]
        [5.25, 4.25]

    Reference: Offline Regularised Reinforcement Learning for Large Language Models Alignment (arXiv 2405.19107), with a
    given baseline in the place of a learned value.
    """
    _check_level(level)
    if isinstance(beta, float | int) and beta <= 0:
        raise ValueError(f"beta must be above 0, got {beta}; without the penalty the loss is losses.reinforce")
    logp, old_logp, mask = as_tokens(logp, old_logp, mask)
    d = log_ratio(logp, old_logp)
    whole = d if level == "token" else masked.sum(d, mask, 1, keepdims=True)
    return -as_constant("advantages", advantages, logp) * logp + beta / 2 * whole * d

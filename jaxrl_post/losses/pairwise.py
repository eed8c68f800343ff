"""Policy gradients on differences of rewards: what a prompt adds to all its answers' rewards cancels.

Both losses and the plain gradient read log-probs of whole sequences in groups `[P, G]` and average over all unordered
pairs of valid answers. A KL penalty goes into the rewards: `rewards - beta * (old_logp - ref_logp)`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.consistency import prepare_group
from jaxrl_post.losses.policy import LOG_RATIO_LIMIT, log_ratio, ppo
from jaxrl_post.types import Array

_GROUP = 1  # the axis of G


def _mean_over_pairs(x: Array, valid: Array) -> Array:
    """Mean of a symmetric `[P, G, G]` over unordered pairs of distinct valid members, `[P]`."""
    pair = valid[:, :, None] & valid[:, None, :] & ~jnp.eye(valid.shape[1], dtype=bool)
    return masked.mean(x, pair, (1, 2))


def _differences(x: Array) -> Array:
    """`x_i - x_j` at `[p, i, j]`."""
    return x[:, :, None] - x[:, None, :]


def ppg(logp: Array, rewards: Array, valid: Array | None = None) -> Array:
    r"""Pairwise policy gradient: $\ell = -\frac12\, \mathrm{mean}_{i<j}\, (r_i - r_j)(\log\pi(y_i) - \log\pi(y_j))$.

    Its gradient is that of RLOO for any number of answers, $-\frac1n \sum_i (r_i - \mathrm{mean}_{j \neq i} r_j)
    \nabla \log\pi(y_i)$.

    Args:
        logp: `[P, G]` float, nats; log-prob of the sequence under the trained policy, summed over tokens.
        rewards: `[P, G]` float. A constant.
        valid: `[P, G]` bool, False where the answer does not count; None for all.

    Returns:
        `[P]`, float32 or wider: the loss of each prompt; 0 with zero gradient for fewer than two valid answers. Its
        value says nothing.

    Raises:
        ValueError: if the arrays are not `[P, G]` of one shape.

    Example:
        >>> float(ppg(jnp.array([[-1.0, -2.0]]), jnp.array([[3.0, 1.0]]))[0])
        -1.0

    Reference: Pairwise Proximal Policy Optimization: Harnessing Relative Feedback for LLM Alignment
    (arXiv 2310.00212).
    """
    logp, valid, (rewards,) = prepare_group(logp, valid, rewards=rewards)
    return -_mean_over_pairs(_differences(rewards) * _differences(logp), valid) / 2


def p3o_separate(
    logp: Array,
    old_logp: Array,
    rewards: Array,
    valid: Array | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Array:
    r"""P3O with each answer's ratio clipped on its own (V1).

    $$\ell = \frac12\, \mathrm{mean}_{i<j}\big[\ell_{ppo}(\rho_i, D_{ij}) + \ell_{ppo}(\rho_j, -D_{ij})\big], \qquad
    D_{ij} = r_i - r_j, \quad \rho_i = \pi(y_i) / \pi_{old}(y_i)$$

    with $\ell_{ppo}(\rho, A) = -\min(\rho A, \mathrm{clip}(\rho, 1 - \epsilon_{low}, 1 + \epsilon_{high}) A)$.

    Args:
        logp: `[P, G]` float, nats; log-prob of the sequence under the trained policy, summed over tokens.
        old_logp: `[P, G]` float, nats; the same under the policy that sampled. A constant.
        rewards: `[P, G]` float. A constant.
        valid: `[P, G]` bool, False where the answer does not count; None for all.
        clip_low: $\epsilon_{low}$, distance of the lower bound from 1.
        clip_high: $\epsilon_{high}$, distance of the upper bound from 1.

    Returns:
        `[P]`, float32 or wider: the loss of each prompt; 0 with zero gradient for fewer than two valid answers.

    Raises:
        ValueError: if the arrays are not `[P, G]` of one shape, or a clip distance is negative.

    Example:
        >>> loss = p3o_separate(jnp.log(jnp.array([[1.5, 0.9]])), jnp.zeros((1, 2)), jnp.array([[3.0, 1.0]]))
        >>> round(float(loss[0]), 6)  # -(2 * 1.2 - 2 * 0.9) / 2
        -0.3

    Reference: Pairwise Proximal Policy Optimization: Harnessing Relative Feedback for LLM Alignment
    (arXiv 2310.00212).
    """
    logp, valid, (old_logp, rewards) = prepare_group(logp, valid, old_logp=old_logp, rewards=rewards)
    difference = _differences(rewards)
    shape = difference.shape
    own, old = (jnp.broadcast_to(x[:, :, None], shape).reshape(-1) for x in (logp, old_logp))
    loss = ppo(own, old, difference.reshape(-1), clip_low=clip_low, clip_high=clip_high).reshape(shape)
    # Over ordered pairs each unordered one is met from both sides, and the mean halves their sum.
    return _mean_over_pairs(loss, valid)


def p3o_joint(
    logp: Array,
    old_logp: Array,
    rewards: Array,
    valid: Array | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Array:
    r"""P3O with the product of the two ratios clipped (V2).

    $$\ell = -\mathrm{mean}_{i<j} \min\big(D_{ij}\, w_{ij} M_{ij},\ D_{ij}\, \mathrm{clip}(w_{ij}, 1 - \epsilon_{low},
    1 + \epsilon_{high}) M_{ij}\big), \qquad w_{ij} = \mathrm{sg}(\rho_i \rho_j), \quad
    M_{ij} = \tfrac12 (\log\pi(y_i) - \log\pi(y_j))$$

    The paper describes this form in words; the expression is reconstructed from its gradient
    $D\, \rho_1 \rho_2 \nabla M$, with PPO's pessimistic minimum: the weight of a pair that the policy already ranks as
    the rewards do ($D M > 0$) is bounded from above, that of a pair it ranks the other way from below.

    Args:
        logp: `[P, G]` float, nats; log-prob of the sequence under the trained policy, summed over tokens.
        old_logp: `[P, G]` float, nats; the same under the policy that sampled. A constant.
        rewards: `[P, G]` float. A constant.
        valid: `[P, G]` bool, False where the answer does not count; None for all.
        clip_low: $\epsilon_{low}$, distance of the lower bound from 1.
        clip_high: $\epsilon_{high}$, distance of the upper bound from 1.

    Returns:
        `[P]`, float32 or wider: the loss of each prompt; 0 with zero gradient for fewer than two valid answers. Its
        value says nothing; where all ratios are 1 its gradient is that of `ppg`.

    Raises:
        ValueError: if the arrays are not `[P, G]` of one shape, or a clip distance is negative.

    Example:
        >>> loss = p3o_joint(jnp.array([[-1.0, -2.0]]), jnp.array([[-2.0, -2.0]]), jnp.array([[3.0, 1.0]]))
        >>> round(float(loss[0]), 6)  # -2 * 1.2 * (-1 + 2) / 2
        -1.2

    Reference: Pairwise Proximal Policy Optimization: Harnessing Relative Feedback for LLM Alignment
    (arXiv 2310.00212).
    """
    for name, bound in (("clip_low", clip_low), ("clip_high", clip_high)):
        if isinstance(bound, float | int) and bound < 0:
            raise ValueError(f"{name} must be >= 0 (a distance from 1), got {bound}; give e.g. {name}=0.2")
    logp, valid, (old_logp, rewards) = prepare_group(logp, valid, old_logp=old_logp, rewards=rewards)
    ratios = jax.lax.stop_gradient(log_ratio(logp, old_logp))
    joint = jnp.exp(jnp.clip(ratios[:, :, None] + ratios[:, None, :], -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    margin = _differences(rewards) * _differences(logp) / 2
    surrogate = jnp.minimum(joint * margin, jnp.clip(joint, 1 - clip_low, 1 + clip_high) * margin)
    return -_mean_over_pairs(surrogate, valid)

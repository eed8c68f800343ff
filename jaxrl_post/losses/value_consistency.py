"""Policies read as action values: ROVER's valuation of the uniform policy, and soft Q-learning by path consistency.

In both the policy's own log-probs are the value function, so there is no critic; losses are squared differences to a
target, one per token. Positions without mask are passed over: the state after a token is the next one where the policy
acts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.policy import log_ratio
from jaxrl_post.types import Array


def _rows(mask: Array, **arrays: Array) -> tuple[Array, list[Array]]:
    mask = jnp.asarray(mask)
    masked.check_axes("mask", mask, "[B, T]")
    rows = []
    for name, x in arrays.items():
        x = masked.as_float(x)
        masked.check_like(name, x, "mask", mask)
        rows.append(jnp.where(mask != 0, x, 0.0))
    return mask != 0, rows


def _at_next_action(x: Array, acts: Array) -> Array:
    """`x` at the next position after each one where the policy acts; 0 after the last."""
    length = acts.shape[1]
    here = jnp.where(acts, jnp.arange(length), length)
    after = jnp.pad(jax.lax.cummin(here, axis=1, reverse=True)[:, 1:], ((0, 0), (0, 1)), constant_values=length)
    padded = jnp.pad(x, ((0, 0), (0, 1)))
    return jnp.where(acts, jnp.take_along_axis(padded, after, axis=1), 0.0)


def rover_target(
    rewards: Array, mean_logp: Array, old_mean_logp: Array, mask: Array, *, rho: float = 1.0, next_value: bool = True
) -> Array:
    r"""Regression target of ROVER: the reward, and the value of the uniform policy at the next state.

    $$y_t = \tilde r_t + \rho\, \frac{1}{|V|} \sum_v \big[\log\pi(v|s_{t'}) - \log\pi_{old}(v|s_{t'})\big]$$

    with $t'$ the next trained token, and no second term after the last. In a tree with rewards at the leaves, the
    exact form has $\tilde r$ on the last token; the practical one gives every token the centred reward
    $r_i - \bar r$ of its sequence.

    Args:
        rewards: `[B, T]` float; `advantages.per_token(advantages.dr_grpo(rewards), mask)`, or the reward on the last
            token (`advantages.on_last_token`).
        mean_logp: `[B, T]` float, nats; mean over the vocabulary of the log-probs that the trained policy had when it
            chose the token.
        old_mean_logp: `[B, T]` float, nats; the same under the policy that sampled.
        mask: `[B, T]`, nonzero where the policy chose the token.
        rho: $\rho$, the temperature: a unit of Q is $1/\rho$ nats.
        next_value: False leaves the second term out.

    Returns:
        `[B, T]`, float32 or wider, in units of the reward, without gradient; 0 where the mask is.

    Raises:
        ValueError: if the arrays are not `[B, T]` of one shape.

    Example:
        >>> target = rover_target(jnp.array([[0.5, 0.5]]), jnp.array([[-2.0, -2.1]]), jnp.full((1, 2), -2.0),
        ...                       jnp.ones((1, 2)))
        >>> [round(x, 4) for x in target[0].tolist()]
        [0.4, 0.5]

    Reference: Random Policy Valuation is Enough for LLM Reasoning with Verifiable Rewards (arXiv 2509.24981).
    """
    acts, (rewards, mean_logp, old_mean_logp) = _rows(
        mask, rewards=rewards, mean_logp=mean_logp, old_mean_logp=old_mean_logp
    )
    if next_value:
        rewards = rewards + rho * _at_next_action(mean_logp - old_mean_logp, acts)
    return jax.lax.stop_gradient(rewards)


def rover(logp: Array, old_logp: Array, target: Array, *, rho: float = 1.0, clip_eps: float | None = None) -> Array:
    r"""ROVER's loss of each token: $(Q_t - y_t)^2$ with $Q_t = \rho\,(\log\pi - \log\pi_{old})_t$.

    Args:
        logp: `[B, T]` float, nats; log-prob of the token under the trained policy.
        old_logp: `[B, T]` float, nats; under the policy that sampled. A constant.
        target: `[B, T]` float, in units of the reward; see `rover_target`. A constant.
        rho: $\rho$, the temperature.
        clip_eps: a token whose ratio has left `[1 - clip_eps, 1 + clip_eps]`, and whose target is further out, gets no
            gradient; None for no such bound.

    Returns:
        `[B, T]`, float32 or wider: the loss of each token.

    Raises:
        ValueError: if the shapes differ, or `clip_eps` is not in (0, 1).

    Example:
        >>> round(float(rover(jnp.array([[-0.8]]), jnp.array([[-1.0]]), jnp.array([[0.4]]))[0, 0]), 6)
        0.04

    Reference: Random Policy Valuation is Enough for LLM Reasoning with Verifiable Rewards (arXiv 2509.24981).
    """
    if isinstance(clip_eps, float | int) and not 0 < clip_eps < 1:
        raise ValueError(f"clip_eps must be in (0, 1), a distance of the ratio from 1, got {clip_eps}")
    ratio = log_ratio(logp, old_logp)
    target = jax.lax.stop_gradient(masked.as_float(target))
    masked.check_like("target", target, "logp", ratio)
    if clip_eps is not None:
        above = (ratio > jnp.log1p(clip_eps)) & (target > rho * ratio)
        below = (ratio < jnp.log1p(-clip_eps)) & (target < rho * ratio)
        ratio = jnp.where(above | below, jax.lax.stop_gradient(ratio), ratio)
    return jnp.square(rho * ratio - target)


def soft_q_single_step(logp: Array, target_value: Array, rewards: Array, mask: Array) -> Array:
    r"""Soft Q-learning over one step: $\big(\log\pi(a_t|s_t) - (r_t + \bar V_{t'} - \bar V_t)\big)^2$.

    With $Q$ = logits and $V$ = logsumexp of them, the advantage $Q_t - V_t$ is the log-prob of the action. $\bar V$ is
    that of a target network (a Polyak average of the policy), and 0 after the last action.

    Args:
        logp: `[B, T]` float, nats; log-prob of the token under the trained policy.
        target_value: `[B, T]` float, nats; logsumexp of the target network's logits where the token was chosen. A
            constant.
        rewards: `[B, T]` float, in nats of the target policy $e^{r}$; read where the mask is 1
            (`advantages.on_last_token` for a reward of the whole sequence). A constant.
        mask: `[B, T]`, nonzero where the policy chose the token.

    Returns:
        `[B, T]`, float32 or wider: the loss of each token; 0 where the mask is.

    Raises:
        ValueError: if the arrays are not `[B, T]` of one shape.

    Example:
        >>> logp, value = jnp.log(jnp.array([[0.5]])), jnp.log(jnp.array([[2.0]]))
        >>> round(float(soft_q_single_step(logp, value, jnp.ones((1, 1)), jnp.ones((1, 1)))[0, 0]), 6)
        1.0

    References: RLPrompt: Optimizing Discrete Text Prompts with Reinforcement Learning (arXiv 2205.12548); Efficient
    (Soft) Q-Learning for Text Generation with Limited Good Data (arXiv 2106.07704).
    """
    acts, (logp, value, rewards) = _rows(mask, logp=logp, target_value=target_value, rewards=rewards)
    target = rewards + _at_next_action(value, acts) - value
    return jnp.where(acts, jnp.square(logp - jax.lax.stop_gradient(target)), 0.0)


def soft_q_multi_step(logp: Array, target_value: Array, rewards: Array, mask: Array) -> Array:
    r"""Soft Q-learning to the end of the sequence, from every token of it.

    $$\ell_t = \Big(\sum_{l \ge t} \log\pi(a_l|s_l) - \big(\sum_{l \ge t} r_l - \bar V_t\big)\Big)^2$$

    The sum of `soft_q_single_step`'s residuals from each token on: a sparse reward at the end reaches every token at
    once.

    Args:
        logp: `[B, T]` float, nats; log-prob of the token under the trained policy.
        target_value: `[B, T]` float, nats; logsumexp of the target network's logits where the token was chosen. A
            constant.
        rewards: `[B, T]` float, in nats of the target policy $e^{r}$; read where the mask is 1. A constant.
        mask: `[B, T]`, nonzero where the policy chose the token.

    Returns:
        `[B, T]`, float32 or wider: the loss of each token; 0 where the mask is.

    Raises:
        ValueError: if the arrays are not `[B, T]` of one shape.

    Example:
        >>> logp, value = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[4.0, 2.0]]))
        >>> loss = soft_q_multi_step(logp, value, jnp.array([[0.0, 1.0]]), jnp.ones((1, 2)))
        >>> [round(x, 6) for x in loss[0].tolist()]
        [1.0, 1.0]

    References: RLPrompt: Optimizing Discrete Text Prompts with Reinforcement Learning (arXiv 2205.12548); Bridging the
    Gap Between Value and Policy Based Reinforcement Learning (arXiv 1702.08892).
    """
    acts, (logp, value, rewards) = _rows(mask, logp=logp, target_value=target_value, rewards=rewards)
    ahead = jax.lax.cumsum(logp - jax.lax.stop_gradient(rewards), axis=1, reverse=True)
    return jnp.where(acts, jnp.square(ahead + jax.lax.stop_gradient(value)), 0.0)

"""Rewards on every token, read off a policy that has learned preferences."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import advantages, losses, masked
from jaxrl_post.types import Array


def rto(
    rewards: Array,
    dpo_logp: Array,
    ref_logp: Array,
    old_logp: Array,
    mask: Array,
    *,
    beta1: float = 0.05,
    beta2: float = 0.01,
    clip: float | None = 0.05,
    max_reward: float | None = 10.0,
) -> Array:
    r"""RTO: what a policy trained by DPO thinks of each token, the KL penalty, and the sequence's reward at its end.

    $$r_t = \mathrm{clip}(\beta_1 (\log\pi_{dpo} - \log\pi_{ref})_t, -c, c) - \beta_2 (\log\pi_{old} - \log\pi_{ref})_t
    + [t = \mathrm{last}]\, \mathrm{clip}(R, -10, 10)$$

    With $\beta_1 = 0$ it is the reward of PPO from human feedback. With $\beta_1 = \beta_2 = \beta$, no clip and no
    reward of the sequence, the return is $\beta \log(\pi_{dpo} / \pi_{old})$.

    Args:
        rewards: `[P, G]` float; $R$, of the reward model.
        dpo_logp: `[B, T]` float, nats; log-prob of the token under the DPO policy.
        ref_logp: `[B, T]` float, nats; under the reference, which DPO began from.
        old_logp: `[B, T]` float, nats; under the policy that sampled.
        mask: `[B, T]`, nonzero where the policy chose the token; `B = P * G`, prompt-major.
        beta1: $\beta_1$, scale of the DPO policy's reward.
        beta2: $\beta_2$, weight of the KL penalty.
        clip: $c > 0$, bound of the DPO policy's reward of a token, in units of the reward; None for none (0 in the
            authors' code).
        max_reward: bound of $|R|$; None for none.

    Returns:
        `[B, T]`, float32 or wider, without gradient; 0 where the mask is.

    Raises:
        ValueError: if the shapes do not fit, or `clip` or `max_reward` is not above 0.

    Example:
        >>> dpo, ref, old = (jnp.array([x]) for x in ([-1.0, -2.0], [-1.5, -1.0], [-1.2, -1.4]))
        >>> [round(r, 4) for r in rto(jnp.array([[2.0]]), dpo, ref, old, jnp.ones((1, 2)))[0].tolist()]
        [0.022, 1.954]

    Reference: DPO Meets PPO: Reinforced Token Optimization for RLHF (arXiv 2404.18922).
    """
    for name, bound in (("clip", clip), ("max_reward", max_reward)):
        if isinstance(bound, float | int) and bound <= 0:
            raise ValueError(f"{name} must be above 0, got {bound}; None for no bound")
    dpo_logp, mask = masked.as_float(dpo_logp), jnp.asarray(mask)
    masked.check_axes("dpo_logp", dpo_logp, "[B, T]")
    for name, x in (("mask", mask), ("ref_logp", ref_logp), ("old_logp", old_logp)):
        masked.check_like(name, x, "dpo_logp", dpo_logp)
    dense = beta1 * losses.log_ratio(dpo_logp, ref_logp)
    if clip is not None:
        dense = jnp.clip(dense, -clip, clip)
    rewards = masked.as_float(rewards)
    if max_reward is not None:
        rewards = jnp.clip(rewards, -max_reward, max_reward)
    total = dense - beta2 * losses.log_ratio(old_logp, ref_logp) + advantages.on_last_token(rewards, mask)
    return jax.lax.stop_gradient(jnp.where(mask != 0, total, 0.0))

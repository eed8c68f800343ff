"""What rewards that are wrong, or have nothing to do with the answer, do to advantages."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def random_reward(key: Array, shape: tuple[int, ...], *, rate: float = 0.5) -> Array:
    """Rewards of 1 with some probability, and otherwise 0, whatever the answer: a control for any claim of learning.

    Args:
        key: random key.
        shape: of the rewards.
        rate: probability of 1.

    Returns:
        float32.

    Raises:
        ValueError: if `rate` is outside [0, 1].

    Example:
        >>> float(random_reward(jax.random.key(0), (2, 4), rate=1.0).sum())
        8.0

    Reference: Exploration v.s. Exploitation: Rethinking RLVR through Clipping, Entropy, and Spurious Reward
    (arXiv 2512.16912).
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}")
    return jax.random.bernoulli(key, rate, shape).astype(jnp.float32)


def advantage_loss(right: Array, group_size: Array | int, false_right: Array, false_wrong: Array) -> Array:
    r"""Advantage that right answers lose to wrong labels, $\Delta = \frac{g (G - n)}{G} + \frac{f n}{G}$.

    Under random labels its mean is $n (G - n) / G$: the more of a group are right, the less wrong labels cost.

    Args:
        right: any shape, $n$: right answers of a group.
        group_size: $G$.
        false_right: the same shape, $f$: wrong answers that are labelled right.
        false_wrong: the same shape, $g$: right answers that are labelled wrong.

    Returns:
        The shape of `right`, float32 or wider, in units of the reward.

    Example:
        >>> advantage_loss(jnp.array(12), 16, jnp.array(0), jnp.array(1)).item()
        0.25

    Reference: Exploration v.s. Exploitation: Rethinking RLVR through Clipping, Entropy, and Spurious Reward
    (arXiv 2512.16912).
    """
    n, f, g = (masked.as_float(x) for x in (right, false_right, false_wrong))
    return (g * (group_size - n) + f * n) / group_size


def expected_advantage_loss(right: Array, group_size: Array | int) -> Array:
    r"""`advantage_loss` under labels that are right or wrong by a coin, $n (G - n) / G$.

    Args:
        right: any shape, $n$: right answers of a group.
        group_size: $G$.

    Returns:
        The shape of `right`, float32 or wider.

    Example:
        >>> expected_advantage_loss(jnp.array([2, 8, 12, 15]), 16).tolist()
        [1.75, 4.0, 3.0, 0.9375]

    Reference: Exploration v.s. Exploitation: Rethinking RLVR through Clipping, Entropy, and Spurious Reward
    (arXiv 2512.16912).
    """
    n = masked.as_float(right)
    return n * (group_size - n) / group_size


def clip_share(logp: Array, old_logp: Array, advantages: Array, mask: Array, *, clip: float = 0.2) -> Array:
    r"""How much of the surrogate the clip takes away, $|\sum (\rho A - \min(\rho A, \bar\rho A))| / |\sum \rho A|$.

    Args:
        logp: `[B, T]` float, nats, of the policy.
        old_logp: `[B, T]` float, nats, of the policy that sampled.
        advantages: `[B, T]` float.
        mask: `[B, T]`, nonzero where a token counts.
        clip: of the ratio, on both sides.

    Returns:
        Scalar, float32 or wider; 0 where there is nothing to clip.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> one = jnp.ones((1, 1))
        >>> round(float(clip_share(jnp.log(1.6 * one), 0 * one, one, one)), 4)
        0.25

    Reference: Exploration v.s. Exploitation: Rethinking RLVR through Clipping, Entropy, and Spurious Reward
    (arXiv 2512.16912).
    """
    logp, old_logp, advantages = (masked.as_float(x) for x in (logp, old_logp, advantages))
    masked.check_like("old_logp", old_logp, "logp", logp)
    masked.check_like("advantages", advantages, "logp", logp)
    ratio = jnp.exp(logp - old_logp)
    raw = ratio * advantages
    kept = jnp.minimum(raw, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages)
    whole, lost = masked.sum(raw, mask), masked.sum(raw - kept, mask)
    return jnp.where(whole != 0, jnp.abs(lost / jnp.where(whole != 0, whole, 1.0)), 0.0)

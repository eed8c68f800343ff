"""Entropy in a loss: which tokens are uncertain enough to learn from, what becomes of them in training, and how strong
the bonus should be now.

The bonus itself needs no function: it is the term `Term(stats["policy"].entropy, mask, mode, weight=-coefficient)`.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def top_entropy_mask(
    entropy: Array, mask: Array, *, fraction: float = 0.2, level: Literal["batch", "sequence"] = "batch"
) -> Array:
    r"""Indicator of the tokens of highest entropy, $1[H_{b,t} \ge \tau]$, $\tau$ the $(1 - \rho)$ quantile of all $H$.

    Multiply a policy loss by it and learn from forking tokens only; the denominator stays that of all tokens. The
    quantile is of the whole batch: give this function all rows at once, never those of a micro-batch.

    Args:
        entropy: `[B, T]` float, nats; of the distribution that the token was drawn from.
        mask: `[B, T]`, nonzero where the token counts.
        fraction: $\rho$ in (0, 1], share of the tokens that is kept. Tokens that tie with the last one kept are kept
            too, so equal entropies keep all.
        level: whose quantile $\tau$ is: `"batch"`, or `"sequence"` for that of each row, so that every sequence keeps
            the same share.

    Returns:
        `[B, T]`, float32 or wider, 0 or 1, without gradient; 0 where `mask` is.

    Raises:
        ValueError: if shapes differ, `fraction` is outside (0, 1] or `level` is unknown.

    Example:
        >>> entropy, mask = jnp.array([[0.1, 2.0, 0.3, 0.0, 9.0]]), jnp.array([[1, 1, 1, 1, 0]])
        >>> top_entropy_mask(entropy, mask, fraction=0.5).tolist()
        [[0.0, 1.0, 1.0, 0.0, 0.0]]

    Reference: Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning for LLM
    Reasoning (arXiv 2506.01939).
    """
    if isinstance(fraction, float | int) and not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}; give e.g. fraction=0.2, or 1.0 for every token")
    if level not in ("batch", "sequence"):
        raise ValueError(f'level must be "batch" or "sequence", got {level!r}')
    entropy, mask = masked.as_float(entropy), jnp.asarray(mask)
    masked.check_axes("entropy", entropy, "[B, T]")
    masked.check_like("mask", mask, "entropy", entropy)
    threshold = masked.quantile(entropy, mask, 1 - fraction, 1 if level == "sequence" else None, keepdims=True)
    return jax.lax.stop_gradient(((entropy >= threshold) & (mask != 0)).astype(entropy.dtype))


def entropy_overlap(entropy: Array, other: Array, mask: Array, *, fraction: float = 0.2) -> Array:
    r"""Share of the tokens of highest entropy that are so under another model too, e.g. the one training began from.

    $$|S \cap S'| / |S|, \qquad S = \{t : H_t \ge \tau_\rho\}$$

    Args:
        entropy: `[B, T]` float, nats; of the model in question.
        other: `[B, T]` float, nats; of the other model, on the same tokens.
        mask: `[B, T]`, nonzero where the token counts.
        fraction: $\rho$ of `top_entropy_mask`, for both.

    Returns:
        Scalar in [0, 1]; 0 for an empty mask.

    Raises:
        ValueError: as `top_entropy_mask`.

    Example:
        >>> entropy, other = jnp.array([[0.0, 0.1, 1.0, 2.0]]), jnp.array([[0.0, 1.0, 0.1, 2.0]])
        >>> float(entropy_overlap(entropy, other, jnp.ones((1, 4)), fraction=0.5))
        0.5

    Reference: Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning for LLM
    Reasoning (arXiv 2506.01939).
    """
    chosen = top_entropy_mask(entropy, mask, fraction=fraction)
    return masked.mean(top_entropy_mask(other, mask, fraction=fraction), chosen)


def entropy_change_by_percentile(entropy: Array, other: Array, mask: Array, *, bins: int = 20) -> tuple[Array, Array]:
    """How much the entropy of tokens differs from what it was, by how high it was.

    Args:
        entropy: `[B, T]` float, nats; of the trained model.
        other: `[B, T]` float, nats; of the model it was before, on the same tokens.
        mask: `[B, T]`, nonzero where the token counts.
        bins: tokens are put in order of `other` and cut into so many equal parts; 20 are parts of 5 percentiles.

    Returns:
        change: `[bins]`, float32 or wider, nats: mean of `entropy - other`, from the lowest part to the highest; 0 for
            an empty one. Equal tokens are of one part.
        count: `[bins]`, tokens of each part.

    Raises:
        ValueError: if shapes differ or `bins` is below 1.

    Example:
        >>> before, now = jnp.array([[0.0, 0.0, 1.0, 2.0]]), jnp.array([[0.0, 0.0, 1.5, 2.5]])
        >>> [x.tolist() for x in entropy_change_by_percentile(now, before, jnp.ones((1, 4)), bins=2)]
        [[0.0, 0.5], [2.0, 2.0]]

    Reference: Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning for LLM
    Reasoning (arXiv 2506.01939).
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    entropy, other, mask = masked.as_float(entropy), masked.as_float(other), jnp.asarray(mask)
    masked.check_axes("entropy", entropy, "[B, T]")
    masked.check_like("other", other, "entropy", entropy)
    masked.check_like("mask", mask, "entropy", entropy)
    counts = (mask != 0).reshape(-1)
    level = jnp.where(counts, other.reshape(-1), jnp.inf)
    below = jnp.searchsorted(jnp.sort(level), level)  # of the tokens that count, how many are lower
    part = jnp.minimum(below * bins // jnp.maximum(jnp.sum(counts), 1), bins - 1)
    member = (part == jnp.arange(bins)[:, None]) & counts
    change = (entropy - other).reshape(1, -1)
    return masked.mean(jnp.broadcast_to(change, member.shape), member, 1), jnp.sum(member, 1).astype(entropy.dtype)


def adaptive_entropy_coefficient(
    coefficient: float | Array,
    entropy: float | Array,
    *,
    target: float,
    delta: float = 0.005,
    low: float = 0.0,
    high: float = 1.0,
) -> tuple[Array, Array]:
    r"""Next coefficient of the entropy bonus, and the one to apply now: none while entropy is above its target.

    $$c' = \mathrm{clip}(c + \Delta\,[H \le H^*] - \Delta\,[H > H^*],\ c_{low}, c_{high}), \qquad
    \alpha = c\,[H \le H^*]$$

    The paper leaves $c$ where it is at $H = H^*$ and does not bound it; the bounds, and the side on which equality
    falls, are those of TRL, where $H$ is that of the step before.

    Args:
        coefficient: scalar, the present $c$.
        entropy: scalar, nats; mean entropy per token at the start of the step.
        target: $H^*$, nats, at least 0: the bonus acts at or below it.
        delta: $\Delta$, how far $c$ moves in one step.
        low: smallest $c$.
        high: largest $c$.

    Returns:
        `(c', alpha)`: two scalars, float32 or wider, without gradient.

    Raises:
        ValueError: if `target` or `delta` is negative or `low` is above `high`.

    Example:
        >>> [round(float(x), 4) for x in adaptive_entropy_coefficient(0.1, 0.15, target=0.2)]
        [0.105, 0.1]
        >>> [round(float(x), 4) for x in adaptive_entropy_coefficient(0.1, 0.9, target=0.2)]
        [0.095, 0.0]

    Reference: Skywork Open Reasoner 1 Technical Report (arXiv 2505.22312).
    """
    for name, number in (("target", target), ("delta", delta)):
        if isinstance(number, float | int) and number < 0:
            raise ValueError(f"{name} must be >= 0, got {number}; leave the bonus out for no entropy control")
    if isinstance(low, float | int) and isinstance(high, float | int) and low > high:
        raise ValueError(f"low must not be above high, got low={low} and high={high}")
    coefficient, entropy = masked.as_float(coefficient), masked.as_float(entropy)
    acts = entropy <= target
    following = jnp.clip(coefficient + jnp.where(acts, delta, -delta), low, high)
    return jax.lax.stop_gradient((following, jnp.where(acts, coefficient, 0.0)))

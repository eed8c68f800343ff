"""Entropy added to the advantage, where it shows what is explored, never so much that the advantage changes sign."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def egpo(advantages: Array, entropy: Array, *, alpha: float = 0.4, kappa: float = 2.0) -> Array:
    r"""Advantage plus a share of the entropy, at most a share of its own size.

    $$A' = A + \min(\alpha H,\ |A| / \kappa)$$

    A sequence that was right, or wrong, while its policy was undecided is pushed up more, or down less. With
    $\kappa \ge 1$ the sign of $A$ stays; where $A = 0$ there is no bonus.

    Args:
        advantages: `[P, G]`, `[B]` or `[B, T]` float.
        entropy: of the same shape, nats, not negative; of the policy at the start of the step. For whole sequences the
            mean over the tokens of the reasoning, `masked.mean(entropy, mask, 1)`. A constant.
        alpha: $\alpha$, advantage per nat.
        kappa: $\kappa$, at least 1.

    Returns:
        The shape of `advantages`, float32 or wider.

    Raises:
        ValueError: if shapes differ, `alpha` is negative or `kappa` below 1.

    Example:
        >>> egpo(jnp.array([-1.0, 1.0, 0.0]), jnp.array([1.5, 1.5, 1.5])).tolist()
        [-0.5, 1.5, 0.0]

    References: Exploring Superior Function Calls via Reinforcement Learning (later: Reasoning through Exploration: A
    Reinforcement Learning Framework for Robust Function Calling, arXiv 2508.05118), which says that the entropy of the
    reasoning enters the advantage and is clipped, but has no released code; the form and its constants are those of
    Reasoning with Exploration: An Entropy Perspective (arXiv 2506.14758).
    """
    if isinstance(alpha, float | int) and alpha < 0:
        raise ValueError(f"alpha must be >= 0, got {alpha}")
    if isinstance(kappa, float | int) and kappa < 1:
        raise ValueError(f"kappa must be >= 1, or advantages change their sign, got {kappa}")
    advantages, entropy = masked.as_float(advantages), masked.as_float(entropy)
    masked.check_like("entropy", entropy, "advantages", advantages, "take its mean over the tokens of a sequence")
    bonus = jnp.minimum(alpha * entropy, jnp.abs(advantages) / kappa)
    return advantages + jax.lax.stop_gradient(bonus)

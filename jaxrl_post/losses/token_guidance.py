"""Which tokens of a pair may move further from the reference: those that an aligned model has moved the same way."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.arguments import check_at_least
from jaxrl_post.losses.preference import check_beta
from jaxrl_post.types import Array


def token_guidance(
    guide_logp: Array,
    ref_logp: Array,
    chosen: Array,
    mask: Array,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
    floor: float | None = None,
) -> Array:
    r"""Weights of the log-ratios of a pair's tokens, from a model that was trained for the same preferences before.

    $$f_t = 1 \pm \alpha \beta \log\frac{\pi_{guide}(y_t)}{\pi_{ref}(y_t)}$$

    with + of a chosen answer and - of a rejected one. The reward of an answer is then
    $\beta \sum_t f_t (\log\pi - \log\pi_{ref})_t$.

    Args:
        guide_logp: `[B, T]` float, nats; log-probs under the guide, a policy of DPO, say.
        ref_logp: `[B, T]` float, nats; under the reference.
        chosen: `[B]` bool, whether the answer is the chosen one of its pair.
        mask: `[B, T]`, nonzero on the tokens of the answer.
        beta: scale of the guide's implicit reward, above 0.
        alpha: $\alpha$, at least 0; 0 gives DPO.
        floor: least weight; None for none, as the authors have it: a weight below 0 turns a token's direction around.

    Returns:
        `[B, T]`, float32 or wider, without gradient; 0 where the mask is.

    Raises:
        ValueError: if the arrays are not `[B, T]` of one shape and `chosen` is not `[B]`, `beta` is not above 0, or
            `alpha` is below 0.

    Example:
        >>> ratios, tokens = jnp.array([[2.0, -1.0], [1.0, 0.0]]), jnp.ones((2, 2))
        >>> weights = token_guidance(ratios, 0 * ratios, jnp.array([True, False]), tokens)
        >>> [[round(float(w), 2) for w in row] for row in weights]
        [[1.1, 0.95], [0.95, 1.0]]

    Reference: TGDPO: Harnessing Token-Level Reward Guidance for Enhancing Direct Preference Optimization
    (arXiv 2506.14574).
    """
    check_beta(beta)
    check_at_least("alpha", alpha, 0)
    guide_logp, mask = masked.as_float(guide_logp), jnp.asarray(mask)
    masked.check_axes("guide_logp", guide_logp, "[B, T]")
    for name, x in (("ref_logp", ref_logp), ("mask", mask)):
        masked.check_like(name, x, "guide_logp", guide_logp)
    chosen = jnp.asarray(chosen)
    if chosen.shape != guide_logp.shape[:1]:
        raise ValueError(f"chosen must be [B], one for each row of guide_logp {guide_logp.shape}, got {chosen.shape}")
    rewards = beta * (guide_logp - masked.as_float(ref_logp))
    weights = 1 + alpha * jnp.where(chosen[:, None] != 0, rewards, -rewards)
    if floor is not None:
        weights = jnp.maximum(weights, floor)
    return jax.lax.stop_gradient(jnp.where(mask != 0, weights, 0.0))

"""A mixture of experts in the place of an MLP: each token goes through the few that a router picks for it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl_post.models.layers import ACTIVATIONS, DecoderConfig, accumulation_dtype, param
from jaxrl_post.types import Array


class Experts(nnx.Module):
    r"""$\sum_{e \in \mathrm{top}_k(p)} w_e\, \mathrm{MLP}_e(x)$, where $p = \mathrm{softmax}(R x)$ and $w$ is $p$.

    Or $w = p / \sum p$ over the token's experts, so that its weights add up to 1.

    Tokens are sorted by expert and multiplied with the experts' weights in one ragged product: no token is dropped, no
    expert has a capacity, and only the chosen ones cost anything.

    Reference: Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer, arXiv 1701.06538; the
    report is that of Switch Transformers, arXiv 2101.03961.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = config
        self.config = c
        out_std = c.init_std / math.sqrt(2 * c.layers)
        self.router = param(rngs, (c.width, c.experts), ("embed", None), c, c.init_std)
        shape = (c.experts, c.width, c.mlp_width)
        self.gate = param(rngs, shape, ("experts", "embed", "mlp"), c, c.init_std)
        self.up = param(rngs, shape, ("experts", "embed", "mlp"), c, c.init_std)
        self.down = param(rngs, (c.experts, c.mlp_width, c.width), ("experts", "mlp", "embed"), c, out_std)

    def __call__(self, x: Array, key: Array | None = None) -> tuple[Array, dict[str, Array]]:
        """`[B, T, D]` to `[B, T, D]`, and for each token `chosen` and `probability` `[B, T, E]` of every expert."""
        del key  # nothing here is random
        c = self.config
        flat = x.reshape(-1, c.width)
        wide = accumulation_dtype(x.dtype)
        logits = (flat @ self.router[...].astype(x.dtype)).astype(wide)
        probability = jax.nn.softmax(logits, axis=-1)
        weight, expert = jax.lax.top_k(probability, c.experts_per_token)
        if c.normalize_experts:
            weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
        weight = weight.astype(x.dtype)

        count = flat.shape[0]
        order = jnp.argsort(expert.reshape(-1), stable=True)
        token = order // c.experts_per_token
        sizes = jnp.bincount(expert.reshape(-1), length=c.experts).astype(jnp.int32)
        rows = flat[token]

        def product(rows: Array, weights: nnx.Param) -> Array:
            return jax.lax.ragged_dot(rows, weights[...].astype(rows.dtype), sizes)

        inner = ACTIVATIONS[c.activation](product(rows, self.gate)) * product(rows, self.up)
        out = product(inner, self.down) * weight.reshape(-1)[order][:, None]
        total = jnp.zeros((count, c.width), wide).at[token].add(out.astype(wide))
        chosen = jnp.sum(jax.nn.one_hot(expert, c.experts, dtype=wide), axis=1)
        shape = (*x.shape[:2], c.experts)
        report = {"chosen": chosen.reshape(shape), "probability": probability.reshape(shape)}
        return total.reshape(x.shape).astype(x.dtype), report


def load_balancing_loss(chosen: Array, probability: Array, mask: Array) -> Array:
    r"""$E \sum_e f_e P_e$: the smaller, the more evenly the router uses the experts; $k$ where it does entirely.

    Args:
        chosen: `[L, B, T, E]`: 1 where the token went to the expert, in each layer.
        probability: `[L, B, T, E]`: of the router.
        mask: `[B, T]`: the tokens that count, padding not.

    Returns:
        A scalar: $f_e$ is the share of tokens that went to expert $e$ and $P_e$ its mean probability, over all layers
        at once.

    Example:
        >>> even = jnp.full((1, 1, 2, 2), 0.5)
        >>> float(load_balancing_loss(jnp.array([[[[1.0, 0.0], [0.0, 1.0]]]]), even, jnp.ones((1, 2))))
        1.0

    Reference: Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity, arXiv
    2101.03961.
    """
    weights = jnp.broadcast_to(mask, chosen.shape[:3]).astype(probability.dtype)
    total = jnp.maximum(jnp.sum(weights), 1)
    share = jnp.einsum("lbte,lbt->e", chosen, weights) / total
    mean = jnp.einsum("lbte,lbt->e", probability, weights) / total
    return chosen.shape[-1] * jnp.sum(share * mean)

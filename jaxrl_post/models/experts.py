"""A mixture of experts in the place of an MLP: each token goes through the few that a router picks for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxrl_post.kernels.ambient import vary_alike
from jaxrl_post.kernels.platform import current_device
from jaxrl_post.mesh import spread
from jaxrl_post.models.layers import ACTIVATIONS, DecoderConfig, accumulation_dtype, adapter, param
from jaxrl_post.models.lora import Adapter
from jaxrl_post.types import Array

Map: TypeAlias = tuple[Array, ...]
"""A linear map of all experts: `W`, or `W`, `A` and `s B` where it has an adapter."""

FEW = 512
"""With so many tokens on an accelerator or fewer, all experts take less time than those that were chosen.

A ragged product moves a layer's weights over and over: a token of Qwen3-30B-A3B on v5p, by the compiler, 4.2 times all
weights, and 1.05 times if every row goes through every expert. With 64 rows that makes 5.8 ms of memory and 2.1 ms of
products instead of 23.4 ms of memory; with 512 rows, 17 ms of products instead of 27 ms of memory.
"""


class Experts(nnx.Module):
    r"""$\sum_{e \in \mathrm{top}_k(p)} w_e\, \mathrm{MLP}_e(x)$, where $p = \mathrm{softmax}(R x)$ and $w$ is $p$.

    Or $w = p / \sum p$ over the token's experts, so that its weights add up to 1.

    Tokens are sorted by expert and multiplied with the experts' weights in one ragged product, so that only the chosen
    ones cost anything. Few tokens, as in decoding, choose nearly all experts between them, and go through all of them;
    on CPUs all tokens do, since a ragged product is one with every expert there, for each of a token's choices. Either
    way no token is dropped, and no expert has a capacity. On a mesh every device does this for its own tokens with its
    own experts. Tokens that are split over the axis of the experts are gathered along it before, and the
    devices' sums scattered after: an exchange that drops nothing needs room for all of them anyway.

    Reference: Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer, arXiv 1701.06538.
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
        own = (c.experts, "experts")
        self.gate_lora = adapter("gate", (c.width,), (c.mlp_width,), ("embed", "mlp"), c, rngs, own)
        self.up_lora = adapter("up", (c.width,), (c.mlp_width,), ("embed", "mlp"), c, rngs, own)
        self.down_lora = adapter("down", (c.mlp_width,), (c.width,), ("mlp", "embed"), c, rngs, own)

    def __call__(self, x: Array, keys: Array | None = None) -> tuple[Array, dict[str, Array]]:
        """`[B, T, D]` to `[B, T, D]`, and for each token `chosen` and `probability` `[B, T, E]` of every expert."""
        del keys  # nothing here is random
        c = self.config
        logits = (x @ self.router[...].astype(x.dtype)).astype(accumulation_dtype(x.dtype))
        gate = _matrices(x.dtype, self.gate, self.gate_lora)
        up = _matrices(x.dtype, self.up, self.up_lora, self.gate_lora)
        down = _matrices(x.dtype, self.down, self.down_lora)
        out, expert = _on_each_device(c, x, logits, gate, up, down)
        chosen = jnp.sum(jax.nn.one_hot(expert, c.experts, dtype=logits.dtype), axis=-2)
        return out, {"chosen": chosen, "probability": jax.nn.softmax(logits, axis=-1)}


def _matrices(dtype: Any, weight: nnx.Param, adapter: Adapter | None, holder: Adapter | None = None) -> Map:
    """A map of all experts: `W`, and with an adapter its `A` (of `holder` if it has none) and `s B`."""
    whole = weight[...].astype(dtype)  # whatever it is stored in
    if adapter is None:
        return (whole,)
    a = adapter.a if adapter.a is not None or holder is None else holder.a
    assert a is not None
    return whole, a[...].astype(dtype), (adapter.scale * adapter.b[...]).astype(dtype)


def _axes(inputs: str, outputs: str) -> tuple[PartitionSpec, ...]:
    """The logical axes of a map's matrices."""
    kinds = ((inputs, outputs), (inputs, None), (None, outputs))
    return tuple(PartitionSpec("experts", *kind) for kind in kinds)


def _routed(config: DecoderConfig, logits: Array) -> tuple[Array, Array]:
    """The weights and the numbers of each token's experts, `[..., k]`, from the router's logits `[..., E]`."""
    weight, expert = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), config.experts_per_token)
    if config.normalize_experts:
        weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
    return weight, expert


def _mapped(rows: Array, matrices: Map, sizes: Array) -> Array:
    """Rows `[N, I]`, sorted by expert, each through the map of its own: `[N, O]`."""
    weight, *halves = matrices
    out = jax.lax.ragged_dot(rows, weight, sizes)
    for half in halves:
        rows = jax.lax.ragged_dot(rows, half, sizes)
    return out + rows if halves else out


def _mixed(
    x: Array, weight: Array, expert: Array, gate: Map, up: Map, down: Map, first: Array | int, activation: str
) -> Array:
    """What the experts from number `first` on, those of `gate`, add to each token of `x` `[B, T, D]`."""
    rows, own = x.reshape(-1, x.shape[-1]), expert.reshape(-1, expert.shape[-1]) - first
    weight = weight.reshape(own.shape)
    mixed = _all_experts if current_device().platform == "cpu" or len(rows) <= FEW else _chosen_experts
    return mixed(rows, weight, own, gate, up, down, ACTIVATIONS[activation]).reshape(x.shape).astype(x.dtype)


def _all_experts(
    x: Array, weight: Array, own: Array, gate: Map, up: Map, down: Map, activation: Callable[[Array], Array]
) -> Array:
    """Every token through every expert, and those that it did not choose left out of the sum."""

    def mapped(rows: Array, matrices: Map) -> Array:  # [E, N, I] to [E, N, O]
        weight, *halves = matrices
        out = jnp.einsum("eni,eio->eno", rows, weight)
        for half in halves:
            rows = jnp.einsum("eni,eio->eno", rows, half)
        return out + rows if halves else out

    held = gate[0].shape[0]
    chosen = own[..., None] == jnp.arange(held)  # [N, k, E]
    share = jnp.einsum("nk,nke->en", weight, chosen.astype(weight.dtype))
    every = jnp.broadcast_to(x, (held, *x.shape))
    out = mapped(activation(mapped(every, gate)) * mapped(every, up), down) * share[..., None]
    wide = jnp.where(jnp.any(chosen, axis=1).T[..., None], out.astype(accumulation_dtype(out.dtype)), 0)
    return jnp.sum(wide, axis=0)


def _chosen_experts(
    x: Array, weight: Array, own: Array, gate: Map, up: Map, down: Map, activation: Callable[[Array], Array]
) -> Array:
    """Every token through the experts that it chose, sorted by them."""
    held, per_token = gate[0].shape[0], own.shape[-1]
    own = own.reshape(-1)
    here = (own >= 0) & (own < held)
    own = jnp.where(here, own, held)  # what goes elsewhere is sorted behind all groups
    order = jnp.argsort(own, stable=True)
    token = order // per_token
    sizes = jnp.bincount(own, length=held).astype(jnp.int32)
    rows = x[token]
    inner = activation(_mapped(rows, gate, sizes)) * _mapped(rows, up, sizes)
    out = _mapped(inner, down, sizes) * weight.reshape(-1)[order][:, None]
    wide = jnp.where(here[order][:, None], out.astype(accumulation_dtype(out.dtype)), 0)
    return jnp.zeros(x.shape, wide.dtype).at[token].add(wide)


def _no_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether the backward pass finds what an operation gave: weights are gathered again, not kept whole."""
    return not primitive.name.startswith("all_gather")


def _on_each_device(
    config: DecoderConfig, x: Array, logits: Array, gate: Map, up: Map, down: Map
) -> tuple[Array, Array]:
    """What its experts make of each token, and which they are; on a mesh, each device for its own tokens and experts.

    Args:
        config: of the decoder.
        x: `[B, T, D]`.
        logits: `[B, T, E]`, of the router.
        gate: `W` `[E, D, F]`, and with an adapter `A` `[E, D, r]` and `B` `[E, r, F]`.
        up: alike.
        down: `W` `[E, F, D]`, and with an adapter `A` `[E, F, r]` and `B` `[E, r, D]`.

    Returns:
        `[B, T, D]`, and the numbers of the experts `[B, T, k]`.
    """
    rows, length, _ = spread(("batch", "length", None), x.shape)
    experts, embed, mlp = spread(("experts", "embed", "mlp"), gate[0].shape)
    # Weights are gathered along axes that split the tokens too; whatever else splits them, the compiler undoes outside.
    embed = tuple(axis for axis in embed if axis in (*rows, *length))
    exchanged = tuple(axis for axis in experts if axis in rows)
    summed = tuple(axis for axis in (*experts, *mlp) if axis not in exchanged)
    maps = (gate, up, down)
    axes = (_axes("embed", "mlp")[: len(gate)], _axes("embed", "mlp")[: len(up)], _axes("mlp", "embed")[: len(down)])

    def gathered(matrix: Array, axes: PartitionSpec) -> Array:
        if not embed or "embed" not in axes:
            return matrix
        return jax.lax.all_gather(matrix, embed, axis=axes.index("embed"), tiled=True)

    def local(x: Array, logits: Array, *maps: Map) -> tuple[Array, Array]:
        weight, own = _routed(config, logits)
        # Before anything is gathered, so that going back the shares of devices are added up after they are scattered.
        x, weight, expert, maps = vary_alike((x, weight.astype(x.dtype), own, maps))
        gate, up, down = jax.tree.map(gathered, maps, axes)
        if exchanged:
            x, weight, expert = (jax.lax.all_gather(a, exchanged, tiled=True) for a in (x, weight, expert))
        first = jax.lax.axis_index(experts) * gate[0].shape[0] if experts else 0
        out = _mixed(x, weight, expert, gate, up, down, first, config.activation)
        if exchanged:
            out = jax.lax.psum_scatter(out, exchanged, tiled=True)
        return jax.lax.psum(out, summed) if summed else out, own

    if not any((rows, length, experts, embed, mlp)):
        return local(x, logits, *maps)
    tokens = PartitionSpec(rows or None, length or None)
    over = {"experts": experts, "embed": embed, "mlp": mlp}
    placed = jax.tree.map(lambda names: PartitionSpec(*(over.get(name) or None for name in names)), axes)
    run = jax.shard_map(
        jax.checkpoint(local, policy=_no_gathered, prevent_cse=False),
        in_specs=(tokens, tokens, *placed),
        out_specs=(tokens, tokens),
    )
    return run(x, logits, *maps)


def load_balancing_loss(chosen: Array, probability: Array, length: Array, *, shares: Array | None = None) -> Array:
    r"""$E \sum_e f_e P_e$ of each sequence: how unevenly the router uses the experts; $k$ where they are used alike.

    $P_e$ is the mean probability of expert $e$ over the tokens of the sequence, and $f_e$ the share of tokens that went
    to it: of the same tokens in the same layer, and then averaged over layers; or what `shares` says. With the shares
    of a whole batch, the mean over its tokens (sequences weighted by their length) is the loss of the batch.

    Args:
        chosen: `[B, L, E]`: how many of the sequence's tokens went to each expert, in each layer.
        probability: `[B, L, E]`: the sum over its tokens of the router's probabilities.
        length: `[B]`, tokens.
        shares: `[E]` of all layers together, as in Hugging Face's models, or `[L, E]`; None for each sequence's own.

    Returns:
        `[B]`; 0 for a sequence without tokens.

    Example:
        >>> one_expert, probability = jnp.array([[[2.0, 0.0]]]), jnp.array([[[1.5, 0.5]]])
        >>> load_balancing_loss(one_expert, probability, jnp.array([2])).tolist()
        [1.5]
        >>> load_balancing_loss(one_expert, probability, jnp.array([2]), shares=jnp.array([0.5, 0.5])).tolist()
        [1.0]

    Reference: Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity, arXiv
    2101.03961.
    """
    tokens = jnp.maximum(length, 1)[:, None, None].astype(probability.dtype)
    share = chosen / tokens if shares is None else shares
    return chosen.shape[-1] * jnp.mean(jnp.sum(share * probability / tokens, axis=-1), axis=-1)

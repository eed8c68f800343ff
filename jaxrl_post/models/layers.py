"""The parts of the decoder: root-mean-square norm, grouped attention with a cache, gated MLP.

Every part is a Flax NNX module whose parameters carry their logical axis names. What is stacked over depth, and how the
parts make a language model, is in `decoder.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxrl_post.kernels.ambient import vary_alike
from jaxrl_post.mesh import LogicalAxes, constrain, spread
from jaxrl_post.models.lora import Adapter, Lora, fold_in
from jaxrl_post.models.rope import Rope, rotate
from jaxrl_post.types import Array

# `(query[B, T, H, K], key[B, T, kv_heads, K], value) -> [B, T, H, K]`: which token sees which, and what a cache holds
# beside, is settled outside.
Attend: TypeAlias = Callable[..., Array]


Activation = Literal["silu", "gelu_tanh", "gelu"]
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}
Norms = Literal["pre", "post", "both"]
Biases = Literal["none", "qkv", "all"]
QKNorm = Literal["none", "head", "full"]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options of a decoder; `decoder` documents them."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rope: Rope
    local_rope: Rope
    qk_norm: QKNorm
    attention_bias: Biases
    mlp_bias: bool
    activation: Activation
    norms: Norms
    norm_offset: float
    norm_eps: float
    window: int | None
    local_layers: tuple[bool, ...]
    attention_scale: float | None
    attention_softcap: float | None
    embedding_scale: float | None
    experts: int
    experts_per_token: int
    normalize_experts: bool
    tied: bool
    softcap: float | None
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    remat: str
    value_head: bool
    init_std: float
    lora: Lora | None = None


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: LogicalAxes, config: DecoderConfig, std: float) -> nnx.Param:
    """A normally distributed parameter that knows its logical axes."""
    # Drawn in float32, so that a bfloat16 model starts from the rounded values of the float32 one.
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value.astype(config.param_dtype), logical_axes=axes)


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Float32, or `dtype` if that is wider."""
    return jnp.promote_types(dtype, jnp.float32)


def zeros(shape: tuple[int, ...], axes: LogicalAxes, config: DecoderConfig) -> nnx.Param:
    """A parameter that starts at zero and knows its logical axes."""
    return nnx.Param(jnp.zeros(shape, config.param_dtype), logical_axes=axes)


def adapter(
    name: str,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    axes: LogicalAxes,
    config: DecoderConfig,
    rngs: nnx.Rngs,
    experts: tuple[int, str] | None = None,
) -> Adapter | None:
    """The adapter of a projection, if it is to have one."""
    if config.lora is None or name not in config.lora.projections:
        return None
    shared = config.lora.holder(name) != name
    return Adapter(config, inputs, outputs, axes, shared=shared, experts=experts, rngs=rngs)


def adapted(
    y: Array,
    adapter: Adapter | None,
    x: Array,
    keys: Array | None,
    number: int,
    holder: tuple[Adapter | None, int] = (None, 0),
) -> Array:
    """`y`, the projection of `x`, and what the adapter adds.

    `number` tells the dropout of adapters apart. One without an `A` has that of `holder`, and its dropout.
    """
    if adapter is None:
        return y
    shared, number = holder if adapter.a is None else (None, number)
    return y + adapter(x, fold_in(keys, number), shared)


def looked_up(table: Array, tokens: Array, dtype: jnp.dtype) -> Array:
    """`table[tokens]` in another dtype, where no device ever holds more of the table than its part.

    Each device looks up its own columns, for the tokens of all devices that have others, and of tokens that it has no
    row for it takes zero, which the sum over the vocabulary's devices makes right. Columns are then exchanged for
    tokens, so that what travels is of the size of the result, forward and backward, and not of the table's.

    Args:
        table: `[V, D]`.
        tokens: `[B, T]` int32.
        dtype: of the result, and of what travels.

    Returns:
        `[B, T, D]`.
    """
    vocab, embed = spread(("vocab", "embed"), table.shape)
    split = spread(("batch", "length"), tokens.shape)
    rows, length = (tuple(axis for axis in axes if axis not in embed) for axes in split)
    given_rows, given_length = (tuple(axis for axis in embed if axis in axes) for axes in split)

    def local(table: Array, tokens: Array) -> Array:
        if not vocab:
            return table[tokens].astype(dtype)
        own = tokens - jax.lax.axis_index(vocab) * table.shape[0]
        here = (own >= 0) & (own < table.shape[0])
        table, own, here = vary_alike((table, own, here))
        found = jnp.where(here[..., None], table[jnp.where(here, own, 0)].astype(dtype), 0)
        return jax.lax.psum(found, vocab)

    def exchanged(table: Array, tokens: Array) -> Array:
        x = local(table, tokens)
        # Columns lie in the order of `embed`, where what splits positions comes last.
        for place, axes in ((1, given_length), (0, given_rows)):
            if axes:
                x = jax.lax.all_to_all(x, axes, split_axis=place, concat_axis=2, tiled=True)
        return x

    if not vocab and not embed:
        return local(table, tokens)
    spec = PartitionSpec
    of_tokens = spec(rows or None, length or None)
    inputs = (spec(vocab or None, embed or None), of_tokens)
    if set(embed) == {*given_rows, *given_length}:
        out = spec((rows + given_rows) or None, (length + given_length) or None)
        x = jax.shard_map(exchanged, in_specs=inputs, out_specs=out)(table, tokens)
    else:  # tokens that do not divide cannot be given for columns
        x = jax.shard_map(local, in_specs=inputs, out_specs=spec(*of_tokens, embed or None))(table, tokens)
        x = jax.lax.with_sharding_constraint(x, of_tokens)
    return constrain(x, ("batch", "length", "act_embed"))


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * (offset + scale)` over the last axis, in float32 or wider.

    The factor starts at 1: with an offset of 1, as some families have, `scale` starts at 0.

    Reference: Root Mean Square Layer Normalization, arXiv 1910.07467.
    """

    def __init__(self, size: int, config: DecoderConfig):
        self.eps, self.offset = config.norm_eps, config.norm_offset
        self.scale = nnx.Param(jnp.full((size,), 1 - config.norm_offset, config.param_dtype), logical_axes=(None,))

    def __call__(self, x: Array) -> Array:
        """`x` normalized, of the same shape and dtype."""
        wide = x.astype(accumulation_dtype(x.dtype))
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * (self.offset + self.scale[...].astype(wide.dtype))).astype(x.dtype)


class Attention(nnx.Module):
    """Causal attention with fewer key-value heads than query heads, rotary positions, optional biases and QK-norm."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = config
        self.config = c
        std, out_std = c.init_std, c.init_std / math.sqrt(2 * c.layers)
        kv_axes: LogicalAxes = ("embed", "kv_heads", "head_dim")
        self.query = param(rngs, (c.width, c.heads, c.head_dim), ("embed", "heads", "head_dim"), c, std)
        self.key = param(rngs, (c.width, c.kv_heads, c.head_dim), kv_axes, c, std)
        self.value = param(rngs, (c.width, c.kv_heads, c.head_dim), kv_axes, c, std)
        self.out = param(rngs, (c.heads, c.head_dim, c.width), ("heads", "head_dim", "embed"), c, out_std)
        biased, per_head = c.attention_bias != "none", c.qk_norm == "head"
        self.query_bias = zeros((c.heads, c.head_dim), ("heads", "head_dim"), c) if biased else None
        self.key_bias = zeros((c.kv_heads, c.head_dim), ("kv_heads", "head_dim"), c) if biased else None
        self.value_bias = zeros((c.kv_heads, c.head_dim), ("kv_heads", "head_dim"), c) if biased else None
        self.out_bias = zeros((c.width,), ("embed",), c) if c.attention_bias == "all" else None
        sizes = (c.head_dim, c.head_dim) if per_head else (c.heads * c.head_dim, c.kv_heads * c.head_dim)
        into: tuple[int, ...] = (c.width,)
        kv_shape = (c.kv_heads, c.head_dim)
        self.query_lora = adapter("query", into, (c.heads, c.head_dim), ("embed", "heads", "head_dim"), c, rngs)
        self.key_lora = adapter("key", into, kv_shape, kv_axes, c, rngs)
        self.value_lora = adapter("value", into, kv_shape, kv_axes, c, rngs)
        self.out_lora = adapter("out", (c.heads, c.head_dim), into, ("heads", "head_dim", "embed"), c, rngs)
        self.query_norm = None if c.qk_norm == "none" else RMSNorm(sizes[0], c)
        self.key_norm = None if c.qk_norm == "none" else RMSNorm(sizes[1], c)

    def __call__(
        self,
        x: Array,
        rotation: tuple[Array, Array],
        attend: Attend,
        keys: Array | None = None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """`[B, T, D]` to `[B, T, D]`, and the keys and values `[B, T, kv_heads, K]` of these tokens."""
        dtype = x.dtype
        projections = (
            (self.query, self.query_bias, self.query_lora),
            (self.key, self.key_bias, self.key_lora),
            (self.value, self.value_bias, self.value_lora),
        )

        def project(number: int, weight: nnx.Param, bias: nnx.Param | None, lora: Adapter | None) -> Array:
            y = _plus(jnp.einsum("btd,dhk->bthk", x, weight[...].astype(dtype)), bias)
            return adapted(y, lora, x, keys, number, (self.query_lora, 0))

        query, key, value = (project(number, *parts) for number, parts in enumerate(projections))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self._normalized(self.query_norm, query), self._normalized(self.key_norm, key)
        query, key = rotate(query, rotation), rotate(key, rotation)
        query, key, value = (constrain(a, ("batch", "length", "act_heads", None)) for a in (query, key, value))
        mixed = attend(query, key, value)
        out = _plus(jnp.einsum("bthk,hkd->btd", mixed, self.out[...].astype(dtype)), self.out_bias)
        return adapted(out, self.out_lora, mixed, keys, len(projections)), (key, value)

    def _normalized(self, norm: RMSNorm, x: Array) -> Array:
        if self.config.qk_norm == "head":
            return norm(x)
        return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)  # over all heads at once


class MLP(nnx.Module):
    """`down(act(gate x) * up x)`.

    Reference: GLU Variants Improve Transformer, arXiv 2002.05202.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = config
        self.activation = c.activation
        self.gate = param(rngs, (c.width, c.mlp_width), ("embed", "mlp"), c, c.init_std)
        self.up = param(rngs, (c.width, c.mlp_width), ("embed", "mlp"), c, c.init_std)
        self.down = param(rngs, (c.mlp_width, c.width), ("mlp", "embed"), c, c.init_std / math.sqrt(2 * c.layers))
        self.gate_bias = zeros((c.mlp_width,), ("mlp",), c) if c.mlp_bias else None
        self.up_bias = zeros((c.mlp_width,), ("mlp",), c) if c.mlp_bias else None
        self.down_bias = zeros((c.width,), ("embed",), c) if c.mlp_bias else None
        self.gate_lora = adapter("gate", (c.width,), (c.mlp_width,), ("embed", "mlp"), c, rngs)
        self.up_lora = adapter("up", (c.width,), (c.mlp_width,), ("embed", "mlp"), c, rngs)
        self.down_lora = adapter("down", (c.mlp_width,), (c.width,), ("mlp", "embed"), c, rngs)

    def __call__(self, x: Array, keys: Array | None = None) -> tuple[Array, dict[str, Array]]:
        """`[B, T, D]` to `[B, T, D]`, and nothing to report."""
        gate, up, down = (w[...].astype(x.dtype) for w in (self.gate, self.up, self.down))
        gated = adapted(_plus(x @ gate, self.gate_bias), self.gate_lora, x, keys, 4)
        raised = adapted(_plus(x @ up, self.up_bias), self.up_lora, x, keys, 5, (self.gate_lora, 4))
        inner = constrain(ACTIVATIONS[self.activation](gated) * raised, ("batch", "length", "act_mlp"))
        return adapted(_plus(inner @ down, self.down_bias), self.down_lora, inner, keys, 6), {}


def _plus(x: Array, bias: nnx.Param | None) -> Array:
    return x if bias is None else x + bias[...].astype(x.dtype)

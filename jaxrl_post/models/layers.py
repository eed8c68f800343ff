"""The parts of the decoder: root-mean-square norm, rotary positions, grouped attention with a cache, gated MLP.

Every part is a Flax NNX module whose parameters carry their logical axis names. What is stacked over depth, and how the
parts make a language model, is in `decoder.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl_post.mesh import LogicalAxes, constrain
from jaxrl_post.types import Array

CACHE_AXES: LogicalAxes = ("layers", "batch", "cache_length", "kv_heads", "head_dim")

# `(query[B, T, H, K], key[B, S, kv_heads, K], value) -> [B, T, H, K]`: which token sees which is settled outside.
Attend: TypeAlias = Callable[[Array, Array, Array], Array]


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
    rope_base: float
    qk_norm: bool
    tied: bool
    softcap: float | None
    norm_eps: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    remat: str
    value_head: bool
    init_std: float


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far.

    Attributes:
        k: `[layers, B, S, kv_heads, head_dim]`, rotated.
        v: the same shape.
        positions: `[B, S]` int32, position of the token in each slot, -1 where the slot is empty or holds padding.
        index: int32 scalar, number of slots written so far, the same for all rows.
    """

    k: Array
    v: Array
    positions: Array
    index: Array


class LayerCache(NamedTuple):
    """The caches of all layers, and where in them one layer writes.

    Attributes:
        k: `[layers, B, S, kv_heads, head_dim]`.
        v: the same shape.
        layer: int32 scalar.
        index: int32 scalar, first slot to write.
    """

    k: Array
    v: Array
    layer: Array
    index: Array


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: LogicalAxes, config: DecoderConfig, std: float) -> nnx.Param:
    """A normally distributed parameter that knows its logical axes."""
    # Drawn in float32, so that a bfloat16 model starts from the rounded values of the float32 one.
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value.astype(config.param_dtype), logical_axes=axes)


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Float32, or `dtype` if that is wider."""
    return jnp.promote_types(dtype, jnp.float32)


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, in float32 or wider.

    Reference: Root Mean Square Layer Normalization, arXiv 1910.07467.
    """

    def __init__(self, size: int, config: DecoderConfig):
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones((size,), config.param_dtype), logical_axes=(None,))

    def __call__(self, x: Array) -> Array:
        """`x` normalized, of the same shape and dtype."""
        wide = x.astype(accumulation_dtype(x.dtype))
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * self.scale[...].astype(wide.dtype)).astype(x.dtype)


def rotary_angles(positions: Array, head_dim: int, base: float, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Cosine and sine, each `[B, T, head_dim/2]`, of `position * base^(-2i/head_dim)`."""
    frequency = base ** (-jnp.arange(0, head_dim, 2, dtype=dtype) / head_dim)
    angle = positions[..., None].astype(dtype) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, rotation: tuple[Array, Array]) -> Array:
    """Rotate `[B, T, H, K]` queries or keys: dimension `i` together with `i + K/2`.

    Reference: RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv 2104.09864.
    """
    cos, sin = (r[:, :, None, :] for r in rotation)
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal attention with fewer key-value heads than query heads, rotary positions and optional QK-norm."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = config
        self.config = c
        std, out_std = c.init_std, c.init_std / math.sqrt(2 * c.layers)
        kv_axes: LogicalAxes = ("embed", "kv_heads", "head_dim")
        self.query = param(rngs, (c.width, c.heads, c.head_dim), ("embed", "heads", "head_dim"), c, std)
        self.key = param(rngs, (c.width, c.kv_heads, c.head_dim), kv_axes, c, std)
        self.value = param(rngs, (c.width, c.kv_heads, c.head_dim), kv_axes, c, std)
        self.out = param(rngs, (c.heads, c.head_dim, c.width), ("heads", "head_dim", "embed"), c, out_std)
        self.query_norm = RMSNorm(c.head_dim, c) if c.qk_norm else None
        self.key_norm = RMSNorm(c.head_dim, c) if c.qk_norm else None

    def __call__(
        self, x: Array, rotation: tuple[Array, Array], attend: Attend, cache: LayerCache | None, read_cache: bool
    ) -> tuple[Array, LayerCache | None]:
        """`[B, T, D]` to `[B, T, D]`; with `read_cache` over all that the cache holds, else over `x` alone."""
        dtype = x.dtype
        query, key, value = (
            jnp.einsum("btd,dhk->bthk", x, w[...].astype(dtype)) for w in (self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rotate(query, rotation), rotate(key, rotation)
        query, key, value = (constrain(a, ("batch", "length", "act_heads", None)) for a in (query, key, value))
        if cache is not None:
            # The whole stack is written at [layer, :, index:index+T], which XLA does in place; slicing a layer out,
            # updating it and stacking it again would copy the cache at every token.
            start = (cache.layer, 0, cache.index, 0, 0)
            k = jax.lax.dynamic_update_slice(cache.k, key[None].astype(cache.k.dtype), start)
            v = jax.lax.dynamic_update_slice(cache.v, value[None].astype(cache.v.dtype), start)
            cache = cache._replace(k=k, v=v)
            if read_cache:
                key = jax.lax.dynamic_index_in_dim(k, cache.layer, 0, keepdims=False)
                value = jax.lax.dynamic_index_in_dim(v, cache.layer, 0, keepdims=False)
        out = attend(query, key, value)
        return jnp.einsum("bthk,hkd->btd", out, self.out[...].astype(dtype)), cache


class MLP(nnx.Module):
    """`down(silu(gate x) * up x)`.

    Reference: GLU Variants Improve Transformer, arXiv 2002.05202.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = config
        self.gate = param(rngs, (c.width, c.mlp_width), ("embed", "mlp"), c, c.init_std)
        self.up = param(rngs, (c.width, c.mlp_width), ("embed", "mlp"), c, c.init_std)
        self.down = param(rngs, (c.mlp_width, c.width), ("mlp", "embed"), c, c.init_std / math.sqrt(2 * c.layers))

    def __call__(self, x: Array) -> Array:
        """`[B, T, D]` to `[B, T, D]`."""
        gate, up, down = (w[...].astype(x.dtype) for w in (self.gate, self.up, self.down))
        inner = constrain(jax.nn.silu(x @ gate) * (x @ up), ("batch", "length", "act_mlp"))
        return inner @ down


class Layer(nnx.Module):
    """One pre-norm residual layer: attention, then MLP."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, config)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self, x: Array, rotation: tuple[Array, Array], attend: Attend, cache: LayerCache | None, read_cache: bool
    ) -> tuple[Array, LayerCache | None]:
        """`[B, T, D]` to `[B, T, D]`, and the cache with this layer's keys and values written."""
        out, cache = self.attention(self.attention_norm(x), rotation, attend, cache, read_cache)
        x = x + out
        x = x + self.mlp(self.mlp_norm(x))
        return constrain(x, ("batch", "length", "act_embed")), cache

"""A decoder-only language model whose layers are stacked and scanned, and the `Policy` made of it.

`Decoder` is an ordinary Flax NNX module. `decoder` wraps it into pure functions with the same adapter that a user's own
module goes through, so that training, scoring and sampling know nothing of this file.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxrl_post.kernels.attention import attention
from jaxrl_post.mesh import LogicalAxes, constrain
from jaxrl_post.models.adapters import from_nnx, nest
from jaxrl_post.models.layers import (
    CACHE_AXES,
    Attend,
    DecoderConfig,
    KVCache,
    Layer,
    LayerCache,
    RMSNorm,
    accumulation_dtype,
    param,
    rotary_angles,
)
from jaxrl_post.types import Array, Policy, Unembedding

REMAT = ("none", "dots", "full")


class ValueHead(nnx.Module):
    """A linear estimate of the return, which starts at zero."""

    def __init__(self, config: DecoderConfig):
        self.kernel = nnx.Param(jnp.zeros((config.width,), config.param_dtype), logical_axes=("embed",))
        self.bias = nnx.Param(jnp.zeros((), config.param_dtype), logical_axes=())

    def __call__(self, hidden: Array) -> Array:
        """`[B, T]` values of `[B, T, D]` states, float32 or wider."""
        wide = accumulation_dtype(hidden.dtype)
        return hidden.astype(wide) @ self.kernel[...].astype(wide) + self.bias[...].astype(wide)


class Decoder(nnx.Module):
    """The language model of `decoder` as a Flax NNX module; parameters under `layers` have a leading axis of layers."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = config
        self.config = c
        table: LogicalAxes = ("vocab", "embed")
        self.embedding = param(rngs, (c.vocab_size, c.width), table, c, c.init_std)

        @nnx.split_rngs(splits=c.layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> Layer:
            return Layer(c, rngs=rngs)

        self.layers = stack(rngs)
        self.final_norm = RMSNorm(c.width, c)
        self.unembedding = None if c.tied else param(rngs, (c.vocab_size, c.width), table, c, c.init_std)
        self.value_head = ValueHead(c) if c.value_head else None

    def hidden(
        self,
        tokens: Array,
        positions: Array,
        segment_ids: Array | None = None,
        completion_starts: tuple[int, ...] | None = None,
    ) -> Array:
        """`[B, T, D]` states after the last norm, all tokens at once; those of a segment stand in their order."""
        attend = _in_row_order(positions, segment_ids, completion_starts)
        return self._run(tokens, positions, attend, None, read_cache=False)[0]

    def prefill(self, tokens: Array, positions: Array, cache: KVCache) -> tuple[Array, KVCache]:
        """`hidden` that also fills an empty cache."""
        # An empty cache holds nothing to attend to, so the new tokens attend to each other only: [T, T], not [T, S].
        return self._cached(tokens, positions, cache, read_cache=False)

    def decode(self, tokens: Array, positions: Array, cache: KVCache) -> tuple[Array, KVCache]:
        """`hidden` of the next tokens, which attend to all that the cache holds and to each other."""
        return self._cached(tokens, positions, cache, read_cache=True)

    def unembed(self) -> Unembedding:
        """The last linear map, in the compute dtype."""
        table = self.embedding if self.unembedding is None else self.unembedding
        return Unembedding(table[...].astype(self.config.dtype), self.config.softcap)

    def heads(self, hidden: Array) -> dict[str, Array]:
        """`value`, if the model has a value head."""
        return {} if self.value_head is None else {"value": self.value_head(hidden)}

    def _cached(self, tokens: Array, positions: Array, cache: KVCache, *, read_cache: bool) -> tuple[Array, KVCache]:
        if tokens.shape[1] > cache.positions.shape[1]:
            raise ValueError(
                f"{tokens.shape[1]} tokens do not fit a cache of capacity {cache.positions.shape[1]}; "
                "make it with init_cache(batch, capacity) for prompt and completion together"
            )
        written = jax.lax.dynamic_update_slice(cache.positions, positions.astype(jnp.int32), (0, cache.index))
        # In a cache a token is found by its position: its slot also counts the padding between prompt and completion.
        by_position = functools.partial(attention, query_positions=positions, key_positions=written)
        attend = by_position if read_cache else _in_row_order(positions)
        hidden, (k, v) = self._run(tokens, positions, attend, cache, read_cache=read_cache)
        return hidden, KVCache(k, v, written, cache.index + tokens.shape[1])

    def _run(
        self, tokens: Array, positions: Array, attend: Attend, cache: KVCache | None, *, read_cache: bool
    ) -> tuple[Array, Any]:
        c = self.config
        rotation = rotary_angles(positions, c.head_dim, c.rope_base, accumulation_dtype(c.dtype))
        # Rows are whole on each device before the lookup: looked up in columns, they would have to be exchanged between
        # the devices that hold the columns and those that hold the batch.
        table = constrain(self.embedding[...], ("vocab", "act_embed"))
        x = constrain(table[tokens].astype(c.dtype), ("batch", "length", "act_embed"))
        graph, stacked = nnx.split(self.layers)

        def layer(carry: Any, scanned: Any) -> tuple[Any, None]:
            x, caches = carry
            state, number = scanned
            entry = None if cache is None else LayerCache(caches[0], caches[1], number, cache.index)
            x, entry = nnx.merge(graph, state)(x, rotation, attend, entry, read_cache)
            caches = None if entry is None else (constrain(entry.k, CACHE_AXES), constrain(entry.v, CACHE_AXES))
            return (x, caches), None

        if c.remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if c.remat == "dots" else None
            # A scan already keeps the recomputation apart from the forward pass; a barrier would only cost.
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        caches = None if cache is None else (cache.k, cache.v)
        (x, caches), _ = jax.lax.scan(layer, (x, caches), (stacked, jnp.arange(c.layers, dtype=jnp.int32)))
        return self.final_norm(x), caches


def _in_row_order(
    positions: Array, segment_ids: Array | None = None, completion_starts: tuple[int, ...] | None = None
) -> Attend:
    """Attention of a row to itself: to what stands before a token, in its segment and completion, and is no padding."""
    segments = jnp.zeros_like(positions) if segment_ids is None else segment_ids
    segments = jnp.where(positions < 0, -1, segments)
    return functools.partial(attention, segment_ids=segments, completion_starts=completion_starts)


def decoder(
    *,
    vocab_size: int,
    width: int = 128,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    mlp_width: int | None = None,
    rope_base: float = 10000.0,
    qk_norm: bool = False,
    tied: bool = False,
    softcap: float | None = None,
    norm_eps: float = 1e-6,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    value_head: bool = False,
    init_std: float = 0.02,
) -> Policy:
    """A pre-norm decoder with rotary positions, grouped attention and a gated MLP, as a `Policy`.

    `x += attention(norm(x)); x += mlp(norm(x))` for each layer, then a norm and the unembedding. Softmax and norms are
    float32 or wider whatever `dtype` is. Parameters are drawn from N(0, init_std^2), those that write to the residual
    stream from N(0, init_std^2 / (2 layers)). Layers are stacked on a leading axis and scanned, so compile time does
    not grow with depth.

    The cache is a `KVCache`; prompts are right-padded with position -1 on padding, and every call of `decode` writes
    the next slots of all rows. Slots beyond the capacity overwrite the last ones: `init_cache` must be given room for
    prompt and completion.

    Args:
        vocab_size: `V`.
        width: `D`, the size of the residual stream.
        layers: number of layers.
        heads: number of query heads.
        kv_heads: number of key-value heads, a divisor of `heads`; None for as many as `heads`.
        head_dim: size of a head, even; None for `width / heads`.
        mlp_width: hidden size of the MLP; None for `4 * width`.
        rope_base: base of the rotary frequencies.
        qk_norm: whether queries and keys are normalized per head.
        tied: whether the unembedding is the embedding table.
        softcap: logits become `softcap * tanh(logits / softcap)`; None for no cap.
        norm_eps: added to the mean square in the norms.
        dtype: compute dtype; parameters are cast to it where they are used.
        param_dtype: dtype of the parameters.
        remat: what the backward pass finds: `"none"` everything, `"dots"` the products with weight matrices (the rest,
            attention scores among it, is recomputed: half the memory, and on a CPU faster), `"full"` only the input of
            each layer.
        value_head: whether `heads` gives `value` (zero at first).
        init_std: standard deviation of the initial parameters.

    Returns:
        A `Policy`; `params` is a nested dict of arrays.

    Raises:
        ValueError: if the sizes do not fit each other or `remat` is unknown.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> policy = decoder(vocab_size=11, width=16, layers=3, heads=4, kv_heads=2)
        >>> params = policy.init(jax.random.key(0))
        >>> params["layers"]["attention"]["key"].shape
        (3, 16, 2, 4)
        >>> tokens = jnp.array([[3, 1, 4]])
        >>> hidden, aux = policy.hidden(params, tokens, jnp.arange(3)[None])
        >>> hidden.shape
        (1, 3, 16)
    """
    if min(vocab_size, width, layers, heads) < 1:
        raise ValueError(
            "vocab_size, width, layers and heads must be positive, "
            f"got vocab_size={vocab_size}, width={width}, layers={layers}, heads={heads}"
        )
    kv_heads = heads if kv_heads is None else kv_heads
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"kv_heads must divide heads, got heads={heads}, kv_heads={kv_heads}")
    if head_dim is None:
        if width % heads:
            raise ValueError(f"width={width} is not divisible by heads={heads}; change one or give head_dim")
        head_dim = width // heads
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary positions, got {head_dim}; change width, heads or head_dim")
    if remat not in REMAT:
        raise ValueError(f"remat must be one of {REMAT}, got {remat!r}")
    config = DecoderConfig(
        vocab_size=vocab_size,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=4 * width if mlp_width is None else mlp_width,
        rope_base=rope_base,
        qk_norm=qk_norm,
        tied=tied,
        softcap=softcap,
        norm_eps=norm_eps,
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype(param_dtype),
        remat=remat,
        value_head=value_head,
        init_std=init_std,
    )

    def init_cache(batch: int, capacity: int, dtype: DTypeLike | None = None) -> KVCache:
        shape = (layers, batch, capacity, kv_heads, head_dim)
        k, v = (constrain(jnp.zeros(shape, config.dtype if dtype is None else dtype), CACHE_AXES) for _ in range(2))
        return KVCache(k, v, jnp.full((batch, capacity), -1, jnp.int32), jnp.zeros((), jnp.int32))

    def axes() -> dict[str, Any]:
        params = nnx.state(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), nnx.Param)

        def names(path: tuple[Any, ...], variable: Any) -> LogicalAxes:
            stacked = ("layers",) if path[0] == "layers" else ()
            return (*stacked, *variable.get_metadata()["logical_axes"])

        return nest((path, names(path, variable)) for path, variable in nnx.to_flat_state(params))

    return from_nnx(
        lambda rngs: Decoder(config, rngs=rngs),
        hidden=Decoder.hidden,
        unembed=Decoder.unembed,
        heads=Decoder.heads,
        init_cache=init_cache,
        prefill=Decoder.prefill,
        decode=Decoder.decode,
        axes=axes,
    )

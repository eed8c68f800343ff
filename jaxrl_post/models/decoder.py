"""A decoder-only language model whose layers are stacked and scanned, and the `Policy` made of it.

`Decoder` is an ordinary Flax NNX module. `decoder` wraps it into pure functions with the same adapter that a user's own
module goes through, so that training, scoring and sampling know nothing of this file.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxrl_post.kernels.attention import attention
from jaxrl_post.mesh import LogicalAxes, constrain
from jaxrl_post.models.adapters import from_nnx, nest
from jaxrl_post.models.experts import Experts
from jaxrl_post.models.insertion import insert_rows
from jaxrl_post.models.layers import (
    ACTIVATIONS,
    CACHE_AXES,
    MLP,
    Activation,
    Attend,
    Attention,
    Biases,
    DecoderConfig,
    KVCache,
    LayerCache,
    Norms,
    QKNorm,
    RMSNorm,
    accumulation_dtype,
    looked_up,
    param,
)
from jaxrl_post.models.lora import Lora, fold_in
from jaxrl_post.models.rope import Rope, rotary_angles
from jaxrl_post.types import Array, Policy, Unembedding

REMAT = ("none", "dots", "full")


class Layer(nnx.Module):
    """One residual layer: attention, then MLP, each with a norm before it, after it, or both."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        before, after = config.norms in ("pre", "both"), config.norms in ("post", "both")
        self.attention_norm = RMSNorm(config.width, config) if before else None
        self.attention = Attention(config, rngs=rngs)
        self.after_attention_norm = RMSNorm(config.width, config) if after else None
        self.mlp_norm = RMSNorm(config.width, config) if before else None
        self.mlp = Experts(config, rngs=rngs) if config.experts else MLP(config, rngs=rngs)
        self.after_mlp_norm = RMSNorm(config.width, config) if after else None

    def __call__(
        self,
        x: Array,
        rotation: tuple[Array, Array],
        attend: Attend,
        cache: LayerCache | None,
        read_cache: bool,
        keys: Array | None = None,
    ) -> tuple[Array, LayerCache | None, dict[str, Array]]:
        """`[B, T, D]` to `[B, T, D]`, the cache with this layer's keys and values written, and what the MLP reports."""
        out, cache = self.attention(_normed(self.attention_norm, x), rotation, attend, cache, read_cache, keys)
        x = x + _normed(self.after_attention_norm, out)
        out, report = self.mlp(_normed(self.mlp_norm, x), keys)
        x = x + _normed(self.after_mlp_norm, out)
        return constrain(x, ("batch", "length", "act_embed")), cache, report


def _normed(norm: RMSNorm | None, x: Array) -> Array:
    return x if norm is None else norm(x)


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
        keys: Array | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """`[B, T, D]` states after the last norm, all tokens at once; those of a segment stand in their order.

        Beside them, if the model has experts, what `Policy.hidden` says of them.
        """
        attend = functools.partial(_in_row_order, positions, segment_ids, completion_starts)
        bounds = (0, *(completion_starts or ()), tokens.shape[1])

        def sums(x: Array) -> Array:
            """Over the tokens of each part of a row: `[B, T, E]` to `[B, S, E]`."""
            x = jnp.where(positions[..., None] >= 0, x, 0)
            return jnp.stack([jnp.sum(x[:, a:b], axis=1) for a, b in itertools.pairwise(bounds)], axis=1)

        hidden, _, report = self._run(tokens, positions, attend, None, read_cache=False, keys=keys, summed=sums)
        return hidden, {f"router_{name}": jnp.moveaxis(x, 0, 2) for name, x in report.items()}

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
        column = cache.index % cache.positions.shape[1]
        written = jax.lax.dynamic_update_slice(cache.positions, positions.astype(jnp.int32), (0, column))
        after = cache.index + tokens.shape[1]
        attend = functools.partial(_in_row_order, positions, None, None)
        if read_cache:
            attend = functools.partial(_by_position, positions, written)
        hidden, (k, v), _ = self._run(tokens, positions, attend, cache, read_cache=read_cache)
        return hidden, KVCache(k, v, written, after)

    def _run(
        self,
        tokens: Array,
        positions: Array,
        attends: Callable[[int | None], Attend],
        cache: KVCache | None,
        *,
        read_cache: bool,
        keys: Array | None = None,
        summed: Callable[[Array], Array] | None = None,
    ) -> tuple[Array, Any, dict[str, Array]]:
        """States, caches and what the experts report, summed; `attends` makes the attention that a window leaves."""
        c = self.config
        wide = accumulation_dtype(c.dtype)
        options = {"scale": c.attention_scale, "softcap": c.attention_softcap}
        everywhere, nearby = (functools.partial(attends(window), **options) for window in (None, c.window))
        angles, local_angles = (rotary_angles(r, c.head_dim, positions, wide) for r in (c.rope, c.local_rope))

        def mixed(local: Array) -> tuple[tuple[Array, Array], Attend]:
            """What differs between a local layer and another, where the program is the same for both."""
            rotation = angles
            if c.local_rope != c.rope:
                rotation = jax.tree.map(lambda a, b: jnp.where(local, a, b), local_angles, angles)
            if c.window is None:
                return rotation, everywhere
            return rotation, lambda *qkv: jax.lax.cond(local, nearby, everywhere, *qkv)

        x = looked_up(self.embedding[...], tokens, c.dtype)
        if c.embedding_scale is not None:
            x = x * jnp.asarray(c.embedding_scale, c.dtype)
        x = constrain(x, ("batch", "length", "act_embed"))
        graph, stacked = nnx.split(self.layers)

        def layer(carry: Any, scanned: Any) -> tuple[Any, Any]:
            x, caches = carry
            state, number, local = scanned
            if all(c.local_layers):
                rotation, attend = local_angles, nearby
            elif not any(c.local_layers):
                rotation, attend = angles, everywhere
            else:
                rotation, attend = mixed(local)
            own_keys = fold_in(keys, number) if c.lora is not None and c.lora.dropout else None
            entry = (
                None if cache is None else LayerCache(caches[0], caches[1], number, cache.index % caches[0].shape[2])
            )
            x, entry, report = nnx.merge(graph, state)(x, rotation, attend, entry, read_cache, own_keys)
            caches = None if entry is None else (constrain(entry.k, CACHE_AXES), constrain(entry.v, CACHE_AXES))
            return (x, caches), {} if summed is None else jax.tree.map(summed, report)

        if c.remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if c.remat == "dots" else None
            # A scan already keeps the recomputation apart from the forward pass; a barrier would only cost.
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        caches = None if cache is None else (cache.k, cache.v)
        scanned = (stacked, jnp.arange(c.layers, dtype=jnp.int32), jnp.asarray(c.local_layers))
        (x, caches), report = jax.lax.scan(layer, (x, caches), scanned)
        return self.final_norm(x), caches, report


def _in_row_order(
    positions: Array, segment_ids: Array | None, completion_starts: tuple[int, ...] | None, window: int | None
) -> Attend:
    """Attention of a row to itself: to what stands before a token, in its segment and completion, and is no padding."""
    segments = jnp.zeros_like(positions) if segment_ids is None else segment_ids
    segments = jnp.where(positions < 0, -1, segments)
    if completion_starts is not None and window is not None:
        # No sequence is longer than the row without the other completions.
        ends = (*completion_starts[1:], positions.shape[1])
        longest = completion_starts[0] + max(b - a for a, b in zip(completion_starts, ends, strict=True))
        if longest > window:
            raise ValueError(
                f"a model with a sliding window of {window} tokens cannot let completions share a prompt in rows of "
                f"{longest} tokens; score them in rows of their own (training.share_prompts: false)"
            )
        window = None
    return functools.partial(attention, segment_ids=segments, completion_starts=completion_starts, window=window)


def _by_position(positions: Array, written: Array, window: int | None) -> Callable[..., Array]:
    """Attention to a cache, where a token is found by its position: the order of columns says nothing.

    Args:
        positions: `[B, T]`, of the queries.
        written: `[B, S]`, of what the cache holds.
        window: of the attention.
    """

    def attend(query: Array, cache: LayerCache, **options: Any) -> Array:
        key, value = (jax.lax.dynamic_index_in_dim(x, cache.layer, 0, keepdims=False) for x in (cache.k, cache.v))
        where = {"query_positions": positions, "key_positions": written}
        return attention(query, key, value, window=window, **where, **options)

    return attend


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
    rope: Rope | None = None,
    local_rope: Rope | None = None,
    window: int | None = None,
    local_layers: Sequence[bool] | None = None,
    qk_norm: QKNorm | bool = False,
    attention_bias: Biases = "none",
    attention_scale: float | None = None,
    attention_softcap: float | None = None,
    mlp_bias: bool = False,
    activation: Activation = "silu",
    norms: Norms = "pre",
    norm_offset: float = 0.0,
    norm_eps: float = 1e-6,
    embedding_scale: float | None = None,
    experts: int = 0,
    experts_per_token: int = 0,
    normalize_experts: bool = True,
    tied: bool = False,
    softcap: float | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    value_head: bool = False,
    init_std: float = 0.02,
    lora: Lora | None = None,
) -> Policy:
    """A decoder with rotary positions, grouped attention and a gated MLP or experts, as a `Policy`.

    `x += attention(norm(x)); x += mlp(norm(x))` for each layer, then a norm and the unembedding. Softmax and norms are
    float32 or wider whatever `dtype` is. Parameters are drawn from N(0, init_std^2), those that write to the residual
    stream from N(0, init_std^2 / (2 layers)). Layers are stacked on a leading axis and scanned, so compile time does
    not grow with depth.

    The cache is a `KVCache`; prompts are right-padded with position -1 on padding, and every call of `decode` writes
    the next columns of all rows, after the last one the first again: `init_cache` must be given room for prompt and
    completion.

    Args:
        vocab_size: `V`.
        width: `D`, the size of the residual stream.
        layers: number of layers.
        heads: number of query heads.
        kv_heads: number of key-value heads, a divisor of `heads`; None for as many as `heads`.
        head_dim: size of a head, even; None for `width / heads`.
        mlp_width: hidden size of the MLP, or of each expert; None for `4 * width`.
        rope_base: base of the rotary frequencies, if `rope` is not given.
        rope: how positions become angles, with `models.Rope`; None for `Rope(base=rope_base)`.
        local_rope: the same in local layers; None for `rope`.
        window: a token of a local layer sees this many tokens, itself among them; None for all before it.
        local_layers: for each layer, whether it is local; None for all of them if there is a window.
        qk_norm: `"head"` (or True) normalizes queries and keys per head, `"full"` all heads of a token together, both
            before they are rotated; `"none"` (or False) does not.
        attention_bias: `"none"`, `"qkv"`, or `"all"`: with one on the attention's output too.
        attention_scale: of the scores; None for `1 / sqrt(head_dim)`.
        attention_softcap: scores become `attention_softcap * tanh(scores / attention_softcap)`; None for no cap.
        mlp_bias: whether the three maps of the MLP have a bias.
        activation: of the MLP's gate: `"silu"`, `"gelu"`, or `"gelu_tanh"`, its approximation.
        norms: `"pre"` as above; `"post"` is `x += norm(attention(x))`; `"both"` is `x += norm(attention(norm(x)))`.
        norm_offset: the norms multiply by `norm_offset + scale`.
        norm_eps: added to the mean square in the norms.
        embedding_scale: embeddings are multiplied by it, rounded to `dtype`; None for no factor.
        experts: number of experts in the place of each MLP; 0 for an MLP.
        experts_per_token: how many of them each token goes through.
        normalize_experts: whether the weights of a token's experts are made to add up to 1.
        tied: whether the unembedding is the embedding table.
        softcap: logits become `softcap * tanh(logits / softcap)`; None for no cap.
        dtype: compute dtype; parameters are cast to it where they are used.
        param_dtype: dtype of the parameters.
        remat: what the backward pass finds: `"none"` everything, `"dots"` the products with weight matrices (the rest,
            attention scores among it, is recomputed: half the memory, and on a CPU faster), `"full"` only the input of
            each layer.
        value_head: whether `heads` gives `value` (zero at first).
        init_std: standard deviation of the initial parameters.
        lora: adapters of the layers' projections, with `models.Lora`; None for none.

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
    for name, value, known in (
        ("remat", remat, REMAT),
        ("qk_norm", qk_norm, (True, False, *get_args(QKNorm))),
        ("attention_bias", attention_bias, get_args(Biases)),
        ("activation", activation, tuple(ACTIVATIONS)),
        ("norms", norms, get_args(Norms)),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")
    rope = Rope(base=rope_base) if rope is None else rope
    local_rope = rope if local_rope is None else local_rope
    rope.check(head_dim)
    local_rope.check(head_dim)
    if local_rope.rotated(head_dim) != rope.rotated(head_dim):
        raise ValueError("rope and local_rope must rotate equally many dimensions of a head")
    if local_layers is None:
        local_layers = (window is not None,) * layers
    if len(local_layers) != layers:
        raise ValueError(
            f"local_layers must say of each of {layers} layers whether it is local, got {len(local_layers)}"
        )
    if experts and not 1 <= experts_per_token <= experts:
        raise ValueError(f"experts_per_token must be between 1 and experts={experts}, got {experts_per_token}")
    if experts and mlp_bias:
        raise ValueError("mlp_bias does not apply to experts, which have none")
    lora = None if lora is None else lora.checked()
    if lora is not None and lora.dropout and experts and {"gate", "up", "down"} & set(lora.projections):
        raise ValueError(f"lora dropout {lora.dropout} does not apply to the maps of experts; leave it or them out")
    config = DecoderConfig(
        vocab_size=vocab_size,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=4 * width if mlp_width is None else mlp_width,
        rope=rope,
        local_rope=local_rope,
        qk_norm={True: "head", False: "none"}.get(qk_norm, qk_norm),  # type: ignore[call-overload]
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        activation=activation,
        norms=norms,
        norm_offset=norm_offset,
        norm_eps=norm_eps,
        window=window,
        local_layers=tuple(map(bool, local_layers)),
        attention_scale=attention_scale,
        attention_softcap=attention_softcap,
        embedding_scale=embedding_scale,
        experts=experts,
        experts_per_token=experts_per_token,
        normalize_experts=normalize_experts,
        tied=tied,
        softcap=softcap,
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype(param_dtype),
        remat=remat,
        value_head=value_head,
        init_std=init_std,
        lora=lora,
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

    policy = from_nnx(
        lambda rngs: Decoder(config, rngs=rngs),
        hidden=Decoder.hidden,
        unembed=Decoder.unembed,
        heads=Decoder.heads,
        init_cache=init_cache,
        prefill=Decoder.prefill,
        decode=Decoder.decode,
        axes=axes,
    )
    return policy._replace(insert=functools.partial(insert_rows, axes={"k": 1, "v": 1, "positions": 0}))

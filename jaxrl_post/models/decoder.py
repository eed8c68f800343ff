"""The `Policy` of a decoder-only language model.

It wraps the module of `network` into pure functions with the same adapter that a user's own module goes through, so
that training, scoring and sampling know nothing of it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxrl_post.mesh import LogicalAxes
from jaxrl_post.models.adapters import from_nnx, nest
from jaxrl_post.models.cache_kinds import Cache, insert, new_cache, share_prompts
from jaxrl_post.models.layers import (
    ACTIVATIONS,
    Activation,
    Biases,
    DecoderConfig,
    Norms,
    QKNorm,
)
from jaxrl_post.models.lora import Lora
from jaxrl_post.models.network import Decoder
from jaxrl_post.models.quantize import Quantized
from jaxrl_post.models.rope import Rope
from jaxrl_post.models.rounding import round_late, two_uses
from jaxrl_post.types import Params, Policy

REMAT = ("none", "dots", "full")


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

    The cache is a `KVCache`, or a `WindowedCache` where local layers see fewer tokens than it has columns; prompts are
    right-padded with position -1 on padding, and every call of `decode` writes the next columns of all rows, after the
    last one the first again: `init_cache` must be given room for prompt and completion. Its dtype may be int8, which
    takes half the memory of bfloat16 and moves the states a little: log-probs of the sampler are then not quite those
    of `hidden`. With `init_cache(..., pages=n)` rows share a pool of `n` pages, of which each takes what its tokens
    need (`PagedCache`). `cache_bytes` tells what a cache takes.

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

    def init_cache(batch: int, capacity: int, dtype: DTypeLike | None = None, *, pages: int | None = None) -> Cache:
        return new_cache(config, batch, capacity, dtype, pages=pages)

    def axes() -> dict[str, Any]:
        params = nnx.state(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), nnx.Param)

        def names(path: tuple[Any, ...], variable: Any) -> LogicalAxes:
            stacked = ("layers",) if path[0] == "layers" else ()
            return (*stacked, *variable.get_metadata()["logical_axes"])

        return nest((path, names(path, variable)) for path, variable in nnx.to_flat_state(params))

    def cast(params: Params) -> Params:
        def rounded(path: tuple[Any, ...], x: Any) -> Any:
            if isinstance(x, Quantized):
                return x
            names = [str(part.key) for part in path]
            # These are multiplied with once. A table that tokens are looked up in adds up the gradients of many, norms
            # and adapters are small: they keep what they are stored in.
            in_layer = names[0] == "layers" and not any(name.endswith("_lora") for name in names) and x.ndim > 2
            if not (in_layer or names[0] == "unembedding"):
                return x
            return x.astype(config.dtype) if config.dtype.itemsize < x.dtype.itemsize else x

        return jax.tree_util.tree_map_with_path(rounded, params, is_leaf=lambda x: isinstance(x, Quantized))

    def late(params: Params, cast: Params) -> Params:
        rounded = round_late(params, cast)
        table = cast["embedding"]
        if config.tied and table is not None and config.dtype.itemsize < table.dtype.itemsize:
            rounded = {**rounded, "embedding": two_uses(table, config.dtype)}
        return rounded

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
    inserted = functools.partial(insert, local_layers=config.local_layers)
    return policy._replace(insert=inserted, cast=cast, round_late=late, share=share_prompts)

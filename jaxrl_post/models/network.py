"""The layers of a decoder-only language model, stacked and scanned, as an ordinary Flax NNX module."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl_post.kernels.attention import attention
from jaxrl_post.mesh import LogicalAxes, constrain
from jaxrl_post.models.cache import attend_cached
from jaxrl_post.models.cache_kinds import Cache, SharedCache, reads, write_layers
from jaxrl_post.models.experts import Experts
from jaxrl_post.models.layers import (
    MLP,
    Attend,
    Attention,
    DecoderConfig,
    RMSNorm,
    accumulation_dtype,
    looked_up,
    param,
)
from jaxrl_post.models.lora import fold_in
from jaxrl_post.models.rope import rotary_angles
from jaxrl_post.models.rounding import TwoUses, accumulated
from jaxrl_post.types import Array, Unembedding

PIECE_TOKENS = 2048
"""Where all but a layer's input is computed again, the rows of a layer are run in pieces of about so many tokens."""


class Rows(NamedTuple):
    """What a layer is told of each row beside its states, all `[B, ...]`."""

    positions: Array
    segment_ids: Array | None = None
    keys: Array | None = None


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
        keys: Array | None = None,
    ) -> tuple[Array, tuple[Array, Array], dict[str, Array]]:
        """`[B, T, D]` to `[B, T, D]`, the keys and values of its attention, and what the MLP reports."""
        out, kv = self.attention(_normed(self.attention_norm, x), rotation, attend, keys)
        x = x + _normed(self.after_attention_norm, out)
        out, report = self.mlp(_normed(self.mlp_norm, x), keys)
        x = x + _normed(self.after_mlp_norm, out)
        return constrain(x, ("batch", "length", "act_embed")), kv, report


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
        bounds = (0, *(completion_starts or ()), tokens.shape[1])

        def attends(rows: Rows, window: int | None) -> Attend:
            return _in_row_order(rows.positions, rows.segment_ids, completion_starts, window)

        def sums(rows: Rows, x: Array) -> Array:
            """Over the tokens of each part of a row: `[B, T, E]` to `[B, S, E]`."""
            x = jnp.where(rows.positions[..., None] >= 0, x, 0)
            return jnp.stack([jnp.sum(x[:, a:b], axis=1) for a, b in itertools.pairwise(bounds)], axis=1)

        hidden, _, report = self._run(tokens, Rows(positions, segment_ids, keys), attends, summed=sums)
        return hidden, {f"router_{name}": jnp.moveaxis(x, 0, 2) for name, x in report.items()}

    def prefill(self, tokens: Array, positions: Array, cache: Cache) -> tuple[Array, Cache]:
        """`hidden` that also fills an empty cache."""
        if isinstance(cache, SharedCache):
            raise ValueError("a cache with shared prompts is not empty; prefill the prompts, then share them")
        # An empty cache holds nothing to attend to, so the new tokens attend to each other only: [T, T], not [T, S].
        return self._cached(tokens, positions, cache, functools.partial(_in_row_order, positions, None, None))

    def decode(self, tokens: Array, positions: Array, cache: Cache) -> tuple[Array, Cache]:
        """`hidden` of the next tokens, which attend to all that the cache holds and to each other."""
        attends = functools.partial(_by_position, positions, cache, self.config.local_layers)
        return self._cached(tokens, positions, cache, attends)

    def unembed(self) -> Unembedding:
        """The last linear map, in the compute dtype."""
        table = self.embedding if self.unembedding is None else self.unembedding
        return Unembedding(table[...].astype(self.config.dtype), self.config.softcap)

    def heads(self, hidden: Array) -> dict[str, Array]:
        """`value`, if the model has a value head."""
        return {} if self.value_head is None else {"value": self.value_head(hidden)}

    def _cached(
        self, tokens: Array, positions: Array, cache: Cache, attends: Callable[[int | None], Attend]
    ) -> tuple[Array, Cache]:
        if tokens.shape[1] > cache.positions.shape[1]:
            raise ValueError(
                f"{tokens.shape[1]} tokens do not fit a cache of capacity {cache.positions.shape[1]}; "
                "make it with init_cache(batch, capacity) for prompt and completion together"
            )
        hidden, (k, v), _ = self._run(tokens, Rows(positions), lambda _, window: attends(window), keep=True)
        return hidden, write_layers(cache, k, v, positions, self.config.local_layers)

    def _run(
        self,
        tokens: Array,
        rows: Rows,
        attends: Callable[[Rows, int | None], Attend],
        *,
        keep: bool = False,
        summed: Callable[[Rows, Array], Array] | None = None,
    ) -> tuple[Array, Any, dict[str, Array]]:
        """States, keys and values of all layers if they are kept, and what the experts report, summed.

        `attends` makes the attention that a window leaves; its functions are given the layer's number too.
        """
        c = self.config
        wide = accumulation_dtype(c.dtype)
        table = self.embedding[...]
        x = looked_up(table.table if isinstance(table, TwoUses) else table, tokens, c.dtype)
        if c.embedding_scale is not None:
            x = x * jnp.asarray(c.embedding_scale, c.dtype)
        x = constrain(x, ("batch", "length", "act_embed"))
        graph, stacked = nnx.split(self.layers)

        def layer_of(rows: Rows) -> Callable[[Array, Any], tuple[Array, Any]]:
            options = {"scale": c.attention_scale, "softcap": c.attention_softcap}
            everywhere, nearby = (functools.partial(attends(rows, window), **options) for window in (None, c.window))
            # Of every piece again: kept, they would take more than they cost.
            angles, local_angles = (rotary_angles(r, c.head_dim, rows.positions, wide) for r in (c.rope, c.local_rope))

            def mixed(local: Array) -> tuple[tuple[Array, Array], Callable[..., Array]]:
                """What differs between a local layer and another, where the program is the same for both."""
                rotation = angles
                if c.local_rope != c.rope:
                    rotation = jax.tree.map(lambda a, b: jnp.where(local, a, b), local_angles, angles)
                if c.window is None:
                    return rotation, everywhere
                return rotation, lambda *given: jax.lax.cond(local, nearby, everywhere, *given)

            def layer(x: Array, scanned: Any) -> tuple[Array, Any]:
                state, number, local = scanned
                if all(c.local_layers):
                    rotation, attend = local_angles, nearby
                elif not any(c.local_layers):
                    rotation, attend = angles, everywhere
                else:
                    rotation, attend = mixed(local)
                own_keys = fold_in(rows.keys, number) if c.lora is not None and c.lora.dropout else None
                x, kv, report = nnx.merge(graph, state)(x, rotation, lambda *qkv: attend(*qkv, number), own_keys)
                if summed is not None:
                    report = {name: summed(rows, values) for name, values in report.items()}
                return x, (kv if keep else None, {} if summed is None else report)

            return recomputed(layer)

        def recomputed(layer: Callable[..., Any]) -> Callable[..., Any]:
            if c.remat == "none":
                return layer
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if c.remat == "dots" else None
            # A scan already keeps the recomputation apart from the forward pass; a barrier would only cost.
            return jax.checkpoint(layer, policy=policy, prevent_cse=False)

        layer, pieces = layer_of(rows), 1 if keep else self._pieces(*tokens.shape)
        if pieces > 1:
            x, cut = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), (x, rows))

            @recomputed
            def layer(x: Array, scanned: Any) -> tuple[Array, Any]:
                state, *rest = scanned
                scanned = (accumulated(state), *rest)
                return jax.lax.map(lambda piece: layer_of(piece[1])(piece[0], scanned), (x, cut))

        scanned = (stacked, jnp.arange(c.layers, dtype=jnp.int32), jnp.asarray(c.local_layers))
        x, (kept, report) = jax.lax.scan(layer, x, scanned)
        if pieces > 1:
            x = x.reshape(-1, *x.shape[2:])
            report = {name: values.reshape(c.layers, -1, *values.shape[3:]) for name, values in report.items()}
        return self.final_norm(x), kept, report

    def _pieces(self, batch: int, length: int) -> int:
        """In how many pieces the rows of a layer are run: what a layer's backward pass holds is then of one piece.

        On a mesh in one, whose devices would gather the layer's weights for each; and so where the number of rows has
        no divisor that gives pieces of a useful size.
        """
        if self.config.remat != "full" or math.prod(jax.sharding.get_abstract_mesh().axis_sizes) > 1:
            return 1
        most = max(1, PIECE_TOKENS // length)
        pieces = next(n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= most)
        return pieces if 2 * (batch // pieces) >= most else 1


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

    def attend(query: Array, key: Array, value: Array, layer: Array, **options: Any) -> Array:
        where = {"segment_ids": segments, "completion_starts": completion_starts, "window": window}
        return attention(query, key, value, **where, **options)

    return attend


def _by_position(positions: Array, cache: Cache, local_layers: tuple[bool, ...], window: int | None) -> Attend:
    """Attention to a cache and among the new tokens, which have these positions."""
    read = reads(cache, positions, window, local_layers)

    def attend(query: Array, key: Array, value: Array, layer: Array, **options: Any) -> Array:
        return attend_cached(query, key, value, positions, read(layer), window=window, **options)

    return attend

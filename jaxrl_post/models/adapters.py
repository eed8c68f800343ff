"""Policies from models that were written elsewhere: Flax NNX modules, Flax Linen modules, bare apply functions.

The model must be causal: the state of a token may depend on that token and the ones before it, never on later ones.
Scoring relies on this (padding follows the tokens, and no mask hides it), and so does the cache that is supplied where
the model brings none.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen, nnx

from jaxrl_post.models.recompute import recompute_cache
from jaxrl_post.types import Array, Params, Policy, PyTree, Unembedding

CacheMethod: TypeAlias = Callable[..., tuple[Array, PyTree]]


def from_nnx(
    build: Callable[[nnx.Rngs], nnx.Module],
    *,
    hidden: Callable[..., Any],
    unembed: Callable[[Any], Any],
    heads: Callable[[Any, Array], dict[str, Array]] | None = None,
    init_cache: Callable[..., PyTree] | None = None,
    prefill: CacheMethod | None = None,
    decode: CacheMethod | None = None,
    axes: Callable[[], PyTree] | None = None,
) -> Policy:
    """A `Policy` from a Flax NNX module.

    `params` is a nested dict of the module's `nnx.Param` variables, with strings for keys. All other variables (random
    number streams, running averages) keep their initial value, and the module is put into evaluation mode: dropout
    would make sampling and scoring disagree.

    Args:
        build: makes the module from random number streams; traced, so it may be large.
        hidden: `(module, tokens[B, T], positions[B, T]) -> [B, T, D]`, or `([B, T, D], aux)`; it may also take
            `segment_ids`, `completion_starts`, and `key` (for all rows) or `keys` (one for each, `[B]`). An unbound
            method such as `MyModel.encode` will do.
        unembed: `(module) -> Array[V, D]` or an `Unembedding`.
        heads: `(module, hidden[B, T, D]) -> dict[str, [B, T]]`, e.g. `value`.
        init_cache: `(batch, capacity, dtype) -> cache`; together with `prefill` and `decode`, or none of the three.
            Without them the whole sequence is recomputed at every decoded token.
        prefill: `(module, tokens, positions, cache) -> (hidden, cache)`.
        decode: the same signature.
        axes: `() -> pytree` as in `Policy`.

    Returns:
        A `Policy`.

    Raises:
        ValueError: if some but not all of the cache functions are given.

    Example:
        >>> class Bigram(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.embed = nnx.Embed(5, 8, rngs=rngs)
        ...         self.out = nnx.Param(jax.random.normal(rngs.params(), (5, 8)))
        >>> policy = from_nnx(
        ...     Bigram, hidden=lambda model, tokens, positions: model.embed(tokens), unembed=lambda model: model.out
        ... )
        >>> params = policy.init(jax.random.key(0))
        >>> sorted(params), policy.unembed(params).weight.shape
        (['embed', 'out'], (5, 8))
    """

    def build_module(key: Any) -> nnx.Module:
        module = build(nnx.Rngs(key))
        module.eval()
        return module

    graph, abstract, _ = nnx.split(nnx.eval_shape(lambda: build_module(0)), nnx.Param, ...)
    paths = [path for path, _ in nnx.to_flat_state(abstract)]
    # Compiled, so that the parameters, which are not asked for here, are never made.
    rest = jax.jit(lambda: nnx.split(build_module(0), nnx.Param, ...)[2])()

    def init(key: Array) -> Params:
        state = nnx.split(build_module(key), nnx.Param, ...)[1]
        return nest((path, variable[...]) for path, variable in nnx.to_flat_state(state))

    def module(params: Params) -> Any:
        leaves = [(path, _lookup(params, path)) for path in paths]
        return nnx.merge(graph, nnx.from_flat_state(leaves), rest, copy=True)

    return _policy(
        init,
        lambda params, *args, **keywords: hidden(module(params), *args, **keywords),
        _keywords(hidden),
        lambda params: unembed(module(params)),
        None if heads is None else lambda params, states: heads(module(params), states),
        init_cache,
        None if prefill is None else lambda params, *args: prefill(module(params), *args),
        None if decode is None else lambda params, *args: decode(module(params), *args),
        axes,
    )


def from_linen(
    module: linen.Module,
    *,
    hidden: str | Callable[..., Any],
    unembed: Callable[[Params], Any],
    init: Callable[[Array], Params] | None = None,
    heads: Callable[[Params, Array], dict[str, Array]] | None = None,
    init_cache: Callable[..., PyTree] | None = None,
    prefill: str | CacheMethod | None = None,
    decode: str | CacheMethod | None = None,
    axes: Callable[[], PyTree] | None = None,
) -> Policy:
    """A `Policy` from a Flax Linen module, whose only collection is "params".

    Args:
        module: the unbound module.
        hidden: name of a method `(tokens[B, T], positions[B, T]) -> [B, T, D]` (or `([B, T, D], aux)`), or a function
            with the module before these; it may also take `segment_ids`, `completion_starts`, and `key` (for all rows)
            or `keys` (one for each, `[B]`).
        unembed: `(params) -> Array[V, D]` or an `Unembedding`.
        init: `(key) -> params`; None for `module.init(key, tokens)["params"]`, where `__call__(tokens[B, T])` must
            reach every parameter.
        heads: `(params, hidden[B, T, D]) -> dict[str, [B, T]]`, e.g. `value`.
        init_cache: `(batch, capacity, dtype) -> cache`; together with `prefill` and `decode`, or none of the three.
            Without them the whole sequence is recomputed at every decoded token.
        prefill: name of a method `(tokens, positions, cache) -> (hidden, cache)`, or a function with the module before.
        decode: the same.
        axes: `() -> pytree` as in `Policy`.

    Returns:
        A `Policy`.

    Raises:
        ValueError: if some but not all of the cache functions are given, or (at `init`) if the module has collections
            other than "params".

    Example:
        >>> class Bigram(linen.Module):
        ...     def setup(self):
        ...         self.embed = linen.Embed(5, 8)
        ...         self.out = linen.Dense(5, use_bias=False)
        ...     def encode(self, tokens, positions):
        ...         return self.embed(tokens)
        ...     def __call__(self, tokens):
        ...         return self.out(self.encode(tokens, None))
        >>> policy = from_linen(Bigram(), hidden="encode", unembed=lambda params: params["out"]["kernel"].T)
        >>> params = policy.init(jax.random.key(0))
        >>> policy.unembed(params).weight.shape
        (5, 8)
    """

    def default_init(key: Array) -> Params:
        variables = linen.meta.unbox(module.init(key, jnp.zeros((1, 1), jnp.int32)))
        if others := sorted(set(variables) - {"params"}):
            raise ValueError(
                f"a Linen policy keeps its state in the collection 'params' only, but {type(module).__name__} also has "
                f"{others}; turn them off, or give init=(key) -> params if the model runs without them"
            )
        return variables["params"]

    def run(method: str | Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, *args, **keywords: module.apply({"params": params}, *args, method=method, **keywords)

    return _policy(
        default_init if init is None else init,
        run(hidden),
        _keywords(getattr(type(module), hidden) if isinstance(hidden, str) else hidden),
        unembed,
        heads,
        init_cache,
        None if prefill is None else run(prefill),
        None if decode is None else run(decode),
        axes,
    )


def from_apply(apply: Callable[[Params, Array], Array], init: Callable[[Array], Params] | None = None) -> Policy:
    """A `Policy` from a bare `apply(params, tokens[B, T]) -> logits[B, T, V]`.

    Nothing is known of the model but its logits, so that `[B, T, V]` of them are held when it is scored, and the whole
    sequence is recomputed at every token it generates; a warning says so.

    Args:
        apply: a causal model.
        init: `(key) -> params`.

    Returns:
        A `Policy` whose `hidden` gives logits and whose `Unembedding.weight` is None.

    Raises:
        ValueError: from `Policy.init`, if no `init` was given.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("ignore")
        >>> policy = from_apply(lambda params, tokens: params["table"][tokens])
        >>> logits, _ = policy.hidden({"table": jnp.eye(3)}, jnp.array([[2, 0]]), jnp.array([[0, 1]]))
        >>> logits.tolist()
        [[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]]
    """
    warnings.warn(
        "a policy made by from_apply holds all [B, T, V] logits when it is scored and recomputes the whole sequence "
        "for every generated token; from_nnx and from_linen avoid both",
        stacklevel=2,
    )

    def no_init(key: Array) -> Params:
        del key
        raise ValueError("this policy cannot make parameters: pass from_apply(apply, init=(key) -> params)")

    return _policy(
        no_init if init is None else init,
        lambda params, tokens, positions: apply(params, tokens),
        frozenset(),
        lambda params: Unembedding(None),
    )


def nest(leaves: Iterable[tuple[tuple[Any, ...], Any]]) -> dict[str, Any]:
    """A nested dict with strings for keys from pairs of path and leaf.

    Example:
        >>> nest([(("layers", 0, "scale"), 1.0), (("out",), 2.0)])
        {'layers': {'0': {'scale': 1.0}}, 'out': 2.0}
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves:
        node = tree
        for name in path[:-1]:
            node = node.setdefault(str(name), {})
        node[str(path[-1])] = leaf
    return tree


def _lookup(tree: Any, path: tuple[Any, ...]) -> Any:
    for name in path:
        tree = tree[str(name)]
    return tree


def _keywords(function: Callable[..., Any]) -> frozenset[str]:
    """Which of the optional arguments of `Policy.hidden` a function takes."""
    return frozenset(inspect.signature(function).parameters) & {"segment_ids", "completion_starts", "key", "keys"}


def _policy(
    init: Callable[[Array], Params],
    run: Callable[..., Any],
    keywords: frozenset[str],
    unembed: Callable[[Params], Any],
    heads: Callable[[Params, Array], dict[str, Array]] | None = None,
    init_cache: Callable[..., PyTree] | None = None,
    prefill: CacheMethod | None = None,
    decode: CacheMethod | None = None,
    axes: Callable[[], PyTree] | None = None,
) -> Policy:
    def hidden(
        params: Params,
        tokens: Array,
        positions: Array,
        segment_ids: Array | None = None,
        *,
        completion_starts: tuple[int, ...] | None = None,
        key: Array | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        optional: dict[str, Any] = {}
        if segment_ids is not None:
            if "segment_ids" not in keywords:
                raise ValueError("this model's hidden function takes no segment_ids, so its rows cannot be packed")
            optional["segment_ids"] = segment_ids
        if completion_starts is not None:
            if "completion_starts" not in keywords:
                raise ValueError(
                    "this model's hidden function takes no completion_starts, so that completions cannot share a "
                    "prompt; leave shared_prompt out, or let hidden pass them on to kernels.attention"
                )
            optional["completion_starts"] = completion_starts
        if key is not None and not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        one_for_all = key is None or key.ndim == 0
        if "key" in keywords:
            optional["key"] = key if key is None or one_for_all else key[0]
        if "keys" in keywords and key is not None:
            optional["keys"] = jax.random.split(key, tokens.shape[0]) if one_for_all else key
        out = run(params, tokens, positions, **optional)
        return out if isinstance(out, tuple) else (out, {})

    def unembedding(params: Params) -> Unembedding:
        out = unembed(params)
        return out if isinstance(out, Unembedding) else Unembedding(jnp.asarray(out))

    given = {"init_cache": init_cache, "prefill": prefill, "decode": decode}
    missing = [name for name, function in given.items() if function is None]
    if missing and len(missing) < len(given):
        raise ValueError(f"give init_cache, prefill and decode together, or none of them; {missing} are missing")
    if init_cache is None or prefill is None or decode is None:
        init_cache, prefill, decode = recompute_cache(hidden)
    return Policy(init, hidden, unembedding, heads or (lambda params, states: {}), init_cache, prefill, decode, axes)

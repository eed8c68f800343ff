"""Low-rank adapters: which projections get one, what it adds, and which parameters are trained when the rest is frozen.

A model with adapters has its own weights and the adapters in one tree. Without them (`Policy` of the same sizes without
`lora`) the same tree is the model as it was: a reference needs no copy of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl_post.types import Array, Params, PyTree

PROJECTIONS = ("query", "key", "value", "out", "gate", "up", "down")
"""The linear maps of a layer, which may have adapters."""

FUSED = {"qkv": ("query", "key", "value"), "gate_up": ("gate", "up")}
"""Targets of several projections whose adapters share one `A`, which is how one adapter of a fused matrix is."""

TARGETS = ("qkv", *PROJECTIONS[:4], "gate_up", *PROJECTIONS[4:])
"""What may have adapters, in their order."""

HUGGING_FACE = {
    "qkv_proj": "qkv",
    "gate_up_proj": "gate_up",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "out",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}
"""Our names of what Hugging Face models call otherwise."""

SUFFIX = "_lora"


@dataclasses.dataclass(frozen=True)
class Lora:
    r"""Adapters of some projections, $W x + s\, B A x$.

    Attributes:
        rank: $r$, rows of $A$ and columns of $B$.
        alpha: $s = \alpha / r$; with `rank_stabilized`, $s = \alpha / \sqrt r$ (rsLoRA).
        targets: of `TARGETS`, or the names that Hugging Face models have for them. `qkv` is query, key and value with
            one `A` for all three, which is what an adapter of a matrix that fuses them is; `gate_up` alike.
        dropout: share of the inputs of $A$ that are zeroed while training.
        rank_stabilized: see `alpha`.

    Reference: LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685; A Rank Stabilization Scaling Factor
    for Fine-Tuning with LoRA, arXiv 2312.03732.
    """

    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = ("query", "value")
    dropout: float = 0.0
    rank_stabilized: bool = False

    @property
    def scale(self) -> float:
        """`s`."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    @property
    def projections(self) -> tuple[str, ...]:
        """The linear maps that have adapters; the targets must be checked."""
        return tuple(name for target in self.targets for name in FUSED.get(target, (target,)))

    def holder(self, projection: str) -> str:
        """The projection whose adapter holds `A` for this one: itself, or the first of those that share it."""
        shared = [FUSED[target] for target in self.targets if target in FUSED]
        return next((names[0] for names in shared if projection in names), projection)

    def checked(self) -> Lora:
        """The same with our names of the targets, in their order.

        Raises:
            ValueError: for a rank below 1, an unknown target, none or one twice, or a dropout outside [0, 1).

        Example:
            >>> Lora(rank=4, targets=("v_proj", "q_proj")).checked().targets
            ('query', 'value')
        """
        if self.rank < 1:
            raise ValueError(f"lora rank must be at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora dropout must be in [0, 1), got {self.dropout}")
        names = {HUGGING_FACE.get(name, name) for name in self.targets}
        if not names or (unknown := sorted(names - set(TARGETS))):
            wrong = unknown if names else "none"
            raise ValueError(f"lora targets must be some of {', '.join((*TARGETS, *HUGGING_FACE))}, got {wrong}")
        fused = [name for target in FUSED if target in names for name in FUSED[target]]
        if twice := sorted(names & set(fused)):
            raise ValueError(f"lora targets name {', '.join(twice)} twice, alone and in qkv or gate_up; leave one out")
        return dataclasses.replace(self, targets=tuple(name for name in TARGETS if name in names))


class Adapter(nnx.Module):
    """`s B A x` for one projection; it starts at zero, because `B` does. With `shared`, another adapter holds `A`.

    With `experts`, a pair of their number and its logical axis, each of these has an `A` and a `B` of its own, and who
    holds the adapter multiplies with them.
    """

    def __init__(
        self,
        config: Any,
        inputs: Sequence[int],
        outputs: Sequence[int],
        axes: Sequence[Any],
        *,
        shared: bool = False,
        experts: tuple[int, str] | None = None,
        rngs: Any,
    ):
        lora: Lora = config.lora
        self.scale, self.dropout = lora.scale, lora.dropout
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        into, outof = tuple(axes[: len(self.inputs)]), tuple(axes[len(self.inputs) :])
        count, along = ((), ()) if experts is None else ((experts[0],), (experts[1],))
        # Adapters are small, and are trained: float32 whatever the frozen weights are stored in.
        wide = jnp.promote_types(config.param_dtype, jnp.float32)

        def drawn() -> nnx.Param:
            bound = 1 / math.sqrt(math.prod(self.inputs))
            a = jax.random.uniform(rngs.params(), (*count, *self.inputs, lora.rank), jnp.float32, -bound, bound)
            return nnx.Param(a.astype(wide), logical_axes=(*along, *into, None))

        self.a = None if shared else drawn()
        self.b = nnx.Param(jnp.zeros((*count, lora.rank, *self.outputs), wide), logical_axes=(*along, None, *outof))

    def __call__(self, x: Array, keys: Array | None = None, holder: Adapter | None = None) -> Array:
        """`[B, T, *inputs]` to `[B, T, *outputs]`; `keys` `[B]` of dropout, `holder` the adapter that has `A`."""
        a = self.a if holder is None else holder.a
        assert a is not None
        if self.dropout and keys is not None:
            kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.dropout, x.shape[1:]))(keys)
            x = jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)
        inner = jnp.tensordot(x, a[...].astype(x.dtype), axes=len(self.inputs))
        return jnp.tensordot(inner, self.b[...].astype(x.dtype), axes=1) * jnp.asarray(self.scale, x.dtype)


def fold_in(keys: Array | None, number: Array | int) -> Array | None:
    """A key for each row, of which each purpose has one of its own."""
    return None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def is_adapter(path: Sequence[Any]) -> bool:
    """Whether a path in a parameter tree leads to an adapter.

    Example:
        >>> is_adapter(("layers", "attention", "query_lora", "a")), is_adapter(("layers", "attention", "query"))
        (True, False)
    """
    return any(_name(part).endswith(SUFFIX) for part in path)


def trainable(params: Params) -> PyTree:
    """Which parameters are trained where a model has adapters: those of the adapters and of its heads.

    Args:
        params: a tree of parameters, or of their shapes.

    Returns:
        A tree of the same structure with bools.

    Example:
        >>> trainable({"query": 0, "query_lora": {"a": 0}, "value_head": {"kernel": 0}})
        {'query': False, 'query_lora': {'a': True}, 'value_head': {'kernel': True}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: is_adapter(path) or any(_name(part) == "value_head" for part in path), params
    )


def split_adapters(params: Params) -> tuple[Params, Params]:
    """The model's own parameters, and its adapters alone, each as a nested dict.

    Example:
        >>> split_adapters({"layers": {"query": 1, "query_lora": {"a": 2}}})
        ({'layers': {'query': 1}}, {'layers': {'query_lora': {'a': 2}}})
    """
    own, adapters = {}, {}
    for name, value in params.items():
        if name.endswith(SUFFIX):
            adapters[name] = value
        elif isinstance(value, dict):
            inner_own, inner = split_adapters(value)
            own[name] = inner_own
            if inner:
                adapters[name] = inner
        else:
            own[name] = value
    return own, adapters


def merge_adapters(params: Params, lora: Lora) -> Params:
    r"""The parameters without adapters, with what these add put into the weights, $W + s\, A B$.

    Args:
        params: of a model with adapters.
        lora: what they were made with.

    Returns:
        Parameters of the model without adapters, in the dtypes that its weights have.

    Example:
        >>> weight = {"query": jnp.ones((2, 3)), "query_lora": {"a": jnp.ones((2, 1)), "b": jnp.full((1, 3), 0.5)}}
        >>> merge_adapters({"layers": weight}, Lora(rank=1, alpha=2.0))["layers"]["query"].tolist()
        [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
    """
    lora, merged = lora.checked(), {}
    for name, value in params.items():
        if name.endswith(SUFFIX):
            continue
        if isinstance(value, dict):
            merged[name] = merge_adapters(value, lora)
            continue
        halves = adapter_of(params, name, lora)
        merged[name] = value if halves is None else merge(value, *halves, scale=lora.scale)
    return merged


def merge(weight: Any, a: Array, b: Array, *, scale: float) -> Array:
    """`W + s A B` in the dtype of `W`; leading axes that all three have (layers, experts) are kept apart."""
    product = functools.partial(jnp.tensordot, axes=1)
    for _ in range(a.ndim + b.ndim - 2 - weight.ndim):
        product = jax.vmap(product)
    wide = jnp.promote_types(weight.dtype, a.dtype)
    return (weight.astype(wide) + scale * product(a, b).astype(wide)).astype(weight.dtype)


def adapter_of(siblings: Mapping[str, Any], projection: str, lora: Lora) -> tuple[Any, Any] | None:
    """`A` and `B` of a projection, given the parameters that stand beside it; None if it has no adapter."""
    own = siblings.get(projection + SUFFIX)
    return None if own is None else (siblings[lora.holder(projection) + SUFFIX]["a"], own["b"])


def _name(part: Any) -> str:
    return str(getattr(part, "key", getattr(part, "name", part)))

"""Parameters on their way to a file: one layer of one of them at a time, adapters merged and few bits widened in it.

A model that is written whole would need a second copy of itself on the devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_post.models.lora import SUFFIX, Lora, adapter_of, merge
from jaxrl_post.models.quantize import Quantized
from jaxrl_post.models.weight_names import Path as ParamPath
from jaxrl_post.types import Array, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Written:
    """A parameter and what goes into it when it is written.

    Attributes:
        weight: an array, or a `Quantized`.
        adapter: `A` and `B`, whose product is added; None for none.
        scale: of the product.
    """

    weight: Any
    adapter: tuple[Any, Any] | None = None
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is written."""
        return tuple(self.weight.shape)

    @property
    def dtype(self) -> Any:
        """Of what is written, if it is not asked for in another."""
        return self.weight.dtype

    def value(self) -> Array:
        """What is written, of one layer if the parameter is in a layer."""
        weight = self.weight
        weight = weight.astype(weight.dtype) if isinstance(weight, Quantized) else weight
        return weight if self.adapter is None else merge(weight, *self.adapter, scale=self.scale)


def written(params: Params, lora: Lora | None) -> dict[ParamPath, Written]:
    """The parameters of the model without adapters by their path, from those of one that may have some.

    Args:
        params: of a decoder.
        lora: what its adapters were made with; None if it has none.

    Raises:
        ValueError: if there are adapters and it is not said what they were made with.

    Example:
        >>> layer = {"up": jnp.ones((1, 2, 2)), "up_lora": {"a": jnp.ones((1, 2, 1)), "b": jnp.ones((1, 1, 2))}}
        >>> found = written({"layers": {"mlp": layer}}, Lora(rank=1, alpha=0.5, targets=("up",)))
        >>> sorted(found), to_host(found["layers", "mlp", "up"], 0).tolist()
        ([('layers', 'mlp', 'up')], [[1.5, 1.5], [1.5, 1.5]])
    """
    lora = None if lora is None else lora.checked()

    def walk(tree: Mapping[str, Any], path: ParamPath) -> dict[ParamPath, Written]:
        found: dict[ParamPath, Written] = {}
        for name, value in tree.items():
            if name.endswith(SUFFIX):
                if lora is None:
                    raise ValueError("these parameters have adapters; pass lora=..., with which they are merged")
            elif isinstance(value, dict):
                found |= walk(value, (*path, name))
            else:
                halves = None if lora is None else adapter_of(tree, name, lora)
                found[*path, name] = Written(value, halves, 1.0 if lora is None else lora.scale)
        return found

    return walk(params, ())


def to_host(leaf: Any, layer: int | None) -> np.ndarray:
    """A parameter (an array or a `Written`) or one of its layers, gathered from the devices that hold it."""
    arrays = jax.tree.leaves(leaf)
    if not all(isinstance(array, jax.Array) for array in arrays):
        return np.asarray(_value(leaf if layer is None else jax.tree.map(lambda x: x[layer], leaf)))
    out = arrays[0].sharding
    if isinstance(out, NamedSharding):
        out = NamedSharding(out.mesh, PartitionSpec())
    take = jax.jit(_value if layer is None else _layer, out_shardings=out)
    whole = take(leaf) if layer is None else take(leaf, jnp.int32(layer))
    return np.asarray(whole.addressable_data(0))


def _value(leaf: Any) -> Array:
    return leaf.value() if isinstance(leaf, Written) else leaf


def _layer(leaf: Any, layer: Array) -> Array:
    return _value(jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False), leaf))

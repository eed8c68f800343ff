"""Frozen weights in 8 or 4 bits, which adapters stand on: made once, widened again where a layer multiplies by them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post.models.lora import PROJECTIONS
from jaxrl_post.types import Array, Params

QuantizeKind = Literal["int8", "nf4"]

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The sixteen values of NormalFloat: quantiles of a normal distribution, scaled to [-1, 1], zero among them."""

OUTPUT_AXES = {"query": 2, "key": 2, "value": 2}
"""How many of a projection's axes are outputs; one where it is not named."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight in few bits, with a scale for each block of neighbours along one input axis.

    Attributes:
        values: int8 of the weight's shape, or uint8 with two values in a byte, half as long along the axis.
        scale: float32, the weight's shape with the axis divided by the block.
        kind: `"int8"` or `"nf4"`.
        axis: the axis that blocks are taken along, counted from the end.
        dtype: of the weight that it was made of.
    """

    values: Array
    scale: Array
    kind: QuantizeKind = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        shape = list(self.values.shape)
        shape[self.axis] *= 2 if self.kind == "nf4" else 1
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """Of the weight."""
        return self.values.ndim

    def __getitem__(self, index: Any) -> Quantized:
        """Itself for `[...]`, by which modules read their parameters."""
        if index is not Ellipsis:
            raise TypeError("a quantized weight has no parts; widen it with astype first")
        return self

    def astype(self, dtype: Any) -> Array:
        """The weight again, rounded, as the arrays in whose place it stands have it."""
        wide = jnp.promote_types(dtype, jnp.float32)
        values = jnp.moveaxis(self.values, self.axis, -1)
        if self.kind == "nf4":
            both = jnp.stack([values >> 4, values & 15], axis=-1).reshape(*values.shape[:-1], -1)
            unit = jnp.asarray(NF4, wide)[both.astype(jnp.int32)]
        else:
            unit = values.astype(wide) / 127
        scale = jnp.moveaxis(self.scale, self.axis, -1).astype(wide)
        blocks = unit.reshape(*scale.shape, -1) * scale[..., None]
        return jnp.moveaxis(blocks.reshape(unit.shape), -1, self.axis).astype(dtype)


def quantize_array(x: Array, *, kind: QuantizeKind = "int8", axis: int = -1, block: int = 64) -> Quantized:
    r"""A weight in 8 or 4 bits: each block is divided by its largest magnitude and rounded to the nearest value.

    Args:
        x: the weight, float.
        kind: `"int8"`: $\mathrm{round}(127 x / s)$; `"nf4"`: the nearest of `NF4`.
        axis: that blocks are taken along.
        block: values that share a scale; all of the axis, where it is not a multiple of it.

    Returns:
        `Quantized`, whose error is at most half a step: `s / 254` for int8.

    Raises:
        ValueError: for an unknown kind, or an odd number of values in 4 bits.

    Example:
        >>> small = quantize_array(jnp.array([0.5, -1.0, 0.25, 0.0]), kind="int8")
        >>> small.values.tolist(), small.scale.tolist()
        ([64, -127, 32, 0], [1.0])

    Reference: QLoRA: Efficient Finetuning of Quantized LLMs, arXiv 2305.14314.
    """
    if kind not in get_args(QuantizeKind):
        raise ValueError(f"kind must be one of {', '.join(get_args(QuantizeKind))}, got {kind!r}")
    axis = axis % x.ndim - x.ndim
    size = x.shape[axis]
    if kind == "nf4" and size % 2:
        raise ValueError(f"nf4 puts two values into a byte, and an axis of {size} has an odd number; use int8")
    block = block if size % block == 0 and not (kind == "nf4" and block % 2) else size
    moved = jnp.moveaxis(x, axis, -1).astype(jnp.promote_types(x.dtype, jnp.float32))
    blocks = moved.reshape(*moved.shape[:-1], size // block, block)
    scale = jnp.max(jnp.abs(blocks), axis=-1)
    unit = (blocks / jnp.where(scale > 0, scale, 1.0)[..., None]).reshape(moved.shape)
    if kind == "int8":
        values = jnp.round(unit * 127).astype(jnp.int8)
    else:
        middle = (np.asarray(NF4[1:]) + np.asarray(NF4[:-1])) / 2
        codes = jnp.searchsorted(jnp.asarray(middle, unit.dtype), unit).astype(jnp.uint8)
        values = (codes[..., 0::2] << 4) | codes[..., 1::2]
    return Quantized(
        jnp.moveaxis(values, -1, axis), jnp.moveaxis(scale.astype(jnp.float32), -1, axis), kind, axis, x.dtype
    )


def quantize(params: Params, *, kind: QuantizeKind = "int8", block: int = 64, free: bool = False) -> Params:
    """Parameters of a decoder with the projections of its layers in 8 or 4 bits; the policy stays the same.

    Embeddings, norms, biases, routers, adapters and heads are left as they are. What is quantized cannot be trained:
    train adapters (`models.Lora`, `models.trainable`).

    Args:
        params: of `models.decoder`.
        kind: `"int8"` or `"nf4"`.
        block: values that share a scale.
        free: whether to delete each array as soon as it is quantized, so that a large model need not fit twice;
            `params` cannot be used any more.

    Returns:
        The same nested dict with `Quantized` in the place of some arrays.

    Raises:
        ValueError: as `quantize_array`.

    Example:
        >>> from jaxrl_post import models
        >>> policy = models.decoder(vocab_size=8, width=16, layers=2, heads=2)
        >>> small = quantize(policy.init(jax.random.key(0)), kind="nf4")
        >>> small["layers"]["mlp"]["up"].values.shape, small["layers"]["mlp"]["up"].values.dtype.name
        ((2, 8, 64), 'uint8')
    """

    def inside(tree: Params) -> Params:
        made = {}
        for name, value in tree.items():
            if isinstance(value, dict):
                made[name] = value if name.endswith("_lora") else inside(value)
            elif name in PROJECTIONS:
                one = functools.partial(quantize_array, kind=kind, axis=-1 - OUTPUT_AXES.get(name, 1), block=block)
                made[name] = jax.lax.map(one, value)  # a layer at a time
                if free:
                    jax.block_until_ready(made[name])
                    value.delete()
            else:
                made[name] = value
        return made

    return {**params, "layers": inside(params["layers"])}


def dequantize(params: Params) -> Params:
    """Parameters with arrays again in the place of `Quantized` ones, in the dtype that these were made of.

    Example:
        >>> dequantize({"up": quantize_array(jnp.array([0.5, -1.0]))})["up"].dtype.name
        'float32'
    """
    return jax.tree.map(
        lambda x: x.astype(x.dtype) if isinstance(x, Quantized) else x,
        params,
        is_leaf=lambda x: isinstance(x, Quantized),
    )

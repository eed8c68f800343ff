"""Which tensor of a Hugging Face checkpoint holds which part of the decoder's parameters, and in which layout.

Here a linear map is `[in, out]`, its heads apart, and layers (and experts) are stacked on leading axes; there it is
`[out, in]` and every layer (and expert) has tensors of its own. Nothing is read or written here.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import TypeAlias

import numpy as np

from jaxrl_post.models.families import Head

Path: TypeAlias = tuple[str, ...]

_LAYER = {
    ("attention", "query"): "self_attn.q_proj.weight",
    ("attention", "key"): "self_attn.k_proj.weight",
    ("attention", "value"): "self_attn.v_proj.weight",
    ("attention", "out"): "self_attn.o_proj.weight",
    ("attention", "query_bias"): "self_attn.q_proj.bias",
    ("attention", "key_bias"): "self_attn.k_proj.bias",
    ("attention", "value_bias"): "self_attn.v_proj.bias",
    ("attention", "out_bias"): "self_attn.o_proj.bias",
    ("attention", "query_norm", "scale"): "self_attn.q_norm.weight",
    ("attention", "key_norm", "scale"): "self_attn.k_norm.weight",
    ("mlp", "gate"): "mlp.gate_proj.weight",
    ("mlp", "up"): "mlp.up_proj.weight",
    ("mlp", "down"): "mlp.down_proj.weight",
    ("mlp", "gate_bias"): "mlp.gate_proj.bias",
    ("mlp", "up_bias"): "mlp.up_proj.bias",
    ("mlp", "down_bias"): "mlp.down_proj.bias",
    ("attention_norm", "scale"): "input_layernorm.weight",
    ("after_attention_norm", "scale"): "post_attention_layernorm.weight",
    ("mlp_norm", "scale"): "pre_feedforward_layernorm.weight",
    ("after_mlp_norm", "scale"): "post_feedforward_layernorm.weight",
}
# Where nothing is normalized after the attention, its name belongs to the norm before the MLP.
_MLP_NORM_ALONE = "post_attention_layernorm.weight"

_EXPERTS = {
    ("mlp", "router"): "mlp.gate.weight",
    ("mlp", "gate"): "mlp.experts.{expert}.gate_proj.weight",
    ("mlp", "up"): "mlp.experts.{expert}.up_proj.weight",
    ("mlp", "down"): "mlp.experts.{expert}.down_proj.weight",
}
# The experts of a layer in one tensor, as transformers holds them in memory.
_JOINED_EXPERTS = {
    ("mlp", "router"): "mlp.gate.weight",
    ("mlp", "gate"): "mlp.experts.gate_up_proj",
    ("mlp", "up"): "mlp.experts.gate_up_proj",
    ("mlp", "down"): "mlp.experts.down_proj",
}
_FUSED = {
    ("attention", "query"): "self_attn.qkv_proj.weight",
    ("attention", "key"): "self_attn.qkv_proj.weight",
    ("attention", "value"): "self_attn.qkv_proj.weight",
    ("mlp", "gate"): "mlp.gate_up_proj.weight",
    ("mlp", "up"): "mlp.gate_up_proj.weight",
}
_VECTORS = ("scale", "embedding", "unembedding", "kernel", "bias")

UNUSED_SUFFIXES = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")
"""Ends of names of tensors that hold no parameter: tables that old versions stored."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the parts of one parameter are.

    Attributes:
        name: of the tensors, with `{layer}` and `{expert}` where there is one for each.
        lead: sizes of the leading axes of the parameter that the name counts.
        tail: the other axes.
        shape: of each tensor in the file.
        rows: which of its rows (its last axis but one) are meant; None for all.
        transposed: whether its last two axes stand the other way round.
        halves: the tensor has two rows, and the parameter is the second minus the first.
    """

    name: str
    lead: tuple[int, ...]
    tail: tuple[int, ...]
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    transposed: bool = False
    halves: bool = False

    def tensors(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """Index of the leading axes, and the tensor's name, for each tensor."""
        for index in itertools.product(*map(range, self.lead)):
            yield index, self.tensor(index)

    def tensor(self, index: tuple[int, ...]) -> str:
        """The name of the tensor at an index of the leading axes."""
        return self.name.format(**dict(zip(("layer", "expert"), index, strict=False)))

    def ours(self, x: np.ndarray) -> np.ndarray:
        """A tensor of the file (its `rows`, where there are any) as the decoder holds it, without the leading axes."""
        if self.halves:
            return (x[1].astype(np.float32) - x[0].astype(np.float32)).reshape(self.tail)
        return (np.swapaxes(x, -1, -2) if self.transposed else x).reshape(self.tail)

    def theirs(self, x: np.ndarray) -> np.ndarray:
        """The way back."""
        if self.halves:
            half = x.reshape(1, *self.shape[1:]) / 2
            return np.concatenate([-half, half])
        rows = self.shape[-2:-1] if self.rows is None else (self.rows[1] - self.rows[0],)
        if not self.transposed:
            return x.reshape(self.shape)
        return np.swapaxes(x.reshape(*self.shape[:-2], self.shape[-1], *rows), -1, -2)


def places(
    shapes: Mapping[Path, tuple[int, ...]],
    *,
    fused: bool = False,
    joined_experts: bool = False,
    prefix: str = "model.",
    unembedding: str = "lm_head.weight",
    head: Head = "causal_lm",
    labels: int = 0,
) -> dict[Path, Place]:
    """The place of every parameter of a decoder.

    Args:
        shapes: of its parameters by their path.
        fused: whether query, key and value are one matrix, and gate and up of the MLP another.
        joined_experts: whether the experts of a layer are one tensor.
        prefix: of the names of all but the heads.
        unembedding: name of the last linear map.
        head: which head the checkpoint has; parameters that it has no place for are left out.
        labels: of a classification.

    Returns:
        Places by path.

    Raises:
        ValueError: for a parameter that is none of a plain decoder.

    Example:
        >>> place = places({("layers", "attention", "query"): (2, 6, 4, 3)})["layers", "attention", "query"]
        >>> place.tensor((1,)), place.shape, place.ours(np.zeros((12, 6))).shape
        ('model.layers.1.self_attn.q_proj.weight', (12, 6), (6, 4, 3))
    """
    experts = ("layers", "mlp", "router") in shapes
    names = {**_LAYER, **(_FUSED if fused else {})}
    if experts:
        names |= _JOINED_EXPERTS if joined_experts else _EXPERTS
    if ("layers", "after_attention_norm", "scale") not in shapes:
        names["mlp_norm", "scale"] = _MLP_NORM_ALONE

    found: dict[Path, Place] = {}
    rows: dict[str, int] = {}
    for path in sorted(shapes, key=_order):
        shape = tuple(shapes[path])
        if path[0] != "layers":
            place = _outside(path, shape, prefix, unembedding, head, labels)
            if place is not None:
                found[path] = place
            continue
        if path[1:] not in names:
            raise ValueError(f"{'.'.join(path)} has no place in a Hugging Face checkpoint; quantized weights have none")
        name = names[path[1:]]
        lead = 2 if "{expert}" in name else 1
        full = f"{prefix}layers.{{layer}}.{name}"
        place = _linear(path, full, shape[:lead], shape[lead:])
        if name in _FUSED.values() or name == _JOINED_EXPERTS["mlp", "up"]:
            first = rows.get(full, 0)
            rows[full] = first + place.shape[-2]
            place = dataclasses.replace(place, rows=(first, rows[full]))
        found[path] = place
    # A fused tensor has the rows of all of its parts.
    return {
        path: place
        if place.rows is None
        else dataclasses.replace(place, shape=(*place.shape[:-2], rows[place.name], place.shape[-1]))
        for path, place in found.items()
    }


def _order(path: Path) -> tuple[int, Path]:
    """Query before key before value, gate before up: the order in which they are fused."""
    order = ("query", "key", "value", "gate", "up")
    return (order.index(path[-1]) if path[-1] in order else -1, path)


def _linear(path: Path, name: str, lead: tuple[int, ...], tail: tuple[int, ...]) -> Place:
    if path[-1] in _VECTORS or path[-1].endswith("_bias"):
        return Place(name, lead, tail, (math.prod(tail),))
    if len(tail) == 3 and path[1] == "mlp":  # the experts of a layer together
        return Place(name, lead, tail, (tail[0], tail[2], tail[1]), transposed=True)
    inputs = 2 if path[-2:] == ("attention", "out") else 1
    return Place(name, lead, tail, (math.prod(tail[inputs:]), math.prod(tail[:inputs])), transposed=True)


def _outside(
    path: Path, shape: tuple[int, ...], prefix: str, unembedding: str, head: Head, labels: int
) -> Place | None:
    """The place of a parameter that is not in a layer; None if this kind of checkpoint has none."""
    if path == ("embedding",):
        return Place(f"{prefix}embed_tokens.weight", (), shape, shape)
    if path == ("final_norm", "scale"):
        return Place(f"{prefix}norm.weight", (), shape, shape)
    if path == ("unembedding",):
        return Place(unembedding, (), shape, shape) if head == "causal_lm" else None
    if head == "causal_lm" or (path[-1] == "bias" and head == "sequence_classification"):
        return None
    if path == ("value_head", "kernel"):
        return Place("score.weight", (), shape, (labels, *shape), halves=labels == 2)
    return Place("score.bias", (), shape, (labels,), halves=labels == 2)

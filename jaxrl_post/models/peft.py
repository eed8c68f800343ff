"""Adapters in the format of PEFT, `adapter_config.json` and `adapter_model.safetensors`, which serving engines load."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post.models.adapters import nest
from jaxrl_post.models.lora import HUGGING_FACE, SUFFIX, Lora, is_adapter
from jaxrl_post.models.pretrained import flat
from jaxrl_post.models.safetensors_io import Tensor, read_header, write_file
from jaxrl_post.types import Params

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model.model.layers."
_THEIRS = {ours: theirs for theirs, ours in HUGGING_FACE.items()}
_FUSED = {"phi3": ("query", "key", "value", "gate", "up")}
# What an adapter may have that ours have not, with the value that means it has none.
_OFF: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "use_dora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
}


def save_adapters(
    directory: str | os.PathLike[str], params: Params, lora: Lora, *, base: str = "", model_type: str = "llama"
) -> None:
    """Write the adapters of a model, and nothing else of it.

    Args:
        directory: to write; made if it is not there.
        params: with adapters.
        lora: what they were made with.
        base: directory or hub id of the model that they belong to.
        model_type: of its `config.json`.

    Raises:
        ValueError: if the parameters have no adapters, or those of projections that this type has only together.

    Example:
        >>> import tempfile
        >>> from jaxrl_post import models
        >>> lora = Lora(rank=2)
        >>> policy = models.decoder(vocab_size=8, width=8, layers=1, heads=2, lora=lora)
        >>> directory = tempfile.mkdtemp()
        >>> save_adapters(directory, policy.init(jax.random.key(0)), lora)
        >>> sorted(path.name for path in Path(directory).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    lora = lora.checked()
    leaves = {path: leaf for path, leaf in flat(params).items() if is_adapter(path)}
    if not leaves:
        raise ValueError("these parameters have no adapters to save")
    check_targets(lora, model_type)
    parts = {name: (path, layer) for path, leaf in leaves.items() for layer, name in _names(path, leaf.shape[0])}

    def make(name: str) -> np.ndarray:
        path, layer = parts[name]
        x = np.asarray(jax.device_get(leaves[path][layer]))
        matrix = x.reshape(-1, x.shape[-1]) if path[-1] == "a" else x.reshape(x.shape[0], -1)
        return np.ascontiguousarray(matrix.T)

    def shape(path: tuple[str, ...]) -> tuple[int, ...]:
        _, *axes = leaves[path].shape
        return (axes[-1], math.prod(axes[:-1])) if path[-1] == "a" else (math.prod(axes[1:]), axes[0])

    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    specs = [(name, shape(path), np.dtype(leaves[path].dtype)) for name, (path, _) in parts.items()]
    write_file(target / ADAPTER_WEIGHTS, specs, make)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilized,
        "target_modules": [_THEIRS[name] for name in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    (target / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_targets(lora: Lora, model_type: str) -> None:
    """Raise ValueError if PEFT has no adapters of these projections for a type of model.

    Args:
        lora: the adapters.
        model_type: of a `config.json`.

    Example:
        >>> check_targets(Lora(rank=2, targets=("out",)), "phi3")
    """
    if together := sorted(set(_FUSED.get(model_type, ())) & set(lora.checked().targets)):
        raise ValueError(
            f"{model_type} holds {', '.join(together)} in fused matrices, for which PEFT has other adapters; merge "
            "them instead, models.merge_adapters(params, lora), or leave them out of the targets"
        )


def read_adapter_config(directory: str | os.PathLike[str]) -> Lora:
    """What the adapters of a directory were made with.

    Args:
        directory: that PEFT or `save_adapters` wrote.

    Raises:
        ValueError: if there are none, or they are of a kind that the decoder lacks (it is named).
    """
    path = Path(directory) / ADAPTER_CONFIG
    if not path.is_file():
        raise ValueError(f"{directory} holds no {ADAPTER_CONFIG}, so it holds no adapters of PEFT")
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type {config.get('peft_type')!r} is not supported, only LORA")
    for name, off in _OFF.items():
        if config.get(name, off[0]) not in off:
            raise ValueError(f"{path}: {name} = {config[name]!r} is not supported")
    targets = config["target_modules"]
    if isinstance(targets, str):
        raise ValueError(f"{path}: target_modules {targets!r} is a pattern; give the list of names")
    return Lora(
        rank=config["r"],
        alpha=config["lora_alpha"],
        targets=tuple(name.rsplit(".", 1)[-1] for name in targets),
        dropout=config.get("lora_dropout", 0.0),
        rank_stabilized=bool(config.get("use_rslora", False)),
    ).checked()


def load_adapters(directory: str | os.PathLike[str], params: Params) -> Params:
    """Parameters with the adapters of a directory in the place of their own.

    Args:
        directory: that PEFT or `save_adapters` wrote.
        params: of a decoder with `lora=read_adapter_config(directory)`.

    Returns:
        The same parameters, adapters replaced, in the dtype and sharding that they have.

    Raises:
        ValueError: if tensors are missing, too many, or of another shape; all of them are named.
    """
    tensors = read_header(Path(directory) / ADAPTER_WEIGHTS)
    leaves = flat(params)
    wanted = {
        name: (path, layer)
        for path, leaf in leaves.items()
        if is_adapter(path)
        for layer, name in _names(path, leaf.shape[0])
    }
    if wanted.keys() != tensors.keys():
        missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
        raise ValueError(f"the adapters of {directory} are not this model's: missing {missing}, not known {extra}")

    def read(path: tuple[str, ...], leaf: Any) -> Any:
        shape = leaf.shape[1:]
        parts = []
        for _, name in _names(path, leaf.shape[0]):
            matrix = _matrix(tensors[name])
            if matrix.size != math.prod(shape):
                raise ValueError(f"{name} of {directory} is {list(matrix.shape)}, which does not fit {list(shape)}")
            parts.append(matrix.T.reshape(shape))
        made = jnp.asarray(np.stack(parts), leaf.dtype)
        return jax.device_put(made, leaf.sharding) if isinstance(leaf, jax.Array) else made

    return nest((path, read(path, leaf) if is_adapter(path) else leaf) for path, leaf in leaves.items())


def _names(path: tuple[str, ...], layers: int) -> Iterator[tuple[int, str]]:
    """The tensor of each layer of an adapter's half."""
    block = "self_attn" if path[1] == "attention" else "mlp"
    projection = _THEIRS[path[2].removesuffix(SUFFIX)]
    for layer in range(layers):
        yield layer, f"{_PREFIX}{layer}.{block}.{projection}.lora_{path[3].upper()}.weight"


def _matrix(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.view())

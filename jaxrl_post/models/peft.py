"""Adapters in the format of PEFT, `adapter_config.json` and `adapter_model.safetensors`, which serving engines load."""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post.models.adapters import nest
from jaxrl_post.models.config_keys import is_off
from jaxrl_post.models.families import FAMILIES, Family
from jaxrl_post.models.hub import local_directory, writable_directory
from jaxrl_post.models.lora import FUSED, HUGGING_FACE, PROJECTIONS, SUFFIX, Lora, is_adapter
from jaxrl_post.models.pretrained import flat
from jaxrl_post.models.safetensors_io import read_header, write_file
from jaxrl_post.models.weight_names import Path as ParamPath
from jaxrl_post.models.written import to_host
from jaxrl_post.types import Params

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_LAYERS = {"text": "base_model.model.model.layers.", "images": "base_model.model.model.language_model.layers."}
"""What the names of tensors begin with: of a model of text, and of one that sees images too."""

_WITH_IMAGES = "gemma3"
_OF_TEXT = re.compile(r"\.\*language_model\.\*\\\.\(([a-z_|]+)\)")
_PACKED = ("gate_up", "down")
"""Maps of experts that newer models hold in one tensor for all experts, and whose adapters PEFT holds likewise."""

_THEIRS = {ours: theirs for theirs, ours in HUGGING_FACE.items()}
_READ = frozenset(
    [
        "peft_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "target_modules",
        "target_parameters",
        "base_model_name_or_path",
        "revision",
        "bias",
        "init_lora_weights",
    ]
)
# What says nothing of what the adapters are: how they started, where they are meant to run, sizes of what is off.
_HARMLESS = frozenset(
    ["auto_mapping", "task_type", "inference_mode", "peft_version", "qalora_group_size", "megatron_core", "eva_config"]
)
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Initial values of adapters that leave the base model as it is; others come with weights of their own for it."""


def save_adapters(
    directory: str | os.PathLike[str],
    params: Params,
    lora: Lora,
    *,
    base: str = "",
    revision: str | None = None,
    model_type: str = "llama",
) -> None:
    """Write the adapters of a model, and nothing else of it.

    Args:
        directory: to write, on this machine; made if it is not there.
        params: with adapters.
        lora: what they were made with.
        base: directory or hub id of the model that they belong to.
        revision: branch, tag or commit of it on the hub.
        model_type: of its `config.json`; of `gemma3`, which sees images too, they are those of the language model.

    Raises:
        ValueError: if the directory is an address, or the parameters have no adapters, or those of projections that
            this type has only together, or only apart.

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
    target = writable_directory(directory)
    lora = lora.checked()
    leaves = {path: leaf for path, leaf in flat(params).items() if is_adapter(path)}
    if not leaves:
        raise ValueError("these parameters have no adapters to save")
    check_targets(lora, model_type)
    packed = _family(model_type).experts and "gate_up" in lora.targets
    images = model_type == _WITH_IMAGES
    parts = _parts(leaves, lora, packed=packed, images=images)
    host = functools.lru_cache(maxsize=1)(lambda path, layer: to_host(leaves[path], layer))  # its experts follow

    def make(name: str) -> np.ndarray:
        part = parts[name]
        pieces = [_theirs(path, host(path, part.layer)[part.expert]) for path in part.paths]
        return np.ascontiguousarray(np.concatenate(pieces))  # of a fused matrix the rows of all of its parts

    if jax.process_index() != 0:  # parameters are gathered by all processes, and the first one writes
        for name in parts:
            make(name)
        return
    target.mkdir(parents=True, exist_ok=True)
    specs = [(name, part.shape(leaves), np.dtype(leaves[part.paths[0]].dtype)) for name, part in parts.items()]
    write_file(target / ADAPTER_WEIGHTS, specs, make)
    modules: Any = [_THEIRS[name] for name in lora.targets if not (packed and name in _PACKED)]
    if images:  # whose other part has projections of the same names
        modules = rf".*language_model.*\.({'|'.join(modules)})"
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilized,
        "target_modules": modules,
        "target_parameters": [f"mlp.experts.{_THEIRS[name]}" for name in lora.targets if packed and name in _PACKED]
        or None,
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
        >>> check_targets(Lora(rank=2, targets=("qkv", "out")), "phi3")
    """
    targets, fused = set(lora.checked().targets), _family(model_type).fused
    if _family(model_type).experts:
        if len(alone := targets & {"gate", "up"}) == 1:
            raise ValueError(
                f"PEFT has adapters of gate_proj and up_proj of {model_type}'s experts only together; give both beside "
                f"{alone.pop()}, or gate_up_proj, with one A for both"
            )
        targets -= {"gate", "up", "gate_up"}  # each kind has its own format
    for name, parts in FUSED.items():
        apart = [part for part in parts if part in targets]
        if fused and apart:
            raise ValueError(
                f"{model_type} holds {', '.join(parts)} in one fused matrix, whose adapter has one A for all of them; "
                f"give the target {_THEIRS[name]} in the place of {', '.join(apart)}"
            )
        if not fused and name in targets:
            raise ValueError(f"{model_type} has no {_THEIRS[name]}; give the targets {', '.join(parts)} instead")


def read_adapter_config(directory: str | os.PathLike[str]) -> Lora:
    """What the adapters of a directory were made with.

    Args:
        directory: that PEFT or `save_adapters` wrote.

    Raises:
        ValueError: if there are none, or they are of a kind that the decoder lacks (it is named).
    """
    path, config = Path(directory) / ADAPTER_CONFIG, _config(directory)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type {config.get('peft_type')!r} is not supported, only LORA")
    odd = {name: value for name, value in config.items() if name not in _READ | _HARMLESS and not is_off(value)}
    odd |= {"bias": config["bias"]} if config.get("bias", "none") not in ("none", None) else {}
    odd |= {} if (start := config.get("init_lora_weights")) in _STARTS else {"init_lora_weights": start}
    if odd:
        shown = ", ".join(f"{name} = {value!r}" for name, value in odd.items())
        raise ValueError(f"{path}: {shown} is not supported")
    targets = config.get("target_modules") or ()
    if isinstance(targets, str) and (named := _OF_TEXT.fullmatch(targets)):
        targets = named[1].split("|")
    if isinstance(targets, str):
        raise ValueError(
            f"{path}: target_modules {targets!r} is a pattern; give the list of names, or of the language model in one "
            r"that sees images '.*language_model.*\.(q_proj|v_proj)'"
        )
    targets = (*targets, *(config.get("target_parameters") or ()))
    return Lora(
        rank=config.get("r", 8),  # as PEFT
        alpha=config.get("lora_alpha", 8),
        targets=tuple(name.rsplit(".", 1)[-1] for name in targets),
        dropout=config.get("lora_dropout", 0.0),
        rank_stabilized=bool(config.get("use_rslora", False)),
    ).checked()


def adapter_directory(path_or_id: str | os.PathLike[str]) -> Path:
    """The directory of adapters, downloaded if they are named by their hub id.

    Raises:
        ValueError: as `hub.local_directory`.
    """
    return local_directory(path_or_id, (ADAPTER_CONFIG, ADAPTER_WEIGHTS))


def adapter_base(directory: str | os.PathLike[str]) -> tuple[str | None, str | None]:
    """The directory or hub id of the model that the adapters of a directory belong to, and its revision there.

    Raises:
        ValueError: if there are no adapters.
    """
    config = _config(directory)
    return config.get("base_model_name_or_path") or None, config.get("revision") or None


def _config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    path = Path(directory) / ADAPTER_CONFIG
    if not path.is_file():
        raise ValueError(f"{directory} holds no {ADAPTER_CONFIG}, so it holds no adapters of PEFT")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); copy it again") from error


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
    path = Path(directory) / ADAPTER_WEIGHTS
    if not path.is_file():
        raise ValueError(f"{directory} holds no {ADAPTER_WEIGHTS}; adapters in other formats are not read")
    tensors = read_header(path)
    leaves = flat(params)
    adapters = {path: leaf for path, leaf in leaves.items() if is_adapter(path)}
    packed = any(".mlp.experts.lora_" in name or ".mlp.experts.base_layer.lora_" in name for name in tensors)
    images = any(name.startswith(_LAYERS["images"]) for name in tensors)
    parts = _parts(adapters, read_adapter_config(directory), packed=packed, images=images)
    if parts.keys() != tensors.keys():
        missing, extra = sorted(parts.keys() - tensors.keys()), sorted(tensors.keys() - parts.keys())
        raise ValueError(f"the adapters of {directory} are not this model's: missing {missing}, not known {extra}")
    found = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in adapters.items()}
    for name, part in parts.items():
        matrix = np.asarray(tensors[name].view())
        if matrix.shape != (wanted := part.shape(adapters)):
            raise ValueError(f"{name} of {directory} is {list(matrix.shape)}, not {list(wanted)} as this model needs")
        ends = np.cumsum([rows for rows, _ in part.shapes(adapters)])
        for path, piece in zip(part.paths, np.split(matrix, ends[:-1]), strict=True):
            place = found[path][part.layer][part.expert]
            place[...] = _ours(path, piece, place.shape)

    def placed(path: ParamPath, leaf: Any) -> Any:
        if path not in found:
            return leaf
        return jax.device_put(found[path], leaf.sharding) if isinstance(leaf, jax.Array) else jnp.asarray(found[path])

    return nest((path, placed(path, leaf)) for path, leaf in leaves.items())


class _Part(NamedTuple):
    """What one tensor of a file holds: rows of one layer's parameters, of one expert's or of all (`...`)."""

    layer: int
    expert: Any
    paths: list[ParamPath]

    def shapes(self, leaves: Mapping[ParamPath, Any]) -> list[tuple[int, int]]:
        """Of the matrices of its parameters."""
        taken = 1 if self.expert is ... else 2
        return [_theirs_shape(path, leaves[path].shape[taken:]) for path in self.paths]

    def shape(self, leaves: Mapping[ParamPath, Any]) -> tuple[int, int]:
        """Of the tensor."""
        shapes = self.shapes(leaves)
        return sum(rows for rows, _ in shapes), shapes[0][1]


def _family(model_type: str) -> Family:
    return FAMILIES["gemma3_text" if model_type == _WITH_IMAGES else model_type]


def _parts(adapters: Mapping[ParamPath, Any], lora: Lora, *, packed: bool, images: bool) -> dict[str, _Part]:
    """What the tensors of a file hold, by their names.

    Args:
        adapters: the parameters.
        lora: what they were made with.
        packed: whether those of experts are one for all experts.
        images: whether the model has another part, that sees images.
    """
    prefix = _LAYERS["images" if images else "text"]
    fused = {name: target for target, names in FUSED.items() if target in lora.targets for name in names}
    both = packed and set(_PACKED) <= set(lora.targets)
    parts: dict[str, _Part] = {}
    # PROJECTIONS is the order in which projections are fused.
    for path in sorted(adapters, key=lambda path: PROJECTIONS.index(path[2].removesuffix(SUFFIX))):
        block = "self_attn" if path[1] == "attention" else "mlp"
        target = fused.get(projection := path[2].removesuffix(SUFFIX), projection)
        shape = adapters[path].shape
        modules: dict[Any, str] = {...: _THEIRS[target]}
        if block == "mlp" and len(shape) == 4:  # one of two adapters of one module is within the other
            inner = "experts.base_layer" if both and target == "gate_up" else "experts"
            modules = {...: inner} if packed else {e: f"experts.{e}.{_THEIRS[target]}" for e in range(shape[1])}
        for layer in range(shape[0]):
            for expert, module in modules.items():
                name = f"{prefix}{layer}.{block}.{module}.lora_{path[3].upper()}.weight"
                parts.setdefault(name, _Part(layer, expert, [])).paths.append(path)
    return parts


def _theirs(path: ParamPath, x: np.ndarray) -> np.ndarray:
    """One layer of an adapter's half as PEFT holds it, `[out, in]`; of all experts `[E * r, in]` or `[out, r * E]`."""
    if _of_experts(path, x.shape):
        order = (0, 2, 1) if path[-1] == "a" else (2, 1, 0)
        return x.transpose(order).reshape(_theirs_shape(path, x.shape))
    return x.reshape(_theirs_shape(path, x.shape)[::-1]).T


def _ours(path: ParamPath, matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """What `_theirs` makes a matrix of."""
    if not _of_experts(path, shape):
        return matrix.T.reshape(shape)
    experts, inner, outer = shape
    if path[-1] == "a":
        return matrix.reshape(experts, outer, inner).transpose(0, 2, 1)
    return matrix.reshape(outer, inner, experts).transpose(2, 1, 0)


def _theirs_shape(path: ParamPath, shape: tuple[int, ...]) -> tuple[int, int]:
    if _of_experts(path, shape):
        experts, inner, outer = shape
        return (experts * outer, inner) if path[-1] == "a" else (outer, inner * experts)
    return (shape[-1], math.prod(shape[:-1])) if path[-1] == "a" else (math.prod(shape[1:]), shape[0])


def _of_experts(path: ParamPath, shape: tuple[int, ...]) -> bool:
    return path[1] == "mlp" and len(shape) == 3

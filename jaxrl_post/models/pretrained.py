"""Hugging Face checkpoints as policies: from a local directory or by hub id, straight into sharded arrays.

Parameters arrive layer by layer: the host holds no more than one layer of one parameter beside what stays, and each
process reads only what its own devices hold. Writing is in `export.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from jaxrl_post.mesh import shardings
from jaxrl_post.models.adapters import nest
from jaxrl_post.models.decoder import decoder
from jaxrl_post.models.families import decoder_keywords, head_of
from jaxrl_post.models.hub import local_directory
from jaxrl_post.models.lora import is_adapter
from jaxrl_post.models.orbax_io import is_orbax, restore_orbax
from jaxrl_post.models.safetensors_io import Tensor, open_checkpoint
from jaxrl_post.models.weight_check import placed
from jaxrl_post.models.weight_names import Path as ParamPath
from jaxrl_post.models.weight_names import Place
from jaxrl_post.types import Params, Policy

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
# What a model and its tokenizer need, and no other formats of the same weights.
_PATTERNS = ("*.json", "*.jinja", "*.safetensors", "*.model", "*.txt")


class HasVocabulary(Protocol):
    """What is asked of a tokenizer here."""

    @property
    def vocab_size(self) -> int: ...  # noqa: D102


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model that was read.

    Attributes:
        policy: runs it.
        params: its parameters: arrays, or shapes with shardings if it was read without its weights.
        config: the `config.json`, which `save_pretrained` wants back.
        generation_config: the `generation_config.json`, if there is one.
        directory: that it was read from.
        new: names of parameters that the checkpoint has not and `Policy.init` made: a value head, adapters.
    """

    policy: Policy
    params: Params
    config: dict[str, Any]
    generation_config: dict[str, Any] | None
    directory: Path
    new: tuple[str, ...] = ()


def from_config(
    config: Mapping[str, Any],
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    value_head: bool = False,
    ignore: Iterable[str] = (),
    **overrides: Any,
) -> Policy:
    """The policy of a Hugging Face configuration.

    Args:
        config: a `config.json`.
        dtype: compute dtype.
        param_dtype: dtype of the parameters.
        value_head: whether the model gives values; needed for the configuration of a classification.
        ignore: keys of the configuration that are known to make no difference, though they are not known here.
        **overrides: keywords of `decoder` that win over the configuration's, such as `remat="full"`.

    Returns:
        A `Policy`, with parameters drawn at random by its `init`.

    Raises:
        ValueError: names what the configuration asks for and the decoder lacks.

    Example:
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
        >>> policy = from_config(dict(model_type="qwen3", num_attention_heads=4, num_key_value_heads=2, **sizes))
        >>> jax.eval_shape(policy.init, jax.random.key(0))["layers"]["attention"]["key"].shape
        (2, 16, 2, 128)
    """
    keywords = decoder_keywords(config, ignore=ignore)
    head, _ = head_of(config)
    if head != "causal_lm":
        if not value_head:
            raise ValueError(f"{config['architectures'][0]} gives values and no logits; load it with value_head=True")
        # Such a checkpoint has no unembedding; sharing the embedding's saves making one up.
        keywords["tied"] = True
    return decoder(**{**keywords, "dtype": dtype, "param_dtype": param_dtype, "value_head": value_head, **overrides})


def from_pretrained(
    path_or_id: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    value_head: bool = False,
    tokenizer: HasVocabulary | None = None,
    abstract: bool = False,
    key: jax.Array | None = None,
    revision: str | None = None,
    ignore: Iterable[str] = (),
    **overrides: Any,
) -> Pretrained:
    """Read a model as `transformers` saves it.

    A `...ForSequenceClassification` with one label and a `...ForTokenClassification` with one or two give a policy
    whose value head is their classifier: the value is the only label's logit, or the second's minus the first's.

    Args:
        path_or_id: a directory of a Hugging Face checkpoint, or one that `jaxrl-post convert` made of it, or the id of
            a model on the hub.
        dtype: compute dtype.
        param_dtype: dtype of the parameters, whatever that of the file.
        mesh: that parameters are spread over, as `mesh.RULES` says; None for all on one device.
        value_head: whether the model gives values. One that the checkpoint lacks starts at zero.
        tokenizer: the run's, to check that the model has a row for each of its tokens.
        abstract: leave the weights where they are: `params` is of `jax.ShapeDtypeStruct`, and only `config.json` need
            be there; of the models in `known_configs` not even a network.
        key: for parameters that the checkpoint has not, needed for adapters (`lora=models.Lora(...)`).
        revision: branch, tag or commit on the hub.
        ignore: keys of the configuration that are known to make no difference, though they are not known here.
        **overrides: keywords of `decoder` that win over the configuration's, such as `remat="full"`.

    Returns:
        A `Pretrained`.

    Raises:
        ValueError: if there is no such model, it asks for what the decoder lacks, files are missing or damaged, or
            tensors are missing, too many, of another shape or of a quantized dtype (all of them are named).

    Example:
        >>> import tempfile
        >>> from jaxrl_post import models
        >>> config = dict(model_type="qwen3", vocab_size=9, hidden_size=8, intermediate_size=4, num_hidden_layers=2)
        >>> config |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=6)
        >>> policy = models.from_config(config)
        >>> directory = tempfile.mkdtemp() + "/model"
        >>> models.save_pretrained(directory, jax.jit(policy.init)(jax.random.key(0)), config)
        >>> models.from_pretrained(directory).params["embedding"].shape
        (9, 8)
    """
    try:
        wanted = [pattern for pattern in _PATTERNS if not abstract or pattern != "*.safetensors"]
        directory = local_directory(path_or_id, wanted, revision=revision)
    except ValueError:
        if not abstract or str(path_or_id) not in known_configs():
            raise
        directory, config = Path(path_or_id), known_configs()[str(path_or_id)]
    else:
        config = read_config(directory)
    policy = from_config(
        config, dtype=dtype, param_dtype=param_dtype, value_head=value_head, ignore=ignore, **overrides
    )
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    if tokenizer is not None:
        check_vocabulary(shapes["embedding"].shape[0], tokenizer)
    spread = _spread(policy, shapes, mesh)
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, spread)
    made = functools.partial(
        Pretrained, policy, config=config, generation_config=_json(directory / GENERATION_CONFIG), directory=directory
    )
    if abstract:
        return made(params=shapes)
    leaves = flat(shapes)
    if is_orbax(directory):
        own = set(flat(jax.eval_shape(from_config(config, value_head=value_head).init, jax.random.key(0))))
        there = {path: leaf for path, leaf in leaves.items() if path in own and path[0] != "value_head"}
        params = flat(restore_orbax(directory, nest(there.items())))
    else:
        tensors = open_checkpoint(directory)
        found = placed(directory, config, leaves, tensors)
        params = {path: _read(leaves[path], place, tensors) for path, place in found.items()}
    new = {path: leaf for path, leaf in leaves.items() if path not in params}
    if key is None and any(is_adapter(path) for path in new):
        raise ValueError("adapters start at random: pass key=jax.random.key(...)")
    params |= _drawn(policy, new, jax.random.key(0) if key is None else key)
    return made(params=nest(params.items()), new=tuple(".".join(path) for path in new))


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The `config.json` of a directory.

    Raises:
        ValueError: if it is not there or is damaged.
    """
    config = _json(Path(directory) / CONFIG)
    if config is None:
        raise ValueError(f"{directory} holds no {CONFIG}, so it is no Hugging Face model")
    return config


@functools.cache
def known_configs() -> dict[str, dict[str, Any]]:
    """The `config.json` of some published models by hub id, to plan and compile for them without a network.

    Example:
        >>> known_configs()["Qwen/Qwen3-0.6B"]["num_hidden_layers"]
        28
    """
    return json.loads((Path(__file__).parent / "known" / "configs.json").read_text(encoding="utf-8"))


def flat(params: Params) -> dict[ParamPath, Any]:
    """Leaves of a nested dict by their path.

    Example:
        >>> flat({"layers": {"scale": 1.0}})
        {('layers', 'scale'): 1.0}
    """
    return {
        tuple(str(getattr(key, "key", key)) for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def check_vocabulary(rows: int, tokenizer: HasVocabulary) -> None:
    """Raise ValueError if a model with an embedding of `rows` tokens lacks some of a tokenizer.

    Fewer tokens than rows are fine: many models pad their embedding. So is a token that stands for a piece of an image
    (`media_ids` of the tokenizer), which models of text alone lack.

    Args:
        rows: of the embedding.
        tokenizer: with a `vocab_size`.
    """
    if not set(range(rows, tokenizer.vocab_size)) <= set(getattr(tokenizer, "media_ids", ())):
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's embedding only {rows} rows; they do not "
            "belong together, or the embedding was not resized when tokens were added"
        )


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); copy it again") from error


def _spread(policy: Policy, shapes: Params, mesh: Mesh | None) -> Params:
    if mesh is None:
        default = getattr(jax.config, "jax_default_device", None)
        device = default if isinstance(default, jax.Device) else jax.devices(default)[0]
        return jax.tree.map(lambda _: SingleDeviceSharding(device), shapes)
    return shardings(shapes, None if policy.axes is None else policy.axes(), mesh)


def _read(leaf: jax.ShapeDtypeStruct, place: Place, tensors: Mapping[str, Tensor]) -> jax.Array:
    """One parameter, of which the host holds one layer at a time and only what its devices need."""
    sharding, dtype = leaf.sharding, leaf.dtype
    assert sharding is not None
    if not place.lead:
        return _part(leaf.shape, dtype, sharding, place, (), tensors)
    without_layers = sharding
    if isinstance(sharding, NamedSharding):
        without_layers = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    whole = jax.jit(_zeros, static_argnums=(0, 1), out_shardings=sharding)(leaf.shape, dtype)
    put = jax.jit(_put, donate_argnums=0, out_shardings=sharding)
    for layer in range(place.lead[0]):
        # Wait, or layers would pile up on the host.
        whole = jax.block_until_ready(
            put(whole, _part(leaf.shape[1:], dtype, without_layers, place, (layer,), tensors), layer)
        )
    return whole


def _zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.zeros(shape, dtype)


def _put(whole: jax.Array, part: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(whole, part, layer, 0)


def _drawn(policy: Policy, new: Mapping[ParamPath, Any], key: jax.Array) -> dict[ParamPath, jax.Array]:
    """The parameters that `Policy.init` gives, of which the compiler makes no others."""
    if not new:
        return {}

    def init(key: jax.Array) -> list[jax.Array]:
        made = flat(policy.init(key))
        return [made[path] for path in new]

    return dict(zip(new, jax.jit(init, out_shardings=[leaf.sharding for leaf in new.values()])(key), strict=True))


def _part(
    shape: tuple[int, ...],
    dtype: Any,
    sharding: Sharding,
    place: Place,
    lead: tuple[int, ...],
    tensors: Mapping[str, Tensor],
) -> jax.Array:
    """The parameter at an index of its first leading axis, if it has any."""
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        spans = tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))
        holders.setdefault(spans, []).append(device)
    shards = []
    for spans, devices in holders.items():
        buffer = np.empty([stop - start for start, stop in spans], dtype)
        _fill(buffer, spans, place, lead, tensors)
        shards += [jax.device_put(buffer, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _fill(
    buffer: np.ndarray,
    spans: tuple[tuple[int, int], ...],
    place: Place,
    lead: tuple[int, ...],
    tensors: Mapping[str, Tensor],
) -> None:
    counted = len(place.lead) - len(lead)  # 1 for experts that are tensors of their own
    inside = tuple(slice(*span) for span in spans[counted:])
    for slot, number in enumerate(range(*spans[0]) if counted else [None]):
        view = tensors[place.tensor(lead if number is None else (*lead, number))].view()
        if place.rows is not None:
            view = view[..., place.rows[0] : place.rows[1], :]
        (buffer if number is None else buffer[slot])[...] = place.ours(view)[inside]

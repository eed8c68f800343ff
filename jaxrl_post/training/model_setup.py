"""From the configuration's `model` to policies: drawn or read, with adapters or without, with a value head."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxrl_post import mesh as mesh_lib
from jaxrl_post import models
from jaxrl_post.data import Tokenizer, load_tokenizer
from jaxrl_post.models.families import decoder_keywords
from jaxrl_post.models.hub import local_directory, writable_directory
from jaxrl_post.training.config import ConfigWarning, ModelConfig
from jaxrl_post.training.config.schema import NOT_SIZES
from jaxrl_post.training.router import RouterLoss
from jaxrl_post.types import Array, Params, Policy, PyTree, Unembedding


class Models(NamedTuple):
    """The forms that a run needs of its model.

    Attributes:
        policy: what is trained and sampled from.
        critic: the same with a value head.
        base: the policy without its adapters, which reads the policy's parameters; the policy itself if it has none.
        source: the checkpoint that it starts from, without its weights; None if it is drawn.
        load: `(key, mesh) -> params`, the policy's first parameters.
    """

    policy: Policy
    critic: Policy
    base: Policy
    source: models.Pretrained | None
    load: Callable[[Array, Mesh], Params]


class Checkpoint(NamedTuple):
    """A role's model, where it comes from a checkpoint of its own.

    Attributes:
        policy: runs it.
        load: `(key, mesh) -> params`.
    """

    policy: Policy
    load: Callable[[Array, Mesh], Params]


def make_models(model: ModelConfig, tokenizer: Tokenizer) -> Models:
    """The models that the configuration describes.

    Args:
        model: the section of the configuration.
        tokenizer: the run's.

    Raises:
        ValueError: if there is no such checkpoint, the decoder lacks what it asks for, or the tokenizer has more tokens
            than it; for a router loss, if the checkpoint has no experts.
    """
    lora, source = lora_of(model), None
    if model.path is not None:
        source = models.from_pretrained(
            model.path, abstract=True, tokenizer=tokenizer, ignore=model.ignore, revision=model.revision
        )
        if model.router_loss and not models.decoder_keywords(source.config, ignore=model.ignore).get("experts"):
            raise ValueError(f"model.router_loss is for a model with experts, and {model.path} has none; leave it out")

    def made(lora: models.Lora | None, value_head: bool = False) -> Policy:
        return _policy(model, tokenizer, source, lora=lora, value_head=value_head)

    def load(key: Array, mesh: Mesh) -> Params:
        if model.path is not None:
            params = _read(model, model.path, key, mesh, lora=lora, revision=model.revision)
            if model.lora is not None and model.lora.path is not None:
                params = models.load_adapters(models.adapter_directory(model.lora.path), params)
            return params
        shapes = jax.eval_shape(policy.init, key)
        layout = mesh_lib.shardings(shapes, None if policy.axes is None else policy.axes(), mesh)
        with jax.set_mesh(mesh):
            return jax.jit(policy.init, out_shardings=layout)(key)

    policy = made(lora)
    base = policy if lora is None else made(None)
    return Models(policy, made(lora, value_head=True), base, source, load)


def warn_of_long_rows(model: ModelConfig, source: models.Pretrained | None, longest: int) -> None:
    """Warn of rows whose positions turn out to be others where they are scored than where they were sampled.

    Args:
        model: the section of the configuration.
        source: its checkpoint.
        longest: tokens of a prompt with its completion.
    """
    rope = None if source is None else models.decoder_keywords(source.config, ignore=model.ignore).get("rope")
    if rope is not None and rope.kind in ("dynamic", "longrope") and longest > rope.original_length:
        warnings.warn(
            f"model.path: the rotary positions of {model.path} ({rope.kind}) change where a row has more than "
            f"{rope.original_length} tokens, and what it sampled until then is scored with the others. Keep "
            f"data.max_prompt_length + rollout.max_new_tokens = {longest} within that, or give method.old_logp: "
            "recompute with a method.correction",
            ConfigWarning,
            stacklevel=2,
        )


def make_checkpoint(
    model: ModelConfig, tokenizer: Tokenizer, path: str, *, value_head: bool, trained: bool
) -> Checkpoint:
    """The model of a role that starts from a Hugging Face checkpoint: a reward model, a critic, a teacher.

    Its sizes are its own; dtypes, recomputation and, if it is trained, adapters are those of the policy.

    Args:
        model: the section of the configuration.
        tokenizer: the run's, whose tokens the role's model must know by the same ids.
        path: the directory, or `hf://owner/name`.
        value_head: whether the role gives values; a checkpoint that has no head for them gets one that starts at zero.
        trained: whether the method trains it.

    Raises:
        ValueError: as `make_models`, and if the directory has a tokenizer that means something else by some id.
    """
    source = models.from_pretrained(
        path, abstract=True, tokenizer=tokenizer, value_head=value_head, ignore=model.ignore
    )
    check_same_tokens(tokenizer, path)
    lora = lora_of(model) if trained else None

    def load(key: Array, mesh: Mesh) -> Params:
        return _read(model, path, key, mesh, lora=lora, value_head=value_head)

    return Checkpoint(_policy(model, tokenizer, source, lora=lora, value_head=value_head), load)


def make_copy(policy: Policy, key: Array, mesh: Mesh) -> Callable[[Params], Params]:
    """A jitted function that copies the policy's parameters to another layout of their devices, as it multiplies with.

    Args:
        policy: the model.
        key: that its parameters could be drawn with.
        mesh: the same devices in the same order.

    Returns:
        `params -> params`.
    """
    cast = policy.cast or (lambda params: params)
    shapes = jax.eval_shape(lambda: cast(policy.init(key)))
    layout = mesh_lib.shardings(shapes, None if policy.axes is None else policy.axes(), mesh)
    return jax.jit(cast, out_shardings=layout)


def read_policy(model: ModelConfig, path: str, key: Array, mesh: Mesh) -> Params:
    """A checkpoint's parameters for a policy with the configuration's adapters."""
    return _read(model, path, key, mesh, lora=lora_of(model))


def check_same_tokens(tokenizer: Tokenizer, path: str) -> None:
    """Raise ValueError if a directory has a tokenizer that means other texts by some of the ids (256 are asked)."""
    directory = local_directory(path, ("*.json", "*.jinja", "*.model", "*.txt"))
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return
    other = load_tokenizer(str(directory))
    shared = min(tokenizer.vocab_size, other.vocab_size)
    for token in range(0, shared, max(1, shared // 256)):
        here, there = tokenizer.decode([token]), other.decode([token])
        if here != there:
            raise ValueError(
                f"token {token} is {here!r} in this run but {there!r} in {path}; tokens must mean the same"
            )


_BESIDE_SHAPES = (
    *("rope", "local_rope", "window", "local_layers", "qk_norm", "attention_scale", "attention_softcap", "activation"),
    *("norms", "norm_offset", "norm_eps", "embedding_scale", "experts_per_token", "normalize_experts", "softcap"),
)
"""Keywords of `models.decoder` that its parameters mean something else by, and do not show."""


def what_parameters_mean(model: ModelConfig, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a model's output depends on beside its parameters, by name.

    Args:
        model: of a run.
        config: of the checkpoint that it starts from; None if it is drawn.
    """
    given = sizes_of(model) if config is None else decoder_keywords(dict(config), ignore=model.ignore)
    defaults = {name: one.default for name, one in inspect.signature(models.decoder).parameters.items()}
    found = {**defaults, **given}
    head_dim = found["head_dim"] or found["width"] // found["heads"]
    rope = found["rope"] or models.Rope(base=found["rope_base"])
    lora = lora_of(model)
    return {name: found[name] for name in _BESIDE_SHAPES} | {
        "rope": rope,
        "local_rope": found["local_rope"] or rope,
        "qk_norm": {True: "head", False: "none"}.get(found["qk_norm"], found["qk_norm"]),
        "attention_scale": found["attention_scale"] or head_dim**-0.5,
        "lora's scale": None if lora is None else lora.scale,
    }


def check_same_meaning(own: Mapping[str, Any], other: Mapping[str, Any], path: str) -> None:
    """Raise ValueError unless a directory's parameters mean what this run's do; see `what_parameters_mean`."""
    differing = [f"{name} is {own[name]} here but {other[name]} in {path}" for name in own if own[name] != other[name]]
    if differing:
        raise ValueError("; ".join(differing))


def _policy(
    model: ModelConfig,
    tokenizer: Tokenizer,
    source: models.Pretrained | None,
    *,
    lora: models.Lora | None,
    value_head: bool,
) -> Policy:
    """The policy of a checkpoint, or of the configuration's own sizes; its `init` gives quantized weights if asked."""
    options: dict[str, Any] = {
        "dtype": model.dtype,
        "param_dtype": model.param_dtype,
        "remat": model.remat,
        "lora": lora,
        "value_head": value_head,
    }
    if source is not None:
        drawn = models.from_config(source.config, ignore=model.ignore, **options)
        policy = within_vocabulary(drawn, tokenizer.vocab_size, source.params["embedding"].shape[0])
    else:
        drawn = policy = models.decoder(vocab_size=tokenizer.vocab_size, **sizes_of(model), **options)
    kind = model.quantize
    if kind == "none" or lora is None:
        return policy
    return policy._replace(init=lambda key: models.quantize(drawn.init(key), kind=kind))


def _read(
    model: ModelConfig,
    path: str,
    key: Array,
    mesh: Mesh,
    *,
    lora: models.Lora | None,
    value_head: bool = False,
    revision: str | None = None,
) -> Params:
    """A checkpoint's parameters on the mesh, with adapters that start anew and quantized under them if asked."""
    params = models.from_pretrained(
        path,
        dtype=model.dtype,
        param_dtype=model.param_dtype,
        mesh=mesh,
        ignore=model.ignore,
        lora=lora,
        key=key,
        value_head=value_head,
        revision=revision,
    ).params
    kind = model.quantize
    return params if kind == "none" or lora is None else models.quantize(params, kind=kind, free=True)


def within_vocabulary(policy: Policy, size: int, rows: int) -> Policy:
    """A policy that gives no probability to ids that the tokenizer does not have: rows that only pad its embedding.

    Args:
        policy: the model.
        size: number of the tokenizer's ids.
        rows: number of the embedding's.
    """
    if size >= rows:
        return policy

    def unembed(params: Params) -> Unembedding:
        found = policy.unembed(params)
        weight = None if found.weight is None else found.weight[:size]
        return found._replace(weight=weight, bias=None if found.bias is None else found.bias[:size])

    return policy._replace(unembed=unembed)


def check_export(
    model: ModelConfig, made: Models, tokenizer: Tokenizer, directory: str | None, key: str = "model.export"
) -> None:
    """Raise ValueError for an export that would fail, or overwrite what the run starts from; None is none."""
    if directory is None:
        return
    target = writable_directory(directory).absolute()
    if model.path is not None and Path(model.path).absolute() == target:
        raise ValueError(f"{key} is model.path, {model.path}: the checkpoint would be overwritten; choose another")
    if made.source is None:
        models.to_config(vocab_size=tokenizer.vocab_size, **sizes_of(model))
    lora = lora_of(model)
    if lora is not None and made.source is not None:
        models.check_targets(lora, made.source.config["model_type"])


def sizes_of(model: ModelConfig) -> dict[str, Any]:
    """Keywords of `models.decoder` that say what a model that is drawn is like."""
    return {name: value for name, value in dataclasses.asdict(model).items() if name not in NOT_SIZES}


def lora_of(model: ModelConfig) -> models.Lora | None:
    """The adapters that the configuration gives the model."""
    if model.lora is None:
        return None
    return models.Lora(**{name: value for name, value in vars(model.lora).items() if name != "path"}).checked()


def router_losses(model: ModelConfig) -> dict[str, RouterLoss]:
    """The load-balancing loss that the configuration gives the policy, by role."""
    return {} if model.router_loss is None else {"policy": RouterLoss(**dataclasses.asdict(model.router_loss))}


def trainable(model: ModelConfig, policy: Policy, key: Array) -> PyTree | None:
    """Which of a model's parameters are trained; None for all."""
    return None if model.lora is None else models.trainable(jax.eval_shape(policy.init, key))


def export(
    made: Models,
    model: ModelConfig,
    tokenizer: Any,
    params: Params,
    directory: str,
    *,
    dtype: str | None = None,
    overwrite: bool = True,
) -> None:
    """Write a policy as a Hugging Face checkpoint, and its adapters, if it has any, in PEFT's format beside it.

    Args:
        made: the run's models.
        model: the section of the configuration.
        tokenizer: whose files are written too.
        params: of the policy.
        directory: receives the model with the adapters merged into it; they alone go to `adapter` inside, if the model
            that they belong to is a checkpoint.
        dtype: of the file; None for that of the parameters.
        overwrite: whether the directory may hold a model already.

    Raises:
        ValueError: if the model was drawn and is one that no family of Hugging Face has.
    """
    lora = lora_of(model)
    if made.source is not None:
        config, generation = made.source.config, made.source.generation_config
    else:
        config = models.to_config(vocab_size=tokenizer.vocab_size, **sizes_of(model))
        generation = {"eos_token_id": list(tokenizer.eos_ids), "pad_token_id": tokenizer.pad_id}
    models.save_pretrained(
        directory,
        params,
        config,
        lora=lora,
        tokenizer=tokenizer,
        generation_config=generation,
        dtype=dtype,
        overwrite=overwrite,
    )
    if lora is not None and model.path is not None:  # adapters of a model that is nowhere else would be of no use
        target, kind = f"{directory}/adapter", config["model_type"]
        models.save_adapters(target, params, lora, base=model.path, revision=model.revision, model_type=kind)

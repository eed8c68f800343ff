"""A policy's parameters as a directory that `transformers` and serving engines load."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.typing import DTypeLike

from jaxrl_post.models.decoder import decoder
from jaxrl_post.models.families import ACTIVATIONS, FAMILIES, Config, Head, decoder_keywords, head_of, text_config
from jaxrl_post.models.hub import writable_directory
from jaxrl_post.models.lora import Lora
from jaxrl_post.models.pretrained import CONFIG, GENERATION_CONFIG, HasVocabulary, check_vocabulary, flat, from_config
from jaxrl_post.models.rope import Rope
from jaxrl_post.models.safetensors_io import write_checkpoint
from jaxrl_post.models.weight_names import Path as ParamPath
from jaxrl_post.models.weight_names import Place, places
from jaxrl_post.models.written import to_host, written
from jaxrl_post.types import Params

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


class SavableTokenizer(HasVocabulary, Protocol):
    """What is asked of a tokenizer here."""

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write its files into `directory`."""
        ...


def save_pretrained(
    directory: str | os.PathLike[str],
    params: Params,
    config: Mapping[str, Any],
    *,
    tokenizer: SavableTokenizer | None = None,
    generation_config: Mapping[str, Any] | None = None,
    lora: Lora | None = None,
    head: Head | None = None,
    dtype: DTypeLike | None = None,
    max_shard_size: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Write a model as `transformers` saves it.

    The directory appears under its name when it is complete. Into one that exists, with `overwrite`, files are moved
    one by one, the weights last; files that are not of a model are left alone.

    A value head becomes the classifier of a model with one label: `...ForTokenClassification`, which has a bias, or
    `...ForSequenceClassification`, which has none. Such a model has no unembedding.

    Adapters are merged into what is written and quantized weights widened, a layer of one parameter at a time, so that
    no second model need fit on the devices. On several hosts every process must call it, since parameters are gathered;
    the first one writes.

    Args:
        directory: to write, on this machine.
        params: of a decoder.
        config: the `config.json` of the model that they come from, `Pretrained.config`.
        tokenizer: whose files are written too.
        lora: what the model's adapters were made with, if it has any.
        generation_config: `generation_config.json`; None for one with the stop tokens of `tokenizer` or `config`.
        head: what to write; None for what `config` names, or a token classification if `config` names a causal language
            model and there is a value head. With `"causal_lm"` a value head is left out.
        dtype: of the file; None for that of the parameters.
        max_shard_size: bytes of tensors in a file.
        overwrite: whether the directory may hold a model already.

    Raises:
        ValueError: if the directory is an address or holds a model already, the parameters have adapters without `lora`
            or are not those of a model of `config`, the tokenizer has more tokens than the embedding has rows, or
            `head` cannot be written: `transformers` has no such class, there is no value head, or it has a bias and the
            format none.
    """
    target = writable_directory(directory)
    text = text_config(config)
    leaves = written(params, lora)
    if tokenizer is not None:
        check_vocabulary(leaves["embedding",].shape[0], tokenizer)
    head, labels = _head(head, config, leaves)
    _check_shapes(config, leaves)
    found = places(
        {path: leaf.shape for path, leaf in leaves.items()},
        fused=FAMILIES[text["model_type"]].fused,
        head=head,
        labels=labels,
    )
    stored = np.dtype(leaves["embedding",].dtype if dtype is None else dtype)
    described = config_for(config, head=head, labels=labels, dtype=stored.name)
    if holds_model(target) and not overwrite:
        raise ValueError(
            f"{target} holds a model already; choose another directory, or remove it (from Python: pass overwrite=True)"
        )

    specs, make = _tensors(found, leaves, None if dtype is None else stored)
    if jax.process_index() != 0:
        for name, _, _ in specs:
            make(name)
        return
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        write_checkpoint(partial, specs, make, max_shard_size=max_shard_size)
        _write_json(partial / CONFIG, described)
        if generation_config is not None:
            _write_json(partial / GENERATION_CONFIG, generation_config)
        if tokenizer is not None:
            tokenizer.save(partial)
        if not (partial / GENERATION_CONFIG).exists():
            names = ("bos_token_id", "eos_token_id", "pad_token_id")
            ids = {name: described[name] for name in names if described.get(name) is not None}
            _write_json(partial / GENERATION_CONFIG, {"_from_model_config": True, **ids})
        _publish(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def config_for(config: Config, *, head: Head, labels: int, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model that is written: that of the model that was read, with its head and dtype.

    Args:
        config: of the model that was read.
        head: what is written.
        labels: of a classification.
        dtype: name of the parameters' dtype.

    Returns:
        A `config.json`; of a model that also saw images, that of its language model.

    Raises:
        ValueError: if `transformers` has no such model.

    Example:
        >>> config_for({"model_type": "qwen3"}, head="token_classification", labels=1, dtype="float32")["id2label"]
        {'0': 'LABEL_0'}
    """
    text = text_config(config)
    family = FAMILIES[text["model_type"]]
    if config.get("model_type") == "gemma3":
        text = {**{k: v for k, v in family.defaults.items() if v is not None}, **text}
    if head == "token_classification" and not family.classifies_tokens:
        raise ValueError(
            f"transformers has no {family.prefix}ForTokenClassification; write a sequence_classification instead, "
            "which has no bias"
        )
    suffix = {
        "causal_lm": "ForCausalLM",
        "sequence_classification": "ForSequenceClassification",
        "token_classification": "ForTokenClassification",
    }[head]
    prefix = family.sequence_prefix if head == "sequence_classification" and family.sequence_prefix else family.prefix
    text["architectures"] = [prefix + suffix]
    text = with_dtype(text, dtype)
    text.pop("num_labels", None)
    if head == "causal_lm":
        text.pop("id2label", None)
        text.pop("label2id", None)
    elif len(text.get("id2label") or ()) != labels:
        text["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        text["label2id"] = {name: int(i) for i, name in text["id2label"].items()}
    return text


def with_dtype(config: Config, dtype: str) -> dict[str, Any]:
    """A `config.json` that names another dtype, under the name or names that it has for it."""
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
    return {**config, **dict.fromkeys(names, dtype)}


def _head(head: Head | None, config: Mapping[str, Any], leaves: Mapping[ParamPath, Any]) -> tuple[Head, int]:
    named, labels = head_of(config)
    has_value = ("value_head", "kernel") in leaves
    if head is None:
        head = "token_classification" if named == "causal_lm" and has_value else named
    if head == "causal_lm":
        if named != "causal_lm":
            raise ValueError(f"a {config['architectures'][0]} has no unembedding to write a causal_lm with")
        return head, 0
    if not has_value:
        raise ValueError(f"head={head!r} needs a value head, which these parameters have not; use head='causal_lm'")
    if head == "sequence_classification" and np.any(to_host(leaves["value_head", "bias"], None)):
        raise ValueError(
            "a sequence_classification has no bias, and that of this value head is not zero; write a "
            "token_classification, or set it to zero if values that differ by a constant are alike"
        )
    return head, max(labels, 1) if head == named else 1


def _check_shapes(config: Mapping[str, Any], leaves: Mapping[ParamPath, Any]) -> None:
    """Raise ValueError unless the parameters are those of a model of the configuration."""
    policy = from_config(config, value_head=("value_head", "kernel") in leaves, ignore=_all_keys(config))
    wanted = {path: list(x.shape) for path, x in flat(jax.eval_shape(policy.init, jax.random.key(0))).items()}
    given = {path: list(x.shape) for path, x in leaves.items()}
    wrong = [
        f"{'.'.join(path)} is {given.get(path, 'missing')}, not {wanted.get(path, 'there')}"
        for path in sorted(wanted | given)
        if wanted.get(path) != given.get(path)
    ]
    if wrong:
        raise ValueError(f"these parameters are not those of config.json: {'; '.join(wrong)}")


def _all_keys(config: Mapping[str, Any]) -> set[str]:
    """Those of the sections in it too; whoever read the model has said already which make no difference."""
    return set(config).union(*(_all_keys(value) for value in config.values() if isinstance(value, Mapping)))


def to_config(**keywords: Any) -> dict[str, Any]:
    """A Hugging Face configuration for a model that was made with `decoder`, so that it can be written.

    Args:
        **keywords: of `decoder`; dtypes, `remat`, `value_head`, `init_std` and `lora` make no difference.

    Returns:
        A `config.json` of one of the families `llama`, `qwen2` and `qwen3`.

    Raises:
        ValueError: if none of them has such models; names what stands in the way of the nearest.

    Example:
        >>> config = to_config(vocab_size=11, width=16, heads=4, kv_heads=2, qk_norm="head")
        >>> config["model_type"], config["num_key_value_heads"], config["head_dim"]
        ('qwen3', 2, 4)
    """
    wanted = _complete(keywords)
    activation = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[wanted["activation"]]
    shared = {
        "vocab_size": wanted["vocab_size"],
        "hidden_size": wanted["width"],
        "intermediate_size": wanted["mlp_width"],
        "num_hidden_layers": wanted["layers"],
        "num_attention_heads": wanted["heads"],
        "num_key_value_heads": wanted["kv_heads"],
        "head_dim": wanted["head_dim"],
        "hidden_act": activation,
        "rms_norm_eps": wanted["norm_eps"],
        "rope_theta": wanted["rope"].base,
        "tie_word_embeddings": wanted["tied"],
        "bos_token_id": None,
        "eos_token_id": None,
    }
    types = ["sliding_attention" if local else "full_attention" for local in wanted["local_layers"]]
    windows = {"use_sliding_window": wanted["window"] is not None, "sliding_window": wanted["window"]}
    biased = wanted["attention_bias"] == "all"
    candidates = [
        {"model_type": "llama", **shared, "attention_bias": biased, "mlp_bias": wanted["mlp_bias"]},
        {"model_type": "qwen2", **shared, **windows, "layer_types": types},
        {"model_type": "qwen3", **shared, **windows, "layer_types": types, "attention_bias": biased},
    ]
    differences = []
    for config in candidates:
        found = _complete(decoder_keywords(config))
        differences.append([f"{name}: {wanted[name]}" for name in wanted if wanted[name] != found[name]])
        if not differences[-1]:
            return config
    raise ValueError(f"no family of llama, qwen2, qwen3 has models with {', '.join(min(differences, key=len))}")


def _complete(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of `decoder` that say what is computed, with its defaults and in one way of saying it."""
    parameters = inspect.signature(decoder).parameters
    if unknown := sorted(set(keywords) - set(parameters)):
        raise ValueError(f"{', '.join(unknown)} is no keyword of decoder")
    full = {name: parameter.default for name, parameter in parameters.items()} | dict(keywords)
    for name in ("dtype", "param_dtype", "remat", "value_head", "init_std", "lora"):
        del full[name]
    base = full.pop("rope_base")
    rope = Rope(base=float(base)) if full["rope"] is None else full["rope"]
    local = full["local_layers"]
    if local is None:
        local = (full["window"] is not None,) * full["layers"]
    return full | {
        "rope": rope,
        "local_rope": rope if full["local_rope"] is None else full["local_rope"],
        "local_layers": tuple(map(bool, local)),
        "kv_heads": full["heads"] if full["kv_heads"] is None else full["kv_heads"],
        "head_dim": full["width"] // full["heads"] if full["head_dim"] is None else full["head_dim"],
        "mlp_width": 4 * full["width"] if full["mlp_width"] is None else full["mlp_width"],
        "qk_norm": {True: "head", False: "none"}.get(full["qk_norm"], full["qk_norm"]),
    }


def holds_model(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory exists and has the weights or the `config.json` of a model in it."""
    path = Path(directory)
    return path.exists() and any(_is_ours(file.name) for file in path.iterdir())


def _is_ours(name: str) -> bool:
    return name == CONFIG or _WEIGHTS.fullmatch(name) is not None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _publish(partial: Path, target: Path) -> None:
    """Give a complete directory its name, or move its files into one that exists."""
    if not target.exists():
        os.rename(partial, target)
        return
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    new = {path.name for path in files}
    # An earlier checkpoint would be mixed with this one: a single file is found before an index.
    for path in target.iterdir():
        if _WEIGHTS.fullmatch(path.name) and path.name not in new:
            path.unlink()
    for path in sorted(files, key=lambda path: _WEIGHTS.fullmatch(path.name) is not None):
        place = target / path.relative_to(partial)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)


Specs = list[tuple[str, tuple[int, ...], np.dtype]]


def _tensors(
    found: Mapping[ParamPath, Place], leaves: Mapping[ParamPath, Any], dtype: np.dtype | None
) -> tuple[Specs, Callable[[str], np.ndarray]]:
    """The tensors to write, layer by layer, and what makes one."""
    parts: dict[str, list[tuple[ParamPath, tuple[int, ...]]]] = {}
    for path, place in found.items():
        for index, name in place.tensors():
            parts.setdefault(name, []).append((path, index))

    def layer(name: str) -> int:
        path, index = parts[name][0]
        return index[0] if path[0] == "layers" else -1

    fetched: dict[tuple[ParamPath, int], np.ndarray] = {}

    def fetch(path: ParamPath, index: tuple[int, ...]) -> np.ndarray:
        leaf = leaves[path]
        if not index:
            return to_host(leaf, None)
        if (path, index[0]) not in fetched:
            fetched.clear()  # one layer of one parameter is held, whose experts come one after the other
            fetched[path, index[0]] = to_host(leaf, index[0])
        return fetched[path, index[0]][index[1:]]

    def make(name: str) -> np.ndarray:
        pieces = [found[path].theirs(fetch(path, index)) for path, index in parts[name]]
        whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return whole if dtype is None else whole.astype(dtype)

    specs: Specs = []
    for name in sorted(parts, key=layer):  # stable: the parts of a layer keep their order
        path, _ = parts[name][0]
        specs.append((name, found[path].shape, np.dtype(leaves[path].dtype) if dtype is None else dtype))
    return specs, make

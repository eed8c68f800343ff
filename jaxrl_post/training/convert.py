"""Models in another form: runs, adapters and Orbax checkpoints as Hugging Face directories, and these as Orbax."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxrl_post import models
from jaxrl_post.data import load_tokenizer
from jaxrl_post.models.export import with_dtype
from jaxrl_post.models.hub import HUB, writable_directory
from jaxrl_post.models.orbax_io import is_orbax, restore_orbax, save_orbax
from jaxrl_post.training.model_setup import export
from jaxrl_post.training.run_files import in_bucket

_WEIGHTS = (".safetensors", ".bin", ".index.json", ".gguf", ".h5", ".msgpack")


def convert(source: str, target: str, *, dtype: str | None = None) -> str:
    """Write the model of `source` in its other form.

    Args:
        source: the directory of a run (which may be in a bucket), of adapters in PEFT's format, of a Hugging Face
            checkpoint (or its hub id), or of an Orbax checkpoint that came from one.
        target: directory to write, on this machine. From a run or Orbax it becomes a Hugging Face checkpoint, with
            adapters merged into the model and, beside it, in PEFT's format; from adapters the model that they belong
            to with them merged; from a Hugging Face checkpoint an Orbax one.
        dtype: of the parameters; None for that of the source.

    Returns:
        What was written, in words.

    Raises:
        ValueError: if the source is none of these, its adapters do not name their model, or the target is an address
            or holds a model already.
    """
    writable_directory(target)
    # Nothing but runs is read from buckets.
    if (in_bucket(source) and not source.startswith(HUB)) or (Path(source) / "config.yaml").is_file():
        from jaxrl_post.training.inference import load_run

        setup, params = load_run(source)
        export(setup.models, setup.config.model, setup.tokenizer, params, target, dtype=dtype, overwrite=False)
        return f"{target} is a Hugging Face checkpoint of the policy of {source}"
    if (Path(source) / "adapter_config.json").is_file():
        lora, (base, revision) = models.read_adapter_config(source), models.adapter_base(source)
        if base is None:
            raise ValueError(
                f"{source}/adapter_config.json does not name the model: give base_model_name_or_path there"
            )
        stored = dtype or _dtype(models.from_pretrained(base, abstract=True, revision=revision).config)
        found = models.from_pretrained(base, param_dtype=stored, revision=revision, lora=lora, key=jax.random.key(0))
        models.save_pretrained(
            target,
            models.load_adapters(source, found.params),
            found.config,
            lora=lora,
            tokenizer=_tokenizer(source) or _tokenizer(found.directory),  # PEFT's users save it beside them
            generation_config=found.generation_config,
        )
        return f"{target} is a Hugging Face checkpoint of {base} with the adapters of {source} merged into it"
    if is_orbax(source):
        config = models.read_config(source)
        stored = dtype or _dtype(config)
        policy = models.from_config(config, param_dtype=stored)
        params = restore_orbax(source, jax.eval_shape(policy.init, jax.random.key(0)))
        given = Path(source) / "generation_config.json"
        generation = json.loads(given.read_text(encoding="utf-8")) if given.is_file() else None
        models.save_pretrained(target, params, config, tokenizer=_tokenizer(source), generation_config=generation)
        return f"{target} is a Hugging Face checkpoint"
    found = models.from_pretrained(source, abstract=True)
    stored = dtype or _dtype(found.config)
    read = models.from_pretrained(source, param_dtype=stored)
    save_orbax(target, read.params, with_dtype(read.config, stored))
    for path in read.directory.iterdir():
        if path.is_file() and path.name != "config.json" and not path.name.endswith(_WEIGHTS):
            shutil.copy2(path, Path(target) / path.name)
    return f"{target} is an Orbax checkpoint"


def _dtype(config: Mapping[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _tokenizer(directory: str | Path):
    there = any((Path(directory) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return load_tokenizer(directory) if there else None

"""What the options of adapters are where they are null: their defaults, or what the adapters to go on from say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxrl_post.models.lora import Lora
from jaxrl_post.models.peft import adapter_base, adapter_directory, read_adapter_config
from jaxrl_post.training.config.errors import Problems
from jaxrl_post.training.config.schema import Config, LoraConfig

DEFAULTS = {field.name: field.default for field in dataclasses.fields(Lora) if field.name != "rank"}


def with_adapters(config: Config, problems: Problems, check_files: bool) -> Config:
    """The configuration with the options of `model.lora`, and the base of its adapters, filled in.

    Args:
        config: as it was read; a field that could not be is None.
        problems: takes what is wrong: an option that the adapters contradict, adapters that cannot be read.
        check_files: whether the adapters must be there; an old run's file says all that is read of them.

    Returns:
        The configuration; the same where something is wrong.
    """
    model = config.model
    if model is None or model.lora is None or not problems.ok("model.lora", "model.path"):
        return config
    options = dataclasses.asdict(model.lora)
    path = options.pop("path")
    given = {name: value for name, value in options.items() if value is not None}
    if path is None:
        if "rank" not in given:
            problems.add("model.lora.rank", "is missing; give it, e.g. 16, or path: adapters to go on from")
            return config
        filled = {**DEFAULTS, **given}
    elif not check_files and len(given) == len(options):
        return config  # what is there now may be other adapters
    else:
        try:
            directory = adapter_directory(path)
            found, (base, revision) = read_adapter_config(directory), adapter_base(directory)
        except ValueError as error:
            problems.add("model.lora.path", str(error), path)
            return config
        filled = dataclasses.asdict(found) | ({"dropout": given["dropout"]} if "dropout" in given else {})
        for name, value in given.items():
            if _canonical(name, value) != filled[name]:
                what = filled[name] if name != "targets" else ", ".join(filled[name])
                problems.add(f"model.lora.{name}", f"is {what} in the adapters of {path}; leave it out", value)
        if model.path is None and base is None:
            problems.add("model.path", f"is missing: the adapters of {path} do not say which model they belong to")
        elif model.path is None:
            model = dataclasses.replace(model, path=base, revision=model.revision or revision)
        elif base is not None and Path(base).name != Path(model.path).name:
            problems.warnings.append(
                f"model.lora.path: the adapters of {path} were made for {base}, and model.path is {model.path}; on "
                "other weights they mean nothing"
            )
        if "policy" in (config.roles or {}):
            problems.add("roles.policy", f"brings adapters of its own, and model.lora.path = {path}; leave one out")
    lora = LoraConfig(path=path, **filled)
    return dataclasses.replace(config, model=dataclasses.replace(model, lora=lora))


def _canonical(name: str, value: Any) -> Any:
    """Targets in our names and order; a wrong one stays, and is found to be wrong elsewhere."""
    if name != "targets":
        return value
    try:
        return Lora(rank=1, targets=tuple(value)).checked().targets
    except ValueError:
        return value

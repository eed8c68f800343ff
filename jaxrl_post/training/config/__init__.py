"""The configuration of a run: typed sections, read from YAML with `key=value` overrides, checked before compilation.

`schema` holds the sections, `parsing` the types, `overrides` the command line's changes, `checks`, `content_checks` and
`methods_check` what must hold between fields and methods, `document` the printed reference. Nothing here touches a
device.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrl_post.data import PRINTABLE
from jaxrl_post.training.config import checks, parsing, yaml_text
from jaxrl_post.training.config.adapter_checks import with_adapters
from jaxrl_post.training.config.checks import check_devices
from jaxrl_post.training.config.document import defaults, document
from jaxrl_post.training.config.errors import ConfigError, ConfigWarning, Problems
from jaxrl_post.training.config.methods_check import check_method, encode_texts
from jaxrl_post.training.config.overrides import check_evaluation_overrides, merge, override
from jaxrl_post.training.config.schema import (
    BASE,
    BudgetScheduleConfig,
    Config,
    CurriculumConfig,
    DataConfig,
    EvalConfig,
    ExitsConfig,
    LoggingConfig,
    LoraConfig,
    MeshConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RoleConfig,
    RolloutConfig,
    RouterLossConfig,
    SamplingConfig,
    ServerConfig,
    TrainingConfig,
    WarmStartConfig,
)

__all__ = [
    "BASE",
    "BudgetScheduleConfig",
    "Config",
    "ConfigError",
    "ConfigWarning",
    "CurriculumConfig",
    "DataConfig",
    "EvalConfig",
    "ExitsConfig",
    "LoggingConfig",
    "LoraConfig",
    "MeshConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RewardConfig",
    "RoleConfig",
    "RolloutConfig",
    "RouterLossConfig",
    "SamplingConfig",
    "ServerConfig",
    "TrainingConfig",
    "WarmStartConfig",
    "check_devices",
    "check_evaluation_overrides",
    "defaults",
    "document",
    "dump",
    "from_dict",
    "load",
    "to_dict",
    "validate",
]


def load(path: str | Path, overrides: Sequence[str] = (), *, namespace: Any = None, check_files: bool = True) -> Config:
    """Read a YAML file, apply overrides, check everything and fill in what follows from other fields.

    A file whose key `base` names another one (relative to itself) says only what differs: its keys go over those of
    the other, section by section; `method`, `rewards` and `roles` are replaced as a whole. An override that gives a
    section goes over it likewise. A section that is null or left empty changes nothing, unless null means something
    there (`warm_start: null`).

    Args:
        path: the file.
        overrides: `a.b.c=value`, the value in YAML; items of lists by number, `rewards.0.weight=2`.
        namespace: where the functions of methods are looked up; `jaxrl_post.methods` if None.
        check_files: whether files and packages that the run needs must be there; False to read an old run's file.

    Returns:
        The configuration, resolved.

    Raises:
        ConfigError: with all problems of file and overrides at once.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    problems = Problems()
    values = _read(path, problems)
    if isinstance(values, dict):
        for item in overrides:
            override(values, item, problems)
    return _build(values, str(path), problems, namespace, check_files)


def _read(path: Path, problems: Problems, above: tuple[Path, ...] = ()) -> Any:
    """The file's values over those of the file that its `base` names, if it names one."""
    if not path.is_file():
        what = "is a directory; give the YAML file in it" if path.is_dir() else f"not found (looked from {Path.cwd()})"
        named = f" (the base of {above[-1]})" if above else ""
        raise FileNotFoundError(f"configuration file {path}{named}: {what}")
    if path.resolve() in above:
        raise ConfigError([f"base: goes in a circle: {' -> '.join(map(str, above))}; break it"], str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError([f"is not UTF-8 text ({error}); save it as UTF-8"], str(path)) from error
    values, duplicates = yaml_text.read(text, str(path))
    problems.messages.extend(duplicates)
    values = {} if values is None else values
    if not isinstance(values, dict) or "base" not in values:
        return values
    base = values.pop("base")
    if not isinstance(base, str):
        raise ConfigError([f"base: must be the path of another configuration, got {base!r}"], str(path))
    return merge(_read(path.parent / base, problems, (*above, path.resolve())), values)


def from_dict(
    values: Mapping[str, Any], *, source: str = "configuration", namespace: Any = None, check_files: bool = True
) -> Config:
    """The configuration that a mapping of YAML keys describes, checked and resolved as `load` does.

    Args:
        values: sections by name, as `to_dict` returns them.
        source: what to call them in messages.
        namespace: where the functions of methods are looked up; `jaxrl_post.methods` if None.
        check_files: whether files and packages that the run needs must be there.

    Raises:
        ConfigError: with all problems at once.
    """
    return _build(values, source, Problems(), namespace, check_files)


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as mappings, lists and scalars; `from_dict` gives an equal one back."""
    return parsing.plain(config)


def dump(config: Config) -> str:
    """The configuration as YAML; `load` gives an equal one back."""
    return yaml_text.write(to_dict(config))


def validate(config: Config, *, namespace: Any = None, check_files: bool = True) -> Config:
    """Check a configuration that was made in Python, and fill in what follows from other fields.

    Args:
        config: the configuration.
        namespace: where the functions of methods are looked up; `jaxrl_post.methods` if None.
        check_files: whether files and packages that the run needs must be there.

    Returns:
        The configuration, resolved.

    Raises:
        ConfigError: with all problems at once.
    """
    return from_dict(to_dict(config), namespace=namespace, check_files=check_files)


def _build(values: Any, source: str, problems: Problems, namespace: Any, check_files: bool) -> Config:
    if not isinstance(values, Mapping):
        raise ConfigError([*problems.messages, "must be a mapping of sections (run_dir, data, training, ...)"], source)
    config: Config = with_adapters(parsing.parse_section(Config, values, "", problems), problems, check_files)
    model, data = config.model, config.data
    if model is not None and data is not None and model.path and data.tokenizer is None and data.alphabet is None:
        data = dataclasses.replace(data, tokenizer=model.path, tokenizer_revision=model.revision)
        config = dataclasses.replace(config, data=data)
    made = None
    if problems.ok("method") and config.method is not None:
        method = encode_texts(config.method, config.data, problems)
        method, made = check_method(method, problems, namespace)
        config = dataclasses.replace(config, method=method)
    checks.check(config, made, problems, check_files)
    if problems.messages or made is None:
        raise ConfigError(problems.messages, source)
    for text in problems.warnings:
        warnings.warn(text, ConfigWarning, stacklevel=3)
    return _resolve(config, made.roles, made.trains)


def _resolve(config: Config, roles: frozenset[str], trained: frozenset[str]) -> Config:
    model, data = config.model, config.data
    if model.path is None:
        model = dataclasses.replace(
            model,
            kv_heads=model.heads if model.kv_heads is None else model.kv_heads,
            head_dim=model.width // model.heads if model.head_dim is None else model.head_dim,
            mlp_width=4 * model.width if model.mlp_width is None else model.mlp_width,
        )
    if data.alphabet is None and data.tokenizer is None:
        data = dataclasses.replace(data, alphabet=PRINTABLE)
    # Where adapters have been trained before (a warm start, another run, those of lora.path) the base is not what the
    # method starts from.
    continued = model.lora is not None and model.lora.path is not None
    begun = continued or config.warm_start is not None or "policy" in config.roles
    source = "policy" if model.lora is None or begun else BASE
    missing = {role: RoleConfig(source="policy" if role in trained else source) for role in sorted(roles - {"policy"})}
    return dataclasses.replace(config, model=model, data=data, roles={**missing, **config.roles})

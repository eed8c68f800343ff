"""Compiled programs in files, so that a run, or code of your own, starts without compiling.

A file belongs to one version of JAX and of the compiler, to a kind and number of devices, and to a run's configuration:
it says so, and is refused elsewhere. Those for TPUs are written where there is none; running one has not been tested on
hardware. Mind that `jax[tpu]` pins a libtpu of its own, another one than the extra `compile` installs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import pickle
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jaxlib.version import __version__ as jaxlib_version

from jaxrl_post import __version__
from jaxrl_post.training import config as configs
from jaxrl_post.training.config import Config
from jaxrl_post.training.generation import Generation

SUFFIX = ".executable"

logger = logging.getLogger(__name__)


def save(compiled: Any, directory: str | os.PathLike[str], name: str, *, configuration: str = "") -> Path:
    """Write a compiled program.

    Args:
        compiled: from `jitted.lower(...).compile()`.
        directory: receives the file, and is made if need be.
        name: of the program; a slash in it becomes a dash.
        configuration: tells apart programs of one name; `load` is asked for the same.

    Returns:
        The file.

    Example:
        >>> import tempfile
        >>> compiled = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((2,), "float32")).compile()
        >>> path = save(compiled, tempfile.mkdtemp(), "increment")
        >>> load(path)(jax.numpy.zeros(2)).tolist()
        [1.0, 1.0]
    """
    payload, inputs, outputs = serialize_executable.serialize(compiled)
    path = _path(directory, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    lies = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    devices = {device for one in lies for device in one.device_set}
    made = _circumstances(devices) | {"configuration": configuration}
    content = pickle.dumps({"made_for": made, "program": (payload, inputs, outputs)})
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(path)
    return path


def load(path: str | os.PathLike[str], *, configuration: str | None = None) -> Any:
    """Read a compiled program, for the first devices here. Only read files that you trust: it is a pickle.

    Args:
        path: a file that `save` wrote.
        configuration: what `save` was given; None for whatever it was.

    Returns:
        What is called as the jitted function was, with arrays of the very shapes and shardings.

    Raises:
        ValueError: if another version of JAX or its compiler wrote it, or it is for other devices, or for more, or of
            another configuration.
    """
    found = pickle.loads(Path(path).read_bytes())
    made, here = found["made_for"], _circumstances(jax.devices())
    of = made.pop("configuration")
    if configuration is not None and configuration != of:
        raise ValueError(f"{path} was compiled from another configuration, or for other end tokens; compile it again")
    if made != here | {"devices": min(made["devices"], here["devices"])}:
        raise ValueError(f"{path} was compiled for {_shown(made)}, but here is {_shown(here)}; compile it again")
    try:
        used = jax.devices()[: made["devices"]]
        return serialize_executable.deserialize_and_load(*found["program"], execution_devices=used)
    except Exception as error:  # of the runtime's own kinds
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be loaded on these {jax.device_count()} devices: {first}") from error


def identity(config: Config, how: Generation | None = None) -> str:
    """What tells the programs of a configuration from those of others; the directory of the run is no part of it.

    Args:
        config: of the run.
        how: what a program samples, which depends on the tokenizer too; None for one that samples nothing.
    """
    if how is not None:
        how = how._replace(turns=None)  # functions have no lasting names; the configuration says which they are
    values = configs.to_dict(config)
    code = [_source(name) for name in (config.method.name, config.data and config.data.environment) if name]
    for name in ("run_dir", "logging", "seed"):
        values.pop(name, None)
    text = json.dumps([__version__, values, repr(how), *code], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _source(name: str) -> str:
    """The text of the file that a function of the user's own is in, as `file.py:function` or `module:function`."""
    place, colon, _ = name.rpartition(":")
    if not colon:
        return ""
    found = importlib.util.find_spec(place) if not place.endswith(".py") else None
    path = Path(place) if found is None else Path(found.origin or "")
    return path.read_text() if path.is_file() else ""


def use(directory: str | os.PathLike[str], name: str, jitted: Any, *, configuration: str) -> Callable[..., Any]:
    """A program of a directory in the place of a jitted function, or that function where there is no such program.

    Of code of your own the file that `method` or `data.environment` names is part of `configuration`, and what it
    imports is not: compile again when that has changed.

    Args:
        directory: that `save` wrote to.
        name: of the program.
        jitted: what it was compiled from.
        configuration: what `save` was given.

    Returns:
        A function of the same arguments, which may lie elsewhere: they are brought to where the program has them.

    Raises:
        ValueError: as `load`; if there is no such directory; when called, for arrays of other shapes.

    Example:
        >>> import tempfile
        >>> use(tempfile.mkdtemp(), "sine", jax.numpy.sin, configuration="")(0.0).item()
        0.0
    """
    path = _path(directory, name)
    if not path.parent.is_dir():
        raise ValueError(
            f"there is no directory {directory} with compiled programs; jaxrl-post compile --save makes it"
        )
    if not path.is_file():
        logger.warning("there is no %s; %s is compiled here", path, name)
        return jitted
    loaded = load(path, configuration=configuration)

    def call(*arguments: Any, **named: Any) -> Any:
        arguments, named = jax.device_put((arguments, named), loaded.input_shardings)
        try:
            return loaded(*arguments, **named)
        except TypeError as error:
            raise ValueError(
                f"{path} was compiled for arrays of other shapes or types, as where the data holds fewer than "
                f"eval.problems; compile it again, or take it away: {str(error).splitlines()[0]}"
            ) from error

    return call


def _path(directory: str | os.PathLike[str], name: str) -> Path:
    return Path(directory) / f"{name.replace('/', '-')}{SUFFIX}"


def _circumstances(devices: Collection[Any]) -> dict[str, Any]:
    """What a program depends on, beside its code."""
    kinds = sorted({device.device_kind for device in devices})
    found = {"devices": len(devices), "kind": ", ".join(kinds), "jax": jax.__version__, "jaxlib": jaxlib_version}
    on_tpu = any(device.platform == "tpu" for device in devices)
    return found | ({"libtpu": importlib.metadata.version("libtpu")} if on_tpu else {})


def _shown(circumstances: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in circumstances.items())

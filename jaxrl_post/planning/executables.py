"""Compiled programs in files, so that a run starts without compiling.

A file belongs to one version of JAX and its compiler, one kind of device and one layout: it says so, and is refused by
any other. Those for TPUs are written where there is none; running one has not been tested on hardware.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jaxlib.version import __version__ as jaxlib_version

SUFFIX = ".executable"


def save(compiled: Any, directory: str | os.PathLike[str], name: str) -> Path:
    """Write a compiled program.

    Args:
        compiled: from `jitted.lower(...).compile()`.
        directory: receives the file, and is made if need be.
        name: of the program; a slash in it becomes a dash.

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
    path = Path(directory) / f"{name.replace('/', '-')}{SUFFIX}"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = pickle.dumps({"versions": _versions(), "program": (payload, inputs, outputs)})
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(path)
    return path


def load(path: str | os.PathLike[str]) -> Any:
    """Read a compiled program; its devices must be here. Only read files that you trust: it is a pickle.

    Args:
        path: a file that `save` wrote.

    Returns:
        What is called as the jitted function was, with arrays of the very shapes and shardings.

    Raises:
        ValueError: if another version of JAX wrote it, or the devices that it was compiled for are not here.
    """
    found = pickle.loads(Path(path).read_bytes())
    if found["versions"] != _versions():
        raise ValueError(
            f"{path} was compiled by {found['versions']}, but this is {_versions()}; compile it again with this version"
        )
    try:
        return serialize_executable.deserialize_and_load(*found["program"])
    except Exception as error:  # of the runtime's own kinds
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be loaded on these {jax.device_count()} devices: {first}") from error


def _versions() -> dict[str, str]:
    return {"jax": jax.__version__, "jaxlib": jaxlib_version}

"""Compiled programs in files, for code of your own that is to start without compiling.

`jaxrl-post train` does not read them: it compiles what it needs, and finds it again in JAX's persistent cache
(`JAX_COMPILATION_CACHE_DIR`). A file belongs to one version of JAX and of the compiler, and to a kind and number of
devices: it says so, and is refused elsewhere. Those for TPUs are written where there is none; running one has not been
tested on hardware. Mind that `jax[tpu]` pins a libtpu of its own, another one than the extra `compile` installs.
"""

from __future__ import annotations

import importlib.metadata
import os
import pickle
from collections.abc import Collection
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
    lies = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    devices = {device for one in lies for device in one.device_set}
    content = pickle.dumps({"made_for": _circumstances(devices), "program": (payload, inputs, outputs)})
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(path)
    return path


def load(path: str | os.PathLike[str]) -> Any:
    """Read a compiled program, for the first devices here. Only read files that you trust: it is a pickle.

    Args:
        path: a file that `save` wrote.

    Returns:
        What is called as the jitted function was, with arrays of the very shapes and shardings.

    Raises:
        ValueError: if another version of JAX or its compiler wrote it, or it is for other devices, or for more.
    """
    found = pickle.loads(Path(path).read_bytes())
    made, here = found["made_for"], _circumstances(jax.devices())
    if made != here | {"devices": min(made["devices"], here["devices"])}:
        raise ValueError(f"{path} was compiled for {_shown(made)}, but here is {_shown(here)}; compile it again")
    try:
        used = jax.devices()[: made["devices"]]
        return serialize_executable.deserialize_and_load(*found["program"], execution_devices=used)
    except Exception as error:  # of the runtime's own kinds
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be loaded on these {jax.device_count()} devices: {first}") from error


def _circumstances(devices: Collection[Any]) -> dict[str, Any]:
    """What a program depends on, beside its code."""
    kinds = sorted({device.device_kind for device in devices})
    found = {"devices": len(devices), "kind": ", ".join(kinds), "jax": jax.__version__, "jaxlib": jaxlib_version}
    on_tpu = any(device.platform == "tpu" for device in devices)
    return found | ({"libtpu": importlib.metadata.version("libtpu")} if on_tpu else {})


def _shown(circumstances: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in circumstances.items())

"""The TPU's own compiler, run where there is no TPU: its devices are described, and programs are compiled for them."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import Any

from jaxrl_post.planning.chips import Topology, topology

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""What the compiler needs in the environment before JAX is imported: no search for a TPU, several processes at once."""


def prepare() -> None:
    """Set the environment of this process for compiling; call it before JAX is imported.

    Raises:
        ImportError: if the compiler is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError('compiling for TPUs needs their compiler: pip install "jaxrl-post[compile]"')
    os.environ.update(ENVIRONMENT)


@functools.cache
def devices(name: str, slices: int = 1) -> Sequence[Any]:
    """The devices of a topology, described, not present: those of the first slice first.

    Args:
        name: e.g. `"v5e:2x4"`.
        slices: how many of them, joined by the data center's network.

    Raises:
        ValueError: if there is no such topology.
    """
    from jax.experimental import topologies

    wanted: Topology = topology(name, slices)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if wanted.chip.name == "v4":  # whose two cores are one device where there is one
        options["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:  # of the compiler's own kinds, for a shape that the chip's slices do not have
        raise ValueError(f"the compiler knows no topology {name!r}: {str(error).splitlines()[0]}") from error
    if len(found) != wanted.devices:
        raise ValueError(f"{name} should have {wanted.devices} devices, but the compiler describes {len(found)}")
    return found


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """No compilation cache: programs for a TPU that is not there can be written to it, but not read back."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    name = "jax_enable_compilation_cache"
    before = getattr(jax.config, name)
    jax.config.update(name, False)
    compilation_cache.reset_cache()  # which remembers whether it is used
    try:
        yield
    finally:
        jax.config.update(name, before)
        compilation_cache.reset_cache()

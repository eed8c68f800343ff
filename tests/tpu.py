"""Meshes over TPU topologies that need no TPU: `libtpu` compiles for them ahead of time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from jaxrl_post.mesh import AXES, make_mesh

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1", "v4": "v4:2x2x1"}


@functools.cache
def topology(name: str):
    """The devices of a topology such as `v5e:2x4`, described, not present."""
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Programs for a TPU that is not there can be written to the compilation cache, but not read back."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


@contextlib.contextmanager
def one_chip(chip: str) -> Iterator[Mesh]:
    """Trace and compile for one device of a chip of `CHIPS`."""
    devices = np.asarray(topology(CHIPS[chip])[:1]).reshape((1,) * len(AXES))
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    with _uncached(), jax.set_mesh(mesh):
        yield mesh


@contextlib.contextmanager
def pod(name: str, **sizes: int) -> Iterator[Mesh]:
    """Trace and compile for a mesh over the devices of a topology."""
    mesh = make_mesh(**sizes, devices=topology(name))
    with _uncached(), jax.set_mesh(mesh):
        yield mesh

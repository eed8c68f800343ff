"""Meshes over TPU topologies that need no TPU: `libtpu` compiles for them ahead of time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxrl_post.mesh import AXES, make_mesh
from jaxrl_post.planning.compiler import devices, uncached

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1", "v4": "v4:2x2x1"}


@contextlib.contextmanager
def one_chip(chip: str) -> Iterator[Mesh]:
    """Trace and compile for one device of a chip of `CHIPS`."""
    grid = np.asarray(devices(CHIPS[chip])[:1]).reshape((1,) * len(AXES))
    mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    with uncached(), jax.set_mesh(mesh):
        yield mesh


@contextlib.contextmanager
def pod(name: str, **sizes: int) -> Iterator[Mesh]:
    """Trace and compile for a mesh over the devices of a topology."""
    mesh = make_mesh(**sizes, devices=devices(name))
    with uncached(), jax.set_mesh(mesh):
        yield mesh

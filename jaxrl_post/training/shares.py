"""Which problems of a batch this process feeds to its devices, and which of them it reads back and scores.

A batch is split over the mesh by prompts. A process feeds those whose rows its devices hold; where several processes
hold the same rows (they split the model), each scores a part, so that no completion is scored twice.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from numpy.typing import NDArray

from jaxrl_post import mesh as mesh_lib
from jaxrl_post.types import PyTree


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of a batch of `P` problems that falls to this process.

    Attributes:
        prompts: `P`.
        held: int `[H]`, the problems whose rows are on this process's devices, in order.
        own: int `[O]`, those of them that this process scores; every problem is some process's own, and of one only.
        mesh: where the batch lies.
    """

    prompts: int
    held: NDArray[np.int64]
    own: NDArray[np.int64]
    mesh: Mesh

    def place(self, local: PyTree) -> PyTree:
        """Arrays over all problems, each process giving the rows that it holds.

        Args:
            local: host arrays `[H * k, ...]`: `k` rows for each problem held, in order.

        Returns:
            Arrays `[P * k, ...]` on the mesh.
        """
        return jax.tree.map(self._place, local)

    def _place(self, local: Any) -> jax.Array:
        local = np.asarray(local)
        each = local.shape[0] // len(self.held)
        shape = (self.prompts * each, *local.shape[1:])

        def rows(index: Any) -> NDArray:
            first, last, _ = index[0].indices(shape[0])
            start = int(np.searchsorted(self.held, first // each)) * each
            return local[start : start + last - first]

        return jax.make_array_from_callback(shape, self.layout(local.ndim), rows)

    def layout(self, ndim: int) -> NamedSharding:
        """How an array of `P * k` rows lies: all rows of a problem together."""
        names = ("batch", *(None,) * (ndim - 1))
        # The split is that of the problems, so that no problem's rows are on two processes' devices in parts.
        shape = (self.prompts, *(1,) * (ndim - 1))
        return NamedSharding(self.mesh, mesh_lib.spec(names, shape, dict(self.mesh.shape)))

    def read(self, x: jax.Array) -> NDArray:
        """The rows `[O * k, ...]` of the problems that are this process's own; no others come to the host.

        Args:
            x: `[P * k, ...]` on the mesh.
        """
        each = x.shape[0] // self.prompts
        wanted = (self.own[:, None] * each + np.arange(each)).reshape(-1)
        if x.is_fully_addressable:
            return np.asarray(x)[wanted] if len(self.own) < self.prompts else np.asarray(x)
        result = np.empty((len(wanted), *x.shape[1:]), x.dtype)
        for shard in jax.device_put(x, self.layout(x.ndim)).addressable_shards:
            first, last, _ = shard.index[0].indices(x.shape[0])
            here = (wanted >= first) & (wanted < last)
            if here.any():
                low, high = wanted[here][0] - first, wanted[here][-1] + 1 - first
                result[here] = np.asarray(shard.data[low:high])[wanted[here] - first - low]
        return result


@functools.lru_cache(maxsize=64)
def make_share(prompts: int, mesh: Mesh) -> Share:
    """The part of a batch of `prompts` problems on `mesh` that falls to this process.

    Example:
        >>> make_share(3, mesh_lib.make_mesh()).own.tolist()
        [0, 1, 2]
    """
    layout = NamedSharding(mesh, mesh_lib.spec(("batch",), (prompts,), dict(mesh.shape)))
    holders: dict[tuple[int, int], set[int]] = {}
    for device, (rows,) in layout.devices_indices_map((prompts,)).items():
        first, last, _ = rows.indices(prompts)
        holders.setdefault((first, last), set()).add(device.process_index)
    return split(prompts, holders, mesh, jax.process_index())


def split(prompts: int, holders: dict[tuple[int, int], set[int]], mesh: Mesh, process: int) -> Share:
    """The share of one process.

    Args:
        prompts: number of problems.
        holders: the processes that hold each block of problems, `(first, last + 1)`.
        mesh: where the batch lies.
        process: number of the process.

    Example:
        >>> blocks = {(0, 4): {0, 1}, (4, 8): {2, 3}}
        >>> [split(8, blocks, mesh_lib.make_mesh(), process).own.tolist() for process in range(4)]
        [[0, 1], [2, 3], [4, 5], [6, 7]]
    """
    held, own = [], []
    for (first, last), processes in sorted(holders.items()):
        if process in processes:
            block = np.arange(first, last)
            held.append(block)
            own.append(np.array_split(block, len(processes))[sorted(processes).index(process)])
    nothing = np.zeros(0, np.int64)
    return Share(prompts, np.concatenate([nothing, *held]), np.concatenate([nothing, *own]), mesh)

"""One mesh and one table: which mesh axes each logical axis of an array is spread over.

Arrays name their axes by meaning ("batch", "vocab", "mlp", ...); `RULES` says where each goes. A different sharding is
a changed row, not a changed model. Nothing here moves data except `place`.

To all that are no experts, the axis `expert` is what `fsdp` is: it splits the batch and the parameters. Otherwise
attention would do the same work on all devices along it. The axis `sequence` splits the parameters too, and of the
tokens their positions: of a long row each device has a part, and what attention needs of the others is gathered. Where
there are no positions to split, as in decoding, or where it does not divide their number, it splits the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrl_post.types import PyTree, Rollouts

AXES = ("data", "fsdp", "tensor", "sequence", "expert")

LogicalAxes: TypeAlias = tuple[str | None, ...]
Rules: TypeAlias = Mapping[str, str | tuple[str, ...] | None]

RULES: Rules = {
    # parameters
    "vocab": "tensor",
    "embed": ("fsdp", "expert", "sequence"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "experts": "expert",
    "layers": None,
    # activations and rollouts
    "batch": ("data", "fsdp", "expert", "sequence"),
    "length": "sequence",  # before "batch"
    "act_embed": None,
    "act_heads": "tensor",
    "act_mlp": "tensor",
    "act_vocab": "tensor",
    # key-value cache
    "cache_length": None,
}


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    expert: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """The mesh with axes `AXES`; an axis of size 1 costs nothing.

    Args:
        data: replicas that each hold a part of the batch and all of the parameters.
        fsdp: ways the parameters, the optimiser state and the batch are split.
        tensor: ways heads, hidden units and the vocabulary are split.
        sequence: ways the positions of a row are split, and the parameters as over `fsdp`.
        expert: ways experts are split; all other parameters and the batch are split over it as over `fsdp`.
        devices: devices to use, `jax.devices()` by default; the first `data * fsdp * ...` of them are taken.

    Returns:
        A `jax.sharding.Mesh` with automatic (compiler-propagated) axes.

    Raises:
        ValueError: if there are fewer devices than the product of the sizes, or a size is below 1.

    Example:
        >>> make_mesh().shape["fsdp"]
        1
    """
    sizes = (data, fsdp, tensor, sequence, expert)
    if min(sizes) < 1:
        raise ValueError(f"mesh sizes must be at least 1, got {dict(zip(AXES, sizes, strict=True))}")
    devices = jax.devices() if devices is None else devices
    needed = math.prod(sizes)
    if needed > len(devices):
        raise ValueError(
            f"the mesh {dict(zip(AXES, sizes, strict=True))} needs {needed} devices but {len(devices)} are available; "
            "make an axis smaller"
        )
    grid = np.asarray(devices[:needed]).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(
    axes: LogicalAxes | None, shape: Sequence[int], mesh_shape: Mapping[str, int], rules: Rules = RULES
) -> PartitionSpec:
    """The `PartitionSpec` of an array with logical `axes`.

    A mesh axis is used once, by the first logical axis that asks for it, and only where it divides the dimension: a
    vocabulary of 39 is not split in two but kept whole. "length" asks before all others: rows are split over `sequence`
    only where positions are not.

    Args:
        axes: logical name of each dimension, None for "not split"; None altogether replicates the array.
        shape: the array's shape.
        mesh_shape: size of each mesh axis.
        rules: logical name to mesh axis or axes.

    Raises:
        ValueError: for a logical name that `rules` does not hold, or as many names as the array has not dimensions.

    Example:
        >>> tuple(spec(("vocab", "embed"), (64, 16), {"tensor": 2, "fsdp": 4}))
        ('tensor', 'fsdp')
        >>> tuple(spec(("vocab", "embed"), (39, 16), {"tensor": 2, "fsdp": 4}))
        (None, 'fsdp')
        >>> tuple(spec(("batch", "length"), (4, 6), {"fsdp": 2, "sequence": 2}))
        ('fsdp', 'sequence')
        >>> tuple(spec(("batch", "length"), (4, 1), {"fsdp": 2, "sequence": 2}))
        (('fsdp', 'sequence'), None)
    """
    if axes is None:
        return PartitionSpec()
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} logical axes {axes} were given for an array of shape {tuple(shape)}")
    used: set[str] = set()
    entries: list[str | tuple[str, ...] | None] = [None] * len(axes)
    for place in sorted(range(len(axes)), key=lambda place: axes[place] != "length"):
        name, size = axes[place], shape[place]
        if name is not None and name not in rules:
            raise ValueError(f"unknown logical axis {name!r}; the table holds {sorted(rules)}")
        wanted = rules[name] if name is not None else None
        wanted = (wanted,) if isinstance(wanted, str) else (wanted or ())
        taken: list[str] = []
        for axis in wanted:
            ways = mesh_shape.get(axis, 1)
            split = math.prod(mesh_shape[a] for a in taken)
            if ways > 1 and axis not in used and size % (ways * split) == 0:
                taken.append(axis)
        used.update(taken)
        entries[place] = None if not taken else taken[0] if len(taken) == 1 else tuple(taken)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, axes: LogicalAxes, rules: Rules = RULES) -> jax.Array:
    """Tell the compiler how `x` lies on the ambient mesh (`jax.set_mesh`); without one, `x` itself.

    Mesh axes that the caller handles himself (explicit ones, and manual ones inside `shard_map`) are left alone.

    Args:
        x: the array.
        axes: logical name of each dimension, None for "not split".
        rules: logical name to mesh axis or axes.

    Returns:
        `x`, constrained.

    Raises:
        ValueError: as `spec`, with and without a mesh.

    Example:
        >>> import jax.numpy as jnp
        >>> constrain(jnp.ones((2, 3)), ("batch", None)).shape
        (2, 3)
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = () if mesh.empty else zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    sizes = {name: size for name, size, kind in kinds if kind == AxisType.Auto}
    wanted = spec(axes, x.shape, sizes, rules)
    return x if math.prod(sizes.values()) == 1 else jax.lax.with_sharding_constraint(x, wanted)


def spread(axes: LogicalAxes, shape: Sequence[int], rules: Rules = RULES) -> tuple[tuple[str, ...], ...]:
    """The axes of the ambient mesh that each dimension lies over, for what is to run per device (`jax.shard_map`).

    Args:
        axes: logical name of each dimension, None for "not split".
        shape: the array's shape.
        rules: logical name to mesh axis or axes.

    Returns:
        A tuple of mesh axes for each dimension. All are empty without a mesh, and where the caller handles axes of the
        mesh himself.

    Raises:
        ValueError: as `spec`.

    Example:
        >>> spread(("batch", None), (4, 2))
        ((), ())
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes: dict[str, int] = {}
    if not mesh.empty and all(kind == AxisType.Auto for kind in mesh.axis_types):
        sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    entries = spec(axes, shape, sizes, rules)
    return tuple(() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in entries)


def _names_an_array(node: Any) -> bool:
    return node is None or (isinstance(node, tuple) and all(name is None or isinstance(name, str) for name in node))


def shardings(tree: PyTree, axes: PyTree | None, mesh: Mesh, rules: Rules = RULES) -> PyTree:
    """The `NamedSharding` of every leaf of `tree`.

    Args:
        tree: arrays or `jax.ShapeDtypeStruct`s.
        axes: the same structure with a tuple of logical names (or None) for each leaf; None replicates everything.
        mesh: from `make_mesh`.
        rules: logical name to mesh axis or axes.
    """
    if axes is None:
        return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)

    def lie(names: LogicalAxes | None, leaf: PyTree) -> PyTree:
        # What stands in an array's place may be several of its rank, as a quantized weight is.
        return jax.tree.map(lambda x: NamedSharding(mesh, spec(names, x.shape, dict(mesh.shape), rules)), leaf)

    return jax.tree.map(lie, axes, tree, is_leaf=_names_an_array)


def rollout_shardings(rollouts: Rollouts, mesh: Mesh) -> Rollouts:
    """Shardings of `Rollouts`: leading axes over those of "batch", those of positions over that of "length".

    Args:
        rollouts: arrays or `jax.ShapeDtypeStruct`s; those of shape `[B, T, ...]` have positions.
        mesh: from `make_mesh`.
    """
    places = jax.tree.leaves(rollouts.tokens)[0].shape[:2]

    def leaf(x: Any) -> NamedSharding:
        names: LogicalAxes = ("batch", "length") if x.shape[:2] == places else ("batch",)[: x.ndim]
        return NamedSharding(mesh, spec(names + (None,) * (x.ndim - len(names)), x.shape, dict(mesh.shape)))

    return jax.tree.map(leaf, rollouts)


def place(tree: PyTree, sharding: PyTree) -> PyTree:
    """Put arrays onto the mesh: host arrays that every process holds whole, and those that lie on it in another way."""

    def put(x: Any, s: NamedSharding) -> jax.Array:
        if jax.process_count() == 1 or not getattr(x, "is_fully_addressable", True):
            return jax.device_put(x, s)
        if jnp.issubdtype(getattr(x, "dtype", np.float32), jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(x), s), impl=jax.random.key_impl(x))
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, s, lambda index: host[index])

    return jax.tree.map(put, tree, sharding)

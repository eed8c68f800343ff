"""Rows as one long list of tokens, and back, and the place before each: each device with the tokens that it has.

The same by `reshape` and `roll` would move them where a mesh splits the places of a row: the tokens of a device then do
not stand next to each other in the list, and the compiler gathers whole rows to shift them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxrl_post.mesh import spread
from jaxrl_post.types import Array


def length_parts(batch: int, length: int) -> int:
    """Into how many parts the ambient mesh splits the places of rows `[B, T]`.

    Example:
        >>> length_parts(4, 6)
        1
    """
    axes = spread(("batch", "length"), (batch, length))[1]
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in axes)


def flatten(x: Array, places: int = 2) -> Array:
    """The numbers of `N` tokens in one list: a device's own tokens after each other.

    Args:
        x: `[B, T, ...]`, or `[B, n, T / n, ...]` with places in as many parts as the mesh has for them.
        places: how many leading axes say where a token stands: 2 or 3.

    Returns:
        `[N, ...]`; without a mesh that splits `T`, what `reshape` gives.

    Example:
        >>> flatten(jnp.array([[1, 2], [3, 4]])).tolist()
        [1, 2, 3, 4]
    """
    rows, length = spread(("batch", "length"), x.shape[:2])
    if not length:
        return x.reshape(-1, *x.shape[places:])
    return jax.shard_map(
        lambda x: x.reshape(-1, *x.shape[places:]),
        in_specs=PartitionSpec(rows or None, length),
        out_specs=PartitionSpec(_in_mesh_order(rows + length)),
    )(x)


def unflatten(x: Array, shape: Sequence[int]) -> Array:
    """The inverse of `flatten`.

    Args:
        x: `[N]`, a number for each token.
        shape: `[B, T]` or `[B, n, T / n]`.

    Example:
        >>> unflatten(jnp.array([1, 2, 3, 4]), (2, 2)).tolist()
        [[1, 2], [3, 4]]
    """
    rows, length = spread(("batch", "length"), tuple(shape[:2]))
    if not length:
        return x.reshape(*shape)
    sizes = jax.sharding.get_abstract_mesh().shape
    own = (shape[0] // math.prod(sizes[name] for name in rows), shape[1] // math.prod(sizes[name] for name in length))
    return jax.shard_map(
        lambda x: x.reshape(*own, *shape[2:]),
        in_specs=PartitionSpec(_in_mesh_order(rows + length)),
        out_specs=PartitionSpec(rows or None, length),
    )(x)


def rolled(x: Array) -> Array:
    """What stands one place before, and at the first place what stands last.

    Args:
        x: `[B, T, ...]`.

    Example:
        >>> rolled(jnp.array([[1, 2, 3]])).tolist()
        [[3, 1, 2]]
    """
    rows, length = spread(("batch", "length"), x.shape[:2])

    def local(x: Array) -> Array:
        border = x[:, -1:]
        if length:
            count = jax.lax.axis_size(length)
            border = jax.lax.ppermute(border, length, [(i, (i + 1) % count) for i in range(count)])
        return jnp.concatenate([border, x[:, :-1]], axis=1)

    spec = PartitionSpec(rows or None, length)
    return jax.shard_map(local, in_specs=spec, out_specs=spec)(x) if length else local(x)


def _in_mesh_order(axes: tuple[str, ...]) -> tuple[str, ...]:
    """As `kernels.token_logprob` splits its tokens."""
    return tuple(name for name in jax.sharding.get_abstract_mesh().axis_names if name in axes)

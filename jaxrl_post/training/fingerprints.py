"""Names and fingerprints of a state's arrays: what a checkpoint is checked by when it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post.training import distributed
from jaxrl_post.types import Array, PyTree


def named(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their path.

    Example:
        >>> named({"params": {"w": 1}, "steps": (2, 3)})
        {'params/w': 1, 'steps/0': 2, 'steps/1': 3}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def shapes(tree: PyTree) -> dict[str, str]:
    """Shape and dtype of every array by its path, as text.

    Example:
        >>> shapes({"w": jnp.zeros((2, 3)), "n": ()})
        {'w': 'float32[2, 3]'}
    """
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in named(tree).items()}


@jax.jit
def fingerprint(tree: PyTree) -> Array:
    """One number per leaf that changes with any of its bits; the same for every sharding.

    A sum modulo 2**32 of the elements' bits, each multiplied by an odd number that depends on its place.

    Example:
        >>> a, b = fingerprint({"x": jnp.arange(3.0)}), fingerprint({"x": jnp.array([0.0, 2.0, 1.0])})
        >>> bool(a[0] == b[0])
        False
    """

    def one(x: Array) -> Array:
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        width = np.dtype(x.dtype).itemsize
        bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[width])
        place = jnp.zeros(bits.shape, jnp.uint32)
        for axis, size in enumerate(bits.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        return jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1) * jnp.uint32(0x9E3779B1), dtype=jnp.uint32)

    return jnp.stack([one(leaf) for leaf in jax.tree.leaves(tree)])


def fingerprints(leaves: Mapping[str, Array]) -> dict[str, int]:
    """The `fingerprint` of each array by its name."""
    return dict(zip(leaves, distributed.to_host(fingerprint(list(leaves.values()))).tolist(), strict=True))


def content(leaves: Mapping[str, Array], prints: Mapping[str, int]) -> str:
    """A name for arrays that tells them from all others."""
    text = json.dumps([[name, str(x.dtype), list(x.shape), prints[name]] for name, x in sorted(leaves.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""Tokens go to the vocabulary, a chunk at a time, where bringing the vocabulary to the tokens would be large.

For what needs all logits of a token at once, and so cannot go through the vocabulary a piece after the other. Of an
unembedding that is split over `fsdp` each device has some columns of its rows. Devices trade them for all columns of
fewer rows, which sends one part in `fsdp` of what gathering does, and keep the gradient of those rows alone; then each
looks at the tokens of all of them. Where a device's rows cannot be divided so, its unembedding is whole.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post.kernels.token_logprob import core
from jaxrl_post.kernels.token_logprob.core import Layout
from jaxrl_post.kernels.token_logprob.token_chunks import shards
from jaxrl_post.types import Array, PyTree


def layouts(vocab_size: int, *widths: int) -> tuple[Layout, ...]:
    """How the ambient mesh splits the work of heads over one vocabulary; `width` is what columns are traded over."""
    found = tuple(core.layout(vocab_size, width) for width in widths)
    rows, axes = vocab_size // shards(found[0].vocab), found[0].width
    if rows % shards(axes) or any(at.width != axes for at in found):
        return tuple(at._replace(width=()) for at in found)
    return found


def vocabulary(at: Layout) -> tuple[str, ...]:
    """The mesh axes that the rows of `rows_of` are split over."""
    return at.vocab + at.width


def rows_of(at: Layout, unembedding: Array) -> tuple[Array, Array | int]:
    """A device's columns `[V / vocab shards, D / width shards]` to rows, and the place of the first of them."""
    first = jax.lax.axis_index(at.vocab) * unembedding.shape[0] if at.vocab else 0
    if not at.width:
        return unembedding, first
    rows = jax.lax.all_to_all(unembedding, at.width, split_axis=0, concat_axis=1, tiled=True)
    return rows, first + jax.lax.axis_index(at.width) * rows.shape[0]


def d_unembedding(at: Layout, rows: Array, dtype: jnp.dtype) -> Array:
    """Devices' shares of the gradient of `rows_of` to that of their columns."""
    rows = _over_others(at, rows).astype(dtype)
    return jax.lax.all_to_all(rows, at.width, split_axis=1, concat_axis=0, tiled=True) if at.width else rows


def d_bias(at: Layout, rows: Array, dtype: jnp.dtype) -> Array:
    """Devices' shares of the gradient of a bias, of the rows of `rows_of`, to that of all that share the columns."""
    return gather(at, _over_others(at, rows).astype(dtype))


def _over_others(at: Layout, x: Array) -> Array:
    return add(x, tuple(name for name in at.rows if name not in at.width))


def add(x: Array, axes: tuple[str, ...]) -> Array:
    """The sum over devices along mesh axes."""
    return jax.lax.psum(x, axes) if axes else x


def gather(at: Layout, parts: PyTree) -> PyTree:
    """Arrays `[n, ...]` of the devices that have traded columns, one after the other."""
    if not at.width:
        return parts
    return jax.tree.map(lambda x: jax.lax.all_gather(x, at.width, axis=0, tiled=True), parts)


def own(at: Layout, whole: PyTree) -> PyTree:
    """A device's part of arrays that `gather` would give."""
    if not at.width:
        return whole

    def cut(x: Array) -> Array:
        size = x.shape[0] // shards(at.width)
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(at.width) * size, size)

    return jax.tree.map(cut, whole)


def add_own(at: Layout, shares: Array) -> Array:
    """The sum over the vocabulary of `[tokens, D]`, of a device's own tokens."""
    if at.width:
        parts = shares.reshape(shards(at.width), -1, shares.shape[1])
        shares = jax.lax.psum_scatter(parts, at.width, scatter_dimension=0)
    return add(shares, at.vocab)

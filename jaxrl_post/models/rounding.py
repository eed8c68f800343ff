"""Parameters that are rounded where they are multiplied with, a layer at a time, and never all at once.

Which of a model's parameters are rounded, and to what, is for the model to say (`Policy.cast`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from jaxrl_post.types import Array, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
    """A weight that is read in another dtype, and an array that gets its gradient and is never read.

    A gradient of the weight itself would be as wide as the weight, and a scan over layers would stack it so.

    Attributes:
        weight: as it is stored; no gradient goes to it.
        stand_in: of the same shape. It gets the gradient, in its own dtype.
        dtype: what the weight is rounded to.
    """

    weight: Array
    stand_in: Array
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.weight.shape

    @property
    def ndim(self) -> int:
        """Of the weight."""
        return self.weight.ndim

    def __getitem__(self, index: Any) -> Rounded:
        """Itself for `[...]`, by which modules read their parameters."""
        if index is not Ellipsis:
            raise TypeError("a weight that is still to be rounded has no parts; round it with astype first")
        return self

    def astype(self, dtype: Any) -> Array:
        """The rounded weight."""
        return _rounded(self.dtype, self.weight, self.stand_in).astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _rounded(dtype: Any, weight: Array, stand_in: Array) -> Array:
    del stand_in
    if math.prod(jax.sharding.get_abstract_mesh().axis_sizes) == 1:
        # In the order it is stored in, or XLA may lay out the weights of all layers anew, for the product with one of
        # them. On a mesh it gathers a layer's weights, and lays out these.
        weight = with_layout_constraint(weight, Layout(tuple(range(weight.ndim))))
    kept, given = jnp.finfo(dtype), jnp.finfo(weight.dtype)
    if kept.nexp == given.nexp:
        # The same numbers as without, but XLA would round what a scan slices before it slices it: all layers at once.
        # A barrier does not keep it from that.
        weight = jax.lax.reduce_precision(weight, kept.nexp, kept.nmant)
    return jax.lax.optimization_barrier(weight.astype(dtype))


@_rounded.defjvp
def _(dtype: Any, primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return _rounded(dtype, *primals), tangents[1].astype(dtype)


def round_late(params: Params, cast: Params) -> Params:
    """Parameters with `Rounded` in the place of arrays that `cast` has in another dtype.

    Args:
        params: as stored; parts may be None.
        cast: what `Policy.cast` made of them.

    Example:
        >>> weight = jnp.array([1.0, 0.3])
        >>> def doubled(narrow):
        ...     return 2 * round_late({"w": weight}, {"w": narrow})["w"].astype(jnp.bfloat16)
        >>> narrow = weight.astype(jnp.bfloat16)
        >>> bool(jnp.all(doubled(0 * narrow) == 2 * narrow))  # what is read is the weight
        True
        >>> jax.grad(lambda narrow: doubled(narrow).sum())(narrow).tolist()
        [2.0, 2.0]
    """

    def pair(weight: Array, rounded: Array) -> Any:
        return rounded if weight.dtype == rounded.dtype else Rounded(weight, rounded, rounded.dtype)

    return jax.tree.map(pair, params, cast)


def accumulated(params: Params) -> Params:
    """The same parameters, for a function that is run several times: the sum of their gradients is float32 or wider.

    It is rounded when all are added, so that it is as exact as that of one run.

    Example:
        >>> weight = jnp.ones((), jnp.bfloat16)
        >>> jax.grad(lambda w: sum((x * accumulated({"w": w})["w"].astype(w.dtype)) for x in (256, 1, 1)))(weight)
        Array(258, dtype=bfloat16)
    """

    def wide(x: Any) -> Any:
        if isinstance(x, Rounded):
            return dataclasses.replace(x, stand_in=wide_of(x.stand_in))
        if not jnp.issubdtype(x.dtype, jnp.floating) or wide_of(x).dtype == x.dtype:
            return x
        return Rounded(jax.lax.stop_gradient(x), wide_of(x), x.dtype)

    def wide_of(x: Array) -> Array:
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    return jax.tree.map(wide, params, is_leaf=lambda x: isinstance(x, Rounded))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TwoUses:
    """A table that tokens are looked up in, and the same table rounded, which the last states are multiplied with.

    Attributes:
        table: as it is stored.
        rounded: in the dtype of products.
    """

    table: Array
    rounded: Array

    def __getitem__(self, index: Any) -> TwoUses:
        """Itself for `[...]`, by which modules read their parameters."""
        if index is not Ellipsis:
            raise TypeError("a table with two uses has no parts; take its table, or round it with astype")
        return self

    def astype(self, dtype: Any) -> Array:
        """The rounded table."""
        return self.rounded.astype(dtype)


def two_uses(table: Array, dtype: Any) -> TwoUses:
    """A table for both of its uses, of which the gradients are added up when both are there.

    That of the product comes before the backward pass of all layers: so long it stays in the dtype of products.

    Args:
        table: `[V, D]`.
        dtype: of products.

    Example:
        >>> def loss(table):
        ...     both = two_uses(table, jnp.bfloat16)
        ...     return 2 * both.table[0] + 3 * both.astype(jnp.bfloat16)[1]
        >>> jax.grad(loss)(jnp.ones(2)).tolist()
        [2.0, 3.0]
    """
    both: Any = _both(jnp.dtype(dtype), table)
    return TwoUses(*both)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _both(dtype: Any, table: Array) -> tuple[Array, Array]:
    return table, table.astype(dtype)


def _add_late(dtype: Any, _: None, cotangents: tuple[Array, Array]) -> tuple[Array]:
    del dtype
    # Without a barrier XLA may widen the second at once.
    first, second = jax.lax.optimization_barrier(cotangents)
    return (first + second.astype(first.dtype),)


_both.defvjp(lambda dtype, table: (_both(dtype, table), None), _add_late)

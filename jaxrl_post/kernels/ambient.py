"""What the caller's mesh asks of a function of tokens: axes typed by the caller, and a caller who is per device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType

from jaxrl_post.types import Array, PyTree


def vary_alike(tree: PyTree) -> PyTree:
    """The arrays, each typed as varying over every mesh axis that one of them varies over.

    Inside a caller's own `jax.shard_map` a loop must be given what it returns, and a rule of differentiation must
    return what it was given. What is made to vary here has the gradients of all devices added up going back.
    """

    def varies_over(x: Any) -> frozenset[str]:
        return jax.typeof(x).manual_axis_type.varying

    over: frozenset[str] = frozenset().union(*map(varies_over, jax.tree.leaves(tree)))

    def vary(x: Any) -> Any:
        missing = tuple(sorted(over - varies_over(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree) if over else tree


def without_typed_shardings(function: Callable, *shardings_like: Array) -> Callable:
    """The function with axes of type `Explicit` (as `jax.make_mesh` has them) left to the compiler within it.

    Args:
        function: of arrays only.
        shardings_like: for each member of the tuple that `function` returns, an array whose sharding it gets; for the
            result itself if there is but one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        return function
    shardings: Any = tuple(jax.typeof(x).sharding.spec for x in shardings_like)
    return jax.sharding.auto_axes(function, out_sharding=shardings if len(shardings) > 1 else shardings[0])

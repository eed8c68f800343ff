"""Which tokens are worth computing, and how their numbers find their places again."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxrl_post.kernels.token_logprob.core import Layout
from jaxrl_post.types import Array, PyTree


def check_mask(num_tokens: int, mask: Array | None, max_tokens: int | None) -> None:
    """Raise a ValueError for a mask of another shape, or `max_tokens` without a mask or below 1."""
    if mask is not None and mask.shape != (num_tokens,):
        raise ValueError(f"mask must be [N] = [{num_tokens}], got shape {mask.shape}")
    if max_tokens is not None and mask is None:
        raise ValueError("max_tokens bounds the unmasked tokens and needs a mask")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}; an empty mask needs no smaller bound")


class Selection:
    """All tokens or, of a mask with a bound, the unmasked ones moved together; filled up to what a mesh can split.

    On a mesh every device moves its own tokens, so that none crosses to another, and has room for `max_tokens` of them:
    what fits on one device fits on any mesh.
    """

    def __init__(self, num_tokens: int, mask: Array | None, max_tokens: int | None, at: Layout) -> None:
        self.masked = mask is not None
        self.mask = jnp.ones((num_tokens,), bool) if mask is None else jnp.asarray(mask) != 0
        # Tokens that do not divide among the devices are not split before the work, and move as a whole.
        self.rows = at.rows if num_tokens % at.row_shards == 0 else ()
        shards = at.row_shards if self.rows else 1
        self.room = max_tokens if max_tokens is not None and max_tokens < num_tokens // shards else None
        self.count = num_tokens if self.room is None else self.room * shards
        self.padding = -self.count % at.row_shards

    def _on_each_device(self, function: Callable) -> Callable:  # every argument and result is per token
        if not self.rows:
            return function
        spec = PartitionSpec(self.rows)
        return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)

    def zero_masked(self, x: Array) -> Array:
        """`[N, D]` with zeros where masked: a zero cotangent alone would not do, as 0 * NaN is NaN in a product."""
        return jnp.where(self.mask[:, None], x, jnp.zeros((), x.dtype)) if self.masked else x

    def take(self, tokens: PyTree) -> PyTree:
        """Arrays `[N, ...]` to the tokens that are computed."""

        def local(mask: Array, tokens: PyTree) -> PyTree:
            first = jnp.argsort(~mask, stable=True)[: self.room]
            return jax.tree.map(lambda x: x[first], tokens)

        tokens = jax.tree.map(jnp.asarray, tokens)
        if self.room is not None:
            tokens = self._on_each_device(local)(self.mask, tokens)
        return jax.tree.map(lambda x: jnp.pad(x, ((0, self.padding), *((0, 0),) * (x.ndim - 1))), tokens)

    def put_back(self, field: Array) -> Array:
        """The computed tokens' numbers at their places: 0 where masked, NaN (integers: -1) where there was no room."""
        field = field[: self.count]
        if not self.masked:
            return field
        lost = jnp.nan if jnp.issubdtype(field.dtype, jnp.floating) else -1

        def local(mask: Array, field: Array) -> Array:
            if self.room is not None:
                first = jnp.argsort(~mask, stable=True)[: self.room]
                field = jnp.full(mask.shape, lost, field.dtype).at[first].set(field)
            return jnp.where(mask, field, jnp.zeros((), field.dtype))

        return self._on_each_device(local)(self.mask, field)

"""What is remembered of each prompt between steps: best lengths, pass rates, counts. Bounded, and part of a state."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_post.types import Array, PyTree

Combine = Literal["last", "min", "max", "sum"]


class PromptMemory(NamedTuple):
    """A table by prompt.

    A prompt has the slot `prompt_id mod C`. With `C` at least the size of the data set nothing is ever forgotten; with
    fewer, a prompt forgets what was in its slot.

    Attributes:
        prompt_id: `[C]` int32, whose slot it is; -1 for nobody's.
        values: pytree of `[C, ...]`, what is remembered.
    """

    prompt_id: Array
    values: PyTree


def init_memory(capacity: int, like: PyTree) -> PromptMemory:
    """An empty memory.

    Args:
        capacity: `C`, number of prompts that it can hold.
        like: pytree of scalars or arrays of what is remembered of one prompt: shapes and dtypes.

    Returns:
        A `PromptMemory`.

    Raises:
        ValueError: if `capacity` is below 1.

    Example:
        >>> init_memory(3, {"shortest": 0.0}).prompt_id.tolist()
        [-1, -1, -1]
    """
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1 prompt, got {capacity}; give the size of the data set")
    values = jax.tree.map(lambda x: jnp.zeros((capacity, *jnp.shape(x)), jnp.asarray(x).dtype), like)
    return PromptMemory(jnp.full(capacity, -1, jnp.int32), values)


def recall(memory: PromptMemory, prompt_id: Array, default: PyTree) -> tuple[PyTree, Array]:
    """What is remembered of some prompts.

    Args:
        memory: the memory.
        prompt_id: `[P]` int32; negative ones are never known.
        default: for a prompt that is not known: a pytree of `memory.values`' structure, scalars or `[P, ...]`.

    Returns:
        values: pytree of `[P, ...]`.
        known: `[P]` bool.

    Example:
        >>> memory = remember(init_memory(4, 0.0), jnp.array([7, 2]), jnp.array([30.0, 50.0]))
        >>> values, known = recall(memory, jnp.array([2, 3, 7]), jnp.inf)
        >>> values.tolist(), known.tolist()
        ([50.0, inf, 30.0], [True, False, True])
    """
    prompt_id = jnp.asarray(prompt_id)
    slot = _slot(memory, prompt_id)
    known = (memory.prompt_id[slot] == prompt_id) & (prompt_id >= 0)

    def read(table: Array, otherwise: Any) -> Array:
        found = table[slot]
        return jnp.where(known.reshape(-1, *(1,) * (found.ndim - 1)), found, jnp.asarray(otherwise).astype(found.dtype))

    return jax.tree.map(read, memory.values, default), known


def remember(
    memory: PromptMemory,
    prompt_id: Array,
    values: PyTree,
    keep: Array | None = None,
    *,
    combine: Combine = "last",
) -> PromptMemory:
    """A memory that also holds what was seen of some prompts.

    The order of the rows does not matter, but with `"last"` where a prompt is there twice. Of two prompts of one batch
    that share a slot, the one with the larger id stays.

    Args:
        memory: the memory.
        prompt_id: `[P]` int32; rows with a negative one are left out.
        values: pytree of `[P, ...]`, as `memory.values`.
        keep: `[P]` bool, False for rows that are left out; None for all.
        combine: how a value is joined with what is known of the same prompt: it replaces it (`"last"`), or the
            smaller, the larger or the sum is kept.

    Returns:
        A new `PromptMemory`.

    Raises:
        ValueError: for an unknown `combine`.

    Example:
        >>> memory = init_memory(2, 0.0)
        >>> for ids, lengths in (([0, 1], [9.0, 8.0]), ([0, 3], [5.0, 6.0]), ([0, 3], [7.0, 4.0])):
        ...     memory = remember(memory, jnp.array(ids), jnp.array(lengths), combine="min")
        >>> memory.prompt_id.tolist(), memory.values.tolist()
        ([0, 3], [5.0, 4.0])
    """
    if combine not in ("last", "min", "max", "sum"):
        raise ValueError(f'combine must be "last", "min", "max" or "sum", got {combine!r}')
    prompt_id = jnp.asarray(prompt_id).astype(jnp.int32)
    capacity = memory.prompt_id.shape[0]
    counts = prompt_id >= 0 if keep is None else (jnp.asarray(keep) != 0) & (prompt_id >= 0)
    slot = jnp.where(counts, _slot(memory, prompt_id), capacity)  # out of range, hence dropped
    owner = jnp.full(capacity, -1, jnp.int32).at[slot].max(prompt_id, mode="drop")
    written = owner >= 0
    renewed = written & (owner != memory.prompt_id)
    mine = counts & (owner[jnp.minimum(slot, capacity - 1)] == prompt_id)
    slot = jnp.where(mine, slot, capacity)
    last = jnp.full(capacity, -1, jnp.int32).at[slot].max(jnp.arange(prompt_id.shape[0], dtype=jnp.int32), mode="drop")

    def write(table: Array, new: Array) -> Array:
        new = jnp.asarray(new).astype(table.dtype)
        wide = (capacity, *(1,) * (table.ndim - 1))
        first = new[jnp.maximum(last, 0)]
        if combine == "last":
            return jnp.where(written.reshape(wide), first, table)
        if combine == "sum":
            return jnp.where(renewed.reshape(wide), 0, table).at[slot].add(new, mode="drop")
        base = jnp.where(renewed.reshape(wide), first, table)
        return base.at[slot].min(new, mode="drop") if combine == "min" else base.at[slot].max(new, mode="drop")

    return PromptMemory(jnp.where(written, owner, memory.prompt_id), jax.tree.map(write, memory.values, values))


def _slot(memory: PromptMemory, prompt_id: Array) -> Array:
    return jnp.maximum(prompt_id, 0) % memory.prompt_id.shape[0]

"""Groups made of smaller ones: those of several prompts for one problem, or columns that were sampled one by one."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxrl_post.types import Array, Rollouts

BUDGET = "budget"
"""`[P, G]` float32 of `Rollouts.extras`: the tokens that the prompt of a member asks it to keep to, 0 for none."""

EXIT = "exit"
"""`[P, G]` int32 of `Rollouts.extras`: tokens of the thought before the answer of a member, see `generate_exits`."""


def merge_groups(rollouts: Rollouts, count: int) -> Rollouts:
    """Every `count` groups that follow each other become one, e.g. those of one problem under several budgets.

    Rows stay where they are; the prompts of a group may then differ.

    Args:
        rollouts: `P * count` groups of `G`. Arrays of `extras` and `rewards` that are `[P * count, G, ...]` go with the
            members; others, e.g. with a row for each sequence, stay.
        count: groups that become one.

    Returns:
        `P` groups of `count * G`; a group has the `prompt_id` of its first part.

    Raises:
        ValueError: if `count` does not divide the number of groups.

    Example:
        >>> from jaxrl_post.data import to_rollouts
        >>> parts = to_rollouts([[2], [2, 3]], [[[4]], [[5]]], length=3, prompt_id=[7, 7])
        >>> merged = merge_groups(parts, 2)
        >>> merged.prompt_id.tolist(), merged.length.tolist()
        ([7], [[2, 3]])
    """
    groups, size = rollouts.reward.shape
    if count < 1 or groups % count:
        raise ValueError(f"count must divide the number of groups {groups}, got {count}")
    shape = (groups // count, count * size)
    whole = ("reward", "valid", "length", "finish", "id")

    def merged(x: Array) -> Array:
        return x.reshape(*shape, *x.shape[2:]) if x.shape[:2] == (groups, size) else x

    return rollouts.replace(
        **{name: getattr(rollouts, name).reshape(shape) for name in whole},
        **{name: jax.tree.map(merged, getattr(rollouts, name)) for name in ("rewards", "extras")},
        prompt_id=rollouts.prompt_id[::count],
    )


def join_columns(parts: Sequence[Rollouts]) -> Rollouts:
    """The members of several groups of the same prompts side by side, each in the order of `parts`.

    Args:
        parts: `[P, G_i]` each, with the same `prompt_id`, the same names of extras and no components of the reward;
            shorter rows are padded at their end. Extras are `[P, G_i, ...]` or `[B_i, T_i, ...]`.

    Returns:
        `[P, sum G_i]`.

    Raises:
        ValueError: if the numbers of prompts or the names of extras differ, or an extra has another shape.

    Example:
        >>> from jaxrl_post.data import to_rollouts
        >>> one = to_rollouts([[2], [3]], [[[4]], [[5]]], length=2)
        >>> two = to_rollouts([[2], [3]], [[[6, 7]], [[8]]], length=3)
        >>> join_columns([one, two]).tokens.tolist()
        [[2, 4, 0], [2, 6, 7], [3, 5, 0], [3, 8, 0]]
    """
    prompts, width = parts[0].num_prompts, max(part.mask.shape[1] for part in parts)
    names = set(parts[0].extras)
    for number, part in enumerate(parts):
        if part.num_prompts != prompts or set(part.extras) != names:
            raise ValueError(
                f"parts must have the same prompts and extras: part 0 has {prompts} prompts and {sorted(names)}, part "
                f"{number} has {part.num_prompts} and {sorted(part.extras)}"
            )

    def side_by_side(arrays: Sequence[Array]) -> Array:
        return jnp.concatenate(arrays, axis=1)

    def rows(arrays: Sequence[Array], fill: int = 0) -> Array:
        rest = arrays[0].shape[2:]
        none = ((0, 0),) * len(rest)
        padded = [jnp.pad(x, ((0, 0), (0, width - x.shape[1]), *none), constant_values=fill) for x in arrays]
        grouped = side_by_side([x.reshape(prompts, -1, width, *rest) for x in padded])
        return grouped.reshape(-1, width, *rest)

    def either(*arrays: Array) -> Array:
        if all(x.shape[:2] == part.reward.shape for x, part in zip(arrays, parts, strict=True)):
            return side_by_side(arrays)
        if all(x.shape[:2] == part.mask.shape for x, part in zip(arrays, parts, strict=True)):
            return rows(arrays)
        raise ValueError(f"extras must be [P, G, ...] or [B, T, ...], got shapes {[x.shape for x in arrays]}")

    fills = {"step": -1, "version": -1}
    by_token = {
        name: rows([getattr(part, name) for part in parts], fills.get(name, 0))
        for name in ("tokens", "mask", "logp", "step", "version")
    }
    by_sequence = {
        name: side_by_side([getattr(part, name) for part in parts])
        for name in ("reward", "valid", "length", "finish", "id")
    }
    extras = jax.tree.map(either, *[part.extras for part in parts])
    return parts[0].replace(**by_token, **by_sequence, rewards={}, extras=extras)

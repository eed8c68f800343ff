"""The rows of a group as one row with its prompt once, and the way back to `[B, T]`.

What runs on such rows, and what is read off them, is in `scoring.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxrl_post.kernels.attention.layout import shared_row
from jaxrl_post.models.flattening import length_parts, rolled
from jaxrl_post.types import Array, Rollouts


class SharedRows(NamedTuple):
    """A row `[prompt | C_1 | ... | C_G]` for each group; prompt and completions are padded to fixed sizes.

    Attributes:
        tokens: `[P, R]`.
        positions: `[P, R]` int32, of the token in its own sequence; -1 at padding.
        chosen: `[P, R]` bool, where the mask of any rollout that the token belongs to is not 0.
        starts: where each completion starts.
        last: `[P]` int32, place of the last shared token.
        place: `[B, T]` int32, where the group's row holds each token of a rollout.
        fits: `[B, T]` bool, whether it holds it.
    """

    tokens: Array
    positions: Array
    chosen: Array
    starts: tuple[int, ...]
    last: Array
    place: Array
    fits: Array

    def before(self, states: Array) -> Array:
        """`[P, R, D]`: for each place the state of the token before it, which for all `C_i` is the prompt's last."""
        end = jnp.take_along_axis(states, self.last[:, None, None], axis=1)
        first = np.isin(np.arange(states.shape[1]), self.starts)
        return jnp.where(first[:, None], end, rolled(states))

    def spread(self, field: Array) -> Array:
        """A field `[P, R]` as `[B, T]`, each token's number on the token; of no meaning where it does not fit."""
        groups = field.shape[0]
        return jnp.take_along_axis(field, self.place.reshape(groups, -1), axis=1).reshape(self.place.shape)


def share_prompts(rollouts: Rollouts, prompt_length: int) -> SharedRows:
    """Lay each group out as one row, with what its rollouts begin with in common once.

    Shared is the longest common beginning of the group's valid rollouts, `prompt_length` tokens of it at most. So
    nothing need be known of where prompts end, and what is read off the row is right for every token that fits.
    Rollouts that are not valid join them as far as that leaves the valid ones room, or where all of a group are not.

    Args:
        rollouts: tokens `[B, T]`.
        prompt_length: room for the prompt; each completion gets the other `T - prompt_length` places.

    Returns:
        The rows. Everything fits where prompts have at most `prompt_length` tokens and completions at most
        `T - prompt_length`. In general a token fits if fewer than `T - prompt_length` tokens stand between the shared
        ones and it, and its rollout begins with the shared ones, as all valid ones do.

    Raises:
        ValueError: unless `0 < prompt_length < T`.

    Example:
        >>> from jaxrl_post import data
        >>> rows = share_prompts(data.to_rollouts([[5, 6]], [[[1], [2, 3]]], length=4), 2)
        >>> rows.tokens.tolist(), rows.positions.tolist(), rows.starts
        ([[5, 6, 1, 0, 2, 3]], [[0, 1, 2, -1, 2, 3]], (2, 4))

    Reference: Prefix Grouper: Efficient GRPO Training through Shared-Prefix Forward, arXiv 2506.05433.
    """
    groups, size = rollouts.reward.shape
    length = rollouts.tokens.shape[1]
    if not 0 < prompt_length < length:
        raise ValueError(
            f"shared_prompt must leave room for completions: between 1 and T - 1 = {length - 1}, got {prompt_length}; "
            "give the longest prompt's length"
        )
    # So that the row is split where rows of `T` would be; 0 is a multiple of whatever that is.
    row, starts = shared_row(prompt_length, length - prompt_length, size, length_parts(groups, 0))
    first, each = starts[0], (row - starts[0]) // size

    times = jnp.arange(length, dtype=jnp.int32)
    inside = times < rollouts.length[..., None]
    tokens = jnp.where(inside, rollouts.tokens.reshape(groups, size, length), 0)
    chosen = inside & (rollouts.mask.reshape(groups, size, length) != 0)
    counts = rollouts.valid.astype(bool)
    counts |= ~jnp.any(counts, axis=1, keepdims=True)
    model = jnp.argmax(counts, axis=1)[:, None, None]  # the rollout that the others are held against
    model_tokens, model_inside = (jnp.take_along_axis(x, model, axis=1) for x in (tokens, inside))
    alike = (tokens == model_tokens) & inside & model_inside
    agree = jnp.cumprod(alike, axis=2).sum(axis=2, dtype=jnp.int32)
    # A rollout that does not count joins the others if what it shares with them is enough for them to fit.
    counts |= agree >= jnp.max(jnp.where(counts, rollouts.length - each, 0), axis=1, keepdims=True)
    shared = jnp.minimum(jnp.min(jnp.where(counts, agree, first), axis=1), first)[:, None, None]
    begins = agree[..., None] >= shared

    def pad(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, max(0, first - length))))[:, :first]

    own = shared + jnp.arange(each, dtype=jnp.int32)
    own = jnp.broadcast_to(own, (groups, size, each))
    real = own < rollouts.length[..., None]

    def join(prompt: Array, completions: Array) -> Array:
        return jnp.concatenate([prompt, completions.reshape(groups, size * each)], axis=1)

    def take(x: Array) -> Array:
        return jnp.take_along_axis(x, jnp.minimum(own, length - 1), axis=2)

    in_prompt = pad(times < shared[:, 0])
    place = jnp.where(times < shared, times, jnp.array(starts, jnp.int32)[:, None] + times - shared)
    return SharedRows(
        tokens=join(jnp.where(in_prompt, pad(model_tokens[:, 0]), 0), jnp.where(real, take(tokens), 0)),
        positions=join(jnp.where(in_prompt, jnp.arange(first, dtype=jnp.int32), -1), jnp.where(real, own, -1)),
        chosen=join(in_prompt & pad(jnp.any(chosen & begins, axis=1)), real & take(chosen)),
        starts=starts,
        last=jnp.maximum(shared[:, 0, 0] - 1, 0),
        place=jnp.minimum(place, row - 1).reshape(groups * size, length),
        fits=(begins & (times - shared < each)).reshape(groups * size, length),
    )

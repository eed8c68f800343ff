"""What ends a sequence: its last token, or the last of several that are a stop sequence or hold a stop string."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_post.sampling import SamplingParams
from jaxrl_post.types import Array


class Said(NamedTuple):
    """What a sequence has said, as far as it may become an end.

    Attributes:
        recent: `[R, m]` int32, its last tokens, -1 where there is none; `m` is 0 without stop sequences.
        state: `[R]` int32, of the stop strings; None without.
    """

    recent: Array
    state: Array | None


def nothing_said(sampling: SamplingParams, rows: int) -> Said:
    """What `rows` sequences have said that have said nothing."""
    memory = max(map(len, sampling.stop_sequences), default=0)
    state = None if sampling.stop_strings is None else jnp.zeros(rows, jnp.int32)
    return Said(jnp.full((rows, memory), -1, jnp.int32), state)


def listen(sampling: SamplingParams, said: Said, row: Array, count: Array, token: Array) -> tuple[Said, Array]:
    """What sequences have said with one more token, and whether that is an end.

    Args:
        sampling: what ends them; stop tokens and `min_tokens` may be a sequence's own.
        said: before.
        row: `[R]` int32, the sequences' places in what is their own.
        count: `[R]` int32, how many tokens each had.
        token: `[R]` int32.

    Returns:
        What they have said, and `[R]` bool.

    Example:
        >>> sampling = SamplingParams(stop_tokens=(1,), stop_sequences=((5, 6),))
        >>> said, found = nothing_said(sampling, 1), []
        >>> for count, token in enumerate((6, 5, 6, 1)):
        ...     said, end = listen(sampling, said, *jnp.array([[0], [count], [token]]))
        ...     found.append(bool(end[0]))
        >>> found
        [False, False, True, True]
    """
    stops = jnp.asarray(sampling.stop_tokens, jnp.int32)
    ended = jnp.any(token[:, None] == (stops if stops.ndim == 1 else stops[row]), axis=-1)
    recent = jnp.concatenate([said.recent, token[:, None]], axis=1)[:, 1:]
    found = jnp.zeros_like(ended)
    for sequence in sampling.stop_sequences:
        found |= jnp.all(recent[:, recent.shape[1] - len(sequence) :] == jnp.asarray(sequence), axis=-1)
    state = said.state
    if sampling.stop_strings is not None and state is not None:
        state, come_up = sampling.stop_strings.read(state, token)
        found |= come_up
    least = jnp.asarray(sampling.min_tokens, jnp.int32)
    return Said(recent, state), ended | found & (count >= (least if least.ndim == 0 else least[row]))


def kept_where(mask: Array, said: Said, other: Said) -> Said:
    """What was said where `mask` `[R]` is True, else the other."""
    return jax.tree.map(lambda a, b: jnp.where(mask.reshape(-1, *(1,) * (a.ndim - 1)), a, b), said, other)


def completes(sampling: SamplingParams, tokens: Array, steps: Array) -> Array:
    """`[B, T]` bool: whether a token completes a stop sequence or string, all of it sampled in the token's step.

    Args:
        sampling: what ends sequences, in more than one token.
        tokens: `[B, T]` int32, -1 where nothing was sampled.
        steps: `[B, T]` int32.
    """
    lasting = sampling._replace(stop_tokens=(), min_tokens=0)
    nothing, row = nothing_said(lasting, len(tokens)), jnp.arange(len(tokens))
    before = jnp.pad(steps, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]

    def read(said: Said, now: tuple[Array, Array]) -> tuple[Said, Array]:
        token, goes_on = now
        said, found = listen(lasting, kept_where(goes_on, said, nothing), row, row, token)
        return kept_where(token >= 0, said, nothing), found & (token >= 0)

    return jax.lax.scan(read, nothing, (tokens.T, (steps == before).T))[1].T

"""Texts that end a sequence, wherever its tokens begin and end: a machine that reads one token at a time."""

from __future__ import annotations

import dataclasses
import zlib
from collections import deque
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class StopStrings:
    """What tells after each token whether one of some texts has come up; from `stop_strings`.

    A state says how much of which text stands at the end of what was said; 0 is none of any.

    Attributes:
        table: `[S, V]` int16 or int32, the state after a token in each state; `~state`, which is below 0, if a text
            came up in the token.
    """

    table: Array | np.ndarray

    def read(self, state: Array, token: Array) -> tuple[Array, Array]:
        """The next states, and whether a text has come up.

        Args:
            state: `[...]` int32.
            token: `[...]` int32; of one that the vocabulary lacks nothing is known, and the state after it is 0.

        Returns:
            `[...]` int32, and bool.
        """
        known = (token >= 0) & (token < self.table.shape[1])
        entry = jnp.where(known, jnp.asarray(self.table)[state, jnp.where(known, token, 0)], 0).astype(jnp.int32)
        return jnp.where(entry < 0, ~entry, entry), entry < 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StopStrings) and np.array_equal(self.table, other.table)

    def __hash__(self) -> int:
        return zlib.crc32(np.asarray(self.table).tobytes())

    def __repr__(self) -> str:
        """Short, and another for another table."""
        known = isinstance(self.table, np.ndarray)
        return f"StopStrings({hash(self) if known else '...'}, {self.table.shape})"


def stop_strings(texts: Sequence[str], vocabulary: Sequence[bytes]) -> StopStrings:
    """A machine for the value of `SamplingParams.stop_strings`.

    It finds a text whatever tokens it is made of, also where the token that completes it goes on with something else,
    or has begun with something else.

    Args:
        texts: each ends a sequence.
        vocabulary: what each of `V` token ids adds to a text, in UTF-8, see `data.token_bytes`.

    Returns:
        `StopStrings` with a state for each beginning of a text.

    Raises:
        ValueError: if there is no text, an empty one, or one with a byte that no token has.

    Example:
        >>> found = stop_strings(["</a>"], [b"x<", b"/", b"a", b">?", b"<"])
        >>> state, ends = jnp.zeros((), jnp.int32), []
        >>> for token in (0, 1, 2, 3):
        ...     state, end = found.read(state, token)
        ...     ends.append(bool(end))
        >>> ends
        [False, False, False, True]

    Reference: A. Aho and M. Corasick, Efficient string matching: an aid to bibliographic search, CACM 18 (1975).
    """
    if isinstance(texts, str) or not texts or not all(texts):
        raise ValueError(f"stop strings must be a list of texts, none of them empty, got {texts!r}")
    there = set().union(*vocabulary)
    for text in texts:
        if missing := sorted(set(text.encode()) - there):
            raise ValueError(
                f"the stop string {text!r} can never come up: no token of the vocabulary has the byte {missing[0]} "
                f"({chr(missing[0])!r})"
            )
    step, final = _automaton([text.encode() for text in texts])
    # All tokens at once, a byte of each after the other; those that are at their ends drop out behind.
    lengths = np.array([len(piece) for piece in vocabulary])
    order = np.argsort(-lengths, kind="stable")
    flat = np.frombuffer(b"".join(vocabulary[i] for i in order), np.uint8)
    lengths = lengths[order]
    starts = np.cumsum(lengths) - lengths
    state = np.repeat(np.arange(len(final))[:, None], len(vocabulary), axis=1)
    found = np.zeros(state.shape, bool)
    for place in range(lengths.max(initial=0)):
        left = np.count_nonzero(lengths > place)
        state[:, :left] = step[state[:, :left], flat[starts[:left] + place]]
        found[:, :left] |= final[state[:, :left]]
    table = np.empty(state.shape, np.int16 if len(final) < 2**15 else np.int32)
    table[:, order] = np.where(found, ~state, state)
    return StopStrings(table)


def _automaton(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """`[S, 256]`, the state after each byte, and `[S]`, whether a text ends in it."""
    children: list[dict[int, int]] = [{}]
    ends = []
    for text in texts:
        state = 0
        for byte in text:
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
            state = children[state][byte]
        ends.append(state)
    final = np.zeros(len(children), bool)
    final[ends] = True
    step = np.zeros((len(children), 256), np.int64)
    # The longest other beginning of a text that a state ends with: nearer the root, so it is done before.
    shorter = [0] * len(children)
    queue = deque([0])
    while queue:
        state = queue.popleft()
        final[state] |= final[shorter[state]]
        step[state] = step[shorter[state]]
        for byte, child in children[state].items():
            shorter[child] = int(step[shorter[state], byte]) if state else 0
            step[state, byte] = child
            queue.append(child)
    return step, final

"""What an environment is: pure functions of fixed shapes that `rollout.generate_turns` calls between a policy's turns.

No environment is here, nor what samples; how texts of characters become tokens is here for those that speak in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, TypeAlias

import jax.numpy as jnp

from jaxrl_post.types import Array, PyTree


class Text(NamedTuple):
    """Tokens of a fixed width.

    Attributes:
        tokens: `[L]` int32; what stands at or after `length` is ignored.
        length: int32 scalar, at most `L`.
    """

    tokens: Array
    length: Array


class Transition(NamedTuple):
    """What an action leads to.

    Attributes:
        state: of the structure, shapes and dtypes of the one before.
        observation: `[max_observation]` tokens, 0 or more, which the policy is fed before its next turn; not used if
            the episode is over.
        reward: float scalar, of the action. One that is not finite gives the sequence up as not valid.
        done: bool scalar, whether the episode is over.
    """

    state: PyTree
    observation: Text
    reward: Array
    done: Array


class Environment(NamedTuple):
    """A task for a policy that speaks in turns, as functions of one episode; `generate_turns` maps them over many.

    All are traced: shapes are fixed, and what they do depends on their arguments only.

    Attributes:
        reset: `(task, key) -> (state, prompt)`: int32 scalar and a key of the task's, to a pytree of arrays and
            a `Text` of `max_prompt` tokens, at least 1 of which counts. All sequences of a group begin with the same.
        step: `(state, action, key) -> Transition`: the action is a `Text` of `max_turn_tokens` tokens, zero behind its
            length, which is at least 1; a token that stops is in it. `key` is of the sequence and the turn. No action
            is an error: what means nothing is answered so.
        max_prompt: width of prompts.
        max_observation: width of observations, at least 1.
        fingerprint: `(state) -> int32`, equal where what the policy does next is the choice of one and the same moment;
            for methods that compare turns taken from equal states (`methods.gigpo`). None if states have no number.

    Example:
        >>> import jax
        >>> def reset(task, key):  # say the task's token; the policy is told 0 until it has
        ...     return task, Text(task[None], jnp.ones((), jnp.int32))
        >>> def step(state, action, key):
        ...     right = action.tokens[0] == state
        ...     return Transition(state, Text(jnp.zeros(1, jnp.int32), 1), right.astype(jnp.float32), right)
        >>> echo = Environment(reset, step, max_prompt=1, max_observation=1)
        >>> state, prompt = echo.reset(jnp.array(7), jax.random.key(0))
        >>> echo.step(state, Text(jnp.array([7, 0]), jnp.array(1)), jax.random.key(1)).reward.item()
        1.0
    """

    reset: Callable[[Array, Array], tuple[PyTree, Text]]
    step: Callable[[PyTree, Text, Array], Transition]
    max_prompt: int
    max_observation: int
    fingerprint: Callable[[PyTree], Array] | None = None


class Encoder(Protocol):
    """What is asked of a tokenizer; `data.CharTokenizer` is one."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ...


Vocabulary: TypeAlias = Mapping[str, int] | Encoder
"""Which token a character is: a mapping, or a tokenizer that makes one token of each."""


def character_tokens(vocabulary: Vocabulary, characters: str) -> tuple[int, ...]:
    """The token of each character.

    Args:
        vocabulary: a mapping of characters to ids, or a tokenizer.
        characters: those that an environment reads and writes.

    Returns:
        As many ids as characters.

    Raises:
        ValueError: if one is missing, is more than one token, or has the token of another.

    Example:
        >>> character_tokens({"a": 5, "b": 3}, "ba")
        (3, 5)
    """
    found = {}
    for character in characters:
        if isinstance(vocabulary, Mapping):
            if character not in vocabulary:
                raise ValueError(f"vocabulary has no token for {character!r}, one of {characters!r}; add it")
            tokens = [vocabulary[character]]
        else:
            tokens = list(vocabulary.encode(character))
        if len(tokens) != 1:
            raise ValueError(f"vocabulary must give one token for {character!r}, got {tokens}; use another tokenizer")
        found[character] = int(tokens[0])
    if len(set(found.values())) < len(found):
        raise ValueError(f"vocabulary must have different tokens for the characters {characters!r}, got {found}")
    return tuple(found[character] for character in characters)


def end_tokens(vocabulary: Vocabulary, ends: tuple[int, ...] | None) -> tuple[int, ...]:
    """The tokens that may close an action and are no part of what it says.

    Args:
        vocabulary: a mapping, or a tokenizer.
        ends: token ids; None for those that end the tokenizer's texts, of a mapping none.

    Returns:
        Token ids.

    Example:
        >>> end_tokens({"a": 5}, None), end_tokens({"a": 5}, (1,))
        ((), (1,))
    """
    if ends is not None:
        return tuple(ends)
    return () if isinstance(vocabulary, Mapping) else tuple(vocabulary.eos_ids)


def without_end(action: Text, ends: tuple[int, ...]) -> Text:
    """The action without the token that closes it, if one does.

    Args:
        action: as sampled.
        ends: token ids.

    Returns:
        `Text` of the same width, perhaps of length 0.

    Example:
        >>> without_end(Text(jnp.array([5, 1, 0]), jnp.array(2)), (1,)).length.item()
        1
    """
    last = action.tokens[jnp.maximum(action.length - 1, 0)]
    closed = jnp.any(last == jnp.asarray(ends or (-1,)))
    return action._replace(length=action.length - closed.astype(jnp.int32))


def write_number(value: Array, digits: int, symbols: tuple[int, ...], close: int) -> Text:
    """A number in decimal notation, and a token that closes it.

    Args:
        value: int32 scalar of at most so many digits.
        digits: width of the largest.
        symbols: tokens of `0` to `9` and `-`.
        close: token.

    Returns:
        `Text` of `digits + 2` tokens.

    Example:
        >>> text = write_number(jnp.array(-70), 3, tuple(range(11)), 11)
        >>> text.tokens[: text.length].tolist()
        [10, 7, 0, 11]
    """
    size, negative = jnp.abs(value), (value < 0).astype(jnp.int32)
    powers = 10 ** jnp.arange(digits, dtype=jnp.int32)
    count = jnp.maximum(jnp.sum(size >= powers, dtype=jnp.int32), 1)
    place = jnp.arange(digits + 2, dtype=jnp.int32) - negative
    digit = size // powers[jnp.clip(count - 1 - place, 0, digits - 1)] % 10
    tokens = jnp.where(place < 0, symbols[10], jnp.asarray(symbols[:10], jnp.int32)[digit])
    return Text(jnp.where(place < count, tokens, jnp.where(place == count, close, 0)), negative + count + 1)

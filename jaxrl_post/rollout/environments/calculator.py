"""A sum to be worked out with a calculator that does one operation at a time, all in characters."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_post.rollout.environments.interface import (
    Environment,
    Text,
    Transition,
    Vocabulary,
    character_tokens,
    end_tokens,
    without_end,
    write_number,
)
from jaxrl_post.types import Array

CHARACTERS = "0123456789-+*=()>?"
"""All that is read or written."""

_OPERATORS = "-+*"
_MOST_DIGITS = 4  # a product of two such numbers, and a result that is not in range, still fit in int32


class Sum(NamedTuple):
    """The state.

    Attributes:
        target: int32 scalar, the right answer.
        shown: int32 scalar, what the calculator says: the last result; before the first, and where it did not
            understand, numbers that no result is.
    """

    target: Array
    shown: Array


class Entry(NamedTuple):
    """What an action says.

    Attributes:
        left: int32 scalar, the first number.
        right: int32 scalar, the second.
        operator: int32 scalar: 0 `-`, 1 `+`, 2 `*`, 3 for an answer, `=right`.
        sound: bool scalar, whether it is one of both and its numbers are in range.
    """

    left: Array
    right: Array
    operator: Array
    sound: Array


def apply(operator: Array, left: Array, right: Array) -> Array:
    """`left - right`, `left + right` or `left * right`, for 0, 1 and 2.

    Example:
        >>> apply(jnp.array(2), jnp.array(3), jnp.array(-4)).item()
        -12
    """
    return jnp.select([operator == 0, operator == 1], [left - right, left + right], left * right)


def read_entry(action: Text, symbols: tuple[int, ...], digits: int) -> Entry:
    """Parse `number operator number` or `= number`, where `number` is an optional minus and 1 to `digits` digits.

    Args:
        action: without a token that closes it.
        symbols: tokens of `0` to `9`, `-`, `+`, `*` and `=`.
        digits: most digits of a number.

    Returns:
        `Entry`; its numbers mean nothing where it is not sound.

    Example:
        >>> entry = read_entry(Text(jnp.array([4, 2, 12, 10, 7]), jnp.array(5)), tuple(range(14)), 2)  # 42*-7
        >>> entry.left.item(), entry.right.item(), entry.operator.item(), entry.sound.item()
        (42, -7, 2, True)
    """
    known = jnp.asarray(symbols, jnp.int32)
    zero, no = jnp.zeros((), jnp.int32), jnp.zeros((), bool)

    def read(at: tuple[Array, ...], token_and_place: tuple[Array, Array]) -> tuple[tuple[Array, ...], None]:
        operator, left, value, count, negative, sound = at
        token, place = token_and_place
        found = token == known
        symbol, inside = jnp.argmax(found), place < action.length
        is_digit = inside & jnp.any(found) & (symbol < 10)
        is_sign = inside & (symbol == 10) & (count == 0) & ~negative
        # The second number is begun by an operator behind the first, or by = at the beginning.
        opens = inside & (operator < 0) & ((symbol >= 10) & (symbol < 13) & (count > 0) | (symbol == 13) & (place == 0))
        sound &= ~inside | jnp.any(found) & (is_digit | is_sign | opens)
        value = jnp.where(is_digit, jnp.minimum(value, 10**_MOST_DIGITS) * 10 + symbol, value)
        left = jnp.where(opens, jnp.where(negative, -value, value), left)
        operator = jnp.where(opens, symbol - 10, operator)
        count = jnp.where(opens, 0, count + is_digit)
        sound &= count <= digits
        return (operator, left, jnp.where(opens, 0, value), count, ~opens & (negative | is_sign), sound), None

    places = jnp.arange(len(action.tokens))
    start = (zero - 1, zero, zero, zero, no, ~no)
    (operator, left, value, count, negative, sound), _ = jax.lax.scan(read, start, (action.tokens, places))
    right = jnp.where(negative, -value, value)
    return Entry(left, right, operator, sound & (operator >= 0) & (count > 0))


def calculator(
    *,
    vocabulary: Vocabulary,
    terms: int = 3,
    digits: int = 1,
    operators: str = "-+*",
    seed: int = 0,
    ends: tuple[int, ...] | None = None,
) -> Environment:
    """An expression to be worked out: reward 1 for the right answer, after as many operations as one likes.

    The prompt is an expression of the number of the task, in brackets from the left (`((3+4)*2)-5>`). An action is an
    operation on two numbers (`3+4`, `-7*2`), answered by its result (`7>`), or `=` and the answer (`=9`), which ends
    the episode with reward 1 if it is right and 0 if not. To anything else, to numbers of more digits than any
    expression can lead to, and to results that have more, the answer is `?>`, and the turn is lost.

    Args:
        vocabulary: the tokens of `CHARACTERS`: a mapping, or a tokenizer of characters (`data.CharTokenizer`).
        terms: numbers in the expression, at least 2.
        digits: of each of them, which is from `10^(digits - 1)` to `10^digits - 1`.
        operators: those in expressions, of `-`, `+` and `*`; the calculator knows all.
        seed: of all expressions; task `n` is the same expression whatever key the rollout has.
        ends: token ids that may close an action; None for the tokenizer's `eos_ids`, of a mapping none.

    Returns:
        `Environment` whose fingerprint is what the calculator shows.

    Raises:
        ValueError: for a number out of its range, expressions whose values may have more than four digits, other
            operators, or a vocabulary without one of the characters.

    Example:
        >>> vocabulary = {character: ord(character) for character in CHARACTERS}
        >>> game = calculator(vocabulary=vocabulary, terms=2)
        >>> state, prompt = jax.jit(game.reset)(jnp.array(2), jax.random.key(0))
        >>> "".join(map(chr, prompt.tokens.tolist()))
        '5-2>'
        >>> said = Text(jnp.array([ord(character) for character in "=3"]), jnp.array(2))
        >>> jax.jit(game.step)(state, said, jax.random.key(0)).reward.item()
        1.0
    """
    if terms < 2 or digits < 1:
        raise ValueError(f"terms must be at least 2 and digits at least 1, got {terms} and {digits}")
    if not operators or set(operators) - set(_OPERATORS):
        raise ValueError(f"operators must be some of {_OPERATORS!r}, got {operators!r}")
    largest = 10**digits - 1
    width = len(str(largest**terms if "*" in operators else largest * terms))
    if width > _MOST_DIGITS:
        raise ValueError(
            f"{terms} terms of {digits} digits under {operators!r} may have values of {width} digits, and at most "
            f"{_MOST_DIGITS} are possible; use fewer terms or digits, or no '*'"
        )
    tokens = character_tokens(vocabulary, CHARACTERS)
    opening, closing, close, unknown = tokens[14:]
    ends, over = end_tokens(vocabulary, ends), 10**width
    chosen = jnp.asarray([_OPERATORS.index(character) for character in operators], jnp.int32)

    def reset(task: Array, key: Array) -> tuple[Sum, Text]:
        del key
        of_numbers, of_operators = jax.random.split(jax.random.fold_in(jax.random.key(seed), task))
        numbers = jax.random.randint(of_numbers, (terms,), 10 ** (digits - 1), 10**digits, jnp.int32)
        between = chosen[jax.random.randint(of_operators, (terms - 1,), 0, len(chosen))]
        said, value = [jnp.full(terms - 2, opening)], numbers[0]
        for index in range(terms):
            if index:
                value = apply(between[index - 1], value, numbers[index])
                said.append(jnp.asarray(tokens[10:13])[between[index - 1]][None])
            said.append(jnp.asarray(tokens[:10])[numbers[index] // 10 ** jnp.arange(digits - 1, -1, -1) % 10])
            said.append(jnp.full(int(0 < index < terms - 1), closing))
        text = jnp.concatenate([*said, jnp.asarray([close])]).astype(jnp.int32)
        return Sum(value, jnp.asarray(over, jnp.int32)), Text(text, jnp.asarray(len(text), jnp.int32))

    def step(state: Sum, action: Text, key: Array) -> Transition:
        del key
        entry = read_entry(without_end(action, ends), tokens[:14], width)
        answers = entry.sound & (entry.operator == 3)
        result = apply(entry.operator, entry.left, entry.right)
        works = entry.sound & ~answers & (jnp.abs(result) < over)
        shown = write_number(jnp.where(works, result, 0), width, tokens[:11], close)
        lost = jnp.zeros_like(shown.tokens).at[:2].set(jnp.asarray([unknown, close]))
        observation = Text(jnp.where(works, shown.tokens, lost), jnp.where(works, shown.length, 2))
        state = state._replace(shown=jnp.where(works, result, over + 1).astype(jnp.int32))
        right = answers & (entry.right == state.target)
        return Transition(state, observation, right.astype(jnp.float32), answers)

    prompt = terms * digits + (terms - 1) + 2 * (terms - 2) + 1
    return Environment(reset, step, prompt, width + 2, lambda state: state.shown)

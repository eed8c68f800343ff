r"""A reward for mathematics: the final answer of a completion equals the right one, however it is written.

Parsing and comparing are math-verify's (`pip install "jaxrl-post[math]"`), in processes of their own: what a model
writes can keep a computer algebra system busy for ever.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from jaxrl_post.rewards.tags import tagged_answer
from jaxrl_post.rewards.workers import Workers

logger = logging.getLogger(__name__)

LONGEST_TEXT = 4000
"""Of a completion without a box or `####`, the answer is looked for among this many characters at the end."""

_COMPARISON = Path(__file__).with_name("math_comparison.py")

_BRACE = re.compile(r"(\\f?boxed\s*\{)|\\(?!\\f?boxed\s*\{).|[{}]", re.DOTALL)
# A heading "#### Step 3" or "#### 3. Adding up" is none.
_GSM8K = re.compile(r"####[ \t]*(?![0-9]+[.):][ \t]+\S)(?=\S{0,80}[0-9])([^\n]+)")
_DELIMITED = re.compile(r"\$\$(.+)\$\$|\$(.+)\$|\\\((.+)\\\)|\\\[(.+)\\\]", re.DOTALL)
# Long numerals are left to the processes.
_DECIMAL = re.compile(r"([-+]?)(?:\\?\$)?([0-9]{1,3}(?:,[0-9]{3}){1,9}|[0-9]{1,40})?(\.[0-9]{0,40})?")
_FRACTION = re.compile(
    r"([-+]?)(?:\\[dt]?frac\{([-+]?[0-9]{1,40})\}\{([0-9]{1,40})\}|\\[dt]?frac([0-9])([0-9])|([0-9]{1,40})/([0-9]{1,40}))"
)
_TERM = r"(?:[0-9]{1,40}(?:\.[0-9]{1,40})?[a-zA-Z]?|[a-zA-Z])(?:\^(?:[0-9]|\{[0-9]{1,3}\}))?"
_POLYNOMIAL = re.compile(rf"-?{_TERM}(?:[-+]{_TERM}){{0,20}}")


class _Answer(NamedTuple):
    """A text with an answer; `alone` where it is nothing but the answer."""

    text: str
    alone: bool


def gsm8k_answer(text: str) -> str | None:
    r"""The answer of a solution in GSM8K's form: what follows the last `####` on its line, without commas.

    Args:
        text: a solution.

    Returns:
        The answer, without white space around it; None if there is no `####` or nothing after it.

    Example:
        >>> gsm8k_answer("48/2 = <<48/2=24>>24\n1000 + 234\n#### 1,234")
        '1234'
        >>> gsm8k_answer("It is 72.") is None
        True

    Reference: Training Verifiers to Solve Math Word Problems (arXiv 2110.14168).
    """
    _, mark, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0].strip().replace(",", "") or None if mark else None


def math_verify_reward(*, timeout: float = 5.0, processes: int | None = None) -> Callable[..., list[float | None]]:
    r"""A reward function: 1 where the final answer equals the right one as mathematics, otherwise 0.

    The final answer is what the last closed `\boxed{}` holds; without one, what follows the last `####` on its line;
    without that, what math-verify finds: the answer that the text announces, or else the last formula or number. Of a
    text with `<answer>...</answer>` only the last of these is read, unless a box comes after it. The same holds for the
    right answer, which may thus be a whole solution. Decimals are equal where they agree in the first 6 places.

    Pairs of equal numbers, of different integers, and of the same polynomial need no parser. All others, each once a
    batch, are compared by a pool of processes that is shared by all rewards of these settings.

    Args:
        timeout: seconds of wall-clock time to parse and compare one pair.
        processes: how many at most; None for one per core, and no more than 8.

    Returns:
        `(prompts, completions, answer) -> list[float | None]`: `answer` holds texts or numbers. None where there is no
        right answer or it cannot be parsed, and where comparing takes too long or ends the process; the latter is
        logged. A completion that cannot be parsed gets 0. The function raises ImportError without math-verify.

    Raises:
        ValueError: if `timeout` is not positive and finite, or `processes` less than 1.

    Example:
        >>> reward = math_verify_reward(timeout=30.0, processes=1)
        >>> reward(["?"] * 3, [r"So \boxed{\frac{1}{2}}.", "1+2x", "x>3"], answer=["0.5", "2x+1", "x>4"])
        [1.0, 1.0, 0.0]
    """
    workers = _pool(timeout, processes)

    def reward(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[Any]) -> list[float | None]:
        del prompts
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError('math_verify needs math-verify: pip install "jaxrl-post[math]"')
        golds = [_right_answer(right) for right in answer]
        pairs = [
            None if gold is None else (gold, _final_answer(completion))
            for completion, gold in zip(completions, golds, strict=True)
        ]
        values: dict[Any, float | None] = {None: None}
        values |= {pair: _at_sight(*pair) for pair in pairs if pair is not None}
        hard = [pair for pair, value in values.items() if pair is not None and value is None]
        for pair, value in zip(hard, _compared(workers, hard), strict=True):
            values[pair] = None if value is None else float(value)
        return [values[pair] for pair in pairs]

    return reward


def math_verify(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[Any]) -> list[float | None]:
    r"""`math_verify_reward` with its defaults.

    Args:
        prompts: `N` texts; not looked at.
        completions: `N` texts.
        answer: `N` right answers: a formula, a number, or a solution that ends in `\boxed{}` or `####`.

    Returns:
        `N` rewards; None where the right answer is missing or cannot be parsed, or the comparison fails.

    Raises:
        ImportError: without math-verify.

    Example:
        >>> math_verify(["?"] * 3, [r"\boxed{1,234}", "#### 7", "7"], answer=["#### 1234", 8, None])
        [1.0, 0.0, None]
    """
    return math_verify_reward()(prompts, completions, answer)


@functools.cache
def _pool(timeout: float, processes: int | None) -> Workers:
    return Workers(_COMPARISON, "equal", timeout=timeout, processes=processes)


def _compared(workers: Workers, pairs: Sequence[tuple[_Answer, _Answer]]) -> list[bool | None]:
    if not pairs:
        return []
    before = Counter(workers.lost)
    values = workers.map([[*gold, *given] for gold, given in pairs])
    if lost := workers.lost - before:
        logger.warning(
            "math_verify: of %d comparisons %s; their rows are not scored%s",
            len(pairs),
            ", ".join(f"{count} {why}" for why, count in lost.items()),
            f" (last error: {workers.last_error})" if lost["failed"] else "",
        )
    return values


def _right_answer(answer: Any) -> _Answer | None:
    if isinstance(answer, float):  # math-verify does not read exponents as Python writes them
        return _Answer(f"{Decimal(repr(float(answer))):f}", True) if math.isfinite(answer) else None
    return None if answer is None else _final_answer(str(answer))


def _final_answer(text: str) -> _Answer:
    text = text.replace("\N{MINUS SIGN}", "-")
    if tagged := tagged_answer(text):
        after = text[tagged[1] :]
        text = after if _last_box(after) is not None else text[slice(*tagged)]
    boxed = _last_box(text)
    if boxed is not None:
        return _Answer(boxed.strip(), True)
    marked = _GSM8K.findall(text)
    return _Answer(marked[-1].strip() if marked else text.strip()[-LONGEST_TEXT:], False)


def _last_box(text: str) -> str | None:
    r"""What the last `\boxed{...}` that is closed holds."""
    open_braces: list[int | None] = []  # where a box's content begins, None for other braces
    start, end = -1, -1
    for brace in _BRACE.finditer(text):
        if brace.group().endswith("{") and not brace.group().startswith("\\{"):
            open_braces.append(brace.end() if brace.group(1) else None)
        elif brace.group() == "}" and open_braces:
            begun = open_braces.pop()
            if begun is not None and begun > start:
                start, end = begun, brace.start()
    return text[start:end] if end >= 0 else None


def _at_sight(gold: _Answer, given: _Answer) -> float | None:
    """1 or 0 where no parser is needed to see it; None elsewhere."""
    one, other = _bare(gold.text), _bare(given.text)
    if one == other and _POLYNOMIAL.fullmatch(one):
        return 1.0
    left, right = _number(one), _number(other)
    if left is None or right is None:
        return None
    if left == right:
        return 1.0
    # Decimals are rounded before they are compared, which is the parser's affair.
    return 0.0 if left.denominator == 1 == right.denominator else None


def _bare(text: str) -> str:
    """A formula without delimiters, white space and the full stop after it."""
    text = " ".join(text.split()).removesuffix(".").strip()
    inside = _DELIMITED.fullmatch(text)
    if inside is not None and "$" not in text.strip("$"):
        text = next(group for group in inside.groups() if group is not None).strip()
    return re.sub(r"(?<=[-+*/^=])\s+|\s+(?=[-+*/^=])|\\[!,;]", "", text)


def _number(text: str) -> Fraction | None:
    """The value of a decimal numeral or a fraction of two integers."""
    decimal = _DECIMAL.fullmatch(text)
    if decimal is not None:
        sign, whole, places = (group or "" for group in decimal.groups())
        digits = (whole.replace(",", "") or "0") + places
        return Fraction(sign + digits.removesuffix(".")) if whole or len(places) > 1 else None
    fraction = _FRACTION.fullmatch(text)
    if fraction is None:
        return None
    sign, *parts = (group for group in fraction.groups() if group is not None)
    top, bottom = map(int, parts)
    return None if bottom == 0 else Fraction(top, bottom) * (-1 if sign == "-" else 1)

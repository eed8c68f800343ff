"""Whether two answers are equal as mathematics: what the processes of `rewards.math` run.

Imports math-verify, and nothing of this library, so that a process starts quickly. math-verify's own limits of time
are off: they turn an answer that takes too long into a wrong one, where our process is killed and the row not scored.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

_READ = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
_WORDS_OF_MATHEMATICS = re.compile(r"sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|min|max|gcd|lcm|mod|and|or")
_WORD = re.compile(r"(?:^|(?<=\s))[A-Za-z]{2,}(?=[.,:;!?]?(?:\s|$))")
_LATEX_WORD = re.compile(r"\\text\s*\{[^{}]*\}|\\[A-Za-z]+")
_NUMBER_WITH_UNIT = re.compile(r"([-+]?\\?\$?[0-9][0-9.,/]*)\s+[A-Za-z]{3,}(?:\s+[A-Za-z]+)*\.?")
_NAME = re.compile(r"[A-Za-z]{4,}(?: [A-Za-z]+)*|[A-Za-z]+(?: [A-Za-z]+)+")
_LONGEST_FORMULA = 300
"""A longer text, in characters, that does not say that it is one formula is prose."""


def equal(gold: str, gold_alone: bool, given: str, given_alone: bool) -> bool | None:
    """Whether `given` equals `gold`; None if `gold` cannot be parsed.

    Args:
        gold: the right answer.
        gold_alone: whether it is the answer alone, or a text that may say something around it.
        given: what is judged.
        given_alone: likewise.
    """
    right = read(gold, gold_alone)
    if not right:
        return None
    found = read(given, given_alone)
    return bool(found) and verify(right, found, timeout_seconds=None)


@lru_cache(maxsize=512)
def read(text: str, alone: bool) -> list[Any]:
    """The answer of a text as SymPy has it, a list of one; empty if there is none."""
    if alone:
        return _formula(text)
    one_formula = len(text) <= _LONGEST_FORMULA and "\n" not in text
    if one_formula and not _is_prose(text):
        return _formula(text) or _extracted(text)
    return _extracted(text) or (_formula(text) if one_formula else [])


def _is_prose(text: str) -> bool:
    return any(not _WORDS_OF_MATHEMATICS.fullmatch(word) for word in _WORD.findall(_LATEX_WORD.sub(" ", text)))


def _formula(text: str) -> list[Any]:
    # Letters of words would be read as factors: a number with its unit as a product, and anagrams as equal.
    if _is_prose(text) and (number := _NUMBER_WITH_UNIT.fullmatch(text)):
        text = number[1]
    elif _is_prose(text) and _NAME.fullmatch(text):
        text = rf"\text{{{text}}}"
    return _extracted(rf"\boxed{{{text}}}")


def _extracted(text: str) -> list[Any]:
    return parse(text, _READ, fallback_mode="no_fallback", parsing_timeout=0)


equal("x+1", True, "1+x", False)  # what is built at first use belongs to the start, not to the time of a row

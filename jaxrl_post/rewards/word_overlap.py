"""Partial credit for the words that a completion shares with the answer."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))


def word_f1(
    prompts: Sequence[str],
    completions: Sequence[str],
    answer: Sequence[Any],
    *,
    pattern: str | None = None,
    penalty: float = 0.0,
) -> list[float | None]:
    r"""F1 of the words of a completion and of the answer: $2 P R / (P + R)$ of precision and recall.

    Case and punctuation do not count, the order of words neither; a word that is said twice has to be in the answer
    twice, so that repeating it does not pay.

    Args:
        prompts: `N` texts; not looked at.
        completions: `N` texts.
        answer: `N` answers, each a text or a list of texts of which the best match counts.
        pattern: regular expression with one group, what of the completion is compared, e.g.
            `"<answer>(.*?)</answer>"`; of several matches the last. None for all of it.
        penalty: reward of a completion in which `pattern` is not found.

    Returns:
        `N` rewards in [0, 1], or `penalty`; None where there is no answer to compare with.

    Raises:
        ValueError: if `pattern` does not have exactly one group.

    Example:
        >>> word_f1([""] * 3, ["Paris, France", "paris", "Rome"], answer=["Paris", ["Lutetia", "Paris"], None])
        [0.6666666666666666, 1.0, None]

    Reference: Information Gain-based Policy Optimization: A Simple and Effective Approach for Multi-Turn LLM Agents
    (arXiv 2510.14967), whose code counts each word once and gives -2 for a wrong format.
    """
    del prompts
    find = None if pattern is None else re.compile(pattern, re.DOTALL)
    if find is not None and find.groups != 1:
        raise ValueError(f"pattern must have exactly one group, the part to compare, got {pattern!r}")

    def one(completion: str, expected: Any) -> float | None:
        if expected is None:
            return None
        said = [completion] if find is None else find.findall(completion)
        if not said:
            return float(penalty)
        given = [expected] if isinstance(expected, str) or not isinstance(expected, Sequence) else list(expected)
        return max((_f1(_words(said[-1]), _words(str(text))) for text in given), default=None)

    return [one(completion, expected) for completion, expected in zip(completions, answer, strict=True)]


def _words(text: str) -> Counter[str]:
    return Counter(text.lower().translate(_PUNCTUATION).split())


def _f1(said: Counter[str], expected: Counter[str]) -> float:
    shared = (said & expected).total()
    return 2 * shared / (said.total() + expected.total()) if shared else 0.0

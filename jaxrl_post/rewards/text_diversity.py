"""How varied a text is: of its words, its sentences and their order."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from itertools import pairwise

_FUNCTION_WORDS = """
a an and are as at be but by can for from had has have he her his i if in is it its may not of on or
our she so that the their them then they this to was we were what when which who will with would you
your
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
"""English words that carry form rather than content."""

_SENTENCE = re.compile(r"[^.!?\n]+([.!?]*)")


def token_diversity(sentences: Sequence[Sequence[Hashable]]) -> dict[str, float]:
    r"""Statistics in [0, 1] of how varied sentences are, all 0 for one word or none.

    With $N$ words of $V$ kinds, of which kind $v$ stands $n_v$ times:

    | name | |
    | --- | --- |
    | `type_token` | $V / N$ |
    | `entropy` | $-\sum_v \frac{n_v}{N} \log \frac{n_v}{N} / \log V$ |
    | `sentence_length` | standard deviation of the sentences' lengths over their mean, at most 1 |
    | `adjacent` | mean of 1 less the Jaccard overlap of neighbouring sentences' words |
    | `yule` | $1 / (1 + K)$, $K = 10^4 (\sum_v n_v^2 - N) / N^2$ |
    | `distinct_2` | kinds of pairs of neighbouring words over their number |

    Args:
        sentences: of words, or of anything that can be compared.

    Example:
        >>> found = token_diversity(["abac", "ab"])
        >>> [round(found[name], 4) for name in ("type_token", "entropy", "sentence_length", "adjacent", "distinct_2")]
        [0.5, 0.9206, 0.3333, 0.3333, 0.8]

    Reference: Diversity-Enhanced Reasoning for Subjective Questions (arXiv 2507.20187).
    """
    sentences = [list(sentence) for sentence in sentences if sentence]
    words = [word for sentence in sentences for word in sentence]
    counts, number = Counter(words), len(words)
    lengths = [len(sentence) for sentence in sentences]
    bigrams = list(pairwise(words))
    several, varied = len(sentences) > 1, len(counts) > 1
    overlaps = [len(set(a) & set(b)) / len(set(a) | set(b)) for a, b in pairwise(sentences)]
    return {
        "type_token": len(counts) / number if varied else 0.0,
        "entropy": _entropy(counts.values()) / math.log(len(counts)) if varied else 0.0,
        "sentence_length": min(_deviation(lengths) * len(lengths) / number, 1.0) if several else 0.0,
        "adjacent": 1 - sum(overlaps) / len(overlaps) if several else 0.0,
        "yule": 1 / (1 + 1e4 * (sum(n * n for n in counts.values()) - number) / number**2) if varied else 0.0,
        "distinct_2": len(set(bigrams)) / len(bigrams) if varied else 0.0,
    }


def text_diversity(text: str) -> dict[str, float]:
    """`token_diversity` of a text's words, and how varied its function words and its kinds of sentences are.

    `function_words` is the entropy of its English function words over that of all alike; `sentence_kind` that of
    statements, questions, exclamations and unfinished sentences. Both are 0 where there are not two kinds.

    Args:
        text: sentences end at `.`, `!`, `?` or a line's end; words are letters and digits, whose case does not count.

    Example:
        >>> found = text_diversity("Is it so? It is. Is it?")
        >>> round(found["sentence_kind"], 4), len(found)
        (0.4591, 8)

    Reference: Diversity-Enhanced Reasoning for Subjective Questions (arXiv 2507.20187), which classes sentences by
    their form; here the mark that ends them does.
    """
    parts = [(re.findall(r"\w+", found[0].lower()), found[1][:1]) for found in _SENTENCE.finditer(text)]
    parts = [(words, mark) for words, mark in parts if words]
    kinds = Counter(mark for _, mark in parts)
    function = Counter(word for words, _ in parts for word in words if word in FUNCTION_WORDS)
    return token_diversity([words for words, _ in parts]) | {
        "function_words": _entropy(function.values()) / math.log(len(FUNCTION_WORDS)),
        "sentence_kind": _entropy(kinds.values()) / math.log(4),
    }


def diversity(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The mean of the eight statistics of `text_diversity`, for a small weight beside a reward of the answer.

    Args:
        prompts: `N` texts; not looked at.
        completions: `N` texts.

    Returns:
        `N` rewards in [0, 1].

    Example:
        >>> same, varied = diversity(["", ""], ["So it is. So it is.", "So it is. But is that all there was to see?"])
        >>> same < varied
        True

    Reference: Diversity-Enhanced Reasoning for Subjective Questions (arXiv 2507.20187): 0.1 of the reward.
    """
    del prompts
    return [sum(found.values()) / len(found) for found in map(text_diversity, completions)]


def _entropy(counts: Iterable[int]) -> float:
    """Nats, of the shares."""
    counts = list(counts)
    total = sum(counts)
    return -sum(n / total * math.log(n / total) for n in counts) if len(counts) > 1 else 0.0


def _deviation(values: Sequence[int]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))

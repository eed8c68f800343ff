"""A critique in words as rewards of tokens: spans of an answer that were called good or poor."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def span_scores(text: str, good: Sequence[str], poor: Sequence[str], *, similar: float = 0.8) -> list[int]:
    """The score of each word of a text: 1 within a span that was called good, -1 within a poor one, otherwise 0.

    A span is looked for as it is; where it is not found, the words that are most like it stand for it.

    Args:
        text: the answer.
        good: spans that were called good.
        poor: those that were called poor; a word of both is poor.
        similar: how alike words must be to stand for a span, `difflib`'s ratio in [0, 1]; above 1 for exact alone.

    Returns:
        A number for each word, as `text.split()` has them.

    Example:
        >>> span_scores("the cat sat badly", ["cat sat"], ["badly"])
        [0, 1, 1, -1]

    Reference: Text2Grad: Reinforcement Learning from Natural Language Feedback (arXiv 2505.22338).
    """
    words = [(found.start(), found.end()) for found in re.finditer(r"\S+", text)]
    scores = [0] * len(words)
    for spans, score in ((good, 1), (poor, -1)):
        for span in spans:
            for start, end in _places(text, words, span.strip(), similar):
                for i, (first, _) in enumerate(words):
                    if start <= first < end:
                        scores[i] = score
    return scores


def _places(text: str, words: Sequence[tuple[int, int]], span: str, similar: float) -> list[tuple[int, int]]:
    """Where a span stands: everywhere it does, or the one place most like it."""
    if not span:
        return []
    exact = [(found.start(), found.end()) for found in re.finditer(re.escape(span), text)]
    if exact:
        return exact
    count, best = len(span.split()), (similar, (0, 0))
    for i in range(len(words) - count + 1):
        start, end = words[i][0], words[i + count - 1][1]
        ratio = difflib.SequenceMatcher(None, text[start:end].lower(), span.lower(), autojunk=False).ratio()
        best = max(best, (ratio, (start, end)), key=lambda found: found[0])
    return [best[1]] if best[1] != (0, 0) else []


def word_of_token(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """The word that each token belongs to, by its place in the text.

    Args:
        text: the answer.
        offsets: start and end of each token in it, as fast tokenizers give them.

    Returns:
        A number for each token: that of the word which holds its first character that is no space; -1 for none.

    Example:
        >>> word_of_token("the cat", [(0, 3), (3, 5), (5, 7)])
        [0, 1, 1]

    Reference: Text2Grad: Reinforcement Learning from Natural Language Feedback (arXiv 2505.22338).
    """
    word = [-1] * len(text)
    for number, found in enumerate(re.finditer(r"\S+", text)):
        word[found.start() : found.end()] = [number] * (found.end() - found.start())
    return [next((word[i] for i in range(start, end) if word[i] >= 0), -1) for start, end in offsets]


def span_decay(scores: Array, *, middle: float, alpha: float = 1.0) -> Array:
    r"""Scores that fade with their distance from the first one, $s_t\, \sigma(6 - \alpha (n - n_0))$.

    Args:
        scores: `[B, T]` float; $n$ counts places from the first that is not 0.
        middle: $n_0$, places after which they begin to fade; 6 further on one half is left, and never less than 0.0025.
        alpha: $\alpha$, how fast.

    Returns:
        `[B, T]`, float32 or wider.

    Raises:
        ValueError: if `scores` is not `[B, T]`.

    Example:
        >>> [round(float(s), 4) for s in span_decay(jnp.ones((1, 41)), middle=20.0)[0, jnp.array([10, 26, 40])]]
        [1.0, 0.5, 0.0025]

    Reference: Text2Grad: Reinforcement Learning from Natural Language Feedback (arXiv 2505.22338), whose code takes the
    median length of the spans times their number for the middle.
    """
    scores = masked.as_float(scores)
    masked.check_axes("scores", scores, "[B, T]")
    first = jnp.argmax(scores != 0, axis=1)[:, None]
    distance = alpha * (jnp.arange(scores.shape[1]) - first - middle) - 6
    return scores * jax.nn.sigmoid(-jnp.clip(distance, -10, 6))

"""More problems from multiple-choice questions: the opposite question, whose answer is a set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_NEGATED = {
    "am": "am not",
    "are": "aren't",
    "can": "can't",
    "could": "couldn't",
    "did": "didn't",
    "do": "don't",
    "does": "doesn't",
    "had": "hadn't",
    "has": "hasn't",
    "have": "haven't",
    "is": "isn't",
    "must": "mustn't",
    "should": "shouldn't",
    "was": "wasn't",
    "were": "weren't",
    "will": "won't",
    "would": "wouldn't",
}


class InvertedQuestion(NamedTuple):
    """Options in their new order, and which of them answer the opposite question.

    Attributes:
        options: the options.
        answers: indices into them, in order.
    """

    options: list[str]
    answers: list[int]


def invert_question(options: Sequence[str], answer: int, keep: int, rng: np.random.Generator) -> InvertedQuestion:
    """A single-choice question as a multiple-choice one: asked for the opposite, all options but the answer are right.

    The old answer becomes the only wrong option; some of the others are kept, and all are shuffled.

    Args:
        options: at least two.
        answer: index of the right one.
        keep: how many of the others are kept, from 1 to all of them; the authors draw it evenly.
        rng: for the choice and the order.

    Returns:
        `InvertedQuestion` with `keep + 1` options.

    Raises:
        ValueError: if there is no such option, or `keep` is out of range.

    Example:
        >>> import numpy as np
        >>> made = invert_question(["red", "green", "blue"], 0, 2, np.random.default_rng(0))
        >>> sorted(made.options[i] for i in made.answers)
        ['blue', 'green']

    Reference: Reinforcing Video Reasoning with Focused Thinking (arXiv 2505.24718).
    """
    if not 0 <= answer < len(options):
        raise ValueError(f"answer must be the index of one of {len(options)} options, got {answer}")
    others = [index for index in range(len(options)) if index != answer]
    if not 1 <= keep <= len(others):
        raise ValueError(f"keep must be between 1 and the {len(others)} other options, got {keep}")
    kept: list[int] = [answer, *rng.choice(others, keep, replace=False).tolist()]
    order: list[int] = [kept[place] for place in rng.permutation(len(kept))]
    return InvertedQuestion([options[i] for i in order], [place for place, i in enumerate(order) if i != answer])


def negate_question(question: str) -> str | None:
    """The opposite of an English question: its first auxiliary verb negated, if it stands within the first three words.

    Args:
        question: e.g. `"What did she take?"`.

    Returns:
        The question, or None where there is no such verb, as in "Who won?".

    Example:
        >>> negate_question("What did she take?"), negate_question("Who won?")
        ("What didn't she take?", None)

    Reference: Reinforcing Video Reasoning with Focused Thinking (arXiv 2505.24718), which negates by a list of words.
    """
    words = question.split(" ")
    for place, word in enumerate(words[:3]):
        if (negated := _NEGATED.get(word.lower())) is not None:
            words[place] = negated.capitalize() if word[:1].isupper() else negated
            return " ".join(words)
    return None

"""Rewards for answers that are sets: options ticked, items found."""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Sequence

from jaxrl_post.rewards.tags import tagged_answer


def partial_choice_reward(chosen: Collection[Hashable], right: Collection[Hashable]) -> float:
    r"""The share of the right options that were chosen, and nothing if a wrong one is among them.

    $$r = |X| / |E| \text{ if } X \subseteq E \text{ else } 0$$

    Args:
        chosen: $X$, the options chosen.
        right: $E$, the right ones.

    Returns:
        A number in [0, 1]. Where no option is right, 1 for choosing none and 0 otherwise.

    Example:
        >>> [partial_choice_reward(chosen, "AC") for chosen in ("A", "AC", "AB")]
        [0.5, 1.0, 0.0]

    Reference: Reinforcing Video Reasoning with Focused Thinking (arXiv 2505.24718).
    """
    picked, expected = set(chosen), set(right)
    if not expected:
        return float(not picked)
    return len(picked) / len(expected) if picked <= expected else 0.0


def partial_choice(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str | Collection[str] | None]
) -> list[float | None]:
    """`partial_choice_reward` of multiple-choice answers such as `A, C`.

    Of a completion the last `<answer>...</answer>` is read, or all of it if there is none. Options are what stands
    between commas, semicolons and white space; case does not matter.

    Args:
        prompts: `N` texts; not looked at.
        completions: `N` texts.
        answer: `N` right answers: a text of the same form, or the options one by one.

    Returns:
        `N` rewards; None where there is no answer to compare with.

    Example:
        >>> completions = ["I think <answer>a</answer>", "A,C", "<answer>A, B</answer>", "A"]
        >>> partial_choice(["?"] * 4, completions, answer=["A,C", ["A", "C"], "A,C", None])
        [0.5, 1.0, 0.0, None]

    Reference: Reinforcing Video Reasoning with Focused Thinking (arXiv 2505.24718).
    """
    del prompts

    def options(text: str) -> set[str]:
        return {option.upper() for option in re.split(r"[\s,;]+", text) if option}

    found: list[float | None] = []
    for completion, expected in zip(completions, answer, strict=True):
        if expected is None:
            found.append(None)
            continue
        said = tagged_answer(completion)
        listed = [expected] if isinstance(expected, str) else expected
        right = set().union(*(options(option) for option in listed))
        found.append(partial_choice_reward(options(completion[slice(*said)] if said else completion), right))
    return found


def set_overlap(found: Collection[Hashable], expected: Collection[Hashable], *, alpha: float = 0.8) -> float:
    r"""How well a set of items was found: a mean of recall and of the share that both sets have in common.

    $$r = \alpha \frac{|X \cap E|}{|E|} + (1 - \alpha) \frac{|X \cap E|}{|X \cup E|}$$

    Args:
        found: $X$, the items found.
        expected: $E$, those that were to be found.
        alpha: $\alpha$ in [0, 1]: 0.8 where what is missed costs more (extracting memories), 0.2 where what is too much
            does (retrieving them).

    Returns:
        A number in [0, 1]. Where nothing was to be found, 1 for finding nothing and 0 otherwise.

    Raises:
        ValueError: if `alpha` is outside [0, 1].

    Example:
        >>> round(set_overlap({1, 2, 9}, {1, 2, 3, 4}), 6)
        0.48

    Reference: Collaborative Multi-Agent Optimization for Personalized Memory System (arXiv 2603.12631).
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}; it is the weight of the recall")
    items, wanted = set(found), set(expected)
    if not wanted:
        return float(not items)
    common = len(items & wanted)
    return alpha * common / len(wanted) + (1 - alpha) * common / len(items | wanted)

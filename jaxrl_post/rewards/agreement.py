"""Rewards without labels: how far an answer agrees with the others to the same question, or to its paraphrases."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.rewards.word_overlap import word_f1
from jaxrl_post.types import Array

Vote: TypeAlias = Literal["share", "majority"]


def answer_share(answer: Array, valid: Array | None = None) -> Array:
    r"""The share of a group that gave the same answer, $p_{c(i)}$; a soft vote.

    Its expectation is $\sum_c p_c^2$, the chance that two answers agree, which training on it raises, right or wrong.

    Args:
        answer: `[P, G]` int: rollouts with the same number gave the same answer; below 0 for one that cannot be read.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.

    Returns:
        `[P, G]` float32, in [0, 1]; 0 where not valid, or not read. What is not read counts in the whole.

    Raises:
        ValueError: if `answer` is not `[P, G]` or `valid` has another shape.

    Example:
        >>> answer_share(jnp.array([[7, 7, 8, -1]])).tolist()
        [[0.5, 0.5, 0.25, 0.0]]

    References:
        Right Question is Already Half the Answer: Fully Unsupervised LLM Reasoning Incentivization (arXiv 2504.05812);
        TTRV: Test-Time Reinforcement Learning for Vision Language Models (arXiv 2510.06783).
    """
    answer, there = _answers(answer, valid)
    read = there & (answer >= 0)
    same = (answer[:, :, None] == answer[:, None, :]) & read[:, None, :]
    share = jnp.sum(same, axis=2) / jnp.maximum(jnp.sum(there, axis=1, keepdims=True), 1).astype(jnp.float32)
    return jnp.where(read, share, 0.0)


def semantic_entropy(answer: Array, valid: Array | None = None) -> Array:
    r"""Entropy of a group's answers, $-\sum_c p_c \log p_c$; each that cannot be read is an answer of its own.

    Args:
        answer: `[P, G]` int, as for `answer_share`.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.

    Returns:
        `[P]` float32, nats, from 0 to the log of the number of valid rollouts.

    Raises:
        ValueError: as `answer_share`.

    Example:
        >>> round(semantic_entropy(jnp.array([[7, 7, 8, 9]])).item(), 4)
        1.0397

    Reference: EMPO (arXiv 2504.05812).
    """
    answer, there = _answers(answer, valid)
    count = jnp.maximum(jnp.sum(there, axis=1, keepdims=True), 1).astype(jnp.float32)
    share = jnp.where(answer >= 0, answer_share(answer, there), 1 / count)
    return masked.mean(-jnp.log(jnp.where(there, share, 1.0)), there, 1)


def empo_reward(
    answer: Array, valid: Array | None = None, *, low: float = 0.0, high: float | None = None, alpha: float = 0.0
) -> Array:
    r"""EMPO's reward, $p_{c(i)}\, [\delta_l < H < \delta_h]$, and TTRV's, $p_{c(i)} - \alpha H$.

    The entropy is the same for the group: with a baseline of the group TTRV's term changes nothing.

    Args:
        answer: `[P, G]` int, as for `answer_share`.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.
        low: $\delta_l$, nats; a group that all agree has nothing to learn in any case.
        high: $\delta_h$, nats; None for the entropy of a group in which no two agree, whose rewards are 0.
        alpha: $\alpha$, at least 0.

    Returns:
        `[P, G]` float32; 0 where not valid, and in groups that are gated out.

    Raises:
        ValueError: as `answer_share`, or if `alpha` is below 0.

    Example:
        >>> empo_reward(jnp.array([[7, 7, 8, 9], [1, 2, 3, 4]])).tolist()
        [[0.5, 0.5, 0.25, 0.25], [0.0, 0.0, 0.0, 0.0]]
        >>> [round(float(r), 4) for r in empo_reward(jnp.array([[7, 7, 8, 9]]), alpha=0.75, high=2.0)[0]]
        [-0.2798, -0.2798, -0.5298, -0.5298]

    References:
        Right Question is Already Half the Answer: Fully Unsupervised LLM Reasoning Incentivization (arXiv 2504.05812);
        TTRV: Test-Time Reinforcement Learning for Vision Language Models (arXiv 2510.06783).
    """
    if isinstance(alpha, float | int) and alpha < 0:
        raise ValueError(f"alpha must be at least 0, got {alpha}")
    answer, there = _answers(answer, valid)
    entropy = semantic_entropy(answer, there)
    count = jnp.maximum(jnp.sum(there, axis=1), 1).astype(jnp.float32)
    # A little below, so that rounding does not let a group through in which no two agree.
    most = jnp.log(count) - 1e-4 if high is None else high
    open_ = ((entropy >= low) if low <= 0 else (entropy > low)) & ((entropy < most) | (count == 1))
    found = answer_share(answer, there) - alpha * entropy[:, None]
    return jnp.where(there & open_[:, None], found, 0.0)


def majority(answer: Array, valid: Array | None = None) -> Array:
    """The answer that most of a group gave, of equally frequent ones the first.

    Args:
        answer: `[P, G]` int, as for `answer_share`.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.

    Returns:
        `[P]` int32; -1 where none can be read.

    Raises:
        ValueError: as `answer_share`.

    Example:
        >>> majority(jnp.array([[3, 3, 5, 7], [-1, -1, -1, 4]])).tolist()
        [3, 4]

    Reference: TTRL: Test-Time Reinforcement Learning (arXiv 2504.16084).
    """
    answer, there = _answers(answer, valid)
    share = jnp.where(there & (answer >= 0), answer_share(answer, there), -1.0)
    best = jnp.argmax(share, axis=1)
    return jnp.where(jnp.max(share, axis=1) > 0, answer[jnp.arange(len(answer)), best], -1).astype(jnp.int32)


def co_reward(
    answer: Array, other: Array, valid: Array | None = None, other_valid: Array | None = None
) -> tuple[Array, Array]:
    """The majority of a question's answers is the label of its paraphrase's, and the other way around.

    Args:
        answer: `[P, G]` int, of the questions, as for `answer_share`.
        other: `[P, G']` int, of their paraphrases, with the same numbers for the same answers.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.
        other_valid: `[P, G']` bool, likewise.

    Returns:
        rewards: `[P, G]` float32, 1 or 0.
        other_rewards: `[P, G']` float32. All are 0 where the other side has no answer that can be read.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> one, two = co_reward(jnp.array([[3, 3, 5, 7]]), jnp.array([[5, 5, 3, 5]]))
        >>> one.tolist(), two.tolist()
        ([[0.0, 0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0, 0.0]])

    Reference: Co-Reward: Self-supervised Reinforcement Learning for Large Language Model Reasoning via Contrastive
    Agreement (arXiv 2508.00410).
    """
    answer, there = _answers(answer, valid)
    other, other_there = _answers(other, other_valid)
    if len(answer) != len(other):
        raise ValueError(f"other must have as many prompts as answer, {len(answer)}, got {len(other)}")

    def agree(x: Array, counts: Array, label: Array) -> Array:
        return ((x == label[:, None]) & (label >= 0)[:, None] & counts).astype(jnp.float32)

    return agree(answer, there, majority(other, other_there)), agree(other, other_there, majority(answer, there))


def paraphrase_consistency(similarity: Array, key: Array | None = None, *, count: int | None = None) -> Array:
    r"""How much an answer is like those to the other paraphrases of its question, never its own.

    $$r_{ij} = \frac{1}{(n - 1) g} \sum_{u \ne i} \sum_m \mathrm{sim}(o_{ij}, o_{um})$$

    Args:
        similarity: `[n, g, n, g]` float in [0, 1], of each answer to each paraphrase with each.
        key: to compare with `count` answers of other paraphrases alone, drawn with replacement, which is unbiased.
        count: see `key`; None for all of them.

    Returns:
        `[n, g]`, float32 or wider; 0 for a single paraphrase.

    Raises:
        ValueError: if the shape does not fit, or only one of `key` and `count` is given.

    Example:
        >>> pairs = jnp.array([[1.0, 0.8, 0.2], [0.8, 1.0, 0.4], [0.2, 0.4, 1.0]])
        >>> [round(float(r), 4) for r in paraphrase_consistency(pairs[:, None, :, None])[:, 0]]
        [0.5, 0.6, 0.3]

    Reference: Improving Consistency in Retrieval-Augmented Systems with Group Similarity Rewards (arXiv 2510.04392).
    """
    similarity = masked.as_float(similarity)
    masked.check_axes("similarity", similarity, "[n, g, n, g]")
    n, g = similarity.shape[:2]
    if similarity.shape[2:] != (n, g):
        raise ValueError(f"similarity must be [n, g, n, g], got {similarity.shape}")
    if (key is None) != (count is None):
        raise ValueError("key and count are read together; give both or neither")
    if n == 1:
        return jnp.zeros((n, g), similarity.dtype)
    others = jnp.broadcast_to(~jnp.eye(n, dtype=bool)[:, None, :, None], similarity.shape).reshape(n, g, -1)
    pairs = similarity.reshape(n, g, -1)
    if key is None or count is None:
        return masked.mean(pairs, others, 2)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    drawn = jax.random.categorical(key, jnp.where(others, 0.0, -jnp.inf), shape=(count, n, g))
    return jnp.mean(jnp.take_along_axis(pairs, jnp.moveaxis(drawn, 0, 2), axis=2), axis=2)


def agreement(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    vote: Vote = "share",
    pattern: str | None = None,
    gate: bool = True,
) -> list[float | None]:
    """A reward without labels: the share of the completions of a prompt that end in the same answer.

    Args:
        prompts: `N` texts; equal ones make a group.
        completions: `N` texts.
        vote: `"share"` (EMPO, TTRV), or `"majority"` (TTRL): 1 for the answer of most, of equals the first.
        pattern: regular expression with one group, the answer, of which the last match counts, e.g.
            `"<answer>(.*?)</answer>"`; None for the whole completion. White space at both ends and case do not count.
        gate: with `"share"`, a group in which no two agree has no reward but 0.

    Returns:
        `N` rewards in [0, 1]; 0 where there is no answer.

    Raises:
        ValueError: for an unknown vote, or a pattern without exactly one group.

    Example:
        >>> agreement(["?"] * 4, ["4", "4 ", "5", "six"])
        [0.5, 0.5, 0.25, 0.25]
        >>> agreement(["?"] * 4, ["4", "4 ", "5", "six"], vote="majority")
        [1.0, 1.0, 0.0, 0.0]

    References:
        Right Question is Already Half the Answer: Fully Unsupervised LLM Reasoning Incentivization (arXiv 2504.05812);
        TTRL: Test-Time Reinforcement Learning (arXiv 2504.16084).
    """
    if vote not in get_args(Vote):
        raise ValueError(f"vote must be one of {', '.join(get_args(Vote))}, got {vote!r}")
    answers = _read(completions, pattern)
    rewards: list[float | None] = [0.0] * len(completions)
    for rows in _by(prompts).values():
        counts = Counter(answers[row] for row in rows if answers[row])
        if not counts or (vote == "share" and gate and len(rows) > 1 and max(counts.values()) == 1):
            continue
        best = counts.most_common(1)[0][0]
        for row in rows:
            if answers[row]:
                same = float(answers[row] == best)
                rewards[row] = same if vote == "majority" else counts[answers[row]] / len(rows)
    return rewards


def cross_agreement(
    prompts: Sequence[str], completions: Sequence[str], question: Sequence[Any], *, pattern: str | None = None
) -> list[float | None]:
    """Co-Reward: 1 where an answer is that of most completions of the question's other wordings, otherwise 0.

    Args:
        prompts: `N` texts.
        completions: `N` texts.
        question: `N` values of a column, the same for all wordings of a question, of which a batch must hold two at
            least.
        pattern: see `agreement`.

    Returns:
        `N` rewards, 1 or 0; None where there is no other wording in the batch.

    Raises:
        ValueError: for a pattern without exactly one group.

    Example:
        >>> cross_agreement(["a", "a", "a'", "a'"], ["3", "5", "5", "5"], question=[1, 1, 1, 1])
        [0.0, 1.0, 0.0, 0.0]

    Reference: Co-Reward: Self-supervised Reinforcement Learning for Large Language Model Reasoning via Contrastive
    Agreement (arXiv 2508.00410).
    """
    answers = _read(completions, pattern)

    def one(row: int, rows: Sequence[int]) -> float | None:
        others = [other for other in rows if prompts[other] != prompts[row]]
        if not others:
            return None
        counts = Counter(answers[other] for other in others if answers[other])
        return float(bool(counts) and answers[row] == counts.most_common(1)[0][0])

    return _of_questions(question, one)


def similarity_across(
    prompts: Sequence[str], completions: Sequence[str], question: Sequence[Any]
) -> list[float | None]:
    """`paraphrase_consistency` of the words of completions to a question's other wordings, by their F1.

    Args:
        prompts: `N` texts.
        completions: `N` texts.
        question: `N` values of a column, the same for all wordings of a question.

    Returns:
        `N` rewards in [0, 1]; None where there is no other wording in the batch.

    Example:
        >>> similarity_across(["a", "a'", "a''"], ["in Paris", "Paris", "Rome"], question=[1, 1, 1])
        [0.333..., 0.333..., 0.0]

    Reference: Improving Consistency in Retrieval-Augmented Systems with Group Similarity Rewards (arXiv 2510.04392),
    which recommends BLEU of one and two words.
    """

    def one(row: int, rows: Sequence[int]) -> float | None:
        others = [completions[other] for other in rows if prompts[other] != prompts[row]]
        if not others:
            return None
        found = word_f1([""] * len(others), [completions[row]] * len(others), others)
        return sum(x for x in found if x is not None) / len(others)

    return _of_questions(question, one)


def _of_questions(question: Sequence[Any], one: Any) -> list[float | None]:
    rewards: list[float | None] = [None] * len(question)
    for rows in _by(map(str, question)).values():
        for row in rows:
            rewards[row] = one(row, rows)
    return rewards


def _by(keys: Any) -> dict[Any, list[int]]:
    """Rows of each key."""
    found: dict[Any, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        found[key].append(row)
    return found


def _read(completions: Sequence[str], pattern: str | None) -> list[str]:
    """The answer of each completion; empty for none."""
    if pattern is None:
        return [text.strip().casefold() for text in completions]
    find = re.compile(pattern, re.DOTALL)
    if find.groups != 1:
        raise ValueError(f"pattern must have exactly one group, the answer, got {pattern!r}")
    return [(find.findall(text) or [""])[-1].strip().casefold() for text in completions]


def _answers(answer: Array, valid: Array | None) -> tuple[Array, Array]:
    answer = jnp.asarray(answer)
    masked.check_axes("answer", answer, "[P, G]", "one number per rollout, the same for the same answer")
    there = jnp.ones(answer.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", there, "answer", answer)
    return answer, there

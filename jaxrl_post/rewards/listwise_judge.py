"""A generative judge of whole lists: a principle, a prompt and all its answers go in, scores and an order come out.

The judge is reached through a function of the caller's, text to text. Here is what is asked, how replies are read, what
a reply earns while the judge itself is trained, and what the answers earn while a policy is.
"""

from __future__ import annotations

import inspect
import json
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.rewards.scoring import Reward
from jaxrl_post.types import Array

LOWEST, HIGHEST = 1.0, 5.0
"""The range of the scores that a judge gives."""


class ListwiseReply(NamedTuple):
    """What a judge said of `k` answers.

    Attributes:
        scores: `k` numbers in the order of the answers as they were given; None for a list that is not complete.
        ranking: the answers' numbers from 0, best first; None for one that is not complete.
        reasoned: whether there was any text before the result.
        parsed: whether there was a result in JSON.
    """

    scores: list[float] | None
    ranking: list[int] | None
    reasoned: bool
    parsed: bool


def listwise_request(principle: str, prompt: str, responses: Sequence[str], *, seed: int = 0) -> tuple[str, list[int]]:
    """What a judge is shown, as JSON: answers under names that say nothing, in an order drawn by a seed.

    Args:
        principle: by what the answers shall be judged.
        prompt: what they answer.
        responses: the answers.
        seed: of the order.

    Returns:
        The text, and for each name in turn which answer it stands for.

    Example:
        >>> text, order = listwise_request("Be brief.", "Hi", ["Hello!", "Good day."], seed=1)
        >>> order, json.loads(text)["responses"]
        ([1, 0], {'model-1': 'Good day.', 'model-2': 'Hello!'})

    Reference: RewardAnything: Generalizable Principle-Following Reward Models (arXiv 2506.03637).
    """
    order = list(range(len(responses)))
    random.Random(seed).shuffle(order)
    named = {_name(place): responses[row] for place, row in enumerate(order)}
    return json.dumps({"principle": principle, "prompt": prompt, "responses": named}, ensure_ascii=False), order


def parse_listwise(text: str, order: Sequence[int]) -> ListwiseReply:
    """Read a judge's reply: reasoning, then JSON with `scores` by name and `best-to-worst`, a list of names.

    The last JSON object with scores counts, whatever stands around it.

    Args:
        text: the reply.
        order: of `listwise_request`.

    Returns:
        What was said. Scores that are no numbers from 1 to 5, or not one for each name, are None; so is an order in
        which not every name stands once.

    Example:
        >>> reply = parse_listwise('B is short. {"scores": {"model-1": 5, "model-2": 3}, '
        ...                        '"best-to-worst": ["model-1", "model-2"]}', [1, 0])
        >>> reply.scores, reply.ranking, reply.reasoned
        ([3.0, 5.0], [1, 0], True)

    Reference: RewardAnything: Generalizable Principle-Following Reward Models (arXiv 2506.03637).
    """
    found, start = _last_object(text)
    if found is None:
        return ListwiseReply(None, None, bool(text.strip()), False)
    row_of = {_name(place): row for place, row in enumerate(order)}
    scores = ranking = None
    given = found["scores"]
    if isinstance(given, dict) and set(given) == set(row_of) and all(map(_is_score, given.values())):
        scores = [float(given[name]) for name in sorted(row_of, key=lambda name: row_of[name])]
    listed = found.get("best-to-worst")
    if isinstance(listed, list) and all(isinstance(name, str) for name in listed) and sorted(listed) == sorted(row_of):
        ranking = [row_of[name] for name in listed]
    return ListwiseReply(scores, ranking, bool(text[:start].strip(" \n`").removesuffix("json").strip(" \n`")), True)


def _name(place: int) -> str:
    return f"model-{place + 1}"


def _is_score(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and LOWEST <= x <= HIGHEST


def _last_object(text: str) -> tuple[dict[str, Any] | None, int]:
    """The last object in a text that has scores, and where it begins."""
    decoder = json.JSONDecoder()
    found, begin, place = None, len(text), text.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            place = text.find("{", place + 1)
            continue
        if isinstance(value, dict) and "scores" in value:
            found, begin = value, place
        place = text.find("{", end)
    return found, begin


def kendall_tau(first: Array, second: Array) -> Array:
    r"""Agreement of two orders, the mean over pairs of $\mathrm{sign}(a_i - a_j)\, \mathrm{sign}(b_i - b_j)$.

    Args:
        first: `[..., K]` float.
        second: of the same shape.

    Returns:
        `[...]`, float32 or wider, in [-1, 1]; a tie in either counts 0. 0 for fewer than two.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> round(float(kendall_tau(jnp.array([5.0, 3.0, 1.0]), jnp.array([3.0, 4.0, 2.0]))), 4)
        0.3333

    Reference: A New Measure of Rank Correlation (Kendall, 1938).
    """
    signs, others = (jnp.sign(lead) for lead in _leads(first, second))
    count = signs.shape[-1]
    return jnp.sum(signs * others, axis=(-2, -1)) / max(count * (count - 1), 1)


def _leads(scores: Array, consensus: Array) -> tuple[Array, Array]:
    """`x_i - x_j` of both, `[..., K, K]`."""
    scores, consensus = masked.as_float(scores), masked.as_float(consensus)
    masked.check_like("the other's scores", consensus, "the scores", scores)
    return scores[..., :, None] - scores[..., None, :], consensus[..., :, None] - consensus[..., None, :]


def order_accuracy(scores: Array, consensus: Array) -> Array:
    r"""How little of the consensus a judge's order reverses, by how much it matters.

    $$a = 1 - \frac{\sum_{\text{reversed}\ (i, j)} |s^*_i - s^*_j|}{\sum_{(i, j)} |s^*_i - s^*_j|}$$

    A pair that the judge ties counts half, as the coin that would decide it; were it not counted, equal scores for all
    would be the best reply.

    Args:
        scores: `[..., K]` float, the judge's.
        consensus: of the same shape, $s^*$.

    Returns:
        `[...]`, float32 or wider, in [0, 1]; 1 where all of the consensus are equal.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> float(order_accuracy(jnp.array([3.0, 4.0, 2.0]), jnp.array([5.0, 3.0, 1.0])))
        0.75

    Reference: RewardAnything: Generalizable Principle-Following Reward Models (arXiv 2506.03637).
    """
    leads, true = _leads(scores, consensus)
    wrong = jnp.where(leads == 0, 0.5, (jnp.sign(leads) != jnp.sign(true)).astype(true.dtype))
    total = jnp.sum(jnp.abs(true), axis=(-2, -1))
    lost = jnp.sum(wrong * jnp.abs(true), axis=(-2, -1))
    return 1 - jnp.where(total > 0, lost / jnp.where(total > 0, total, 1.0), 0.0)


def score_accuracy(scores: Array, consensus: Array) -> Array:
    r"""How near scores from 1 to 5 are to the consensus, $a = 1 - \mathrm{mean}_k |s_k - s^*_k| / 4$.

    The paper has a term for the match of the scores' distribution without its formula; this one is a choice.

    Args:
        scores: `[..., K]` float in [1, 5], the judge's.
        consensus: of the same shape, $s^*$.

    Returns:
        `[...]`, float32 or wider, in [0, 1].

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> round(float(score_accuracy(jnp.array([3.0, 4.0, 2.0]), jnp.array([5.0, 3.0, 1.0]))), 5)
        0.66667

    Reference: RewardAnything: Generalizable Principle-Following Reward Models (arXiv 2506.03637).
    """
    scores, consensus = masked.as_float(scores), masked.as_float(consensus)
    masked.check_like("consensus", consensus, "scores", scores)
    return 1 - jnp.mean(jnp.abs(scores - consensus), axis=-1) / (HIGHEST - LOWEST)


def listwise_reply_reward(
    reply: ListwiseReply,
    consensus: Sequence[float],
    *,
    format_weight: float = 0.1,
    order_weight: float = 0.5,
    score_weight: float = 0.5,
) -> float:
    r"""What a judge's reply earns while the judge is trained, $R = w_f \sum_k f_k + w_o a_{order} + w_s a_{score}$.

    The format terms $f$ are 1 for: reasoning before the result; a result in JSON; one score for every answer; an order
    that agrees with the scores. The paper does not give its weights.

    Args:
        reply: of `parse_listwise`.
        consensus: scores that several other judges agree on, in the order of the answers.
        format_weight: $w_f$, of each format term.
        order_weight: $w_o$, of `order_accuracy`.
        score_weight: $w_s$, of `score_accuracy`.

    Returns:
        The reward; 0 for a reply without a result. Without scores there are format terms alone.

    Raises:
        ValueError: if the reply has another number of scores than the consensus.

    Example:
        >>> reply = ListwiseReply([3.0, 4.0, 2.0], [1, 0, 2], True, True)
        >>> round(listwise_reply_reward(reply, [5, 3, 1]), 5)  # 4 * 0.1 + (0.75 + 0.66667) / 2
        1.10833

    Reference: RewardAnything: Generalizable Principle-Following Reward Models (arXiv 2506.03637).
    """
    if not reply.parsed:
        return 0.0
    scores, ranking = reply.scores, reply.ranking
    kept = False
    if scores is not None and ranking is not None:
        kept = all(scores[i] >= scores[j] for i, j in pairwise(ranking))
    total = format_weight * (reply.reasoned + 1 + (scores is not None) + kept)
    if scores is None:
        return total
    if len(scores) != len(consensus):
        raise ValueError(f"the reply scores {len(scores)} answers, and the consensus {len(consensus)}")
    given, true = jnp.asarray(scores), jnp.asarray(consensus, jnp.float32)
    return total + order_weight * float(order_accuracy(given, true)) + score_weight * float(score_accuracy(given, true))


def consensus_scores(scores: Array, *, threshold: float = 0.5, at_least: int = 3) -> tuple[Array, Array]:
    r"""Mean scores of the judges that agree, and whether enough of them do.

    Args:
        scores: `[J, K]` float, of `J` judges.
        threshold: two judges agree if the `kendall_tau` of their scores is above it.
        at_least: a judge counts if it agrees with so many, itself among them, and a prompt if so many count.

    Returns:
        scores: `[K]`, float32 or wider, mean over the judges that count; 0 if none does.
        keep: scalar bool.

    Raises:
        ValueError: if `scores` is not `[J, K]`.

    Example:
        >>> scores, keep = consensus_scores(jnp.array([[5, 3, 1], [4, 2, 1], [5, 4, 2], [1, 3, 5]]))
        >>> [round(float(s), 4) for s in scores], bool(keep)
        ([4.6667, 3.0, 1.3333], True)

    Reference: RewardAnything: Generalizable Principle-Following Reward Models (arXiv 2506.03637).
    """
    scores = masked.as_float(scores)
    masked.check_axes("scores", scores, "[J, K]")
    each = jnp.broadcast_to(scores[:, None], (scores.shape[0], *scores.shape))
    agree = (kendall_tau(each, jnp.swapaxes(each, 0, 1)) > threshold) | jnp.eye(scores.shape[0], dtype=bool)
    counts = jnp.sum(agree, axis=1) >= at_least
    return masked.mean(scores, counts[:, None], 0), jnp.sum(counts) >= at_least


def from_listwise_judge(
    ask: Callable[[list[str]], Any], principle: str, *, seed: int = 0, tie_break: float = 0.5
) -> Reward:
    r"""A reward from a list-wise judge, $r_i = s_i + c\, (k - \mathrm{rank}_i) / (k + 1)$ over the answers to a prompt.

    The rank, from 1 for the best, parts answers of equal score; with $c$ below 1 it never overrules a whole point.

    Args:
        ask: the texts of `listwise_request` to as many replies; it may be a coroutine function. It is called once.
        principle: by what the answers shall be judged.
        seed: of the orders in which the answers are shown.
        tie_break: $c$, in points of score; 0 where the scores alone shall count.

    Returns:
        `reward(prompts, completions)`. All answers to a prompt have None where the reply could not be read; where it
        has scores and no order, the scores count alone.

    Raises:
        ValueError: if `tie_break` is not in [0, 1].

    Example:
        >>> def brevity(texts):
        ...     lists = [json.loads(text)["responses"] for text in texts]
        ...     orders = [sorted(shown, key=lambda name: len(shown[name])) for shown in lists]
        ...     return [json.dumps({"scores": dict.fromkeys(o, 3), "best-to-worst": o}) for o in orders]
        >>> from_listwise_judge(brevity, "Be brief.")(["?", "?", "!"], ["long", "no", "yes"])
        [3.0, 3.1666666666666665, 3.0]

    Reference: RewardAnything: Generalizable Principle-Following Reward Models (arXiv 2506.03637).
    """
    if not 0 <= tie_break <= 1:
        raise ValueError(f"tie_break must be in [0, 1], got {tie_break}; above it the order would overrule the scores")

    def requests(prompts: Sequence[str], completions: Sequence[str]) -> list[tuple[list[int], str, list[int]]]:
        """For each prompt its rows, the text and the order in which they are shown."""
        groups: dict[str, list[int]] = defaultdict(list)
        for row, prompt in enumerate(prompts):
            groups[prompt].append(row)
        found = []
        for number, (prompt, rows) in enumerate(groups.items()):
            text, order = listwise_request(principle, prompt, [completions[r] for r in rows], seed=seed + number)
            found.append((rows, text, order))
        return found

    def read(asked: list[tuple[list[int], str, list[int]]], replies: Sequence[str], size: int) -> list[float | None]:
        if len(replies) != len(asked):
            raise ValueError(f"the judge was asked {len(asked)} times and gave {len(replies)} replies")
        result: list[float | None] = [None] * size
        for (rows, _, order), text in zip(asked, replies, strict=True):
            reply = parse_listwise(text, order)
            if reply.scores is None:
                continue
            for number, row in enumerate(rows):
                behind = 0 if reply.ranking is None else len(rows) - 1 - reply.ranking.index(number)
                result[row] = reply.scores[number] + tie_break * behind / (len(rows) + 1)
        return result

    if not (inspect.iscoroutinefunction(ask) or inspect.iscoroutinefunction(getattr(ask, "__call__", None))):  # noqa: B004

        def reward(prompts: Sequence[str], completions: Sequence[str]) -> list[float | None]:
            asked = requests(prompts, completions)
            return read(asked, ask([text for _, text, _ in asked]), len(prompts))

        return reward

    async def reward_async(prompts: Sequence[str], completions: Sequence[str]) -> list[float | None]:
        asked = requests(prompts, completions)
        return read(asked, await ask([text for _, text, _ in asked]), len(prompts))

    return reward_async

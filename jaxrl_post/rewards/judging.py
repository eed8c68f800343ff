"""A judge of pairs as a reward function: an answer earns its win rate against others to the same prompt."""

from __future__ import annotations

import inspect
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from jaxrl_post.rewards.scoring import Reward, pick


def from_judge(judge: Callable[..., Any], *, both_orders: bool = True, against: str | None = None) -> Reward:
    r"""A reward from comparisons, $r_i = \mathrm{mean}_{j \ne i} P(i \succ j)$ over answers to the same prompt.

    With `against` each answer is compared with a given one alone, $r_i = P(i \succ y_{\text{anchor}})$, so that rewards
    mean the same for all prompts and a group of one has one too.

    Args:
        judge: `(prompts, first, second, **columns) -> list[float | None]`: for each pair of completions the probability
            that the first is better; None where it cannot be said. It names those columns of the data that it reads,
            and may be a coroutine function. It is called once with all pairs of a batch.
        both_orders: show each pair both ways around and take the mean, so that a judge's liking for the first place
            cancels.
        against: column of the data with the anchor, an answer that stays the same while the policy trains, e.g. the
            true one or that of the first policy; None for the other completions of the group.

    Returns:
        `reward(prompts, completions, **columns)`. Equal answers are not shown: neither wins. An answer that is compared
        with none, for want of others or of judgements, has None.

    Example:
        >>> def longer(prompts, first, second):
        ...     return [float(len(a) > len(b)) for a, b in zip(first, second)]
        >>> from_judge(longer)(["?", "?", "?"], ["a", "abc", "ab"])
        [0.0, 1.0, 0.5]

        >>> from_judge(longer, against="anchor")(["?", "!"], ["a", "abc"], anchor=["ab", "ab"])
        [0.0, 1.0]

    References: A Minimaximalist Approach to Reinforcement Learning from Human Feedback (arXiv 2401.04056); with an
    anchor, A Unified Pairwise Framework for RLHF: Bridging Generative Reward Modeling and Policy Optimization
    (arXiv 2504.04950).
    """
    parameters = inspect.signature(judge).parameters

    def anchors(columns: dict[str, Sequence[Any]]) -> Sequence[str]:
        if against is None:
            return []
        if against not in columns:
            have = ", ".join(sorted(columns)) or "none"
            raise ValueError(f"against={against!r} names no column of the data; there are {have}")
        return columns[against]

    def asked(
        prompts: Sequence[str], completions: Sequence[str], columns: dict[str, Sequence[Any]]
    ) -> tuple[list[tuple[int, int]], dict[str, Any]]:
        """The rows that are compared, and what the judge is given. Anchors are numbered on from the completions."""
        rows = len(prompts)
        texts = [*completions, *anchors(columns)]
        if against is not None:
            pairs = [(row, rows + row) for row in range(rows)]
        else:
            groups = defaultdict(list)
            for row, prompt in enumerate(prompts):
                groups[prompt].append(row)
            pairs = [pair for members in groups.values() for pair in combinations(members, 2)]
        pairs = [(i, j) for i, j in pairs if texts[i] != texts[j]]
        if both_orders:
            pairs += [(j, i) for i, j in pairs]
        available = {name: [values[i % rows] for i, _ in pairs] for name, values in columns.items()}
        available |= {"prompts": [prompts[i % rows] for i, _ in pairs]}
        available |= {"first": [texts[i] for i, _ in pairs], "second": [texts[j] for _, j in pairs]}
        chosen, missing = pick(parameters, available)
        if missing:
            raise ValueError(
                f"the judge needs {', '.join(map(repr, missing))}; there are {', '.join(sorted(available))}"
            )
        return pairs, chosen

    def rates(
        prompts: Sequence[str],
        completions: Sequence[str],
        columns: dict[str, Sequence[Any]],
        pairs: list[tuple[int, int]],
        judged: Sequence[float | None],
    ) -> list[float | None]:
        if len(judged) != len(pairs):
            raise ValueError(f"the judge was shown {len(pairs)} pairs and returned {len(judged)} judgements")
        opponents = anchors(columns)
        seen: list[list[float]] = [[] for _ in (*completions, *opponents)]
        for (i, j), probability in zip(pairs, judged, strict=True):
            if probability is None:
                continue
            if not 0 <= probability <= 1:
                raise ValueError(f"a judgement is a probability in [0, 1], or None, got {probability!r}")
            seen[i].append(float(probability))
            seen[j].append(1 - float(probability))
        times = 2 if both_orders else 1
        same = Counter(zip(prompts, completions, strict=True))
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            equal = same[prompt, completion] - 1 if against is None else completion == opponents[row]
            seen[row] += [0.5] * (times * equal)
        return [sum(found) / len(found) if found else None for found in seen[: len(completions)]]

    if not (inspect.iscoroutinefunction(judge) or inspect.iscoroutinefunction(getattr(judge, "__call__", None))):  # noqa: B004

        def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
            pairs, given = asked(prompts, completions, columns)
            return rates(prompts, completions, columns, pairs, judge(**given) if pairs else [])

        return reward

    async def reward_async(
        prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None]:
        pairs, given = asked(prompts, completions, columns)
        return rates(prompts, completions, columns, pairs, await judge(**given) if pairs else [])

    return reward_async

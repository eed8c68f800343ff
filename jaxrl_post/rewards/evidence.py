"""Whether a completion names the passages that its answer rests on."""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Sequence
from typing import Any

_BLOCK = re.compile(r"<useful_chunks>(.*?)</useful_chunks>", re.DOTALL | re.IGNORECASE)
_OPEN = re.compile(r"<useful_chunks>", re.IGNORECASE)


def evidence_score(named: Sequence[Hashable], gold: Collection[Hashable], *, beta: float = 2.0) -> float:
    r"""F-beta of named evidence, $F_\beta = \frac{(1 + \beta^2) P R}{\beta^2 P + R}$; above 1 $\beta$ favours recall.

    Args:
        named: what was named, in any order; what is named twice lowers the precision $P$.
        gold: what there was to be named; $R$ is the share of it that was.
        beta: $\beta$, above 0.

    Returns:
        In [0, 1]; 0 where either is empty.

    Raises:
        ValueError: if `beta` is not above 0.

    Example:
        >>> round(evidence_score([0, 1, 2], {0, 5}), 5)
        0.45455

    Reference: LongRLVR: Long-Context Reinforcement Learning Requires Verifiable Context Rewards (arXiv 2603.02146).
    """
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}; 2 favours recall")
    wanted = set(gold)
    found = len(wanted.intersection(named))
    if not found:
        return 0.0
    precision, recall = found / len(named), found / len(wanted)
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def evidence(prompts: Sequence[str], completions: Sequence[str], evidence: Sequence[Any]) -> list[float | None]:
    """`evidence_score` of the numbers in a completion's one `<useful_chunks>` block, 0 without exactly one.

    Args:
        prompts: `N` texts; not looked at.
        completions: `N` texts that name passages by number, such as `<useful_chunks>0, 3</useful_chunks>`.
        evidence: `N` lists of the right numbers.

    Returns:
        `N` rewards in [0, 1]; None where there are no right numbers.

    Example:
        >>> evidence(["", ""], ["<useful_chunks>[0, 5]</useful_chunks> 42", "42"], [[0, 5], [1]])
        [1.0, 0.0]

    Reference: LongRLVR: Long-Context Reinforcement Learning Requires Verifiable Context Rewards (arXiv 2603.02146).
    """
    del prompts

    def one(completion: str, right: Any) -> float | None:
        if isinstance(right, str | bytes) or not hasattr(right, "__iter__"):
            return None
        try:
            gold = {int(number) for number in right}
        except (TypeError, ValueError):
            return None
        if not gold:
            return None
        blocks = _BLOCK.findall(completion)
        if len(blocks) != 1 or len(_OPEN.findall(completion)) != 1:
            return 0.0
        return evidence_score([int(number) for number in re.findall(r"\d{1,9}", blocks[0])], gold)

    return [one(*row) for row in zip(completions, evidence, strict=True)]

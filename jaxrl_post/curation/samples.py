"""Which of a prompt's answers to learn from: those whose scores can be trusted, and as many right ones as wrong."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array

RankFilter: TypeAlias = Literal["best", "best_random", "best_worst"]
BatchFilter: TypeAlias = Literal["power", "max_min", "max_random"]
ExitRule: TypeAlias = Literal["positive", "balance"]


def rank_filter(rewards: Array, valid: Array | None = None, *, keep: RankFilter, key: Array | None = None) -> Array:
    """Which answers of each group to keep by their rank, where a reward model is most often right about the extremes.

    Args:
        rewards: `[P, G]` float.
        valid: `[P, G]` bool, False where the answer does not count; None for all.
        keep: `"best"`; `"best_random"`, the best and any other; or `"best_worst"`.
        key: for the random one.

    Returns:
        `[P, G]` bool. Of equal rewards the first counts as the best and the last as the worst.

    Raises:
        ValueError: if the shapes do not fit, for an unknown filter, or a random one without a key.

    Example:
        >>> rank_filter(jnp.array([[1.0, -2.0, 3.0]]), keep="best_worst").tolist()
        [[False, True, True]]

    Reference: Policy Filtration in RLHF to Fine-Tune LLM for Code Generation (arXiv 2409.06957).
    """
    if keep not in get_args(RankFilter):
        raise ValueError(f"keep must be one of {', '.join(get_args(RankFilter))}, got {keep!r}")
    rewards, there = _rewards(rewards, valid)
    places = jnp.arange(rewards.shape[1])
    best = there & (places == jnp.argmax(jnp.where(there, rewards, -jnp.inf), axis=1, keepdims=True))
    if keep == "best":
        return best
    if keep == "best_random":
        if key is None:
            raise ValueError("keep='best_random' needs a key")
        order = jnp.where(there & ~best, jax.random.uniform(key, rewards.shape), 2.0)
        return best | (there & ~best & (places == jnp.argmin(order, axis=1, keepdims=True)))
    backwards = jnp.where(there, rewards, jnp.inf)[:, ::-1]
    last = rewards.shape[1] - 1 - jnp.argmin(backwards, axis=1, keepdims=True)
    return best | (there & (places == last))


def batch_filter(
    rewards: Array, valid: Array | None = None, *, form: BatchFilter = "power", exponent: float = 2.0
) -> Array:
    r"""Probabilities of drawing answers of the whole batch again, by how extreme their rewards are.

    | form | weight |
    | --- | --- |
    | `power` | $|r|^k$ |
    | `max_min` | 1 at the batch's largest and smallest reward, 0 elsewhere |
    | `max_random` | 0.4 at the largest, 0.1 elsewhere |

    Args:
        rewards: `[P, G]` float.
        valid: `[P, G]` bool, False where the answer does not count; None for all.
        form: see the table.
        exponent: $k$.

    Returns:
        `[P, G]`, float32 or wider; sums to 1, or is 0 if nothing counts.

    Raises:
        ValueError: if the shapes do not fit or for an unknown form.

    Example:
        >>> [round(float(p), 4) for p in batch_filter(jnp.array([[1.0, -2.0, 3.0]]))[0]]
        [0.0714, 0.2857, 0.6429]

    Reference: Policy Filtration in RLHF to Fine-Tune LLM for Code Generation (arXiv 2409.06957), in the form of verl.
    """
    if form not in get_args(BatchFilter):
        raise ValueError(f"form must be one of {', '.join(get_args(BatchFilter))}, got {form!r}")
    rewards, there = _rewards(rewards, valid)
    if form == "power":
        weight = jnp.abs(rewards) ** exponent
    else:
        largest = rewards == masked.max(rewards, there)
        smallest = rewards == masked.min(rewards, there)
        weight = (largest | smallest) * 1.0 if form == "max_min" else jnp.where(largest, 0.4, 0.1)
    weight = jnp.where(there, jnp.maximum(weight, 1e-8), 0.0)
    return weight / jnp.maximum(jnp.sum(weight), 1e-30)


def filter_r2(rewards: Array, truth: Array, keep: Array) -> Array:
    r"""How well a line through the kept rewards explains the truth, $R^2$: the filter with the largest is to be used.

    Args:
        rewards: `[P, G]` float, of the reward model.
        truth: `[P, G]` float, the true scores of held-out answers.
        keep: `[P, G]`, weights at least 0.

    Returns:
        Scalar, float32 or wider, at most 1; 0 where either does not vary.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> rewards, truth = jnp.array([[1.0, 2.0, 9.0]]), jnp.array([[1.0, 2.0, 3.0]])
        >>> round(filter_r2(rewards, truth, jnp.array([[1, 1, 0]])).item(), 4)
        1.0

    Reference: Policy Filtration in RLHF to Fine-Tune LLM for Code Generation (arXiv 2409.06957).
    """
    rewards, truth, keep = masked.as_float(rewards), masked.as_float(truth), masked.as_float(keep)
    masked.check_like("truth", truth, "rewards", rewards)
    masked.check_like("keep", keep, "rewards", rewards)
    x, y = masked.center(rewards, keep), masked.center(truth, keep)
    spread = jnp.sum(keep * x * x) * jnp.sum(keep * y * y)
    return jnp.where(spread > 0, jnp.square(jnp.sum(keep * x * y)) / jnp.where(spread > 0, spread, 1.0), 0.0)


def process_consistency(
    process: Array,
    exists: Array,
    correct: Array,
    valid: Array | None = None,
    *,
    keep: int,
    max_steps: int = 30,
    penalty: float = 10.0,
) -> Array:
    r"""PROF: a process reward model says which answers to drop, never how good they are.

    Right answers and wrong ones are ranked by themselves, by $c = \pm(2 \bar v - 1)$, so that right ones with poor
    steps and wrong ones with good steps go first; as many of each go as leave the two in balance.

    Args:
        process: `[P, G, S]` float in [0, 1], $v$: scores of the steps.
        exists: `[P, G, S]`, nonzero where there is a step with a score.
        correct: `[P, G]`, nonzero where the answer is right.
        valid: `[P, G]` bool, False where the answer does not count; None for all.
        keep: answers to keep of each prompt.
        max_steps: answers with more steps than this, or with one alone, are dropped first.
        penalty: what they lose of $c$.

    Returns:
        `[P, G]` bool. Halves are rounded to the even number, of equal answers the first goes.

    Raises:
        ValueError: if the shapes do not fit, or `keep` is not in `[1, G]`.

    Example:
        >>> right, wrong = [0.9, 0.8, 0.6, 0.5, 0.2], [0.1, 0.3, 0.7]
        >>> scores = jnp.repeat(jnp.array([right + wrong])[..., None], 2, axis=2)
        >>> kept = process_consistency(scores, jnp.ones((1, 8, 2)), jnp.array([[1] * 5 + [0] * 3]), keep=4)
        >>> kept.astype(int).tolist()
        [[1, 1, 0, 0, 0, 1, 1, 0]]

    Reference: Beyond Correctness: Harmonizing Process and Outcome Rewards through RL Training (arXiv 2509.03403).
    """
    process, exists = masked.as_float(process), jnp.asarray(exists) != 0
    masked.check_axes("process", process, "[P, G, S]")
    masked.check_like("exists", exists, "process", process)
    correct = jnp.asarray(correct) != 0
    masked.check_like("correct", correct, "the answers of process", process[..., 0])
    there = jnp.ones(correct.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", there, "correct", correct)
    if not 1 <= keep <= correct.shape[1]:
        raise ValueError(f"keep must be between 1 and G={correct.shape[1]}, got {keep}")
    steps = jnp.sum(exists, axis=2)
    mean = masked.mean(2 * process - 1, exists, 2)
    agree = jnp.where(correct, mean, -mean) - penalty * ((steps < 2) | (steps > max_steps))

    right, wrong = there & correct, there & ~correct
    count_right, count_wrong = jnp.sum(right, axis=1), jnp.sum(wrong, axis=1)
    drop = jnp.maximum(count_right + count_wrong - keep, 0)
    drop_right = jnp.minimum(drop, jnp.round((count_right - count_wrong + drop) / 2).astype(jnp.int32))
    drop_right = jnp.clip(drop_right, 0, count_right)
    drop_wrong = jnp.minimum(drop - drop_right, count_wrong)
    lost = (right & (_rank(agree, right) < drop_right[:, None])) | (wrong & (_rank(agree, wrong) < drop_wrong[:, None]))
    return there & ~lost


def _rank(x: Array, among: Array) -> Array:
    """`[P, G]`: how many of those among are smaller, or equal and before."""
    places = jnp.arange(x.shape[1])
    smaller = (x[:, None, :] < x[:, :, None]) | ((x[:, None, :] == x[:, :, None]) & (places < places[:, None]))
    return jnp.sum(smaller & among[:, None, :], axis=2)


def pool_finished(positive: Array, negative: Array, *, keep: int, rule: ExitRule = "balance") -> Array:
    """Whether a prompt needs no more answers: there is a right one, or enough of both kinds to keep half of each.

    Args:
        positive: any shape, int: right answers so far.
        negative: the same shape: wrong ones.
        keep: answers that will be kept.
        rule: `"positive"` or `"balance"`.

    Returns:
        The shape of `positive`, bool.

    Raises:
        ValueError: if the shapes differ, for an unknown rule, or if `keep` is below 2.

    Example:
        >>> pool_finished(jnp.array([1, 2]), jnp.array([9, 2]), keep=4).tolist()
        [False, True]

    Reference: Reinforce-Ada: An Adaptive Sampling Framework for Reinforce-Style LLM Training (arXiv 2510.04996).
    """
    if rule not in get_args(ExitRule):
        raise ValueError(f"rule must be one of {', '.join(get_args(ExitRule))}, got {rule!r}")
    if keep < 2:
        raise ValueError(f"keep must be at least 2, got {keep}")
    positive, negative = jnp.asarray(positive), jnp.asarray(negative)
    masked.check_like("negative", negative, "positive", positive)
    if rule == "positive":
        return positive >= 1
    return (positive >= keep // 2) & (negative >= keep - keep // 2)


def balanced(correct: Array, valid: Array | None = None, *, keep: int) -> Array:
    """The first answers of each prompt, half of them right and half wrong as far as there are enough of both.

    Args:
        correct: `[P, G]`, nonzero where the answer is right.
        valid: `[P, G]` bool, False where the answer does not count; None for all.
        keep: answers to keep.

    Returns:
        `[P, G]` bool.

    Raises:
        ValueError: if the shapes differ, or `keep` is not in `[2, G]`.

    Example:
        >>> balanced(jnp.array([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1]]), keep=4).astype(int).tolist()
        [[1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 1]]

    Reference: Reinforce-Ada: An Adaptive Sampling Framework for Reinforce-Style LLM Training (arXiv 2510.04996).
    """
    correct = jnp.asarray(correct) != 0
    masked.check_axes("correct", correct, "[P, G]")
    there = jnp.ones(correct.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", there, "correct", correct)
    if not 2 <= keep <= correct.shape[1]:
        raise ValueError(f"keep must be between 2 and G={correct.shape[1]}, got {keep}")
    right, wrong = there & correct, there & ~correct
    count_right, count_wrong = (jnp.sum(x, axis=1, keepdims=True) for x in (right, wrong))
    take_right = jnp.minimum(keep // 2, count_right)
    take_wrong = jnp.minimum(keep - take_right, count_wrong)
    take_right = jnp.minimum(keep - take_wrong, count_right)
    return (right & (jnp.cumsum(right, axis=1) <= take_right)) | (wrong & (jnp.cumsum(wrong, axis=1) <= take_wrong))


def _rewards(rewards: Array, valid: Array | None) -> tuple[Array, Array]:
    rewards = masked.as_float(rewards)
    masked.check_axes("rewards", rewards, "[P, G]")
    there = jnp.ones(rewards.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", there, "rewards", rewards)
    return rewards, there

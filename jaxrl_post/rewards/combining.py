"""One reward from several, where a plain sum would let the easy ones outweigh what matters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array

Ladder: TypeAlias = Literal["linear", "amplified"]


def verified_score(score: Array, correct: Array, *, alpha: float = 0.5) -> Array:
    r"""A reward model's score within the verdict of a verifier, $r = \sigma(\alpha s) + (c - 1)$.

    Every right answer is in (0, 1) and every wrong one in (-1, 0), so that no score lifts a wrong answer above a right
    one; within each class the score ranks them, also in groups that are all wrong.

    Args:
        score: any shape, float, of a reward model.
        correct: the same shape, 1 where a verifier finds the answer right, else 0.
        alpha: $\alpha$, above 0, per unit of the score.

    Returns:
        The shape of `score`, float32 or wider.

    Raises:
        ValueError: if the shapes differ, or `alpha` is not above 0.

    Example:
        >>> [round(float(r), 5) for r in verified_score(jnp.array([2.0, 2.0]), jnp.array([1, 0]))]
        [0.73106, -0.26894]

    Reference: Qwen2.5-Math Technical Report: Toward Mathematical Expert Model via Self-Improvement (arXiv 2409.12122).
    """
    if isinstance(alpha, float | int) and not alpha > 0:
        raise ValueError(f"alpha must be above 0, got {alpha}; the report takes 0.5")
    score, correct = masked.as_float(score), masked.as_float(correct)
    masked.check_like("correct", correct, "score", score)
    # Of a wrong answer -sigmoid(-x), which does not round to 0 before the right ones do.
    return jnp.where(correct > 0, jax.nn.sigmoid(alpha * score), -jax.nn.sigmoid(-alpha * score))


def gated_sum(levels: Sequence[Array], gates: Sequence[float] | None = None) -> Array:
    r"""Rewards by priority: an easy one counts only where all that matter more have passed their gates.

    $$R = \sum_k o_k R_k, \qquad o_k = \prod_{j > k} [R_j > g_j]$$

    Args:
        levels: arrays of one shape, float, from the least important (the format, say) to the most (the outcome).
        gates: $g_j$ of each level, which is open above it; None for 0. That of the first plays no part.

    Returns:
        The shape of a level, float32 or wider. Each level is a sum over an episode, or, where the more important ones
        are the same at all its turns, of one turn.

    Raises:
        ValueError: if there is no level, the shapes differ, or there is not a gate for each.

    Example:
        >>> form, tool, outcome = jnp.array([0.2, 0.2]), jnp.array([0.3, 0.3]), jnp.array([0.0, 1.0])
        >>> gated_sum([form, tool, outcome]).tolist()
        [0.0, 1.5]

    Reference: Stabilizing Long-term Multi-turn Reinforcement Learning with Gated Rewards (arXiv 2508.10548).
    """
    if not levels:
        raise ValueError("levels must hold at least one array of rewards")
    gates = (0.0,) * len(levels) if gates is None else tuple(gates)
    if len(gates) != len(levels):
        raise ValueError(f"gates must hold one number for each of {len(levels)} levels, got {len(gates)}")
    rewards = [masked.as_float(level) for level in levels]
    for reward in rewards[:-1]:
        masked.check_like("levels", reward, "the last level", rewards[-1])
    total, is_open = jnp.zeros_like(rewards[-1]), jnp.ones(rewards[-1].shape, bool)
    for reward, gate in zip(reversed(rewards), reversed(gates), strict=True):
        total = total + jnp.where(is_open, reward, 0.0)
        is_open &= reward > gate
    return total


def sweet_spot(
    correct: Array, proximity: Array, *, zones: int = 4, alpha: float = 0.5, ladder: Ladder = "linear"
) -> Array:
    r"""A verdict, and a few steps of how near an answer came, so that small differences make none.

    $$r = c + \alpha S, \qquad z = \min(K - 1, \lfloor K s \rfloor), \quad S = \frac{z}{K - 1} \text{ or }
    \frac{2^z - 1}{2^{K - 1} - 1}$$

    Args:
        correct: any shape, 1 where the answer is right, else 0.
        proximity: the same shape, float in [0, 1], $s$: how near it came, of its steps the mean (of a point, say,
            $e^{-d^2 / 2}$ of its distance in sizes of the target; of a puzzle the share of blocks that match).
        zones: $K$; 1 leaves the verdict alone, many give a continuous reward.
        alpha: $\alpha$, at least 0; below 1 every right answer stays above every wrong one.
        ladder: `"linear"`, or `"amplified"`, whose steps double.

    Returns:
        The shape of `correct`, float32 or wider.

    Raises:
        ValueError: if the shapes differ, `zones` is below 1, `alpha` is below 0, or for an unknown ladder.

    Example:
        >>> for ladder in ("linear", "amplified"):
        ...     print(round(float(sweet_spot(jnp.zeros(()), jnp.float32(0.7), ladder=ladder)), 5))
        0.33333
        0.21429

    Reference: SSL: Sweet Spot Learning for Differentiated Guidance in Agentic Optimization (arXiv 2601.22491). The
    values of its zones were not to be seen: the ladders are those that it describes.
    """
    if zones < 1:
        raise ValueError(f"zones must be at least 1, got {zones}")
    if isinstance(alpha, float | int) and alpha < 0:
        raise ValueError(f"alpha must be at least 0, got {alpha}")
    if ladder not in get_args(Ladder):
        raise ValueError(f"ladder must be one of {', '.join(get_args(Ladder))}, got {ladder!r}")
    correct, proximity = masked.as_float(correct), masked.as_float(proximity)
    masked.check_like("proximity", proximity, "correct", correct)
    if zones == 1:
        return correct
    zone = jnp.clip(jnp.floor(zones * proximity), 0, zones - 1)
    share = zone / (zones - 1) if ladder == "linear" else (2.0**zone - 1) / (2.0 ** (zones - 1) - 1)
    return correct + alpha * share


def flawed_success(correct: Array, flawed: Array, *, penalty: float = 1.0) -> Array:
    r"""A right answer that was reached by flawed reasoning earns less, a wrong one -1.

    $$r = 1 \text{ if right and sound},\quad 1 - \lambda \text{ if right and flawed},\quad -1 \text{ if wrong}$$

    With $\lambda = 1$ the flawed answers of a group have a positive advantage while more are wrong than sound, and
    a negative one afterwards: a warm-up that ends by itself.

    Args:
        correct: any shape, above 0 where the answer is right.
        flawed: the same shape, above 0 where a critic of the reasoning found an error.
        penalty: $\lambda$, at least 0; 0 is the outcome alone.

    Returns:
        The shape of `correct`, float32 or wider.

    Raises:
        ValueError: if the shapes differ, or `penalty` is below 0.

    Example:
        >>> flawed_success(jnp.array([1, 1, 0, 0]), jnp.array([0, 1, 0, 1])).tolist()
        [1.0, 0.0, -1.0, -1.0]

    Reference: FAPO: Flawed-Aware Policy Optimization for Efficient and Reliable Reasoning (arXiv 2510.22543).
    """
    if isinstance(penalty, float | int) and penalty < 0:
        raise ValueError(f"penalty must be at least 0, got {penalty}")
    correct, flawed = masked.as_float(correct), masked.as_float(flawed)
    masked.check_like("flawed", flawed, "correct", correct)
    return jnp.where(correct > 0, jnp.where(flawed > 0, 1.0 - penalty, 1.0), -1.0).astype(correct.dtype)


def base_and_bonus(base: Array, bonus: Array, *, base_weight: float = 0.6) -> Array:
    r"""What is necessary times what is only desirable, $r = a (w + (1 - w) b)$.

    A sum would pay an answer for $b$ alone, such as an editor for leaving an image as it is.

    Args:
        base: any shape, float in [0, 1], $a$: the task was done.
        bonus: the same shape, float in [0, 1], $b$: it was done well.
        base_weight: $w$ in [0, 1], the share that a base without bonus earns.

    Returns:
        The shape of `base`, float32 or wider.

    Raises:
        ValueError: if the shapes differ, or `base_weight` is outside [0, 1].

    Example:
        >>> [round(float(r), 4) for r in base_and_bonus(jnp.array([0.9, 0.1]), jnp.array([0.5, 1.0]))]
        [0.72, 0.1]

    Reference: Trust Your Critic: Robust Reward Modeling and Reinforcement Learning for Faithful Image Editing and
    Generation (arXiv 2603.12247), which takes 0.6 for edits (execution, consistency) and 0.4 for generation (following
    the instruction, quality).
    """
    if isinstance(base_weight, float | int) and not 0 <= base_weight <= 1:
        raise ValueError(f"base_weight must be in [0, 1], got {base_weight}")
    base, bonus = masked.as_float(base), masked.as_float(bonus)
    masked.check_like("bonus", bonus, "base", base)
    return base * (base_weight + (1 - base_weight) * bonus)


def grounded_answer(answer: Array, grounding: Array, *, eta: float = 0.1) -> Array:
    r"""An answer, and the evidence it names, which counts mostly where the answer is right.

    $$r = a + \eta F + (1 - \eta)\, a F$$

    Args:
        answer: any shape, float in [0, 1], $a$: 1 where the answer is right.
        grounding: the same shape, float in [0, 1], $F$: how well the evidence was chosen, see `rewards.evidence_score`.
        eta: $\eta$ in [0, 1], the share that evidence earns without a right answer.

    Returns:
        The shape of `answer`, in [0, 2], float32 or wider.

    Raises:
        ValueError: if the shapes differ, or `eta` is outside [0, 1].

    Example:
        >>> [round(float(r), 5) for r in grounded_answer(jnp.array([1.0, 0.0]), jnp.full(2, 5 / 11))]
        [1.45455, 0.04545]

    Reference: LongRLVR: Long-Context Reinforcement Learning Requires Verifiable Context Rewards (arXiv 2603.02146).
    """
    if isinstance(eta, float | int) and not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    answer, grounding = masked.as_float(answer), masked.as_float(grounding)
    masked.check_like("grounding", grounding, "answer", answer)
    return answer + grounding * (eta + (1 - eta) * answer)


def trust(outcome: Array, score: Array, valid: Array | None = None, *, correct_above: float = 0.5) -> Array:
    r"""How far a score of the reasoning is to be trusted in a group: less where it likes its wrong answers better.

    $$\gamma = \min(1, e^{\mu_+ - \mu_-}), \qquad \mu_\pm = \text{mean score of the right, of the wrong answers}$$

    Args:
        outcome: `[P, G]` float, rewards of the outcome.
        score: `[P, G]` float, most often in [0, 1].
        valid: `[P, G]` bool, False where an answer does not count; None for all.
        correct_above: an answer whose outcome is above this is right.

    Returns:
        `[P]` in (0, 1], float32 or wider; 1 where all answers are right, or all wrong.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> round(trust(jnp.array([[1.0, 0.0]]), jnp.array([[0.2, 0.8]])).item(), 5)
        0.54881

    Reference: SophiaVL-R1: Reinforcing MLLMs Reasoning with Thinking Reward (arXiv 2505.17018).
    """
    outcome, score = masked.as_float(outcome), masked.as_float(score)
    masked.check_axes("outcome", outcome, "[P, G]")
    masked.check_like("score", score, "outcome", outcome)
    counts = jnp.ones(outcome.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", counts, "outcome", outcome)
    right, wrong = counts & (outcome > correct_above), counts & ~(outcome > correct_above)
    both = jnp.any(right, axis=1) & jnp.any(wrong, axis=1)
    gap = masked.mean(score, right, 1) - masked.mean(score, wrong, 1)
    return jnp.where(both, jnp.exp(jnp.minimum(jnp.where(both, gap, 0.0), 0.0)), 1.0)

"""Rewards and penalties for the length of an answer by itself, as pure numbers from lengths.

They are shaped like their arguments and work inside `jit`; lengths are tokens of the answer. Lengths compared with the
other answers to the same prompt are in `relative_length`.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def _check_lengths(max_length: float, buffer: float | None = None) -> None:
    if max_length <= 0:
        raise ValueError(f"max_length must be above 0 tokens, got {max_length}")
    if buffer is not None and not 0 < buffer <= max_length:
        raise ValueError(f"buffer must be above 0 and at most max_length={max_length} tokens, got {buffer}")


def soft_overlong(
    lengths: Array, *, max_length: float, buffer: float, factor: float = 1.0, bounded: bool = True
) -> Array:
    r"""Soft overlong punishment of DAPO: a penalty that grows over the last tokens of the allowed length.

    $$r = -\mathrm{factor} \cdot \mathrm{clip}\Big(\frac{L - (L_{max} - L_{buffer})}{L_{buffer}}, 0, 1\Big)$$

    It is added to the task's reward, so that an answer cut at the limit is not simply noise.

    Args:
        lengths: any shape, int or float, tokens of each answer.
        max_length: $L_{max}$, tokens.
        buffer: $L_{buffer}$, tokens before the limit over which the penalty grows.
        factor: the largest penalty, in units of the reward.
        bounded: False lets it grow past `max_length`, as some systems do; that matters only if answers may be longer.

    Returns:
        The shape of `lengths`, float32 or wider, at most 0.

    Raises:
        ValueError: if `max_length` is not above 0, or `buffer` not in (0, `max_length`].

    Example:
        >>> soft_overlong(jnp.array([10, 80, 90, 100, 120]), max_length=100, buffer=20).tolist()
        [0.0, 0.0, -0.5, -1.0, -1.0]

    Reference: DAPO: An Open-Source LLM Reinforcement Learning System at Scale (arXiv 2503.14476).
    """
    _check_lengths(max_length, buffer)
    excess = (masked.as_float(lengths) - (max_length - buffer)) / buffer
    return 0.0 - factor * jnp.clip(excess, 0.0, 1.0 if bounded else None)


def cosine_length(
    lengths: Array,
    correct: Array,
    *,
    max_length: float,
    correct_short: float = 1.0,
    correct_long: float = 0.5,
    wrong_short: float = -1.0,
    wrong_long: float = -0.5,
) -> Array:
    r"""Reward along half a cosine of the length: right answers should be short, wrong ones should have tried longer.

    $$r = r_{long} + \frac12 (r_{short} - r_{long}) \Big(1 + \cos\frac{\pi \min(L, L_{max})}{L_{max}}\Big)$$

    Args:
        lengths: any shape, int or float, tokens of each answer.
        correct: of the same shape, nonzero where the answer is right.
        max_length: $L_{max}$, tokens; longer answers count as that long.
        correct_short: reward of a right answer of length 0.
        correct_long: reward of a right answer of `max_length`.
        wrong_short: reward of a wrong answer of length 0.
        wrong_long: reward of a wrong answer of `max_length`.

    Returns:
        The shape of `lengths`, float32 or wider.

    Raises:
        ValueError: if `max_length` is not above 0 or the shapes differ.

    Example:
        >>> lengths, correct = jnp.array([0, 50, 100, 0, 100]), jnp.array([1, 1, 1, 0, 0])
        >>> [round(r, 4) for r in cosine_length(lengths, correct, max_length=100).tolist()]
        [1.0, 0.75, 0.5, -1.0, -0.5]

    Reference: Demystifying Long Chain-of-Thought Reasoning in LLMs (arXiv 2502.03373), with the constants of TRL.
    """
    _check_lengths(max_length)
    lengths, correct = masked.as_float(lengths), jnp.asarray(correct) != 0
    masked.check_like("correct", correct, "lengths", lengths)
    short, long = jnp.where(correct, correct_short, wrong_short), jnp.where(correct, correct_long, wrong_long)
    share = (1 + jnp.cos(jnp.pi * jnp.clip(lengths / max_length, 0.0, 1.0))) / 2
    return (long + (short - long) * share).astype(lengths.dtype)


def stop_properly(rewards: Array, truncated: Array, *, coefficient: float) -> Array:
    r"""Rewards of answers that were cut at the limit, scaled down or replaced.

    $$r' = c\, r \text{ if } c \geq 0, \qquad r' = c \text{ if } c < 0, \qquad \text{where truncated}$$

    Args:
        rewards: any shape, float.
        truncated: of the same shape, nonzero where the answer did not end by itself.
        coefficient: $c$, at most 1; 0 takes the reward away, 1 leaves it, a negative one replaces it.

    Returns:
        The shape of `rewards`, float32 or wider.

    Raises:
        ValueError: if `coefficient` is above 1 or the shapes differ.

    Example:
        >>> rewards, truncated = jnp.array([1.0, 1.0, 0.0]), jnp.array([0, 1, 1])
        >>> [stop_properly(rewards, truncated, coefficient=c).tolist() for c in (0.5, -1.0)]
        [[1.0, 0.5, 0.0], [1.0, -1.0, -1.0]]

    Reference: ProRL: Prolonged Reinforcement Learning Expands Reasoning Boundaries in Large Language Models
    (arXiv 2505.24864), as OpenRLHF has it.
    """
    if coefficient > 1:
        raise ValueError(f"coefficient must be at most 1, got {coefficient}; above it, being cut would be rewarded")
    rewards, truncated = masked.as_float(rewards), jnp.asarray(truncated) != 0
    masked.check_like("truncated", truncated, "rewards", rewards)
    return jnp.where(truncated, coefficient * rewards if coefficient >= 0 else coefficient, rewards)

"""Rewards for answers that stay what they are when the options of a question change places."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def shuffled_agreement(
    first: Array, again: Array, gold: Array, *, both: float = 1.0, one: float = 0.2, neither: float = 0.0
) -> Array:
    r"""A reward by which of two answers are right: to a question, and with the same reasoning to its shuffled options.

    Args:
        first: any shape, int: the option that was chosen, as a number of its content; -1 for none.
        again: the same shape: that which was chosen after the shuffle, by its content too; -1 for none.
        gold: the same shape: the right one.
        both: reward where both are right.
        one: reward where exactly one is.
        neither: reward where none is.

    Returns:
        The shape of `first`, float32. To be added to the rewards of the answer and of its form.

    Raises:
        ValueError: if the shapes differ, or the rewards do not fall from `both` to `neither`.

    Example:
        >>> found = shuffled_agreement(jnp.array([1, 1, 2]), jnp.array([1, 2, 2]), jnp.array([1, 1, 1]))
        >>> [round(float(r), 4) for r in found]
        [1.0, 0.2, 0.0]

    Reference: Answer-Consistent Chain-of-thought Reinforcement Learning For Multi-modal Large Langauge Models
    (arXiv 2510.10104). Its three values were not to be seen.
    """
    if not both > one >= neither:
        raise ValueError(f"rewards must be both > one >= neither, got {both}, {one} and {neither}")
    first, again, gold = jnp.asarray(first), jnp.asarray(again), jnp.asarray(gold)
    masked.check_like("again", again, "first", first)
    masked.check_like("gold", gold, "first", first)
    right = (first == gold).astype(jnp.int32) + (again == gold)
    return jnp.asarray([neither, one, both], jnp.float32)[right]


def shuffle_consistency(
    first: Array, again: Array, gold: Array, kept_letter: Array | None = None, *, weight: float = 0.5
) -> Array:
    r"""A right answer earns more for staying under shuffles, a wrong one loses for following its letter.

    $$r = \begin{cases} 1 + \lambda c & a_0 = a^\ast \\ -\lambda (1 - c)\, d & \text{otherwise} \end{cases}, \qquad
    c = \mathrm{mean}_k [a_k = a_0]$$

    Args:
        first: `[N]` int: the option that was chosen, as a number of its content; -1 for none, which never agrees.
        again: `[N, K]` int: those chosen with the same reasoning from `K` shuffles, by their content.
        gold: `[N]` int: the right one.
        kept_letter: `[N, K]`, nonzero where the letter was that of the first answer and the content another; $d$ is 1
            where that happened at all. None for never.
        weight: $\lambda$, at least 0.

    Returns:
        `[N]` float32, without a reward of the form.

    Raises:
        ValueError: if the shapes do not fit, there is no shuffle, or `weight` is below 0.

    Example:
        >>> shuffle_consistency(jnp.array([1]), jnp.array([[1, 2]]), jnp.array([1])).tolist()
        [1.25]

    Reference: GeoReason: Aligning Thinking And Answering In Remote Sensing Vision-Language Models Via Logical
    Consistency Reinforcement Learning (arXiv 2601.04118). It describes the reward in words: the branches are those of
    the description, the weight is not published.
    """
    if isinstance(weight, float | int) and weight < 0:
        raise ValueError(f"weight must be at least 0, got {weight}")
    first, again, gold = jnp.asarray(first), jnp.asarray(again), jnp.asarray(gold)
    masked.check_axes("first", first, "[N]")
    masked.check_like("gold", gold, "first", first)
    if again.ndim != 2 or len(again) != len(first) or not again.shape[1]:
        raise ValueError(f"again must be [N, K] with N = {len(first)} and a shuffle at least, got shape {again.shape}")
    kept = jnp.zeros(again.shape, bool) if kept_letter is None else jnp.asarray(kept_letter) != 0
    masked.check_like("kept_letter", kept, "again", again)
    stays = jnp.mean((again == first[:, None]) & (first >= 0)[:, None], axis=1, dtype=jnp.float32)
    drifts = jnp.any(kept, axis=1)
    return jnp.where(first == gold, 1 + weight * stays, -weight * (1 - stays) * drifts)

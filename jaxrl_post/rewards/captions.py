"""Intrinsic rewards from labels of what an agent is told, which arrive while it learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.rewards.novelty import RunningMoments
from jaxrl_post.types import Array


class CaptionLabels(NamedTuple):
    """Captions that have been judged, and those that wait for it.

    Attributes:
        labels: 1 for a helpful caption, 0 for another.
        waiting: captions without a label, the newest last.
    """

    labels: Mapping[str, int] = {}
    waiting: tuple[str, ...] = ()

    def reward(self, captions: Sequence[str]) -> list[float]:
        """The label of each caption; 0 without one, and of an empty caption."""
        return [float(self.labels.get(caption, 0)) for caption in captions]

    def seen(self, captions: Sequence[str]) -> CaptionLabels:
        """With new captions waiting, the last seen at the end."""
        new = dict.fromkeys(c for c in reversed(captions) if c and c not in self.labels)
        return self._replace(waiting=(*(c for c in self.waiting if c not in new), *reversed(new)))

    def annotated(self, annotate: Callable[[list[str]], Sequence[int]], *, limit: int) -> CaptionLabels:
        """With labels of the newest captions that wait, `limit` at most.

        Args:
            annotate: captions to labels, 1 for helpful and 0 otherwise.
            limit: most captions to ask about now.

        Raises:
            ValueError: if there is not one label for each caption.

        Example:
            >>> table = CaptionLabels().seen(["a wall", "a key", ""])
            >>> table = table.annotated(lambda captions: [int("key" in c) for c in captions], limit=1)
            >>> table.reward(["a key", "a wall"]), table.waiting
            ([1.0, 0.0], ('a wall',))

        Reference: Online Intrinsic Rewards for Decision Making Agents from Large Language Model Feedback
        (arXiv 2410.23022).
        """
        asked = list(reversed(self.waiting[len(self.waiting) - min(limit, len(self.waiting)) :]))
        if not asked:
            return self
        found = annotate(asked)
        if len(found) != len(asked):
            raise ValueError(f"annotate was given {len(asked)} captions and returned {len(found)} labels")
        labels = {**self.labels, **{caption: int(label) for caption, label in zip(asked, found, strict=True)}}
        return CaptionLabels(labels, tuple(c for c in self.waiting if c not in labels))


def episode_counts(captions: Array, exists: Array | None = None) -> Array:
    """How often each caption has been seen in its episode so far, this time included.

    Args:
        captions: `[B, T]` int, numbers of captions.
        exists: `[B, T]`, nonzero where there is one; None for all.

    Returns:
        `[B, T]` int32; 0 where there is none.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> episode_counts(jnp.array([[7, 8, 7, 7]])).tolist()
        [[1, 1, 2, 3]]

    Reference: Online Intrinsic Rewards for Decision Making Agents from Large Language Model Feedback
    (arXiv 2410.23022).
    """
    captions = jnp.asarray(captions)
    masked.check_axes("captions", captions, "[B, T]")
    exists = jnp.ones(captions.shape, bool) if exists is None else jnp.asarray(exists) != 0
    masked.check_like("exists", exists, "captions", captions)
    same = (captions[:, :, None] == captions[:, None, :]) & exists[:, None, :]
    places = jnp.arange(captions.shape[1])
    return jnp.where(exists, jnp.sum(same & (places <= places[:, None]), axis=2, dtype=jnp.int32), 0)


def with_intrinsic(
    reward: Array,
    intrinsic: Array,
    counts: Array,
    *,
    external_weight: float = 0.1,
    intrinsic_weight: float = 0.4,
    exponent: float = 3.0,
) -> Array:
    r"""What the environment pays, and a label of what was seen, less each time, $c_e r + c_i\, \ell / N^\beta$.

    Args:
        reward: any shape, float, of the environment.
        intrinsic: the same shape, $\ell$.
        counts: the same shape, $N$, `episode_counts`.
        external_weight: $c_e$.
        intrinsic_weight: $c_i$.
        exponent: $\beta$; 0 pays the same every time, which can be farmed.

    Returns:
        The shape of `reward`, float32 or wider; without intrinsic reward where `counts` is 0.

    Raises:
        ValueError: if the shapes differ, or `exponent` is below 0.

    Example:
        >>> round(with_intrinsic(jnp.ones(1), jnp.ones(1), jnp.array([2])).item(), 4)
        0.15

    Reference: Online Intrinsic Rewards for Decision Making Agents from Large Language Model Feedback
    (arXiv 2410.23022).
    """
    if isinstance(exponent, float | int) and exponent < 0:
        raise ValueError(f"exponent must be at least 0, got {exponent}")
    reward, intrinsic, counts = masked.as_float(reward), masked.as_float(intrinsic), masked.as_float(counts)
    masked.check_like("intrinsic", intrinsic, "reward", reward)
    masked.check_like("counts", counts, "reward", reward)
    discounted = jnp.where(counts > 0, intrinsic / jnp.maximum(counts, 1) ** exponent, 0.0)
    return external_weight * reward + intrinsic_weight * discounted


def above_usual(score: Array, moments: RunningMoments, *, threshold: float = -0.5) -> Array:
    r"""A ranking model's score as intrinsic reward, $z\, [z > \epsilon]$ with $z = (f - \mu) / \sigma$ of all so far.

    Args:
        score: any shape, float, $f$.
        moments: of the scores so far.
        threshold: $\epsilon$, in standard deviations.

    Returns:
        The shape of `score`, float32 or wider; 0 where all scores so far are equal.

    Example:
        >>> scores = jnp.array([0.0, 1.0, 2.0])
        >>> above_usual(scores, RunningMoments.zero().include(scores), threshold=0.0).round(4).tolist()
        [0.0, 0.0, 1.224...]

    Reference: Online Intrinsic Rewards for Decision Making Agents from Large Language Model Feedback
    (arXiv 2410.23022).
    """
    score, std = masked.as_float(score), moments.std
    z = jnp.where(std > 0, (score - moments.mean) / jnp.where(std > 0, std, 1.0), 0.0)
    return jnp.where(z > threshold, z, 0.0)

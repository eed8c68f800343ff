"""Rewards for meaning: how well the tokens of two texts match in an embedding space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


class Matching(NamedTuple):
    """Precision, recall and F1 of a matching, each `[B]` in [-1, 1]."""

    precision: Array
    recall: Array
    f1: Array


def _unit_rows(x: Array) -> Array:
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    nonzero = squared > 0
    return jnp.where(nonzero, x / jnp.sqrt(jnp.where(nonzero, squared, 1.0)), 0.0)


def greedy_matching(x: Array, y: Array, x_mask: Array | None = None, y_mask: Array | None = None) -> Matching:
    r"""Greedy matching of token embeddings by cosine, as in BERTScore.

    $$P = \frac1n \sum_i \max_j \hat x_i \cdot \hat y_j, \quad R = \frac1m \sum_j \max_i \hat x_i \cdot \hat y_j,
    \quad F_1 = \frac{2 P R}{P + R}$$

    Args:
        x: `[B, N, D]` float; embeddings of the tokens of the candidates.
        y: `[B, M, D]` float; embeddings of the tokens of the references.
        x_mask: `[B, N]`, nonzero where a token counts; None for all.
        y_mask: `[B, M]`, nonzero where a token counts; None for all.

    Returns:
        `Matching(precision, recall, f1)`, each `[B]`, float32 or wider; 0 where either text is empty, and an F1 of 0
        where `P + R` is not positive.

    Raises:
        ValueError: if the embeddings are not `[B, N, D]` and `[B, M, D]`, or a mask does not fit.

    Example:
        >>> matching = greedy_matching(jnp.array([[[1.0, 0.0]]]), jnp.array([[[1.0, 0.0], [0.0, 1.0]]]))
        >>> [round(float(score[0]), 5) for score in matching]
        [1.0, 0.5, 0.66667]

    References: Semantic-Based Self-Critical Training For Question Generation (arXiv 2108.12026); BERTScore: Evaluating
    Text Generation with BERT (arXiv 1904.09675).
    """
    x, y = masked.as_float(x), masked.as_float(y)
    masked.check_axes("x", x, "[B, N, D]")
    masked.check_axes("y", y, "[B, M, D]")
    if x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
        raise ValueError(f"x and y must agree in B and D, got shapes {x.shape} and {y.shape}")
    x_mask = jnp.ones(x.shape[:2], bool) if x_mask is None else jnp.asarray(x_mask) != 0
    y_mask = jnp.ones(y.shape[:2], bool) if y_mask is None else jnp.asarray(y_mask) != 0
    masked.check_like("x_mask", x_mask, "the tokens of x", x[:, :, 0])
    masked.check_like("y_mask", y_mask, "the tokens of y", y[:, :, 0])
    x = _unit_rows(jnp.where(x_mask[:, :, None], x, 0.0))
    y = _unit_rows(jnp.where(y_mask[:, :, None], y, 0.0))
    cosine = jnp.einsum("bnd,bmd->bnm", x, y)
    pair = x_mask[:, :, None] & y_mask[:, None, :]
    precision = masked.mean(masked.max(cosine, pair, 2), x_mask, 1)
    recall = masked.mean(masked.max(cosine, pair, 1), y_mask, 1)
    total = precision + recall
    positive = total > 0
    f1 = jnp.where(positive, 2 * precision * recall / jnp.where(positive, total, 1.0), 0.0)
    return Matching(precision, recall, f1)


def matching_reward(
    embed: Callable[[str], Array], *, statistic: Literal["precision", "recall", "f1"] = "f1"
) -> Callable[..., list[float | None]]:
    """A reward function: how well the completion's tokens match those of the answer in an embedding space.

    Args:
        embed: `text -> [N, D]` embeddings of its tokens, e.g. of a frozen encoder; `[0, D]` for an empty text.
        statistic: which of the scores of `greedy_matching`.

    Returns:
        `(prompts, completions, answer, **columns) -> list[float | None]`: None where there is no answer to compare
        with.

    Example:
        >>> letters = lambda text: jnp.eye(3)[jnp.array(["abc".index(letter) for letter in text], int)]
        >>> matching_reward(letters)(["?", "?"], ["a", "ba"], answer=["ab", None])
        [0.6666666865348816, None]

    Reference: Semantic-Based Self-Critical Training For Question Generation (arXiv 2108.12026).
    """

    def reward(
        prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str | None], **columns: object
    ) -> list[float | None]:
        del prompts, columns
        found: list[float | None] = []
        for completion, expected in zip(completions, answer, strict=True):
            if expected is None:
                found.append(None)
                continue
            x, y = (jnp.asarray(embed(text))[None] for text in (completion, expected))
            empty = not x.shape[1] or not y.shape[1]
            found.append(0.0 if empty else float(getattr(greedy_matching(x, y), statistic)[0]))
        return found

    return reward

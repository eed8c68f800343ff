"""Rewards for boxes that point at something in an image: hit, overlap, and how near their edges are.

No image is read: a completion names four numbers, the data the box and the image's size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array

_NUMBER = r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*"
_BOX = re.compile(r"[\[(]" + ",".join([_NUMBER] * 4) + r"[\])]")


def to_boxes(pred: Array, gold: Array) -> tuple[Array, Array]:
    """Both as floats `[..., 4]`; ValueError for other shapes."""
    pred, gold = masked.as_float(pred), masked.as_float(gold)
    if pred.ndim == 0 or pred.shape[-1] != 4:
        raise ValueError(f"pred must be [..., 4] as x1, y1, x2, y2, got shape {pred.shape}")
    masked.check_like("gold", gold, "pred", pred)
    return pred, gold


def box_hit(pred: Array, gold: Array) -> Array:
    r"""1 where the centre of the predicted box is inside the gold one (edges count), otherwise 0.

    Args:
        pred: `[..., 4]`, predicted boxes as `x1, y1, x2, y2`, pixels.
        gold: `pred`'s shape, the right ones.

    Returns:
        `[...]`, float32 or wider.

    Raises:
        ValueError: for wrong shapes.

    Example:
        >>> box_hit(jnp.array([10.0, 10, 30, 30]), jnp.array([10.0, 10, 30, 40])).item()
        1.0

    Reference: GUI-G1: Understanding R1-Zero-Like Training for Visual Grounding in GUI Agents, arXiv 2505.15810.
    """
    pred, gold = to_boxes(pred, gold)
    center = (pred[..., :2] + pred[..., 2:]) / 2
    inside = jnp.all((center >= gold[..., :2]) & (center <= gold[..., 2:]), axis=-1)
    return inside.astype(pred.dtype)


def box_iou(pred: Array, gold: Array) -> Array:
    r"""Intersection over union, $|P \cap Q| / |P \cup Q|$.

    Args:
        pred: `[..., 4]`, predicted boxes as `x1, y1, x2, y2`, pixels.
        gold: `pred`'s shape, the right ones.

    Returns:
        `[...]` in [0, 1], float32 or wider; 0 for a box turned inside out, or two without area.

    Raises:
        ValueError: for wrong shapes.

    Example:
        >>> round(box_iou(jnp.array([10.0, 10, 30, 30]), jnp.array([10.0, 10, 30, 40])).item(), 6)
        0.666667

    Reference: GUI-G1, arXiv 2505.15810.
    """
    pred, gold = to_boxes(pred, gold)

    def area(box: Array) -> Array:
        return jnp.prod(jnp.maximum(box[..., 2:] - box[..., :2], 0.0), axis=-1)

    low, high = jnp.maximum(pred[..., :2], gold[..., :2]), jnp.minimum(pred[..., 2:], gold[..., 2:])
    overlap = jnp.where((area(pred) > 0) & (area(gold) > 0), area(jnp.concatenate([low, high], axis=-1)), 0.0)
    union = area(pred) + area(gold) - overlap
    return jnp.where(union > 0, overlap / jnp.where(union > 0, union, 1.0), 0.0)


def box_edges(pred: Array, gold: Array, size: Array) -> Array:
    r"""How near the four edges are: the harmonic mean of $u_k = 1 - |gold_k - pred_k| / size_k$.

    The harmonic mean follows the worst edge, so that neither a tiny nor a huge box around the right point scores well.

    Args:
        pred: `[..., 4]`, predicted boxes as `x1, y1, x2, y2`, pixels.
        gold: `pred`'s shape, the right ones.
        size: `[..., 2]`, width and height of the image, pixels.

    Returns:
        `[...]` in [0, 1], float32 or wider; 0 if an edge is off by the image's size or more.

    Raises:
        ValueError: for wrong shapes.

    Example:
        >>> size = jnp.array([100.0, 100])
        >>> round(box_edges(jnp.array([10.0, 10, 30, 30]), jnp.array([10.0, 10, 30, 40]), size).item(), 6)
        0.972973

    Reference: GUI-G1, arXiv 2505.15810.
    """
    pred, gold = to_boxes(pred, gold)
    size = masked.as_float(size)
    masked.check_like("size", size, "the corners of pred", pred[..., :2])
    near = 1.0 - jnp.abs(gold - pred) / jnp.concatenate([size, size], axis=-1)
    possible = jnp.all(near > 0, axis=-1)
    mean = 4.0 / jnp.sum(1.0 / jnp.where(possible[..., None], near, 1.0), axis=-1)
    return jnp.where(possible, mean, 0.0)


def box_reward(pred: Array, gold: Array, size: Array, *, iou_weight: float = 0.25, edge_weight: float = 0.125) -> Array:
    r"""GUI-G1's reward of a box, $r_{hit} + 0.25\, r_{iou} + 0.125\, r_{box}$.

    A hit alone is best won with a tiny box, overlap alone with a huge one; together they hold the size.

    Args:
        pred: `[..., 4]`, predicted boxes as `x1, y1, x2, y2`, pixels.
        gold: `pred`'s shape, the right ones.
        size: `[..., 2]`, width and height of the image, pixels.
        iou_weight: factor of `box_iou`.
        edge_weight: factor of `box_edges`.

    Returns:
        `[...]`, float32 or wider.

    Raises:
        ValueError: for wrong shapes.

    Example:
        >>> size = jnp.array([100.0, 100])
        >>> round(box_reward(jnp.array([10.0, 10, 30, 30]), jnp.array([10.0, 10, 30, 40]), size).item(), 6)
        1.288288

    Reference: GUI-G1, arXiv 2505.15810.
    """
    overlap, edges = box_iou(pred, gold), box_edges(pred, gold, size)
    return box_hit(pred, gold) + iou_weight * overlap + edge_weight * edges


def parse_box(text: str) -> tuple[float, float, float, float] | None:
    """The last four numbers in brackets, or None where there are none.

    Example:
        >>> parse_box('the button: [{"bbox_2d": [10, 10, 30, 30.5]}]')
        (10.0, 10.0, 30.0, 30.5)
    """
    found = _BOX.findall(text)
    if not found:
        return None
    x1, y1, x2, y2 = (float(number) for number in found[-1])
    return (x1, y1, x2, y2) if all(map(math.isfinite, (x1, y1, x2, y2))) else None


def box_grounding(
    prompts: Sequence[str],
    completions: Sequence[str],
    box: Sequence[Any],
    width: Sequence[Any],
    height: Sequence[Any],
) -> list[float | None]:
    """`box_reward` of the box that a completion names, 0 where it names none.

    Args:
        prompts: `N` texts; not looked at.
        completions: `N` texts; the last `[x1, y1, x2, y2]` counts.
        box: `N` right boxes, four numbers or a text that holds them.
        width: `N` widths of the image, pixels.
        height: `N` heights.

    Returns:
        `N` rewards; None where the box or the size is missing or makes no sense.

    Example:
        >>> box_grounding(["", ""], ["[10, 10, 30, 30]", "?"], [[10, 10, 30, 40]] * 2, [100] * 2, [100] * 2)
        [1.288288..., 0.0]

    Reference: GUI-G1, arXiv 2505.15810.
    """
    del prompts

    def one(completion: str, gold: Any, *image: Any) -> float | None:
        edges = numbers(parse_box(gold) if isinstance(gold, str) else gold, 4)
        size = numbers(image, 2)
        if edges is None or size is None or min(size) <= 0:
            return None
        pred = parse_box(completion)
        if pred is None:
            return 0.0
        return float(box_reward(jnp.array(pred), jnp.array(edges), jnp.array(size)))

    return [one(*row) for row in zip(completions, box, width, height, strict=True)]


def numbers(values: Any, count: int) -> list[float] | None:
    """So many finite numbers, or None."""
    try:
        found = [float(value) for value in values]
    except (TypeError, ValueError):
        return None
    return found if len(found) == count and all(map(math.isfinite, found)) else None


def difficulty_weights(share: Array) -> Array:
    r"""Weights of prompts that are larger the smaller the target, $w_q = b_q^{-1} / \mathrm{mean}(b^{-1})$.

    Args:
        share: `[N]` float in (0, 1], area of the target over area of the image, of the whole data set.

    Returns:
        `[N]`, float32 or wider, with mean 1. One whose share is not above 0 gets 0 and does not count in the mean.

    Raises:
        ValueError: if `share` is not a vector.

    Example:
        >>> difficulty_weights(jnp.array([0.1, 0.3])).tolist()
        [1.5, 0.5]

    Reference: GUI-G1, arXiv 2505.15810. Its weights are a column of data that was not released; the normalisation to a
    mean of 1 follows the paper's description.
    """
    share = masked.as_float(share)
    masked.check_axes("share", share, "[N]")
    known = share > 0
    inverse = jnp.where(known, 1.0 / jnp.where(known, share, 1.0), 0.0)
    mean = masked.mean(inverse, known)
    return jnp.where(known, inverse / jnp.where(mean > 0, mean, 1.0), 0.0)

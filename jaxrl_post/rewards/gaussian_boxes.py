"""A reward for boxes that grows smoothly towards the right one, from afar too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxrl_post.rewards.boxes import numbers, parse_box, to_boxes
from jaxrl_post.types import Array


def gaussian_point(pred: Array, gold: Array, *, alpha: float = 0.5) -> Array:
    r"""How near the centres are, in sizes of the right box: $\exp(-\frac12 \sum_d (c_d - c^\ast_d)^2 / \sigma_d^2)$.

    Args:
        pred: `[..., 4]`, predicted boxes as `x1, y1, x2, y2`, pixels; the corners in any order.
        gold: `pred`'s shape, the right ones.
        alpha: $\sigma_d = \alpha$ times the right box's size along $d$; above 0.

    Returns:
        `[...]` in [0, 1], float32 or wider; 0 where either box has no area.

    Raises:
        ValueError: for wrong shapes, or if `alpha` is not above 0.

    Example:
        >>> round(float(gaussian_point(jnp.array([10.0, 10, 30, 30]), jnp.array([20.0, 10, 40, 30]))), 5)
        0.60653

    Reference: GUI-G^2: Gaussian Reward Modeling for GUI Grounding (arXiv 2507.15846).
    """
    center, _, gold_center, gold_std, real = _gaussians(pred, gold, alpha)
    distance = jnp.sum(jnp.square((center - gold_center) / gold_std), axis=-1)
    return jnp.where(real, jnp.exp(-0.5 * distance), 0.0)


def gaussian_coverage(pred: Array, gold: Array, *, alpha: float = 0.5) -> Array:
    r"""How much two boxes agree in place and size: the Bhattacharyya coefficient of two Gaussians, $e^{-D}$.

    $$D = \sum_d \frac{(c_d - c^\ast_d)^2}{8 s_d} + \frac12 \log \frac{s_d}{\sigma_d \sigma^\ast_d}, \qquad
    s_d = \frac{\sigma_d^2 + \sigma^{\ast 2}_d}{2}$$

    Args:
        pred: `[..., 4]`, predicted boxes as `x1, y1, x2, y2`, pixels; the corners in any order.
        gold: `pred`'s shape, the right ones.
        alpha: standard deviations are $\alpha$ times a box's size; above 0.

    Returns:
        `[...]` in [0, 1], float32 or wider; 1 only for equal boxes, 0 where either has no area.

    Raises:
        ValueError: for wrong shapes, or if `alpha` is not above 0.

    Example:
        >>> round(float(gaussian_coverage(jnp.array([5.0, 5, 15, 15]), jnp.array([0.0, 0, 20, 20]))), 5)
        0.8

    Reference: GUI-G^2: Gaussian Reward Modeling for GUI Grounding (arXiv 2507.15846).
    """
    center, std, gold_center, gold_std, real = _gaussians(pred, gold, alpha)
    between = (jnp.square(std) + jnp.square(gold_std)) / 2
    distance = jnp.square(center - gold_center) / (8 * between) + 0.5 * jnp.log(between / (std * gold_std))
    return jnp.where(real, jnp.exp(-jnp.sum(distance, axis=-1)), 0.0)


def gaussian_box(
    prompts: Sequence[str], completions: Sequence[str], box: Sequence[Any], *, alpha: float = 0.5
) -> list[float | None]:
    """`gaussian_point` and `gaussian_coverage` of the box that a completion names, 0 where it names none.

    Args:
        prompts: `N` texts; not looked at.
        completions: `N` texts; the last `[x1, y1, x2, y2]` counts.
        box: `N` right boxes, four numbers or a text that holds them.
        alpha: standard deviations are `alpha` times a box's size.

    Returns:
        `N` rewards in [0, 2]; None where the right box is missing or has no area.

    Example:
        >>> [round(r, 5) for r in gaussian_box([""] * 2, ["[10, 10, 30, 30]", "?"], [[20, 10, 40, 30]] * 2)]
        [1.48903, 0.0]

    Reference: GUI-G^2: Gaussian Reward Modeling for GUI Grounding (arXiv 2507.15846).
    """
    del prompts

    def one(completion: str, gold: Any) -> float | None:
        edges = numbers(parse_box(gold) if isinstance(gold, str) else gold, 4)
        if edges is None or edges[0] == edges[2] or edges[1] == edges[3]:
            return None
        found = parse_box(completion)
        if found is None:
            return 0.0
        pred, right = jnp.array(found), jnp.array(edges)
        return float(gaussian_point(pred, right, alpha=alpha) + gaussian_coverage(pred, right, alpha=alpha))

    return [one(*row) for row in zip(completions, box, strict=True)]


def _gaussians(pred: Array, gold: Array, alpha: float) -> tuple[Array, Array, Array, Array, Array]:
    """Centres and standard deviations `[..., 2]` of both, and where both have an area."""
    if isinstance(alpha, float | int) and not alpha > 0:
        raise ValueError(f"alpha must be above 0, got {alpha}")
    pred, gold = to_boxes(pred, gold)

    def parts(box: Array) -> tuple[Array, Array]:
        return (box[..., :2] + box[..., 2:]) / 2, jnp.abs(box[..., 2:] - box[..., :2])

    (center, size), (gold_center, gold_size) = parts(pred), parts(gold)
    real = jnp.all((size > 0) & (gold_size > 0), axis=-1)
    std, gold_std = (alpha * jnp.where(real[..., None], x, 1.0) for x in (size, gold_size))
    return center, std, gold_center, gold_std, real

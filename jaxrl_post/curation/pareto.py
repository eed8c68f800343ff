"""Several objectives at once: which points are not dominated, how well they cover a front, and an archive of them.

Every objective is maximised; turn the sign of one that is to be small. Points lie in arrays of fixed size with a mask
of those that count, so that everything runs inside `jit`; what a point stands for (a policy) is kept by its slot.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array

__all__ = [
    "ParetoArchive",
    "best_for",
    "crowding_distance",
    "expected_utility",
    "hypervolume",
    "hypervolume_contribution",
    "most_isolated",
    "non_dominated",
    "pareto_archive",
    "pareto_insert",
    "sparsity",
]


def _points(points: Array, valid: Array | None) -> tuple[Array, Array]:
    points = masked.as_float(points)
    masked.check_axes("points", points, "[N, M]", "one row per point, one column per objective")
    valid = jnp.ones(points.shape[0], bool) if valid is None else jnp.asarray(valid, bool)
    masked.check_like("valid", valid, "the first axis of points", points[:, 0])
    # What does not count may hold anything.
    return jnp.where(valid[:, None], points, 0.0), valid


def non_dominated(points: Array, valid: Array | None = None) -> Array:
    r"""Points that no other one equals or exceeds in every objective while exceeding it in one.

    $$\neg \exists j: G_j \ge G_i \wedge G_j \ne G_i$$

    Args:
        points: `[N, M]` float, larger is better.
        valid: `[N]` bool, points that count; None for all.

    Returns:
        `[N]` bool; False where a point does not count. Equal points do not dominate each other.

    Raises:
        ValueError: for wrong shapes.

    Example:
        >>> non_dominated(jnp.array([[0.0, 4.0], [1.0, 1.0], [3.0, 1.0]])).tolist()
        [True, False, True]

    Reference:
        A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II (Deb et al., 2002).
    """
    points, valid = _points(points, valid)
    one, other = points[:, None], points[None]
    dominated = jnp.all(other >= one, axis=-1) & jnp.any(other > one, axis=-1) & valid[None]
    return valid & ~jnp.any(dominated, axis=1)


def crowding_distance(points: Array, valid: Array | None = None) -> Array:
    r"""How far a point's neighbours along each objective lie from each other.

    $$d_i = \sum_j \frac{f_j(\mathrm{next}_j(i)) - f_j(\mathrm{prev}_j(i))}{\max f_j - \min f_j}$$

    Args:
        points: `[N, M]` float.
        valid: `[N]` bool, points that count; None for all.

    Returns:
        `[N]`, float32 or wider: infinite for the ends of every objective, so that they are always kept; 0 where a point
        does not count. An objective in which all points are equal adds nothing (and has no ends). Of equal values the
        one that stands first counts as the smaller.

    Raises:
        ValueError: for wrong shapes.

    Example:
        >>> crowding_distance(jnp.array([[0.0, 4.0], [1.0, 3.5], [3.0, 1.0], [4.0, 0.0]])).tolist()
        [inf, 1.5, 1.625, inf]

    Reference:
        C-MORL: Multi-Objective Reinforcement Learning through Efficient Discovery of Pareto Front, arXiv 2410.02236.
    """
    points, valid = _points(points, valid)
    count, place = jnp.sum(valid), jnp.arange(points.shape[0])

    def along(values: Array) -> Array:
        # Ranks by comparison rather than by sorting: sets are small, and this compiles in a fraction of the time.
        earlier = (values[None] < values[:, None]) | (
            (values[None] == values[:, None]) & (place[None] < place[:, None])
        )
        rank = jnp.sum(earlier & valid[None], axis=1)
        at = (rank[None] == jnp.arange(-1, values.shape[0] + 1)[:, None]) & valid[None]
        ordered = jnp.sum(jnp.where(at, values[None], 0.0), axis=1)  # with a 0 at both ends
        spread = ordered[count] - ordered[1]
        gap = ordered[rank + 2] - ordered[rank]
        distance = jnp.where((rank == 0) | (rank == count - 1), jnp.inf, gap / jnp.where(spread > 0, spread, 1.0))
        return jnp.where(valid & (spread > 0), distance, 0.0)

    total = jnp.sum(jax.vmap(along, in_axes=1)(points), axis=0)
    # A front of one point, or of equal ones, has no neighbours to be told from: it is all end.
    alone = jnp.all(jnp.where(valid[:, None], points == points[jnp.argmax(valid)], True))
    return jnp.where(valid, jnp.where(alone, jnp.inf, total), 0.0)


def hypervolume(points: Array, reference: Array, valid: Array | None = None) -> Array:
    r"""Volume of what the points dominate above a reference point.

    $$HV = \lambda\Big(\bigcup_i [z, G_i]\Big)$$

    Slices along the last objective: exact for any number of objectives, with `O(N^M)` operations, so for small sets.

    Args:
        points: `[N, M]` float, larger is better.
        reference: `[M]`, the corner `z` from which the volume is measured.
        valid: `[N]` bool, points that count; None for all.

    Returns:
        Scalar, float32 or wider; 0 without points above the reference.

    Raises:
        ValueError: for wrong shapes.

    Example:
        >>> points = jnp.array([[0.0, 4.0], [1.0, 3.5], [3.0, 1.0], [4.0, 0.0]])
        >>> float(hypervolume(points, jnp.zeros(2)))
        5.5

    Reference:
        An Improved Dimension-Sweep Algorithm for the Hypervolume Indicator (Fonseca et al., 2006).
    """
    points, valid = _points(points, valid)
    reference = jnp.asarray(reference, points.dtype)
    masked.check_like("reference", reference, "a point", points[0])
    inside = valid & jnp.all(points > reference, axis=1)
    return _volume(jnp.where(inside[:, None], points - reference, 0.0))


def _volume(sides: Array) -> Array:
    # Sides of boxes that all have a corner at the origin; a box of which a side is 0 holds nothing.
    if sides.shape[1] == 1:
        return jnp.max(sides, initial=0.0)
    order = jnp.argsort(-sides[:, -1])
    sides = sides[order]
    heights = sides[:, -1] - jnp.append(sides[1:, -1], 0.0)
    reaching = jnp.tril(jnp.ones((sides.shape[0], sides.shape[0]), bool))
    slices = jax.vmap(lambda those: _volume(jnp.where(those[:, None], sides[:, :-1], 0.0)))(reaching)
    return jnp.sum(heights * slices)


def hypervolume_contribution(point: Array, points: Array, reference: Array, valid: Array | None = None) -> Array:
    r"""Volume that a point adds, $\max(0, HV(A \cup \{p\}) - HV(A))$.

    Args:
        point: `[M]` float.
        points: `[N, M]`, the set `A`.
        reference: `[M]`, see `hypervolume`.
        valid: `[N]` bool, points that count; None for all.

    Returns:
        Scalar, float32 or wider.

    Raises:
        ValueError: for wrong shapes.

    Example:
        >>> float(hypervolume_contribution(jnp.array([2.0, 2.0]), jnp.array([[1.0, 3.0]]), jnp.zeros(2)))
        2.0

    Reference:
        Learning to Optimize Multi-Objective Alignment Through Dynamic Reward Weighting, arXiv 2509.11452.
    """
    points, valid = _points(points, valid)
    point = jnp.asarray(point, points.dtype)
    masked.check_like("point", point, "a row of points", points[0])
    more = hypervolume(jnp.vstack([points, point]), reference, jnp.append(valid, True))
    return jnp.maximum(more - hypervolume(points, reference, valid), 0.0)


def expected_utility(points: Array, weights: Array, valid: Array | None = None) -> Array:
    r"""What users with linear preferences get when each is given the point that is best for it.

    $$EU = \mathrm{mean}_w \max_i w \cdot G_i$$

    Args:
        points: `[N, M]` float, larger is better.
        weights: `[W, M]`, preferences.
        valid: `[N]` bool, points that count; None for all.

    Returns:
        Scalar, float32 or wider; 0 without points.

    Raises:
        ValueError: for wrong shapes.

    Example:
        >>> points = jnp.array([[0.0, 4.0], [4.0, 0.0]])
        >>> float(expected_utility(points, jnp.array([[1.0, 0.0], [0.5, 0.5]])))
        3.0

    Reference:
        C-MORL, arXiv 2410.02236.
    """
    points, valid = _points(points, valid)
    weights = masked.as_float(weights)
    if weights.ndim != 2 or weights.shape[1] != points.shape[1]:
        raise ValueError(f"weights must be [W, {points.shape[1]}], a weight per objective, got shape {weights.shape}")
    best = jnp.max(jnp.where(valid, weights @ points.T, -jnp.inf), axis=1, initial=-jnp.inf)
    return jnp.mean(jnp.where(jnp.any(valid), best, 0.0))


def sparsity(points: Array, valid: Array | None = None) -> Array:
    r"""Mean squared gap between neighbours along each objective; smaller is a denser front.

    $$SP = \frac{1}{n - 1} \sum_j \sum_i (\tilde{G}_j[i] - \tilde{G}_j[i+1])^2$$

    where $\tilde{G}_j$ are the values of objective `j` in order.

    Args:
        points: `[N, M]` float, a front (dominated points count too).
        valid: `[N]` bool, points that count; None for all.

    Returns:
        Scalar, float32 or wider; 0 for fewer than two points.

    Raises:
        ValueError: for wrong shapes.

    Example:
        >>> float(sparsity(jnp.array([[0.0, 4.0], [1.0, 2.0], [3.0, 1.0]])))  # (1 + 4 + 4 + 1) / 2
        5.0

    Reference:
        Prediction-Guided Multi-Objective Reinforcement Learning for Continuous Robot Control (Xu et al., 2020).
    """
    points, valid = _points(points, valid)
    ordered = jnp.sort(jnp.where(valid[:, None], points, jnp.inf), axis=0)
    count = jnp.sum(valid)
    between = (jnp.arange(points.shape[0] - 1) < count - 1)[:, None]
    # What does not count is infinite, and inf - inf would be NaN.
    gaps = jnp.where(between, ordered[1:], 0.0) - jnp.where(between, ordered[:-1], 0.0)
    return jnp.sum(jnp.square(gaps)) / jnp.maximum(count - 1, 1)


def best_for(weights: Array, points: Array, valid: Array | None = None) -> Array:
    r"""The point that a linear preference likes best, $\arg\max_i w \cdot G_i$.

    Args:
        weights: `[M]`, the preference.
        points: `[N, M]` float.
        valid: `[N]` bool, points that count; None for all.

    Returns:
        int32 scalar, an index into `points`; -1 without points.

    Raises:
        ValueError: for wrong shapes.

    Example:
        >>> int(best_for(jnp.array([0.9, 0.1]), jnp.array([[0.0, 4.0], [4.0, 0.0]])))
        1

    Reference:
        C-MORL, arXiv 2410.02236.
    """
    points, valid = _points(points, valid)
    weights = jnp.asarray(weights, points.dtype)
    masked.check_like("weights", weights, "a point", points[0])
    best = jnp.argmax(jnp.where(valid, points @ weights, -jnp.inf))
    return jnp.where(jnp.any(valid), best, -1).astype(jnp.int32)


def most_isolated(points: Array, count: int, valid: Array | None = None) -> Array:
    """Indices of the points with the largest crowding distance, from which a front is extended.

    Args:
        points: `[N, M]` float.
        count: how many, at most `N`; static.
        valid: `[N]` bool: points that may be chosen, e.g. those that have not been before; None for all.

    Returns:
        `[count]` int32, the most isolated one first; -1 where there are no more points.

    Raises:
        ValueError: for wrong shapes, or a count outside `[1, N]`.

    Example:
        >>> most_isolated(jnp.array([[0.0, 4.0], [1.0, 3.5], [3.0, 1.0], [4.0, 0.0]]), 3).tolist()
        [0, 3, 2]

    Reference:
        C-MORL, arXiv 2410.02236.
    """
    points, valid = _points(points, valid)
    if not 1 <= count <= points.shape[0]:
        raise ValueError(f"count must be between 1 and N={points.shape[0]}, got {count}")
    distance = jnp.where(valid, crowding_distance(points, valid), -1.0)
    chosen = jnp.argsort(-distance, stable=True)[:count]
    return jnp.where(valid[chosen], chosen, -1).astype(jnp.int32)


class ParetoArchive(NamedTuple):
    """Non-dominated points in slots of a fixed number.

    Attributes:
        points: `[N, M]` float32, 0 in empty slots.
        valid: `[N]` bool, slots that hold a point.
    """

    points: Array
    valid: Array


def pareto_archive(capacity: int, objectives: int) -> ParetoArchive:
    """An archive without points.

    Args:
        capacity: `N`, the largest number of points.
        objectives: `M`.

    Example:
        >>> pareto_archive(2, 3).points.shape
        (2, 3)
    """
    return ParetoArchive(jnp.zeros((capacity, objectives)), jnp.zeros(capacity, bool))


def pareto_insert(given: ParetoArchive, point: Array) -> tuple[ParetoArchive, Array]:
    """Add a point, unless the archive holds one as good in every objective; points that it dominates go.

    Where there is no room, the point with the smallest crowding distance goes, which may be the new one.

    Args:
        given: the archive.
        point: `[M]`.

    Returns:
        The archive, and the slot (int32) that the point got, -1 if none: what the point stands for is kept there.

    Raises:
        ValueError: if the point has another number of objectives.

    Example:
        >>> one, slot = pareto_insert(pareto_archive(4, 2), jnp.array([1.0, 1.0]))
        >>> two, other = pareto_insert(one, jnp.array([0.0, 2.0]))
        >>> three, none = pareto_insert(two, jnp.array([0.0, 1.0]))
        >>> (int(slot), int(other), int(none)), three.valid.tolist()
        ((0, 1, -1), [True, True, False, False])

    Reference:
        C-MORL, arXiv 2410.02236.
    """
    point = jnp.asarray(point, given.points.dtype)
    masked.check_like("point", point, "a row of points", given.points[0])
    wanted = ~jnp.any(given.valid & jnp.all(given.points >= point, axis=1)) & jnp.all(jnp.isfinite(point))
    kept = given.valid & ~jnp.all(given.points <= point, axis=1)
    # The candidates are the slots and the new point, which stands last.
    distance = crowding_distance(jnp.vstack([given.points, point]), jnp.append(kept, True))
    crowded = jnp.argmin(jnp.where(jnp.append(kept, True), distance, jnp.inf))
    full = jnp.all(kept)
    slot = jnp.where(full, crowded, jnp.argmin(kept))
    enters = wanted & (slot < kept.shape[0])
    place = (jnp.arange(kept.shape[0]) == slot) & enters
    valid = jnp.where(wanted, kept, given.valid) | place
    points = jnp.where(place[:, None], point, given.points)
    new = ParetoArchive(jnp.where(valid[:, None], points, 0.0), valid)
    return new, jnp.where(enters, slot, -1).astype(jnp.int32)

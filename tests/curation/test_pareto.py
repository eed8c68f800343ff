"""Fronts of several objectives, on points that can be worked out by hand or by brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.curation import pareto
from tests.advantages.compiled import all_compiled

pareto = all_compiled(pareto)

FRONT = jnp.array([[0.0, 4.0], [1.0, 3.5], [3.0, 1.0], [4.0, 0.0]])


def brute_volume(points, reference):
    """Inclusion and exclusion over all subsets of boxes, in float64."""
    boxes = np.maximum(np.asarray(points, np.float64) - reference, 0)
    total = 0.0
    for size in range(1, len(boxes) + 1):
        for some in itertools.combinations(boxes, size):
            total += (-1) ** (size + 1) * np.prod(np.min(some, axis=0))
    return total


def test_the_table_s_front_has_its_crowding_distances_and_volume():
    np.testing.assert_allclose(pareto.crowding_distance(FRONT)[1:3], [1.5, 1.625])
    assert np.isinf(pareto.crowding_distance(FRONT)[jnp.array([0, 3])]).all()
    assert float(pareto.hypervolume(FRONT, jnp.zeros(2))) == 5.5


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_the_volume_is_that_of_inclusion_and_exclusion_for_any_number_of_objectives(objectives):
    rng = np.random.default_rng(objectives)
    points = rng.normal(0.5, 1.0, (7, objectives)).round(1)
    reference = np.full(objectives, -0.3)
    valid = np.array([True] * 6 + [False])
    found = jax.jit(pareto.hypervolume)(points, reference, valid)
    np.testing.assert_allclose(found, brute_volume(points[:6], reference), rtol=1e-5, atol=1e-6)


def test_what_a_point_adds_to_the_volume_is_never_negative():
    rng = np.random.default_rng(0)
    points, reference = rng.uniform(0, 1, (5, 2)), np.zeros(2)
    for point in rng.uniform(-0.2, 1.2, (20, 2)):
        added = brute_volume([*points, point], reference) - brute_volume(points, reference)
        found = pareto.hypervolume_contribution(point, points, reference)
        np.testing.assert_allclose(found, max(added, 0.0), atol=1e-6)


def test_dominated_points_are_those_that_brute_force_finds_and_equal_points_stay():
    points = np.random.default_rng(1).integers(0, 5, (30, 3))
    expected = [not any((b >= a).all() and (b > a).any() for b in points) for a in points]
    np.testing.assert_array_equal(pareto.non_dominated(points), expected)
    assert pareto.non_dominated(jnp.ones((3, 2))).tolist() == [True, True, True]


def test_points_that_do_not_count_may_hold_anything():
    rubbish = jnp.array([[jnp.nan, jnp.inf], [9.0, 9.0]])
    points, valid = jnp.vstack([FRONT, rubbish]), jnp.array([True] * 4 + [False] * 2)
    np.testing.assert_array_equal(pareto.crowding_distance(points, valid)[:4], pareto.crowding_distance(FRONT))
    assert float(pareto.hypervolume(points, jnp.zeros(2), valid)) == 5.5
    assert float(pareto.sparsity(points, valid)) == float(pareto.sparsity(FRONT))
    assert pareto.non_dominated(points, valid).tolist() == [True] * 4 + [False] * 2
    nothing = jnp.zeros(6, bool)
    assert float(pareto.hypervolume(points, jnp.zeros(2), nothing)) == 0.0
    assert float(pareto.sparsity(points, nothing)) == 0.0
    assert float(pareto.expected_utility(points, jnp.ones((1, 2)), nothing)) == 0.0
    assert int(pareto.best_for(jnp.ones(2), points, nothing)) == -1
    assert pareto.most_isolated(points, 2, nothing).tolist() == [-1, -1]


def test_objectives_in_which_all_points_are_equal_do_not_count():
    points = jnp.array([[0.0, 7.0], [1.0, 7.0], [3.0, 7.0]])
    np.testing.assert_allclose(pareto.crowding_distance(points)[1], 1.0)
    assert np.isinf(pareto.crowding_distance(jnp.ones((3, 2)))).all()
    assert np.isinf(pareto.crowding_distance(jnp.ones((1, 2)))).all()


def test_sparsity_and_expected_utility_by_hand():
    # Gaps 1, 2, 1 along the first objective and .5, 2.5, 1 along the second.
    np.testing.assert_allclose(pareto.sparsity(FRONT), (1 + 4 + 1 + 0.25 + 6.25 + 1) / 3)
    weights = jnp.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    np.testing.assert_allclose(pareto.expected_utility(FRONT, weights), (4 + 2.25 + 4) / 3)
    assert int(pareto.best_for(jnp.array([0.5, 0.5]), FRONT)) == 1


def test_an_archive_holds_the_front_of_what_it_was_given_whatever_the_order():
    rng = np.random.default_rng(2)
    points = rng.integers(0, 8, (40, 2)).astype(np.float32)
    expected = {tuple(p) for p, keep in zip(points, np.asarray(pareto.non_dominated(points)), strict=True) if keep}
    insert = jax.jit(pareto.pareto_insert)
    for order in (np.arange(40), rng.permutation(40)):
        held = pareto.pareto_archive(16, 2)
        for index in order:
            held, slot = insert(held, points[index])
            if int(slot) >= 0:
                np.testing.assert_array_equal(held.points[slot], points[index])
        found = np.asarray(held.points)[np.asarray(held.valid)]
        assert {tuple(p) for p in found} == expected
        assert len(found) == len(expected)


def test_a_full_archive_gives_up_its_most_crowded_point():
    held = pareto.pareto_archive(4, 2)
    for point in FRONT:
        held, _ = pareto.pareto_insert(held, point)
    # Between the last two: the neighbours of (3.1, .9) are nearest to each other, so that it is not kept ...
    same, slot = pareto.pareto_insert(held, jnp.array([3.1, 0.95]))
    assert int(slot) == -1
    np.testing.assert_array_equal(same.points, held.points)
    # ... and a point in the wide gap takes the place of the one that is then most crowded.
    new, slot = pareto.pareto_insert(held, jnp.array([1.1, 3.4]))
    candidates = np.vstack([held.points, [[1.1, 3.4]]])
    crowded = int(np.argmin(np.asarray(pareto.crowding_distance(candidates))))
    assert int(slot) == (crowded if crowded < 4 else -1)
    assert int(new.valid.sum()) == 4


def test_a_point_that_is_not_finite_is_not_archived():
    held, slot = pareto.pareto_insert(pareto.pareto_archive(2, 2), jnp.array([jnp.nan, 1.0]))
    assert int(slot) == -1
    assert not held.valid.any()


def test_wrong_shapes_are_errors():
    with pytest.raises(ValueError, match=r"points must be \[N, M\]"):
        pareto.non_dominated(jnp.zeros(3))
    with pytest.raises(ValueError, match="reference must have the shape of a point"):
        pareto.hypervolume(FRONT, jnp.zeros(3))
    with pytest.raises(ValueError, match="a weight per objective"):
        pareto.expected_utility(FRONT, jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="count must be between 1 and N=4, got 5"):
        pareto.most_isolated(FRONT, 5)

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import rewards
from tests.rewards.compiled import compiled

history_length = compiled(rewards.history_length)
target_length = compiled(rewards.target_length)

H = jnp.array([100.0])


def _history(lengths, correct, history=100.0, **options):
    found = history_length(jnp.array([lengths]), jnp.array([correct]), jnp.array([history]), **options)
    return np.asarray(found)[0]


def test_the_cosine_form_gives_the_tables_numbers():
    correct = [1, 1, 0, 0, 0]
    total = correct + _history([50, 150, 150, 50, 250], correct)
    np.testing.assert_allclose(total, [1.707107, 0.3, -0.707107, 0, -1], atol=1e-6)
    np.testing.assert_array_equal(_history([50, 500], [1, 0], math.inf), [0, 0])


def test_the_linear_form_is_flat_within_its_tolerance_and_bounded():
    lengths = [0, 50, 100, 109, 120, 175, 181, 400]
    right = _history(lengths, [1] * 8, form="linear")
    np.testing.assert_allclose(right, [1, 0.5, 0, 0, -0.1, -0.65, -0.7, -0.7], atol=1e-6)
    wrong = _history(lengths, [0] * 8, form="linear")
    np.testing.assert_allclose(wrong, [0, 0, 0, 0, -0.1, -0.65, -0.71, -1], atol=1e-6)


@pytest.mark.parametrize("form", ["cosine", "linear"])
def test_every_right_answer_stays_above_every_wrong_one_and_wrong_ones_gain_nothing(form):
    lengths = np.linspace(0, 1000, 101)
    right, wrong = _history(lengths, [1] * 101, form=form), _history(lengths, [0] * 101, form=form)
    assert np.min(1 + right) > np.max(wrong) + 0.29
    assert np.max(wrong) <= 0
    assert np.all(np.diff(right) <= 1e-6)
    assert np.all(np.diff(wrong) <= 1e-6)


@pytest.mark.parametrize("form", ["cosine", "linear"])
def test_history_lengths_are_finite_for_any_record_and_compare_with_the_record_of_their_own_row(form):
    history = jnp.array([jnp.inf, 0.0, 1.0, 100.0], jnp.bfloat16)
    lengths, correct = jnp.array([[10.0, 1e6]] * 4, jnp.bfloat16), jnp.array([[1, 0]] * 4)
    found = jax.jit(lambda h: history_length(lengths, correct, h, form=form))(history)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[:3], [[0, 0], [0, 0], [-0.7, -1]], atol=1e-6)
    assert float(found[3, 0]) > 0.8
    slope = jax.jit(jax.grad(lambda h: history_length(lengths, correct, h, form=form).sum()))(jnp.array([jnp.inf] * 4))
    assert np.all(np.isfinite(slope))


def test_the_budget_shrinks_as_in_the_table_and_never_below_one():
    steps = jnp.array([0, 149, 150, 300, 450, 599])
    expected = [256, 256, 179.2, 125.44, 87.808, 87.808]
    np.testing.assert_allclose(rewards.budget_schedule(steps), expected, rtol=1e-6)
    assert float(jax.jit(rewards.budget_schedule)(10**6)) == 1
    np.testing.assert_allclose(rewards.budget_schedule(jnp.array([0, 9999]), start=87.0, decay=1.0), [87, 87])
    # From 512 to 64 in 3 reductions over 400 steps.
    halved = rewards.budget_schedule(jnp.array([99, 100, 399]), start=512, decay=(64 / 512) ** (1 / 3), every=100)
    np.testing.assert_allclose(halved, [512, 256, 64], rtol=1e-6)


def test_the_triangle_peaks_at_the_budget_and_the_band_pays_all_below_it():
    lengths = jnp.array([0.0, 43.5, 87.0, 130.0, 174.0, 500.0])
    budget = jnp.full(6, 87.0)
    triangle = target_length(lengths, budget)
    np.testing.assert_allclose(triangle, [0, 0.5, 1, 0.50575, 0, 0], atol=1e-5)
    band = target_length(lengths, budget, shape="band", max_reward=2.0)
    np.testing.assert_allclose(band, [2, 2, 2, 1.01149, 0, 0], atol=1e-5)


def test_without_a_budget_no_length_is_paid():
    found = jax.jit(lambda b: target_length(jnp.array([0, 5, 5]), b))(jnp.array([0.0, 0.0, 5.0], jnp.bfloat16))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, [0, 0, 1])


def test_wrong_arguments_are_named():
    ones = jnp.ones((1, 2))
    with pytest.raises(ValueError, match="history must have the shape of one number per prompt"):
        history_length(ones, ones, jnp.ones(2))
    with pytest.raises(ValueError, match="correct must have the shape of lengths"):
        history_length(ones, ones[:, :1], H)
    with pytest.raises(ValueError, match=r"lengths must be \[P, G\]"):
        history_length(ones[0], ones[0], H)
    with pytest.raises(ValueError, match="form must be one of"):
        history_length(ones, ones, H, form="sine")
    with pytest.raises(ValueError, match="floor must be at most 0"):
        history_length(ones, ones, H, floor=0.7)
    with pytest.raises(ValueError, match="tolerance must be at least 0"):
        history_length(ones, ones, H, tolerance=-0.1)
    with pytest.raises(ValueError, match="budget must have the shape of lengths"):
        target_length(ones, H)
    with pytest.raises(ValueError, match="shape must be one of triangle, band"):
        target_length(ones, ones, shape="flat")
    for options, message in (({"start": 0}, "start"), ({"decay": 1.5}, "decay"), ({"every": 0}, "every")):
        with pytest.raises(ValueError, match=f"{message} must be"):
            rewards.budget_schedule(0, **options)

"""Win probabilities from a judge's labels, and how far they can be believed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.rewards import calibration_error, fit_temperature, symmetric_win_probability


def test_both_orders_are_averaged_among_the_two_labels():
    shown, swapped = np.log([[0.4, 0.1]]), np.log([[0.2, 0.3]])  # 0.8 and 0.6 among the two
    np.testing.assert_allclose(symmetric_win_probability(shown, swapped), [0.7], rtol=1e-6)
    np.testing.assert_allclose(symmetric_win_probability(swapped, shown), [0.3], rtol=1e-6)


def test_a_liking_for_one_place_cancels_between_equal_answers_and_the_two_orders_add_to_one():
    lead, bias = np.array([0.0, 1.5, -0.3]), 2.0
    one = np.stack([lead + bias, 0 * lead], axis=-1)
    other = np.stack([-lead + bias, 0 * lead], axis=-1)
    p, reverse = symmetric_win_probability(one, other), symmetric_win_probability(other, one)
    np.testing.assert_allclose(p + reverse, 1, rtol=1e-6)
    np.testing.assert_allclose(p[0], 0.5, rtol=1e-6)
    np.testing.assert_array_equal(np.sign(p[1:] - 0.5), np.sign(lead[1:]))


def test_labels_of_logit_minus_infinity_and_huge_ones_have_finite_gradients():
    logits = jnp.array([[1e4, -1e4], [0.0, -jnp.inf]])
    np.testing.assert_allclose(symmetric_win_probability(logits, logits[:, ::-1]), [1, 1])
    gradient = jax.jit(jax.grad(lambda x: symmetric_win_probability(x, -x).sum()))(logits[:1])
    assert np.isfinite(gradient).all()
    assert symmetric_win_probability(jnp.zeros((1, 2), jnp.bfloat16), jnp.zeros((1, 2))).dtype == jnp.float32


def test_the_temperature_of_a_judge_that_is_too_sure_is_found():
    rng = np.random.default_rng(0)
    z = rng.normal(size=4000)
    won = rng.random(4000) < 1 / (1 + np.exp(-z))
    spoiled, valid = np.append(3 * z, np.nan), np.append(np.ones(4000), 0)
    found = jax.jit(fit_temperature)(spoiled, np.append(won, 0), valid)
    np.testing.assert_allclose(found, 3.0, rtol=0.1)
    before, after = (calibration_error(jax.nn.sigmoid(3 * z / t), won) for t in (1.0, found))
    assert after < 0.03 < 0.1 < before


def test_separable_wins_and_no_pairs_have_finite_temperatures():
    z = jnp.array([1.0, 2.0])
    np.testing.assert_allclose(fit_temperature(z, jnp.ones(2)), 1e-3, rtol=1e-3)
    np.testing.assert_allclose(fit_temperature(z, jnp.zeros(2)), 1e3, rtol=1e-3)
    assert float(fit_temperature(z, jnp.ones(2), jnp.zeros(2))) == 1


def test_the_calibration_error_is_that_of_a_loop():
    rng = np.random.default_rng(1)
    p, won, valid = rng.random(50), rng.random(50) < 0.5, rng.random(50) < 0.8
    expected = 0.0
    for b in range(5):
        rows = valid & (np.floor(p * 5) == b)
        if rows.any():
            expected += rows.sum() / valid.sum() * abs(p[rows].mean() - won[rows].mean())
    np.testing.assert_allclose(calibration_error(np.where(valid, p, np.nan), won, valid, bins=5), expected, rtol=1e-4)
    assert float(calibration_error(jnp.ones(2), jnp.zeros(2), jnp.zeros(2))) == 0
    assert float(calibration_error(jnp.ones(2), jnp.ones(2))) == 0


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"logits must be \[..., 2\]"):
        symmetric_win_probability(jnp.zeros(3), jnp.zeros(3))
    with pytest.raises(ValueError, match="swapped_logits must have the shape of logits"):
        symmetric_win_probability(jnp.zeros((3, 2)), jnp.zeros(2))
    with pytest.raises(ValueError, match="won must have the shape of logits"):
        fit_temperature(jnp.zeros(3), jnp.zeros(2))
    with pytest.raises(ValueError, match="bins must be >= 1"):
        calibration_error(jnp.zeros(3), jnp.zeros(3), bins=0)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxrl_post import masked

REDUCTIONS = {
    "sum": masked.sum,
    "mean": masked.mean,
    "var": masked.var,
    "std": masked.std,
    "max": masked.max,
    "min": masked.min,
    "quantile": lambda x, mask: masked.quantile(x, mask, 0.3),
    "whiten": masked.whiten,
    "center": masked.center,
}


def test_reductions_give_hand_worked_numbers():
    # Counted: 1, 2, 6. Mean 3, squares 4 + 1 + 9 = 14, unbiased variance 7, population variance 14 / 3.
    x, mask = jnp.array([[1.0, 2.0], [100.0, 6.0]]), jnp.array([[1, 1], [0, 1]])
    assert float(masked.sum(x, mask)) == 9
    assert float(masked.mean(x, mask)) == 3
    assert float(masked.var(x, mask)) == 7
    np.testing.assert_allclose(masked.var(x, mask, ddof=0), 14 / 3, rtol=1e-6)
    np.testing.assert_allclose(masked.std(x, mask), 7**0.5, rtol=1e-6)
    assert float(masked.max(x, mask)) == 6
    assert float(masked.min(x, mask)) == 1
    np.testing.assert_allclose(masked.whiten(x, mask), [[-2 / 7**0.5, -1 / 7**0.5], [0, 3 / 7**0.5]], rtol=1e-6)
    np.testing.assert_allclose(masked.mean(x, mask, axis=1), [1.5, 6])
    np.testing.assert_allclose(masked.var(x, mask, axis=1), [0.5, 0])
    assert masked.sum(x, mask, axis=1, keepdims=True).shape == (2, 1)


def test_whiten_without_shift_keeps_the_mean():
    x, mask = jnp.array([1.0, 3.0, 9.0]), jnp.array([1, 1, 0])
    # Mean 2, std sqrt(2): 2 -+ 1 / sqrt(2).
    np.testing.assert_allclose(masked.whiten(x, mask, shift_mean=False), [2 - 0.5**0.5, 2 + 0.5**0.5, 0], rtol=1e-6)


@pytest.mark.parametrize("method", ["linear", "lower"])
def test_quantile_inside_jit_agrees_with_numpy_on_the_counted_elements(method):
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(16, 9)).astype(np.float32), rng.random((16, 9)) < 0.6
    quantile = jax.jit(lambda x, mask, q: masked.quantile(x, mask, q, axis=1, method=method))
    for q in (0.0, 0.3, 0.5, 0.77, 1.0):
        expected = [np.quantile(row[m], q, method=method) if m.any() else 0 for row, m in zip(x, mask, strict=True)]
        np.testing.assert_allclose(quantile(x, mask, q), expected, atol=1e-5)
    np.testing.assert_allclose(masked.quantile(x, mask, 0.4), np.quantile(x[mask], 0.4), atol=1e-5)
    assert masked.quantile(x, mask, 0.4, keepdims=True).shape == (1, 1)


def test_quantile_of_infinities_is_not_nan_and_a_counted_nan_is_seen():
    x = jnp.array([jnp.inf, jnp.inf, 1.0])
    assert float(masked.quantile(x, jnp.ones(3), 0.75)) == jnp.inf
    assert np.isnan(masked.quantile(x.at[2].set(jnp.nan), jnp.ones(3), 0.0))


def test_a_counted_nan_is_seen_in_a_standard_deviation():
    x = jnp.array([[1.0, jnp.nan, 2.0], [1.0, 3.0, jnp.nan]])
    found = masked.std(x, jnp.array([[1, 1, 1], [1, 1, 0]]), 1)
    assert np.isnan(found[0])
    np.testing.assert_allclose(found[1], np.sqrt(2.0), rtol=1e-6)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_an_empty_mask_gives_zero_with_zero_gradient(name):
    x = jnp.array([1.0, jnp.nan, -jnp.inf])
    value, gradient = jax.jit(jax.value_and_grad(lambda x: jnp.sum(REDUCTIONS[name](x, jnp.zeros(3)))))(x)
    assert float(value) == 0
    assert np.all(np.asarray(gradient) == 0)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_masked_elements_may_hold_nan_and_get_zero_gradient(name):
    x, mask = jnp.array([1.0, jnp.nan, 3.0, jnp.inf]), jnp.array([1.0, 0.0, 1.0, 0.0])
    value, gradient = jax.jit(jax.value_and_grad(lambda x: jnp.sum(REDUCTIONS[name](x, mask) ** 2)))(x)
    clean = jnp.sum(REDUCTIONS[name](jnp.array([1.0, 3.0]), jnp.ones(2)) ** 2)
    np.testing.assert_allclose(value, clean, rtol=1e-6)
    assert np.all(np.isfinite(gradient))
    assert float(gradient[1]) == 0
    assert float(gradient[3]) == 0


@pytest.mark.parametrize("x", [[0.7], [0.1] * 7], ids=["one element", "equal elements"])
def test_zero_spread_has_zero_variance_whitens_to_zero_and_has_finite_gradients(x):
    x = jnp.array(x)
    mask = jnp.ones_like(x)
    assert float(masked.var(x, mask)) == 0
    assert float(masked.std(x, mask)) == 0
    assert np.all(np.asarray(masked.whiten(x, mask)) == 0)
    assert np.all(np.asarray(masked.whiten(x, mask, eps=0.0)) == 0)
    weights = jnp.arange(1.0, 1.0 + len(x))  # an uneven cotangent: an even one is cancelled by the centring
    for function in (masked.std, masked.whiten, lambda x, mask: masked.whiten(x, mask, eps=0.0)):
        gradient = jax.jit(jax.grad(lambda x, function=function: jnp.sum(weights * function(x, mask))))(x)
        assert np.all(np.isfinite(gradient))


def test_the_mean_of_equal_numbers_is_that_number_in_float32():
    value = np.float32([0.1, 0.95, 1 / 3, 1e-3, 12345.678])
    x = np.broadcast_to(value[:, None, None], (5, 40, 41))
    first_n = np.broadcast_to(np.arange(41) < np.arange(2, 42)[:, None], x.shape)
    np.testing.assert_array_equal(masked.mean(x, first_n, axis=2), np.broadcast_to(value[:, None], (5, 40)))
    # The same sums without the second pass miss it somewhere, or this test could not fail.
    assert np.any(np.asarray(masked.sum(x, first_n, axis=2)) / np.arange(2, 42, dtype=np.float32) != value[:, None])


def test_variance_keeps_its_digits_far_from_zero():
    rng = np.random.default_rng(1)
    x = (1e4 + rng.normal(size=500)).astype(np.float32)
    np.testing.assert_allclose(masked.var(x, np.ones(500)), np.var(x.astype(np.float64), ddof=1), rtol=1e-5)


def test_a_weight_of_two_counts_an_element_twice():
    x, weights = jnp.array([1.0, 4.0, 6.0]), jnp.array([2.0, 1.0, 0.0])
    twice = np.array([1.0, 1.0, 4.0])
    np.testing.assert_allclose(masked.mean(x, weights), twice.mean())
    np.testing.assert_allclose(masked.var(x, weights), twice.var(ddof=1), rtol=1e-6)


def test_padding_changes_nothing():
    rng = np.random.default_rng(2)
    x, mask = rng.normal(size=(3, 5)).astype(np.float32), rng.random((3, 5)) < 0.7
    padded, padded_mask = np.pad(x, ((0, 2), (0, 4)), constant_values=np.nan), np.pad(mask, ((0, 2), (0, 4)))
    for name, function in REDUCTIONS.items():
        value = np.asarray(function(padded, padded_mask))
        value = value[:3, :5] if value.ndim else value
        np.testing.assert_allclose(value, function(x, mask), rtol=1e-5, atol=1e-6, err_msg=name)


def test_gradients_agree_with_finite_differences():
    with jax.enable_x64(True):
        x = jnp.array([0.3, -1.2, 2.0, 5.0])
        mask = jnp.array([1.0, 1.0, 1.0, 0.0])
        check_grads(
            jax.jit(lambda x: [function(x, mask) for function in REDUCTIONS.values()]), (x,), order=1, modes=["rev"]
        )


@pytest.mark.parametrize(("given", "got"), [("bfloat16", "float32"), ("float32", "float32"), ("int32", "float32")])
def test_narrow_dtypes_are_raised_to_float32(given, got):
    for function in REDUCTIONS.values():
        assert jax.eval_shape(function, jnp.ones(3, given), jnp.ones(3, bool)).dtype == got


def test_float64_stays_float64():
    with jax.enable_x64(True):
        for function in REDUCTIONS.values():
            dtypes = jnp.ones(3, jnp.float64), jnp.ones(3, jnp.float32)
            assert jax.eval_shape(function, *dtypes).dtype == jnp.float64


def test_a_mask_of_another_rank_is_an_error_and_not_broadcast():
    # [B] against [B, T] with B = T would broadcast along the wrong axis without a word.
    with pytest.raises(ValueError, match=r"mask must have the shape of x, \(3, 3\), .* got \(3,\)"):
        masked.mean(jnp.ones((3, 3)), jnp.ones(3))
    assert masked.mean(jnp.ones((3, 3)), jnp.ones((3, 1)), axis=1).shape == (3,)


@pytest.mark.parametrize("q", [-0.1, 80])
def test_a_quantile_outside_zero_to_one_is_an_error(q):
    with pytest.raises(ValueError, match=rf"q must be in \[0, 1\], got {q}"):
        masked.quantile(jnp.ones(3), jnp.ones(3), q)

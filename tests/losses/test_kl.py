import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxrl_post import losses

ESTIMATORS = ("k1", "k2", "k3", "abs")


def _distributions():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=6)), jax.nn.log_softmax(jnp.asarray(rng.normal(size=6)))


def _divergence(log_p, log_q):
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q))


def _mean_gradient(estimator, logits, ref_logp):
    # The expectation over tokens sampled from the policy, by enumeration: the sampling weights are constants.
    weights = jnp.exp(jax.nn.log_softmax(logits))
    return jax.jit(jax.grad(lambda x: jnp.sum(weights * losses.kl(jax.nn.log_softmax(x), ref_logp, estimator))))(logits)


def test_estimators_give_hand_worked_numbers():
    # x = log 2: k1 0.693147, k2 0.240227, k3 1/2 - 1 + log 2 = 0.193147; x = -log 2: k3 2 - 1 - log 2 = 0.306853.
    logp, ref_logp = jnp.log(jnp.array([[0.5, 0.25]])), jnp.log(jnp.array([[0.25, 0.5]]))
    np.testing.assert_allclose(losses.kl(logp, ref_logp, "k1"), [[0.693147, -0.693147]], rtol=1e-5)
    np.testing.assert_allclose(losses.kl(logp, ref_logp, "k2"), [[0.240227, 0.240227]], rtol=1e-5)
    np.testing.assert_allclose(losses.kl(logp, ref_logp, "k3"), [[0.193147, 0.306853]], rtol=1e-5)
    np.testing.assert_allclose(losses.kl(logp, ref_logp, "abs"), [[0.693147, 0.693147]], rtol=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased_estimates_of_the_divergence(estimator):
    with jax.enable_x64(True):
        logits, ref_logp = _distributions()
        logp = jax.nn.log_softmax(logits)
        mean = jnp.sum(jnp.exp(logp) * losses.kl(logp, ref_logp, estimator))
        np.testing.assert_allclose(mean, _divergence(logp, ref_logp), rtol=1e-12)


def test_mean_gradients_are_nothing_reverse_and_forward_divergence_for_k1_k2_k3():
    with jax.enable_x64(True):
        logits, ref_logp = _distributions()
        reverse = jax.jit(jax.grad(lambda x: _divergence(jax.nn.log_softmax(x), ref_logp)))(logits)
        forward = jax.jit(jax.grad(lambda x: _divergence(ref_logp, jax.nn.log_softmax(x))))(logits)
        np.testing.assert_allclose(_mean_gradient("k1", logits, ref_logp), np.zeros(6), atol=1e-14)
        np.testing.assert_allclose(_mean_gradient("k2", logits, ref_logp), reverse, atol=1e-14)
        np.testing.assert_allclose(_mean_gradient("k3", logits, ref_logp), forward, atol=1e-14)
        assert np.max(np.abs(reverse - forward)) > 0.01


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_agrees_with_finite_differences_and_sends_nothing_into_the_reference(estimator):
    with jax.enable_x64(True):
        logp, ref_logp = jnp.array([[-1.0, -3.0, -0.2]]), jnp.array([[-1.5, -2.0, -0.3]])
        check_grads(jax.jit(lambda x: losses.kl(x, ref_logp, estimator)), (logp,), order=1, modes=["rev"])
        gradient = jax.jit(jax.grad(lambda x: losses.kl(logp, x, estimator).sum()))(ref_logp)
        assert np.all(np.asarray(gradient) == 0)


def test_k3_keeps_its_digits_near_zero():
    # x^2 / 2 = 5e-9 to leading order; exp(-x) - 1 + x in float32 gives 0 or 6e-8.
    np.testing.assert_allclose(losses.kl(jnp.array([[1e-4]]), jnp.zeros((1, 1)), "k3"), [[5e-9]], rtol=1e-2)


def test_k3_is_finite_far_away_and_never_pulls_the_wrong_way():
    logp, ref_logp = jnp.array([[-500.0, 0.0]]), jnp.array([[0.0, -500.0]])
    value = losses.kl(logp, ref_logp, "k3")
    np.testing.assert_allclose(value, [[np.exp(20.0) - 21, 499.0]], rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: losses.kl(x, ref_logp, "k3").sum()))(logp)
    assert gradient.tolist() == [[0.0, 1.0]]


def test_narrow_dtypes_are_raised_and_wide_ones_kept():
    for estimator in ESTIMATORS:
        kl = functools.partial(losses.kl, estimator=estimator)
        assert jax.eval_shape(kl, *[jnp.ones((1, 2), jnp.bfloat16)] * 2).dtype == jnp.float32
        with jax.enable_x64(True):
            assert jax.eval_shape(kl, *[jnp.ones((1, 2), jnp.float64)] * 2).dtype == jnp.float64


def test_an_unknown_estimator_and_another_shape_are_refused():
    with pytest.raises(ValueError, match="estimator must be one of k1, k2, k3, abs, got 'k4'"):
        losses.kl(jnp.zeros((1, 2)), jnp.zeros((1, 2)), "k4")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="ref_logp must have the shape of logp"):
        losses.kl(jnp.zeros((1, 2)), jnp.zeros(2))


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(0.1, 0.2), (0.11, 0.202), (5.0, 0.204), (0.0, 0.196)],  # 0.2 * (1 + clip(kl / 0.1 - 1, +-0.2) * 100 / 1000)
)
def test_the_kl_coefficient_moves_towards_its_target_by_a_bounded_step(kl, expected):
    coefficient = losses.adaptive_kl_coefficient(0.2, kl, target=0.1, horizon=1000, samples=100)
    np.testing.assert_allclose(coefficient, expected, rtol=1e-6)


@pytest.mark.parametrize("option", ["target", "horizon"])
def test_a_kl_target_or_horizon_of_zero_is_refused(option):
    with pytest.raises(ValueError, match=f"{option} must be above 0"):
        losses.adaptive_kl_coefficient(0.2, 0.1, **{"target": 0.1, option: 0.0})

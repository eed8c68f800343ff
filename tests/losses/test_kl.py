import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxrl_post import losses
from tests.advantages.compiled import all_compiled

losses = all_compiled(losses)

ESTIMATORS = get_args(losses.KLEstimator)
STRAIGHT_THROUGH = ("k1+", "k3+", "abs+")  # their derivative is declared, not that of their value
WEIGHTED = ("k1_weighted", "k3_weighted")


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


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name not in STRAIGHT_THROUGH])
def test_kl_agrees_with_finite_differences_and_sends_nothing_into_the_reference(estimator):
    with jax.enable_x64(True):
        logp, ref_logp = jnp.array([[-1.0, -3.0, -0.2]]), jnp.array([[-1.5, -2.0, -0.3]])
        # The ratio to the present policy is 1 with a gradient, which no finite difference of the value can show.
        given = {"old_logp": jnp.array([[-0.7, -2.9, -0.4]])} if estimator in WEIGHTED else {}
        check_grads(jax.jit(lambda x: losses.kl(x, ref_logp, estimator, **given)), (logp,), order=1, modes=["rev"])
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
    with pytest.raises(ValueError, match=r"estimator must be one of k1, k2, k3, abs, .*, got 'k4'"):
        losses.kl(jnp.zeros((1, 2)), jnp.zeros((1, 2)), "k4")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="ref_logp must have the shape of logp"):
        losses.kl(jnp.zeros((1, 2)), jnp.zeros(2))


@pytest.mark.parametrize("estimator", STRAIGHT_THROUGH)
def test_a_plus_keeps_the_value_and_takes_the_gradient_of_k2(estimator):
    # x = log 2 and -log 2: the derivative of x^2 / 2 is x.
    logp, ref_logp = jnp.log(jnp.array([[0.5, 0.25]])), jnp.log(jnp.array([[0.25, 0.5]]))
    np.testing.assert_array_equal(losses.kl(logp, ref_logp, estimator), losses.kl(logp, ref_logp, estimator[:-1]))
    gradient = jax.jit(jax.grad(lambda x: losses.kl(x, ref_logp, estimator).sum()))(logp)
    np.testing.assert_allclose(gradient, [[0.693147, -0.693147]], rtol=1e-5)


@pytest.mark.parametrize("estimator", [*STRAIGHT_THROUGH, *WEIGHTED])
def test_mean_gradients_of_the_repaired_estimators_are_that_of_the_reverse_divergence(estimator):
    with jax.enable_x64(True):
        logits, ref_logp = _distributions()
        reverse = jax.jit(jax.grad(lambda x: _divergence(jax.nn.log_softmax(x), ref_logp)))(logits)
        np.testing.assert_allclose(_mean_gradient(estimator, logits, ref_logp), reverse, atol=1e-14)


@pytest.mark.parametrize("estimator", WEIGHTED)
def test_weighted_estimators_are_exact_for_tokens_of_another_policy_and_the_others_are_not(estimator):
    with jax.enable_x64(True):
        logits, ref_logp = _distributions()
        old_logp = jax.nn.log_softmax(jnp.asarray(np.random.default_rng(1).normal(size=6)))

        @functools.partial(jax.jit, static_argnums=1)
        def mean_and_gradient(logits, estimator, **options):
            def mean(x):
                return jnp.sum(jnp.exp(old_logp) * losses.kl(jax.nn.log_softmax(x), ref_logp, estimator, **options))

            return jax.value_and_grad(mean)(logits)

        exact, gradient = jax.jit(jax.value_and_grad(lambda x: _divergence(jax.nn.log_softmax(x), ref_logp)))(logits)
        found = mean_and_gradient(logits, estimator, old_logp=old_logp)
        np.testing.assert_allclose(found[0], exact, rtol=1e-12)
        np.testing.assert_allclose(found[1], gradient, atol=1e-14)
        for biased in ("k2", "k3", "k3+", estimator):  # the last without the log-probs of the policy that sampled
            assert np.max(np.abs(mean_and_gradient(logits, biased)[1] - gradient)) > 0.01


def test_weighted_estimators_give_hand_worked_numbers():
    # pi = 1/2, ref = 1/4, old = 1/8: r = 4, x = log 2; r x = 2.772589, r k3 = 4 * 0.193147; slope of r x is r (x + 1).
    logp, ref_logp, old_logp = jnp.log(jnp.array([[0.5]])), jnp.log(jnp.array([[0.25]])), jnp.log(jnp.array([[0.125]]))
    for estimator, value, slope in (("k1_weighted", 2.772589, 6.772589), ("k3_weighted", 0.772589, 2.772589)):
        found = jax.jit(
            jax.value_and_grad(lambda x, name=estimator: losses.kl(x, ref_logp, name, old_logp=old_logp)[0, 0])
        )(logp)
        np.testing.assert_allclose(found[0], value, rtol=1e-5)
        np.testing.assert_allclose(found[1], [[slope]], rtol=1e-5)


def test_summed_over_tokens_k2_misses_what_a_token_does_to_later_ones_and_k2_of_the_sequence_does_not():
    # Two steps over three tokens; the second step's distribution depends on the first token. All nine sequences.
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        params = {"first": jnp.asarray(rng.normal(size=3)), "second": jnp.asarray(rng.normal(size=(3, 3)))}
        reference = {"first": jnp.asarray(rng.normal(size=3)), "second": jnp.asarray(rng.normal(size=(3, 3)))}

        def logp(params):  # [9, 2]
            first = jnp.repeat(jax.nn.log_softmax(params["first"]), 3)
            return jnp.stack([first, jax.nn.log_softmax(params["second"]).reshape(9)], axis=1)

        weights, ref_logp = jnp.exp(logp(params).sum(1)), logp(reference)

        def exact(params):
            sequence = logp(params).sum(1)
            return jnp.sum(jnp.exp(sequence) * (sequence - ref_logp.sum(1)))

        def of_sequences(params):
            return jnp.sum(weights * losses.kl(logp(params).sum(1), ref_logp.sum(1), "k2"))

        def of_tokens(params):
            return jnp.sum(weights[:, None] * losses.kl(logp(params), ref_logp, "k2"))

        right, whole, summed = (jax.jit(jax.grad(f))(params) for f in (exact, of_sequences, of_tokens))
        for name in ("first", "second"):
            np.testing.assert_allclose(whole[name], right[name], atol=1e-14)
        np.testing.assert_allclose(summed["second"], right["second"], atol=1e-14)  # nothing comes later
        assert np.max(np.abs(summed["first"] - right["first"])) > 0.01


def test_the_weighted_k3_pulls_back_from_far_below_where_the_exponential_is_clamped():
    logp, ref_logp = jnp.array([[-500.0, 0.0]]), jnp.array([[0.0, -500.0]])
    gradient = jax.jit(jax.grad(lambda x: losses.kl(x, ref_logp, "k3_weighted").sum()))(logp)
    assert gradient.tolist() == [[-500.0, 500.0]]


def test_log_probs_of_the_sampler_are_refused_where_no_ratio_is_taken_and_are_constants():
    logp = jnp.full((1, 2), -1.0)
    with pytest.raises(ValueError, match="old_logp does not apply to estimator 'k3'"):
        losses.kl(logp, logp, "k3", old_logp=logp)
    gradient = jax.jit(jax.grad(lambda x: losses.kl(logp, logp - 0.5, "k1_weighted", old_logp=x).sum()))(logp)
    assert np.all(np.asarray(gradient) == 0)


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


def test_a_kl_kept_below_its_target_lets_the_coefficient_fall_by_a_fifth_per_horizon():
    # (1 - 0.2 * 10 / 1000)^100 = 0.818567: e^-0.2 to leading order.
    coefficient = jax.lax.fori_loop(
        0, 100, lambda _, b: losses.adaptive_kl_coefficient(b, 0.0, target=0.1, horizon=1000, samples=10), 1.0
    )
    np.testing.assert_allclose(coefficient, 0.998**100, rtol=1e-5)


def test_the_absolute_estimate_has_no_slope_where_the_policies_agree():
    gradient = jax.grad(lambda logp: losses.kl(logp, jnp.array([-1.0, -2.0, -3.0]), estimator="abs").sum())
    assert gradient(jnp.array([-1.0, -1.5, -3.5])).tolist() == [0.0, 1.0, -1.0]

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxrl_post import losses


def _pair(margin):
    return jnp.array([margin - 10.0]), jnp.array([-10.0]), jnp.array([-10.0]), jnp.array([-10.0])


@pytest.mark.parametrize(
    ("margin", "label_smoothing", "expected"),
    [
        (2.0, 0.0, 0.598139),  # -log sigma(0.2)
        (-2.0, 0.0, 0.798139),  # -log sigma(-0.2) = 0.598139 + 0.2
        (2.0, 0.1, 0.618139),  # 0.9 * 0.598139 + 0.1 * 0.798139
        (0.0, 0.0, 0.693147),  # log 2: an identical pair
        (0.0, 0.3, 0.693147),
    ],
)
def test_dpo_gives_closed_form_numbers(margin, label_smoothing, expected):
    np.testing.assert_allclose(
        losses.dpo(*_pair(margin), beta=0.1, label_smoothing=label_smoothing), [expected], rtol=2e-6
    )


def test_the_margin_is_of_policy_over_reference_and_chosen_over_rejected():
    # (-1 + 3) - (-4 + 5) = 1, beta 2: -log sigma(2) = 0.126928.
    logps = (jnp.array([x]) for x in (-1.0, -4.0, -3.0, -5.0))
    np.testing.assert_allclose(losses.dpo(*logps, beta=2.0), [0.126928], rtol=1e-5)


def test_the_gradient_is_minus_beta_times_the_probability_of_the_wrong_order():
    with jax.enable_x64(True):
        for margin in (-3.0, 0.0, 5.0):
            chosen, rejected = jax.jit(jax.grad(lambda *x: losses.dpo(*x, beta=0.5).sum(), argnums=(0, 1)))(
                *_pair(margin)
            )
            expected = -0.5 / (1 + np.exp(0.5 * margin))
            np.testing.assert_allclose(chosen, [expected], rtol=1e-12)
            np.testing.assert_allclose(rejected, [-expected], rtol=1e-12)


def test_label_smoothing_has_its_minimum_where_the_model_believes_the_labels_as_much():
    with jax.enable_x64(True):
        margin = np.log(0.8 / 0.2)  # sigma(margin) = 1 - 0.2
        gradient = jax.jit(jax.grad(lambda x: losses.dpo(x, *_pair(margin)[1:], beta=1.0, label_smoothing=0.2).sum()))
        np.testing.assert_allclose(gradient(_pair(margin)[0]), [0.0], atol=1e-12)


def test_the_gradient_agrees_with_finite_differences_and_the_reference_gets_none():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        logps = [jnp.asarray(rng.normal(size=5)) for _ in range(4)]
        check_grads(
            jax.jit(lambda c, r: losses.dpo(c, r, *logps[2:], label_smoothing=0.1)), logps[:2], order=1, modes=["rev"]
        )
        gradients = jax.jit(jax.grad(lambda *x: losses.dpo(*x).sum(), argnums=(2, 3)))(*logps)
        assert all(np.all(np.asarray(gradient) == 0) for gradient in gradients)
        assert losses.dpo(*logps).dtype == jnp.float64
    assert losses.dpo(*[jnp.ones(2, jnp.bfloat16)] * 4).dtype == jnp.float32


@pytest.mark.parametrize("margin", [-1e6, 1e6])
def test_huge_margins_are_finite(margin):
    value, gradient = jax.jit(jax.value_and_grad(lambda x: losses.dpo(x, *_pair(0.0)[1:], label_smoothing=0.1).sum()))(
        _pair(margin)[0]
    )
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


def test_the_loss_is_the_logistic_loss_of_the_difference_of_implicit_rewards():
    rng = np.random.default_rng(1)
    chosen, rejected, ref_chosen, ref_rejected = (jnp.asarray(rng.normal(size=7)) for _ in range(4))
    difference = losses.implicit_reward(chosen, ref_chosen, beta=0.3) - losses.implicit_reward(
        rejected, ref_rejected, beta=0.3
    )
    expected = np.log1p(np.exp(-np.asarray(difference, np.float64)))
    loss = jax.jit(lambda *x: losses.dpo(*x, beta=0.3))(chosen, rejected, ref_chosen, ref_rejected)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_a_rejected_answer_that_cannot_be_costs_nothing():
    chosen, ref = -jnp.ones(1), -2 * jnp.ones(1)
    loss = jax.value_and_grad(lambda rejected: losses.dpo(chosen, rejected, ref, ref)[0])
    assert [float(jnp.sum(x)) for x in loss(jnp.array([-jnp.inf]))] == [0.0, 0.0]


def test_impossible_arguments_are_refused():
    one = jnp.zeros(2)
    with pytest.raises(ValueError, match=r"chosen_logp must be \[B\], got shape \(2, 3\); sum log-probs"):
        losses.dpo(*[jnp.zeros((2, 3))] * 4)
    with pytest.raises(ValueError, match="ref_rejected_logp must have the shape of chosen_logp"):
        losses.dpo(one, one, one, jnp.zeros(3))
    with pytest.raises(ValueError, match="beta must be above 0, got 0"):
        losses.dpo(one, one, one, one, beta=0)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0.5\), got 0.5"):
        losses.dpo(one, one, one, one, label_smoothing=0.5)

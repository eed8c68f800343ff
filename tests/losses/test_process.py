"""Losses of verifiers of steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses
from tests.advantages.compiled import all_compiled

losses = all_compiled(losses)


def test_the_loss_is_the_cross_entropy_with_the_counted_success_rate():
    z, q = np.linspace(-6, 6, 5), np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    p = 1 / (1 + np.exp(-z))
    expected = -q * np.log(p) - (1 - q) * np.log(1 - p)
    np.testing.assert_allclose(losses.success_bce(jnp.asarray(z), jnp.asarray(q)), expected, rtol=1e-5)


def test_its_gradient_is_the_error_of_the_rate_and_none_reaches_the_counts():
    z, q = jnp.array([[-80.0, -1.0, 0.5, 80.0]]), jnp.array([[0.5, 0.2, 1.0, 0.5]])
    of_logits, of_rates = jax.jit(jax.grad(lambda z, q: jnp.sum(losses.success_bce(z, q)), argnums=(0, 1)))(z, q)
    np.testing.assert_allclose(of_logits, jax.nn.sigmoid(z) - q, atol=1e-6)
    assert not jnp.any(of_rates)
    assert losses.success_bce(z.astype(jnp.bfloat16), q).dtype == jnp.float32


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="success_rate must have the shape of logits"):
        losses.success_bce(jnp.zeros((2, 3)), jnp.zeros(2))


def test_the_implicit_reward_of_a_right_answer_has_the_tables_loss():
    logp, ref, mask = jnp.array([[-1.0, -1.0, jnp.nan]]), jnp.array([[-2.0, -2.0, 0.0]]), jnp.array([[1, 1, 0]])
    loss = lambda *x: losses.implicit_outcome_bce(*x, mask, beta=0.05)  # noqa: E731
    np.testing.assert_allclose(loss(logp, ref, jnp.ones(1)), [0.644397], rtol=1e-5)
    np.testing.assert_allclose(loss(logp, ref, jnp.zeros(1)), [np.log1p(np.exp(0.1))], rtol=1e-5)
    slopes = jax.jit(jax.grad(lambda *x: losses.implicit_outcome_bce(*x, mask).sum(), (0, 1, 2)))(
        logp, ref, jnp.ones(1)
    )
    np.testing.assert_allclose(slopes[0], [[-0.05 / (1 + np.exp(0.1))] * 2 + [0]], rtol=1e-5)
    assert not any(np.any(slope) for slope in slopes[1:])


def test_an_answer_without_tokens_teaches_the_implicit_reward_nothing():
    value, slope = jax.jit(
        jax.value_and_grad(lambda x: losses.implicit_outcome_bce(x, 0 * x, jnp.ones(1), jnp.zeros((1, 2))).sum())
    )(jnp.ones((1, 2)))
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    assert not slope.any()
    with pytest.raises(ValueError, match="beta must be above 0"):
        losses.implicit_outcome_bce(jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.ones(1), jnp.ones((1, 2)), beta=0.0)


def test_the_loss_adds_steps_and_traces_and_leaves_padding_out():
    scores, targets = jnp.array([[0.5, 1.0, jnp.nan], [jnp.nan] * 3]), jnp.array([[0.0, 0.5, jnp.nan], [0.0] * 3])
    mask, whole, rate = jnp.array([[1, 1, 0], [0, 0, 0]]), jnp.array([1.0, 0.5]), jnp.array([0.5, 0.5])
    found = losses.trace_loss(scores, targets, mask, whole, rate, step_weight=2.0, trace_weight=4.0)
    np.testing.assert_allclose(found, [2 * 0.25 + 4 * 0.25, 0])
    gradient = jax.jit(jax.grad(lambda s, t, w, r: losses.trace_loss(s, t, mask, w, r).sum(), argnums=(0, 1, 2, 3)))(
        scores, targets, whole, rate
    )
    np.testing.assert_allclose(gradient[0], [[0.5, 0.5, 0], [0, 0, 0]])
    np.testing.assert_allclose(gradient[2], [1.0, 0])
    assert not any(np.any(gradient[place]) for place in (1, 3))
    with pytest.raises(ValueError, match="success_rate must have the shape of trace_scores"):
        losses.trace_loss(scores, targets, mask, whole, jnp.ones(3))

"""Barriers of constrained policy optimisation, against formulas evaluated in float64 and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.losses import constrained
from tests.advantages.compiled import all_compiled

constrained = all_compiled(constrained)

INF = jnp.inf


def test_the_barrier_is_minus_the_log_of_the_slack_and_its_tangent_below_the_floor():
    returns, limits = np.array([2.0, 1.0, 0.5]), np.array([-np.inf, 0.6, 0.6])
    found = constrained.log_barrier(returns, limits, t=20.0, floor=0.01)
    expected = [0.0, -np.log(0.4) / 40, -(np.log(0.01) + (-0.1 - 0.01) / 0.01) / 40]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_weights_are_the_slopes_of_the_barrier_by_finite_differences():
    returns, limits = np.array([2.0, 1.0, 0.5, 0.605]), np.array([-np.inf, 0.6, 0.6, 0.6])
    weights = constrained.barrier_weights(returns, limits, floor=0.01)
    with jax.enable_x64(True):
        for j in range(1, 4):
            step = np.eye(4)[j] * 1e-7
            up, down = (
                np.asarray(constrained.log_barrier(returns + sign * step, limits, floor=0.01)).sum() for sign in (1, -1)
            )
            np.testing.assert_allclose(weights[j], -(up - down) / 2e-7, rtol=1e-4)
    assert float(weights[0]) == 1.0
    np.testing.assert_allclose(weights[1], 1 / (20 * 3 * 0.4), rtol=1e-5)
    np.testing.assert_allclose(weights[2], 1 / (20 * 3 * 0.01), rtol=1e-5)  # outside: as strong as at the floor


def test_without_constraints_only_the_objective_counts():
    returns, limits = jnp.array([1.0, -5.0]), jnp.array([-INF, -INF])
    assert constrained.log_barrier(returns, limits).tolist() == [0.0, 0.0]
    assert constrained.barrier_weights(returns, limits).tolist() == [1.0, 1.0]


def test_the_released_barrier_follows_its_formula_and_is_flat_below_the_floor():
    ratio = np.array([1.0, 1.1, 1.5, 0.85])
    returns = np.array([2.0, 0.5])
    found = constrained.ratio_barrier(jnp.log(ratio), jnp.zeros(4), returns)
    clipped = np.clip(ratio, 0.8, 1.2)[:, None]
    expected = -np.log(np.maximum(clipped * returns - 0.9 * returns, 1e-3)).mean(1) / 20
    np.testing.assert_allclose(found, expected, rtol=2e-4)
    slope = jax.jit(jax.grad(lambda logp: constrained.ratio_barrier(logp, jnp.zeros(4), returns).sum()))(jnp.log(ratio))
    np.testing.assert_allclose(slope[:2], -ratio[:2] / (ratio[:2] - 0.9) / 20, rtol=2e-4)
    assert slope[2:].tolist() == [0.0, 0.0]  # clipped, and below the floor


def test_the_released_barrier_does_not_see_which_answers_earn_the_return():
    """Enumerated over 4 answers: its gradient at the sampling policy is 0, where that of the problem is not."""
    logits = jnp.array([0.3, -0.2, 0.1, 0.0])
    reward, beta, t = jnp.array([1.0, 0.2, 0.5, 0.1]), 0.9, 20.0
    p = jax.nn.softmax(logits)
    mean = jnp.sum(p * reward)

    def released(logits):
        logp = jax.nn.log_softmax(logits)
        return jnp.sum(p * constrained.ratio_barrier(logp, jnp.log(p), mean[None], beta=beta, t=t))

    def stated(logits):
        value = jnp.sum(jax.nn.softmax(logits) * reward)
        return jnp.sum(constrained.log_barrier(value[None], beta * mean[None], t=t))

    np.testing.assert_allclose(jax.jit(jax.grad(released))(logits), np.zeros(4), atol=1e-6)
    weight = constrained.barrier_weights(mean[None], beta * mean[None], t=t)
    slope = jax.jit(jax.grad(stated))(logits)
    np.testing.assert_allclose(slope, -weight * p * (reward - mean), rtol=1e-4)
    assert np.linalg.norm(slope) > 0.05


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_values_and_gradients_are_finite_far_outside(dtype):
    logp = jnp.array([0.0, 50.0, -50.0], dtype)

    def total(logp, returns):
        barrier = constrained.log_barrier(returns, jnp.array([-INF, 9.0])).sum()
        return constrained.ratio_barrier(logp, jnp.zeros(3), returns).sum() + barrier

    value, slopes = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(logp, jnp.array([0.0, -1.0], dtype))
    assert value.dtype == jnp.float32
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in (value, *slopes))


def test_wrong_arguments_are_errors():
    with pytest.raises(ValueError, match="t must be above 0, got 0"):
        constrained.log_barrier(jnp.ones(2), jnp.ones(2), t=0)
    with pytest.raises(ValueError, match="limits must have the shape of returns"):
        constrained.log_barrier(jnp.ones(2), jnp.ones(3))
    with pytest.raises(ValueError, match=r"returns must be \[M - 1\]"):
        constrained.ratio_barrier(jnp.ones(2), jnp.ones(2), jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="floor must be above 0"):
        constrained.ratio_barrier(jnp.ones(2), jnp.ones(2), jnp.ones(1), floor=0)

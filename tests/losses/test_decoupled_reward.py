import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses
from tests.advantages.compiled import all_compiled

losses = all_compiled(losses)

SCORES = jnp.array([[-0.5, -0.4, -0.6, -0.8]])
LENGTHS = jnp.array([[100, 300, 200, 400]])
CORRECT = jnp.array([[1, 1, 0, 0]])


def _random(seed=0, shape=(20, 6)):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 500, shape).astype(float)
    return rng.normal(size=shape), lengths, rng.random(shape) < 0.5, rng.random(shape) < 0.8


def test_weights_and_objective_are_the_tables_numbers():
    weights = losses.length_weights(LENGTHS, CORRECT, max_length=1000)
    np.testing.assert_allclose(weights, [[0.880797, 0.119203, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(losses.drpo(SCORES, LENGTHS, CORRECT, max_length=1000), [-0.211420], atol=2e-6)
    gradient = jax.jit(jax.grad(lambda s: losses.drpo(s, LENGTHS, CORRECT, max_length=1000).sum()))(SCORES)
    np.testing.assert_allclose(gradient, [[-0.880797, -0.119203, 0.505, 0.495]], atol=1e-5)


def test_it_is_the_formula_in_a_float64_loop():
    scores, lengths, correct, valid = _random()
    with jax.enable_x64(True):
        found = losses.drpo(scores, lengths, correct, valid, max_length=500, lam=0.3, tau=2.0)
    for p in range(20):
        right, wrong = valid[p] & correct[p], valid[p] & ~correct[p]
        expected = 0.0
        if right.any() and wrong.any():
            omega = np.exp((1 - lengths[p, right] / 500) / 0.3)
            soft = 2.0 * np.log(np.mean(np.exp(scores[p, wrong] / 2.0)))
            expected = soft - np.sum(omega / omega.sum() * scores[p, right])
        np.testing.assert_allclose(found[p], expected, rtol=1e-9, atol=1e-12)


def test_without_a_preference_it_is_disco_and_with_the_strongest_the_shortest_right_answer_alone_counts():
    scores, lengths, correct, valid = _random(1)
    with jax.enable_x64(True):
        plain = losses.disco(scores, correct, valid)
        unweighted = losses.drpo(scores, lengths, correct, valid, max_length=500, lam=math.inf)
        np.testing.assert_allclose(unweighted, plain, rtol=1e-12, atol=1e-15)
    weights = np.asarray(losses.length_weights(lengths, correct, valid, max_length=500, lam=1e-6))
    for p in range(20):
        right = np.flatnonzero(valid[p] & correct[p])
        expected = np.zeros(6)
        if len(right):
            shortest = right[lengths[p, right] == lengths[p, right].min()]
            expected[shortest] = 1 / len(shortest)
        np.testing.assert_allclose(weights[p], expected, atol=1e-6)


def test_no_right_answer_is_ever_pushed_down_whatever_its_length():
    scores, lengths, correct, valid = _random(2)
    gradient = jax.jit(jax.grad(lambda s: losses.drpo(s, lengths, correct, valid, max_length=100).sum()))(
        jnp.asarray(scores)
    )
    right = valid & correct
    assert np.all(np.asarray(gradient)[right] <= 0)
    assert not np.asarray(gradient)[~valid].any()


def test_weights_are_the_best_trade_of_length_against_kl():
    # Of all distributions over right answers, w maximises <w, l> - lam KL(w || uniform): no random one does better.
    rng = np.random.default_rng(3)
    lengths, lam = rng.integers(1, 100, 5), 0.2
    left = 1 - lengths / 100
    best = np.asarray(losses.length_weights(lengths[None], np.ones((1, 5)), max_length=100, lam=lam), np.float64)[0]

    def gain(w):
        return w @ left - lam * np.sum(w * np.log(w * 5))

    assert all(gain(w) <= gain(best) + 1e-6 for w in rng.dirichlet(np.ones(5), 500))


def test_one_sided_groups_groups_of_one_and_invalid_rows_give_zero_and_finite_gradients():
    scores = jnp.array([[1.0, 2.0, jnp.nan], [1.0, 2.0, jnp.nan], [jnp.nan] * 3])
    correct, valid = jnp.array([[1, 1, 0], [0, 0, 1], [1, 0, 1]]), jnp.array([[1, 1, 0], [1, 1, 0], [0, 0, 0]])
    lengths = jnp.full((3, 3), 10.0).at[:, 2].set(jnp.nan)
    value, gradient = jax.jit(
        jax.value_and_grad(lambda s: losses.drpo(s, lengths, correct, valid, max_length=9).sum())
    )(scores)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros((3, 3)))
    one = losses.drpo(jnp.ones((2, 1)), jnp.ones((2, 1)), jnp.array([[1], [0]]), max_length=9)
    np.testing.assert_array_equal(one, [0, 0])
    # Equal lengths are equal weights, and lengths far beyond the budget overflow nothing.
    same = losses.length_weights(jnp.full((1, 4), 7), CORRECT, max_length=9)
    np.testing.assert_allclose(same, [[0.5, 0.5, 0, 0]])
    far = losses.length_weights(jnp.array([[1e9, 2e9]]), jnp.ones((1, 2)), max_length=1, lam=1e-6)
    np.testing.assert_array_equal(far, [[1, 0]])


def test_a_centred_reward_less_a_length_penalty_does_give_long_right_answers_a_negative_advantage():
    # The contrast that motivates the method: of three right answers the longest is pushed down.
    rewards = np.array([1, 0.9, 0.2, 0, 0, 0])
    assert abs((rewards[2] - rewards.mean()) / rewards.std(ddof=1) + 0.3176) < 5e-5
    scores, lengths = jnp.zeros((1, 6)), jnp.array([[0, 100, 800, 500, 500, 500]])
    correct = jnp.array([[1, 1, 1, 0, 0, 0]])
    gradient = jax.jit(jax.grad(lambda s: losses.drpo(s, lengths, correct, max_length=1000).sum()))(scores)
    assert float(gradient[0, 2]) < 0  # descent raises its score


def test_the_hinge_has_a_second_estimator_that_is_never_negative():
    rng = np.random.default_rng(4)
    old, mask = -rng.random((3, 5)), rng.random((3, 5)) < 0.6
    logp = old + 0.3 * rng.normal(size=(3, 5))

    def k3(x):
        return jnp.sum(jnp.where(mask, jnp.exp(x - old) - 1 - (x - old), 0.0)) / mask.sum()

    with jax.enable_x64(True):
        hinge = {"beta": 7.0, "delta": 0.001, "estimator": "k3"}
        given = jax.jit(jax.grad(lambda x: jnp.sum(losses.kl_hinge(x, old, mask, **hinge)) / mask.sum()))(logp)
        expected = jax.jit(jax.grad(lambda x: 3.5 * jnp.maximum(k3(x) - 0.001, 0.0) ** 2))(jnp.asarray(logp))
        np.testing.assert_allclose(given, expected, rtol=1e-9)
        upwards = losses.kl_hinge(old + 0.5, old, mask, estimator="k3")
        assert np.all(np.asarray(upwards)[mask] > 0)  # where k1 is -0.5 and the hinge sees nothing
        assert not np.asarray(losses.kl_hinge(old + 0.5, old, mask)).any()


def test_wrong_arguments_are_named_and_bfloat16_is_raised():
    assert losses.drpo(SCORES.astype(jnp.bfloat16), LENGTHS, CORRECT, max_length=9).dtype == jnp.float32
    with pytest.raises(ValueError, match="max_length must be above 0"):
        losses.length_weights(LENGTHS, CORRECT, max_length=0)
    with pytest.raises(ValueError, match="lam must be above 0"):
        losses.length_weights(LENGTHS, CORRECT, max_length=9, lam=0.0)
    with pytest.raises(ValueError, match=r"lengths must be \[P, G\]"):
        losses.length_weights(LENGTHS[0], CORRECT[0], max_length=9)
    with pytest.raises(ValueError, match="lengths must have the shape of scores"):
        losses.drpo(SCORES, LENGTHS[:, :2], CORRECT, max_length=9)
    with pytest.raises(ValueError, match="weights must have the shape"):
        losses.disco(SCORES, CORRECT, weights=jnp.ones(4))
    with pytest.raises(ValueError, match="estimator must be one of k1, k3"):
        losses.kl_hinge(SCORES, SCORES, SCORES, estimator="k2")

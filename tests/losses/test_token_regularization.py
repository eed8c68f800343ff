import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxrl_post import losses
from tests.advantages.compiled import all_compiled

losses = all_compiled(losses)


def test_a_log_ratio_of_one_gives_0_23106_and_none_gives_0():
    better, worse = jnp.array([[-1.0, -2.0, -5.0, 3.0]]), jnp.array([[-2.0, -2.0, -4.0, jnp.nan]])
    found = losses.token_reward(better, worse, jnp.array([[1, 1, 1, 0]]))
    np.testing.assert_allclose(found, [[0.231059, 0.0, -0.231059, 0.0]], rtol=1e-5)


def test_a_token_reward_is_bounded_and_a_constant():
    far = losses.token_reward(jnp.array([[0.0, -1e4]]), jnp.array([[-1e4, 0.0]]), jnp.ones((1, 2)))
    np.testing.assert_allclose(far, [[0.5, -0.5]], rtol=1e-6)
    gradients = jax.jit(jax.grad(lambda a, b: jnp.sum(losses.token_reward(a, b, jnp.ones((1, 2)))), argnums=(0, 1)))(
        jnp.array([[-1.0, -2.0]]), jnp.array([[-2.0, -1.0]])
    )
    assert all(np.all(np.asarray(gradient) == 0) for gradient in gradients)


def test_a_pair_that_is_not_yet_learned_costs_what_the_closed_form_says():
    # sum_t r log pi = -1 on each side, beta 0.1, equal rewards: 0.25 * 0.5 * (0.1 + 0.1) = 0.025.
    logp, rewards = jnp.array([[-2.0, -4.0, jnp.nan]] * 2), jnp.array([[0.3, 0.1, 9.0]] * 2)
    mask = jnp.array([[1, 1, 0]] * 2)
    each = losses.token_regularization(logp, rewards, mask, beta=0.1)
    np.testing.assert_allclose(each, [0.1, 0.1], rtol=1e-6)
    np.testing.assert_allclose(0.25 * losses.t_reg(jnp.zeros(1), each[:1], each[1:]), [0.025], rtol=1e-6)
    means = losses.token_regularization(logp, rewards, mask, beta=0.1, normalize_length=True)
    np.testing.assert_allclose(means, [0.05, 0.05], rtol=1e-6)


def test_the_weight_is_that_of_the_pairs_own_gradient_and_fades_as_the_pair_is_learned():
    margins = np.array([-3.0, 0.0, 4.0, 60.0])
    own = -jax.vmap(jax.grad(lambda h: -jax.nn.log_sigmoid(h)))(jnp.asarray(margins))
    found = losses.t_reg(jnp.asarray(margins), jnp.ones(4), jnp.zeros(4))
    np.testing.assert_allclose(found, own, rtol=1e-5)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(margins)), rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda h: jnp.sum(losses.t_reg(h, jnp.ones(4), jnp.ones(4)))))(jnp.asarray(margins))
    assert np.all(np.asarray(gradient) == 0)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("normalize_length", [False, True])
def test_what_stands_under_the_mask_reaches_neither_value_nor_gradient(bad, normalize_length):
    def loss(logp, rewards):
        mask = jnp.array([[1, 0]])
        return jnp.sum(losses.token_regularization(logp, rewards, mask, normalize_length=normalize_length))

    clean, rewards = jnp.array([[-1.0, -4.0]]), jnp.array([[0.2, 0.3]])
    expected = jax.value_and_grad(loss)(clean, rewards)
    for place in ((clean.at[0, 1].set(bad), rewards), (clean, rewards.at[0, 1].set(bad))):
        for found, wanted in zip(jax.value_and_grad(loss)(*place), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_the_gradient_is_minus_beta_times_the_token_reward_and_zero_where_masked():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        logp, rewards = -rng.random((3, 5)), rng.uniform(-0.5, 0.5, (3, 5))
        mask = (np.arange(5) < np.array([[5], [2], [0]])).astype(float)
        gradient = jax.jit(jax.grad(lambda x: losses.token_regularization(x, rewards, mask, beta=0.2).sum()))(
            jnp.asarray(logp)
        )
        np.testing.assert_allclose(gradient, -0.2 * rewards * mask, rtol=1e-12)
        for normalize_length in (False, True):
            check_grads(
                lambda x, n=normalize_length: losses.token_regularization(x, rewards, mask, normalize_length=n),
                (logp,),
                order=1,
                modes=["rev"],
            )


@pytest.mark.parametrize(
    ("chosen", "rejected", "beta", "gamma", "expected"),
    [
        (-1.0, -1.5, 2.0, 1.0, 0.693147),  # the margin is what it is to be: log 2
        (-1.0, -1.5, 2.0, 0.0, 0.313262),  # log(1 + exp(-1))
        (-1.5, -1.0, 2.0, 1.0, 2.126928),  # log(1 + exp(2))
    ],
)
def test_simpo_gives_hand_worked_numbers(chosen, rejected, beta, gamma, expected):
    found = losses.simpo(jnp.array([chosen]), jnp.array([rejected]), beta=beta, gamma=gamma)
    np.testing.assert_allclose(found, [expected], rtol=1e-6)


def test_simpo_has_the_gradient_of_finite_differences_and_is_finite_far_out():
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        check_grads(losses.simpo, (-rng.random(4), -rng.random(4)), order=1, modes=["rev"])
        assert losses.simpo(-rng.random(4), -rng.random(4)).dtype == jnp.float64
    value, gradient = jax.jit(jax.value_and_grad(lambda x: losses.simpo(x, jnp.zeros(1)).sum()))(jnp.array([-1e6]))
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    assert losses.simpo(jnp.zeros(1, jnp.bfloat16), jnp.zeros(1, jnp.bfloat16)).dtype == jnp.float32


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"better_logp must be \[B, T\]"):
        losses.token_reward(jnp.zeros(2), jnp.zeros(2), jnp.ones(2))
    with pytest.raises(ValueError, match="token_rewards must have the shape of logp"):
        losses.token_regularization(jnp.zeros((2, 3)), jnp.zeros((2, 4)), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="rejected must have the shape of chosen"):
        losses.t_reg(jnp.zeros(2), jnp.zeros(2), jnp.zeros(3))
    with pytest.raises(ValueError, match="beta must be above 0, got 0"):
        losses.simpo(jnp.zeros(2), jnp.zeros(2), beta=0)
    with pytest.raises(ValueError, match=r"chosen_logp must be \[B\], got shape \(2, 3\); average"):
        losses.simpo(jnp.zeros((2, 3)), jnp.zeros((2, 3)))

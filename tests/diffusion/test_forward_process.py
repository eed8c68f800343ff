"""Losses on noised samples: numbers of the papers, limits in which they are other losses, gradients that vanish."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import diffusion


def test_the_exact_velocity_is_the_regressions_minimum():
    keys = jax.random.split(jax.random.key(0), 3)
    x0, noise = jax.random.normal(keys[0], (64, 2)), jax.random.normal(keys[1], (64, 2))
    np.testing.assert_allclose(diffusion.flow_matching(noise - x0, x0, noise), np.zeros(64))
    time = jax.random.uniform(keys[2], (64,))
    x_t = diffusion.noised(x0, noise, time)
    np.testing.assert_allclose(x_t - time[:, None] * (noise - x0), x0, atol=1e-5)


def test_weights_of_rewards():
    found = diffusion.reward_weights(jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(found, [0.270092, 0.734185, 1.995723], rtol=1e-5)
    np.testing.assert_allclose(diffusion.reward_weights(jnp.full(4, 3.0)), np.ones(4))
    np.testing.assert_allclose(diffusion.reward_weights(jnp.array([3.0])), [1.0])
    capped = diffusion.reward_weights(jnp.array([0.0, 0.0, 1.0]), temperature=50.0, clip=10.0)
    np.testing.assert_allclose(capped, [0.0, 0.0, 3.0], atol=1e-5)


def test_nft_has_no_gradient_for_a_sample_that_is_neither_good_nor_bad():
    keys = jax.random.split(jax.random.key(1), 4)
    x0, noise, old = (jax.random.normal(key, (5, 3)) for key in keys[:3])
    time = jax.random.uniform(keys[3], (5,))
    x_t = diffusion.noised(x0, noise, time)

    def total(v, r, beta):
        return jnp.sum(diffusion.nft(v, old, x0, x_t, time, jnp.full(5, r), beta=beta))

    np.testing.assert_allclose(jax.grad(total)(old, 0.5, 0.7), np.zeros((5, 3)), atol=1e-6)
    good, bad = jax.grad(total)(old, 1.0, 1.0), jax.grad(total)(old, 0.0, 1.0)
    np.testing.assert_allclose(good, -bad, rtol=1e-5)
    assert bool(jnp.all(jnp.isfinite(jax.grad(total)(noise - x0, 1.0, 1.0))))
    assert diffusion.optimality(jnp.array(2.5)) == pytest.approx(0.75)


def test_gdro_is_dpo_for_two_and_a_ranking_for_more():
    scores, rewards = jnp.array([[-0.2, 0.3]]), jnp.array([[0.0, 1.0]])
    for temperature in (0.0, 1e-3):
        found = diffusion.gdro(scores, rewards, temperature=temperature)
        np.testing.assert_allclose(found, [0.47408], atol=1e-5)
    soft = diffusion.gdro(jnp.array([[0.2, -0.1, 0.0]]), jnp.array([[1.0, 0.5, 0.0]]), temperature=0.5)
    np.testing.assert_allclose(soft, [1.74876], atol=1e-5)


def test_gdro_does_not_depend_on_the_groups_order_and_is_least_at_the_rewards():
    scores, rewards = jnp.array([0.4, -0.3, 0.1]), jnp.array([1.0, 0.2, 0.6])
    found = [
        float(diffusion.gdro(scores[None, p], rewards[None, p])[0])
        for p in map(jnp.array, itertools.permutations(range(3)))
    ]
    np.testing.assert_allclose(found, found[0], rtol=1e-5)
    slope = jax.grad(lambda s: diffusion.gdro(s[None], rewards[None], temperature=0.5)[0])(rewards / 0.5)
    np.testing.assert_allclose(slope, np.zeros(3), atol=1e-6)


def test_equal_rewards_ask_for_equal_scores():
    slope = jax.grad(lambda s: diffusion.gdro(s[None], jnp.ones((1, 3)))[0])(jnp.full(3, 0.7))
    np.testing.assert_allclose(slope, np.zeros(3), atol=1e-6)


def test_prdp_is_zero_at_the_closed_form_and_clipped_steps_do_not_hide_an_error():
    ref = jax.nn.log_softmax(jax.random.normal(jax.random.key(2), (5,)))
    rewards = jnp.array([0.3, -1.0, 2.0, 0.0, 1.0])
    best = jax.nn.log_softmax(ref + rewards / 2.0)
    of = lambda logp: logp[None, :, None]  # noqa: E731
    np.testing.assert_allclose(diffusion.prdp(of(best), of(ref), of(best), rewards[None], beta=2.0), [0.0], atol=1e-10)
    assert float(diffusion.prdp(of(best), of(ref), of(ref), rewards[None], beta=2.0)[0]) > 0.1
    zero = jnp.zeros((1, 2, 1))
    found = diffusion.prdp(
        jnp.array([[[0.4], [0.0]]]), zero, jnp.array([[[0.4], [0.0]]]), jnp.array([[1.0, 0.0]]), beta=2.0
    )
    np.testing.assert_allclose(found, [0.01], rtol=1e-5)
    assert diffusion.prdp(zero[:, :1], zero[:, :1], zero[:, :1], jnp.ones((1, 1))).tolist() == [0.0]


def test_a_guided_reward_without_a_direction_is_the_cosine():
    output, prompt = jnp.array([3.0, 4.0]), jnp.array([1.0, 0.0])
    np.testing.assert_allclose(diffusion.guided_reward(output, prompt, jnp.zeros(2)), 0.6, rtol=1e-6)
    found = diffusion.guided_reward(jnp.array([0.0, 1.0]), prompt, jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(found, 0.894427, rtol=1e-5)
    slope = jax.grad(lambda b: diffusion.guided_reward(output, prompt, b))(prompt)  # one of the two has no length
    assert bool(jnp.all(jnp.isfinite(slope)))

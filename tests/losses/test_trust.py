"""Decoupled PPO, the interpolated proximal policy and the second-moment mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses
from jaxrl_post.losses.trust import decoupled_ppo, proximal_logp, second_moment_mask


def _random(seed, shape=(5, 9)):
    rng = np.random.default_rng(seed)
    sampler = -rng.random(shape) * 3
    old_logp = sampler + rng.normal(size=shape) * 0.5
    return old_logp + rng.normal(size=shape) * 0.3, old_logp, rng.normal(size=shape), sampler


@pytest.mark.parametrize("max_weight", [None, 1.5])
def test_decoupled_ppo_agrees_with_a_float64_loop(max_weight):
    logp, old_logp, advantages, sampler = _random(0)
    expected = np.empty_like(logp)
    for i in np.ndindex(logp.shape):
        weight = np.exp(old_logp[i] - sampler[i])
        weight = weight if max_weight is None else min(weight, max_weight)
        r, a = np.exp(logp[i] - old_logp[i]), advantages[i]
        expected[i] = -weight * min(r * a, np.clip(r, 0.8, 1.2) * a)
    with jax.enable_x64(True):
        loss = decoupled_ppo(logp, old_logp, advantages, sampler, max_weight=max_weight)
        np.testing.assert_allclose(loss, expected, rtol=1e-12)


def test_decoupled_ppo_is_ppo_where_the_proximal_policy_sampled():
    logp, old_logp, advantages, _ = map(jnp.asarray, _random(1))
    np.testing.assert_allclose(
        decoupled_ppo(logp, old_logp, advantages, old_logp), losses.ppo(logp, old_logp, advantages), rtol=1e-6
    )


def test_decoupled_ppo_without_clipping_has_the_gradient_of_the_ratio_to_the_sampler():
    logp, old_logp, advantages, sampler = map(jnp.asarray, _random(2))
    wide = {"clip_low": 1.0, "clip_high": 1e9}
    one = jax.grad(lambda x: decoupled_ppo(x, old_logp, advantages, sampler, **wide).sum())(logp)
    other = jax.grad(lambda x: losses.ppo(x, sampler, advantages, **wide).sum())(logp)
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_no_gradient_flows_into_the_proximal_and_the_sampling_policy():
    arrays = [jnp.asarray(x) for x in _random(3)]
    for gradient in jax.grad(lambda *x: decoupled_ppo(*x).sum(), argnums=(1, 2, 3))(*arrays):
        assert np.all(np.asarray(gradient) == 0)
    version = jnp.ones(arrays[0].shape, jnp.int32)
    assert np.all(np.asarray(jax.grad(lambda x: proximal_logp(x, arrays[3], version, 4).sum())(arrays[0])) == 0)


def test_the_proximal_policy_lies_one_step_back_on_the_way_from_the_sampler():
    logp, sampler = jnp.array([[0.0] * 5]), jnp.array([[-1.0] * 5])
    version = jnp.array([[0, 2, 3, 4, -1]])
    # versions 4 - 1 = 3 of: 4 steps (3/4 of the way), 2 (1/2), 1 (0), the trained policy itself, and no sample
    np.testing.assert_allclose(proximal_logp(logp, sampler, version, 4), [[-0.25, -0.5, -1.0, -1.0, -1.0]])
    np.testing.assert_allclose(jax.jit(proximal_logp)(logp, sampler, version, 4), [[-0.25, -0.5, -1.0, -1.0, -1.0]])


def _greedy(squares, threshold):
    kept = sorted(squares)
    while len(kept) > 1 and np.mean(kept) >= threshold:
        kept.pop()
    return kept


@pytest.mark.parametrize("threshold", [1e-9, 0.02, 0.1, 10.0])
def test_the_second_moment_of_what_is_kept_is_below_the_threshold(threshold):
    rng = np.random.default_rng(4)
    logp, mask = rng.normal(size=(6, 10)) * 0.5, (rng.random((6, 10)) < 0.8).astype(float)
    kept = np.asarray(jax.jit(second_moment_mask)(logp, np.zeros_like(logp), mask, threshold=threshold))
    expected = _greedy((logp**2)[mask > 0], threshold)
    np.testing.assert_allclose(np.sort((logp**2)[kept > 0]), expected, rtol=1e-6)
    assert np.all(kept <= mask)


def test_no_token_is_dropped_on_policy_and_none_appears_in_an_empty_mask():
    logp = jnp.full((2, 3), -1.0)
    assert second_moment_mask(logp, logp, jnp.ones((2, 3))).tolist() == [[1.0] * 3] * 2
    assert second_moment_mask(logp, 0 * logp, jnp.zeros((2, 3))).tolist() == [[0.0] * 3] * 2


def test_numbers_under_the_mask_play_no_part():
    logp = jnp.array([[0.1, jnp.nan, 5.0]])
    assert second_moment_mask(logp, 0 * logp, jnp.array([[1.0, 0.0, 0.0]])).tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_log_prob_that_has_no_weight_in_the_interpolation_may_be_anything(bad):
    sampler = -jnp.ones((1, 2))
    found = jax.jit(proximal_logp)(jnp.full((1, 2), bad), sampler, jnp.array([[3, -1]]), 4)
    np.testing.assert_array_equal(found, sampler)


def test_options_without_meaning_are_refused():
    one = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match="max_weight must be >= 1"):
        decoupled_ppo(one, one, one, one, max_weight=0.5)
    with pytest.raises(ValueError, match="threshold must be above 0"):
        second_moment_mask(one, one, one, threshold=0.0)
    with pytest.raises(ValueError, match="sampler_logp must have the shape of logp"):
        decoupled_ppo(one, one, one, jnp.zeros(1))
    with pytest.raises(ValueError, match="sampler_logp must have the shape of logp"):
        second_moment_mask(one, jnp.zeros(1), one)
    with pytest.raises(ValueError, match="version must have the shape of logp"):
        proximal_logp(one, one, jnp.zeros(1, jnp.int32), 1)

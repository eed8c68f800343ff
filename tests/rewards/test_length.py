"""Rewards of lengths: the papers' numbers, monotony, and the ends of the range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.rewards import length
from jaxrl_post.rewards.length import soft_overlong, stop_properly
from tests.rewards.compiled import compiled

cosine_length = compiled(length.cosine_length)


def test_the_soft_overlong_punishment_has_the_papers_numbers():
    # L_max = 20480 and a buffer of 4096 tokens: none up to 16384, then linear to -1 at the limit.
    lengths = jnp.array([1, 16384, 18432, 20480, 30000])
    penalty = soft_overlong(lengths, max_length=20480, buffer=4096)
    assert penalty.tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]
    free = soft_overlong(lengths, max_length=20480, buffer=4096, bounded=False)
    np.testing.assert_allclose(free, [0.0, 0.0, -0.5, -1.0, -(30000 - 16384) / 4096])
    assert soft_overlong(jnp.array([100]), max_length=100, buffer=20, factor=0.25).tolist() == [-0.25]


def test_no_penalty_is_a_positive_zero():
    assert not np.signbit(np.asarray(soft_overlong(jnp.array([0, 5]), max_length=10, buffer=5))).any()


def test_the_cosine_reward_prefers_short_right_answers_and_long_wrong_ones():
    lengths = jnp.arange(0, 121, 10)
    right = cosine_length(lengths, jnp.ones(13), max_length=100)
    wrong = cosine_length(lengths, jnp.zeros(13), max_length=100)
    expected = [0.75 + 0.25 * np.cos(np.pi * min(length, 100) / 100) for length in range(0, 121, 10)]
    np.testing.assert_allclose(right, expected, rtol=1e-6)
    np.testing.assert_allclose(wrong, [-0.75 - 0.25 * np.cos(np.pi * min(n, 100) / 100) for n in range(0, 121, 10)])
    assert np.all(np.diff(right) <= 0)
    assert np.all(np.diff(wrong) >= 0)
    assert right.min() > wrong.max()


def test_answers_that_were_cut_are_scaled_or_replaced_and_others_left():
    rewards, truncated = jnp.array([[1.0, -2.0], [1.0, 0.5]]), jnp.array([[False, True], [True, False]])
    assert stop_properly(rewards, truncated, coefficient=0.0).tolist() == [[1.0, 0.0], [0.0, 0.5]]
    assert stop_properly(rewards, truncated, coefficient=0.5).tolist() == [[1.0, -1.0], [0.5, 0.5]]
    assert stop_properly(rewards, truncated, coefficient=-0.5).tolist() == [[1.0, -0.5], [-0.5, 0.5]]


def test_rewards_of_lengths_work_under_jit_in_any_shape_and_dtype():
    lengths = jnp.array([[5, 95], [60, 100]])
    jitted = jax.jit(lambda n: soft_overlong(n, max_length=100, buffer=50))(lengths)
    np.testing.assert_allclose(jitted, [[0.0, -0.9], [-0.2, -1.0]], rtol=1e-6)
    assert cosine_length(lengths.astype(jnp.bfloat16), lengths > 50, max_length=100).dtype == jnp.float32
    with jax.enable_x64(True):
        assert soft_overlong(jnp.asarray(lengths, jnp.float64), max_length=100, buffer=5).dtype == jnp.float64


def test_settings_without_meaning_are_refused():
    one = jnp.ones(3)
    with pytest.raises(ValueError, match=r"buffer must be above 0 and at most max_length=10 tokens, got 20"):
        soft_overlong(one, max_length=10, buffer=20)
    with pytest.raises(ValueError, match="max_length must be above 0 tokens, got 0"):
        cosine_length(one, one, max_length=0)
    with pytest.raises(ValueError, match=r"correct must have the shape of lengths, \(3,\), got \(2,\)"):
        cosine_length(one, jnp.ones(2), max_length=5)
    with pytest.raises(ValueError, match="coefficient must be at most 1, got 2; above it, being cut would be rewarded"):
        stop_properly(one, one, coefficient=2)

"""Rewards from progress, against numbers that were computed by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import rewards


def test_hops_rebuild_the_progress_that_they_were_made_of():
    progress = jnp.array([[0.0, 0.2, 0.6, 0.3, 0.8, 1.0, 1.0]])
    hops = rewards.hop(progress[:, :-1], progress[:, 1:])
    np.testing.assert_allclose(hops[0, 2], -0.5, rtol=1e-6)
    np.testing.assert_allclose(rewards.progress_from_hops(hops), progress[:, 1:], atol=1e-6)
    start, goal = progress[:, 1:], progress[:, 1:] - 1
    np.testing.assert_allclose(rewards.progress_from_hops(hops, start, goal), progress[:, 1:], atol=1e-6)
    assert rewards.hop(jnp.zeros(1), jnp.zeros(1)).tolist() == [0.0]
    assert rewards.progress_from_hops(jnp.zeros((2, 0))).shape == (2, 0)
    with pytest.raises(ValueError, match="both or neither"):
        rewards.progress_from_hops(hops, start)


def test_shaping_adds_up_to_what_an_episode_starts_with():
    rng = np.random.default_rng(0)
    potential, reward = (jnp.asarray(rng.random((3, 5)), jnp.float32) for _ in range(2))
    exists = jnp.arange(5) < jnp.array([5, 3, 0])[:, None]
    gamma = 0.9
    shaped = rewards.potential_shaping(reward, potential, exists, gamma=gamma)
    discount = gamma ** jnp.arange(5)
    extra = jnp.sum((shaped - reward * exists) * discount, axis=1)
    np.testing.assert_allclose(extra, -potential[:, 0] * exists[:, 0], atol=1e-6)
    with pytest.raises(ValueError, match="gamma"):
        rewards.potential_shaping(reward, potential, gamma=1.5)


def test_a_judge_asked_seldom_is_held_and_its_answers_are_mixed():
    called = jnp.array([[1] + [0] * 9 + [1] + [0] * 4])
    values = jnp.where(called > 0, jnp.array([[0.2] * 10 + [0.5] * 5]), jnp.nan)
    np.testing.assert_allclose(rewards.held_between_calls(values, called), [[0.2] * 10 + [0.5] * 5])
    zero = rewards.held_between_calls(values, called, hold="zero")
    assert float(jnp.sum(zero)) == pytest.approx(0.7)
    with pytest.raises(ValueError, match="hold"):
        rewards.held_between_calls(values, called, hold="mean")
    np.testing.assert_allclose(
        rewards.progress_mix(jnp.array([1, -1]), jnp.array([0.6, 0.0]), jnp.array([0, 1])), [1.6 / 3, 1 / 3], rtol=1e-6
    )
    with pytest.raises(ValueError, match="progress"):
        rewards.progress_mix(jnp.ones(2), jnp.ones(1), jnp.ones(2))

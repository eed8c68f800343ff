import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.rewards import scaling
from tests.rewards.compiled import compiled

gap_reward = compiled(scaling.gap_reward)
zscore_by_input = compiled(scaling.zscore_by_input)


def test_the_gap_reward_gives_the_papers_numbers():
    probs = jnp.array([[0.7, 0.2, 0.1], [0.3, 0.5, 0.2], [0.4, 0.4, 0.2]])
    np.testing.assert_allclose(gap_reward(probs, jnp.array([0, 0, 1])), [100, -36, 0], atol=1e-4)


def test_zscores_agree_with_numpy_per_input_and_leave_out_missing_rewards():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(6, 4)) * np.array([1, 100, 0.01, 0]) + 5
    valid = rng.random((6, 4)) < 0.7
    expected = np.zeros((6, 4))
    for i in range(4):
        known = rewards[valid[:, i], i]
        expected[valid[:, i], i] = (known - known.mean()) / (known.std() + 1e-4)
    with jax.enable_x64(True):
        given = zscore_by_input(np.where(valid, rewards, np.nan), valid)
        np.testing.assert_allclose(given, expected, rtol=1e-9, atol=1e-9)
    single = zscore_by_input(rewards[:1])
    np.testing.assert_array_equal(single, np.zeros((1, 4)))


def test_rescale_maps_the_ends_of_one_range_onto_those_of_another():
    given = scaling.rescale(jnp.array([0, 1, 2], jnp.bfloat16), old_low=0, old_high=1, new_low=0, new_high=5)
    assert given.dtype == jnp.float32
    np.testing.assert_allclose(given, [0, 5, 10])


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="old_low and old_high must differ"):
        scaling.rescale(jnp.ones(2), old_low=1, old_high=1, new_low=0, new_high=5)
    with pytest.raises(ValueError, match="at least two classes"):
        gap_reward(jnp.ones((2, 1)), jnp.zeros(2, int))
    with pytest.raises(ValueError, match=r"rewards must be \[S, I\]"):
        zscore_by_input(jnp.ones(3))

"""Wrong labels, against the paper's numbers and a simulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import rewards


def test_wrong_labels_cost_the_less_the_more_are_right():
    np.testing.assert_allclose(rewards.expected_advantage_loss(jnp.array([2, 8, 12, 15]), 16), [1.75, 4.0, 3.0, 0.9375])
    assert rewards.advantage_loss(jnp.array(12), 16, jnp.array(0), jnp.array(1)).item() == 0.25


def test_the_loss_is_that_of_centred_advantages():
    rng = np.random.default_rng(0)
    truth = np.array([1.0] * 5 + [0.0] * 3)
    for _ in range(10):
        label = rng.integers(0, 2, 8).astype(float)
        lost = np.sum(((truth - truth.mean()) - (label - label.mean()))[:5])
        f, g = np.sum(label[5:]), 5 - np.sum(label[:5])
        np.testing.assert_allclose(rewards.advantage_loss(jnp.array(5), 8, f, g), lost, atol=1e-6)


def test_random_rewards_know_nothing():
    found = rewards.random_reward(jax.random.key(0), (100, 100), rate=0.25)
    assert found.mean() == pytest.approx(0.25, abs=0.02)
    with pytest.raises(ValueError, match="rate"):
        rewards.random_reward(jax.random.key(0), (2,), rate=2.0)


def test_the_clips_share_is_what_the_minimum_takes_away():
    logp = jnp.log(jnp.array([[1.6, 0.5, 1.0, 9.0]]))
    advantages, mask = jnp.array([[1.0, -1.0, 1.0, 5.0]]), jnp.array([[1, 1, 1, 0]])
    # 1.6 is cut to 1.2; min(-0.5, -0.8) is -0.8: 0.4 + 0.3 of 1.6 - 0.5 + 1.
    np.testing.assert_allclose(rewards.clip_share(logp, jnp.zeros((1, 4)), advantages, mask), 0.7 / 2.1, rtol=1e-5)
    assert rewards.clip_share(logp, logp, 0 * advantages, mask).item() == 0.0

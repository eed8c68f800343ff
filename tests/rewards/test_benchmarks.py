"""Measures of reward models, against the papers' numbers and brute force."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import rewards


def test_one_right_answer_must_beat_all_wrong_ones():
    scores = jnp.array([[0.7, 0.9, *[0.1] * 8], [0.7, 0.7, *[0.1] * 8], [0.7, *[0.1] * 9]])
    found = rewards.one_to_many(scores)
    np.testing.assert_allclose([*found], [1 / 3, (0.5 + 0.5 + 1) / 3], rtol=1e-6)
    by_chance = rewards.one_to_many(jnp.asarray(np.random.default_rng(0).random((20_000, 10))))
    np.testing.assert_allclose([*by_chance], [0.1, 0.2929], atol=0.01)
    with pytest.raises(ValueError, match="wrong one"):
        rewards.one_to_many(scores[:, :1])


def test_overoptimization_and_its_onset():
    np.testing.assert_allclose(rewards.overoptimization(jnp.array([[1.0, 3.0, 2.5], [1.0, 2.0, 3.0]])), [0.5, 0.0])
    proxy, held_out = jnp.arange(6.0), jnp.array([0.0, 1.0, 2.0, 1.5, 1.0, 0.5])
    assert [rewards.hacking_onset(proxy, held_out, window=w).item() for w in (1, 3, 4, 9)] == [2, 2, -1, -1]
    gap = rewards.hacking_gap(proxy, held_out)
    wanted = [(x - x.mean()) / x.std() for x in map(np.asarray, (proxy, held_out))]
    np.testing.assert_allclose(gap, wanted[0] - wanted[1], rtol=1e-5, atol=1e-6)
    assert rewards.hacking_gap(jnp.ones(3), jnp.ones(3)).tolist() == [0.0] * 3
    with pytest.raises(ValueError, match="window"):
        rewards.hacking_onset(proxy, held_out, window=0)

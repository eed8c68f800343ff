"""Process rewards that steps cannot farm, against numbers that were computed by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import rewards

SCORES = jnp.array([[0.9, 0.8, 0.95]])


def test_clip_delta_and_both_are_the_papers():
    np.testing.assert_allclose(rewards.clip_delta(SCORES), [[0.1, 0.8, 0.0]], atol=1e-6)
    np.testing.assert_allclose(rewards.clip_delta(SCORES, threshold=0.85, delta=False), [[0, -0.05, 0]], atol=1e-6)
    np.testing.assert_allclose(rewards.clip_delta(SCORES, threshold=0.85), [[0.05, -0.05, 0.0]], atol=1e-6)


def test_the_return_from_a_step_is_its_own_score_however_many_follow():
    scores = jnp.asarray(np.random.default_rng(0).random((1, 6)), jnp.float32)
    for count in range(1, 7):
        found = rewards.clip_delta(scores, jnp.arange(6)[None] < count)[0]
        returns = jnp.cumsum(found[::-1])[::-1]
        np.testing.assert_allclose(returns, jnp.where(jnp.arange(6) < count - 1, scores[0], 0.0), atol=1e-6)


def test_what_has_no_score_earns_nothing():
    found = rewards.clip_delta(jnp.array([[jnp.nan, 0.5, jnp.nan, 0.3]]), threshold=0.8, delta=False)
    np.testing.assert_allclose(found, [[0.0, -0.3, 0.0, -0.5]], atol=1e-6)
    assert bool(jnp.all(jnp.isfinite(rewards.clip_delta(jnp.full((1, 3), jnp.nan)))))
    with pytest.raises(ValueError, match="exists"):
        rewards.clip_delta(SCORES, jnp.ones((1, 2)))

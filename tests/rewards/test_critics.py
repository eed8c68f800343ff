"""Rewards for training critics, case by case."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import rewards


def test_the_nearer_to_the_first_error_the_more():
    predicted, truth = jnp.array([3, 5, -1, -1, 0, 9, 2]), jnp.array([5, 5, 5, -1, -1, 5, 3])
    parsed = jnp.array([1, 1, 1, 1, 1, 1, 0])
    found = rewards.first_error(predicted, truth, jnp.full(7, 8), parsed)
    np.testing.assert_allclose(found, [0.75, 1.0, -1.0, 1.0, -1.0, -1.0, -1.0])
    with pytest.raises(ValueError, match="truth"):
        rewards.first_error(predicted, truth[:2], jnp.full(7, 8))


def test_a_critique_earns_by_its_parts_and_nothing_unread():
    verdict, truth = jnp.array([1, 1, 0, 1, 0]), jnp.array([1, 1, 1, 1, 0])
    suggestion, parsed = jnp.array([0, 1, 1, 1, 0]), jnp.array([1, 1, 1, 0, 1])
    np.testing.assert_allclose(rewards.critique(verdict, truth, suggestion, parsed), [1.1, 2.1, 1.1, 0.0, 1.1])
    alone = rewards.critique(verdict, truth, suggestion, parsed, suggestion_weight=0.0)
    np.testing.assert_allclose(alone, [1.1, 1.1, 0.1, 0.0, 1.1])
    with pytest.raises(ValueError, match="parsed"):
        rewards.critique(verdict, truth, suggestion, parsed[:2])

"""Rewards for answers that stay under a shuffle of the options, case by case."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import rewards


def test_both_answers_or_one_may_be_right():
    first, again, gold = jnp.array([1, 1, 2, 2, -1]), jnp.array([1, 2, 1, 2, -1]), jnp.full(5, 1)
    np.testing.assert_allclose(rewards.shuffled_agreement(first, again, gold), [1.0, 0.2, 0.2, 0.0, 0.0])
    with pytest.raises(ValueError, match="both > one"):
        rewards.shuffled_agreement(first, again, gold, one=1.0)
    with pytest.raises(ValueError, match="again"):
        rewards.shuffled_agreement(first, again[:2], gold)


def test_a_wrong_answer_pays_only_for_following_its_letter():
    first, gold = jnp.array([1, 2, 2, 1, -1]), jnp.ones(5, jnp.int32)
    again = jnp.array([[1, 2], [2, 1], [2, 1], [1, 1], [-1, -1]])
    letters = jnp.array([[0, 1], [0, 0], [0, 1], [0, 0], [0, 1]])
    found = rewards.shuffle_consistency(first, again, gold, letters)
    np.testing.assert_allclose(found, [1.25, 0.0, -0.25, 1.5, -0.5])
    np.testing.assert_allclose(rewards.shuffle_consistency(first, again, gold), [1.25, 0.0, 0.0, 1.5, 0.0])
    with pytest.raises(ValueError, match="a shuffle at least"):
        rewards.shuffle_consistency(first, again[:, :0], gold)
    with pytest.raises(ValueError, match="weight"):
        rewards.shuffle_consistency(first, again, gold, weight=-1.0)

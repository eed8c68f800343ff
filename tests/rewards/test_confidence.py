"""A bonus for right answers that the reasoning makes likely, against numbers that were computed by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages, rewards

CORRECT = jnp.array([[1.0, 1, 1, 0]])
CONFIDENCE = jnp.array([[0.9, 0.8, 0.5, 0.7]])


def test_the_bonus_and_its_advantages_are_the_papers():
    bonus = rewards.confidence_bonus(CORRECT, CONFIDENCE)
    np.testing.assert_allclose(CORRECT + bonus, [[1.5, 1.5, 1.0, 0.0]])
    found = advantages.grpo(CORRECT + bonus, eps=1e-4)
    np.testing.assert_allclose(found, [[0.70701, 0.70701, 0.0, -1.41401]], atol=1e-5)


def test_who_is_not_valid_counts_nowhere_and_a_group_of_wrong_answers_has_no_bonus():
    bonus = rewards.confidence_bonus(CORRECT, CONFIDENCE, jnp.array([[0, 1, 1, 1]]))
    assert bonus.tolist() == [[0.0, 0.5, 0.0, 0.0]]
    assert rewards.confidence_bonus(jnp.zeros((1, 4)), CONFIDENCE).tolist() == [[0.0] * 4]
    half = rewards.confidence_bonus(jnp.array([[1.0, 0.4, 0.6]]), jnp.full((1, 3), 0.5))
    assert half.tolist() == [[0.5, 0.0, 0.0]]  # below the mean of the group none is in the running
    with pytest.raises(ValueError, match="confidence"):
        rewards.confidence_bonus(CORRECT, CONFIDENCE[:, :2])


def test_confidence_is_bounded_and_none_without_an_answer():
    logp = jnp.log(jnp.array([[0.5, 0.9, 0.4], [0.1, 1.0, 1.0], [0.5, 0.5, 0.5]]))
    found = rewards.answer_confidence(logp, jnp.array([[0, 1, 1], [0, 1, 1], [0, 0, 0]]))
    np.testing.assert_allclose(found, [0.6, 0.95, 0.0], rtol=1e-6)

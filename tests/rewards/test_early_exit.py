"""S-GRPO's reward by order of exit against hand-worked numbers and a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages, rewards


def test_the_numbers_of_the_paper_come_out():
    reward = rewards.exit_decay(jnp.array([[0, 1, 1, 0, 1]]))
    np.testing.assert_allclose(reward, [[0, 1, 0.5, 0, 0.25]])
    np.testing.assert_allclose(advantages.dr_grpo(reward), [[-0.35, 0.65, 0.15, -0.35, -0.10]], atol=1e-6)


def test_no_right_exit_gives_nothing_and_all_right_ones_halve():
    found = rewards.exit_decay(jnp.array([[0, 0, 0], [1, 1, 1]]))
    np.testing.assert_array_equal(found, [[0, 0, 0], [1, 0.5, 0.25]])


def test_a_group_of_one_is_worth_one_if_right():
    np.testing.assert_array_equal(rewards.exit_decay(jnp.array([[1], [0]])), [[1], [0]])


def test_every_pattern_agrees_with_a_loop():
    patterns = (np.arange(32)[:, None] >> np.arange(5)) & 1
    expected = np.zeros((32, 5))
    for row, pattern in enumerate(patterns):
        right = 0
        for place, correct in enumerate(pattern):
            if correct:
                right += 1
                expected[row, place] = 3.0 ** -(right - 1)
    found = jax.jit(lambda x: rewards.exit_decay(x, decay=3.0))(jnp.asarray(patterns))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_an_exit_that_does_not_count_is_as_if_it_were_not_there():
    correct, valid = jnp.array([[1, 1, 0, 1]]), jnp.array([[False, True, True, True]])
    np.testing.assert_array_equal(rewards.exit_decay(correct, valid), [[0, 1, 0, 0.5]])


def test_without_decay_all_right_answers_are_worth_the_same():
    np.testing.assert_array_equal(rewards.exit_decay(jnp.array([[1, 0, 1]]), decay=1.0), [[1, 0, 1]])


def test_many_right_answers_stay_finite():
    found = rewards.exit_decay(jnp.ones((1, 300)))
    assert bool(jnp.all(jnp.isfinite(found)))
    assert float(found[0, -1]) >= 0


def test_what_has_no_meaning_is_an_error():
    with pytest.raises(ValueError, match="decay must be at least 1, got"):
        rewards.exit_decay(jnp.ones((1, 2)), decay=0.5)
    with pytest.raises(ValueError, match=r"correct must be \[P, M\], got shape \(4,\); one row per prompt"):
        rewards.exit_decay(jnp.ones(4))
    with pytest.raises(ValueError, match="valid must have the shape of correct"):
        rewards.exit_decay(jnp.ones((1, 4)), jnp.ones((1, 3)))

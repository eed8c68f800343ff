"""Rewards from embeddings of what is seen and of the goal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.rewards import goal_similarity, pearson_distance


def test_the_tables_numbers():
    x, up, down = jnp.array([2.0, 0.0]), jnp.array([[0.0, 3.0]]), jnp.array([[0.0, -1.0]])
    np.testing.assert_allclose(goal_similarity(x, up), 0, atol=1e-6)
    np.testing.assert_allclose(goal_similarity(x, up, down, alpha=1.0), 0.5)


def test_the_reward_is_that_of_the_projection_matrix():
    rng = np.random.default_rng(0)
    states, goals, baselines, alpha = rng.normal(size=(3, 4, 5)), rng.normal(size=(2, 5)), rng.normal(size=(3, 5)), 0.4
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    g, b = unit(goals).mean(0), unit(baselines).mean(0)
    u = g - b
    matrix = alpha * np.outer(u, u) / (u @ u) + (1 - alpha) * np.eye(5)
    expected = 1 - 0.5 * np.sum(((unit(states) - g) @ matrix) ** 2, axis=-1)
    found = jax.jit(goal_similarity)(states, goals, baselines, alpha=alpha)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_without_a_baseline_or_with_the_goal_as_one_it_is_the_cosine():
    rng = np.random.default_rng(1)
    states, goal = rng.normal(size=(6, 3)), rng.normal(size=(1, 3))
    cosine = states @ goal[0] / np.linalg.norm(states, axis=1) / np.linalg.norm(goal)
    for found in (goal_similarity(states, goal), goal_similarity(states, goal, goal, alpha=0.7)):
        np.testing.assert_allclose(found, cosine, rtol=1e-4, atol=1e-6)


def test_what_goal_and_baseline_share_does_not_count_with_alpha_one():
    goal, baseline = jnp.array([[1.0, 0.0, 2.0]]), jnp.array([[-1.0, 0.0, 2.0]])
    states = jnp.array([[0.6, 0.8, 0.0], [0.6, 0.0, 0.8]])
    one, two = goal_similarity(states, goal, baseline, alpha=1.0)
    np.testing.assert_allclose(one, two, rtol=1e-5)


def test_an_embedding_of_zero_has_finite_rewards_and_gradients():
    goal, baseline = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
    value, slope = jax.jit(jax.value_and_grad(lambda x: goal_similarity(x, goal, baseline, alpha=0.5)))(jnp.zeros(2))
    assert np.isfinite(value)
    assert np.isfinite(slope).all()


def test_the_distance_of_rewards_is_that_of_numpys_correlation():
    rng = np.random.default_rng(2)
    x, y, valid = rng.normal(size=30), rng.normal(size=30), rng.random(30) < 0.7
    expected = np.sqrt((1 - np.corrcoef(x[valid], y[valid])[0, 1]) / 2)
    np.testing.assert_allclose(jax.jit(pearson_distance)(np.where(valid, x, np.nan), y, valid), expected, rtol=1e-5)
    np.testing.assert_allclose(pearson_distance(x, y, 0 * valid), np.sqrt(0.5), rtol=1e-6)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="alpha must be in"):
        goal_similarity(jnp.ones(2), jnp.ones((1, 2)), jnp.ones((1, 2)), alpha=2.0)
    with pytest.raises(ValueError, match="alpha needs a baseline"):
        goal_similarity(jnp.ones(2), jnp.ones((1, 2)), alpha=0.5)
    with pytest.raises(ValueError, match=r"goal must be \[N, D\] with the D of state"):
        goal_similarity(jnp.ones(3), jnp.ones((1, 2)))

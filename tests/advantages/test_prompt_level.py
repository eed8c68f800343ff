import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages
from tests.advantages.compiled import all_compiled

advantages = all_compiled(advantages)


def test_the_global_advantage_gives_the_papers_numbers():
    rewards = jnp.array([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    given = advantages.global_advantage(rewards, eps=0.0)
    np.testing.assert_allclose(given, [[1.414214] * 2, [-1.414214] * 2, [0, 0], [0, 0]], atol=1e-5)
    unbiased = advantages.global_advantage(rewards, ddof=1, eps=0.0)
    np.testing.assert_allclose(unbiased[0], [1.5**0.5] * 2, rtol=1e-5)


def test_prompts_without_a_valid_rollout_are_out_of_the_global_statistics():
    rewards = np.array([[1.0, np.nan], [0.0, 0.0], [np.nan, np.nan]])
    valid = ~np.isnan(rewards)
    given = advantages.global_advantage(rewards, valid, eps=0.0)
    np.testing.assert_allclose(given, [[1, 0], [-1, -1], [0, 0]], rtol=1e-6)
    assert not np.asarray(advantages.global_advantage(jnp.full((3, 2), 0.3))).any()
    assert not np.asarray(advantages.global_advantage(rewards, 0 * valid)).any()


def test_answer_entropy_is_that_of_the_shares_of_distinct_answers():
    rng = np.random.default_rng(0)
    answer, valid = rng.integers(-3, 3, (20, 6)), rng.random((20, 6)) < 0.7
    valid[0] = False
    given = advantages.answer_entropy(answer, valid)
    for p in range(20):
        _, counts = np.unique(answer[p, valid[p]], return_counts=True)
        share = counts / counts.sum()
        np.testing.assert_allclose(given[p], -(share * np.log(share)).sum(), atol=1e-6)
    np.testing.assert_allclose(advantages.answer_entropy(jnp.array([[1, 2, 3, 4]]), base=2), [2], rtol=1e-6)


def test_the_weight_gives_the_papers_numbers():
    pair = advantages.answer_entropy(jnp.array([[0, 0, 1, 2, 3, 4]]))
    np.testing.assert_allclose(pair, [1.560710], rtol=1e-6)
    entropy = jnp.concatenate([jnp.array([0.0, math.log(2), math.log(6)]), pair])
    np.testing.assert_allclose(advantages.copo_weight(entropy), [9.36e-14, 9.81e-8, 0.997086, 0.771043], rtol=2e-3)


def test_groups_with_one_outcome_have_no_weight_of_their_own():
    rewards, valid = jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]]), jnp.array([[1, 1], [1, 1], [1, 0]])
    assert advantages.uniform_weight(rewards, valid).tolist() == [1, 0, 0]


def test_gradients_are_finite_and_dtypes_wide():
    for rewards in (jnp.zeros((3, 2)), jnp.ones((1, 1))):
        assert np.isfinite(jax.jit(jax.grad(lambda r: jnp.sum(advantages.global_advantage(r))))(rewards)).all()
    for function in (advantages.global_advantage, advantages.uniform_weight, advantages.copo_weight):
        assert jax.eval_shape(function, jnp.ones((3, 2), jnp.bfloat16)).dtype == jnp.float32


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match=r"answer must be \[P, G\], got shape \(3,\)"):
        advantages.answer_entropy(jnp.zeros(3, int))
    with pytest.raises(ValueError, match="base must be above 1, got 1"):
        advantages.answer_entropy(jnp.zeros((2, 3), int), base=1)
    with pytest.raises(ValueError, match="ddof must be 1"):
        advantages.global_advantage(jnp.zeros((2, 3)), ddof=2)

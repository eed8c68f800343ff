"""Budgets of answers, against the papers' numbers and brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import curation


def test_dars_gives_hard_prompts_what_the_paper_gives_them():
    rate = jnp.array([0.0, 0.125, 0.25, 0.375, 0.5, 0.9, 1.0])
    assert curation.extra_rollouts(rate, 8, max_count=32).tolist() == [24, 11, 3, 1, 0, 0, 0]
    assert curation.extra_rollouts(rate, 8, max_count=64, schedule="hard").tolist() == [56, 24, 8, 3, 0, 0, 0]
    # Normalised, 2 sqrt(p (1 - p)) of a prompt with p = 1/8 is 0.6614, and 8 / 0.6614 - 8 = 4.1.
    assert curation.extra_rollouts(rate, 8, max_count=32, normalize_std=True)[1] == 5
    for options in ({"max_count": 4}, {"max_count": 8, "schedule": "none"}):
        with pytest.raises(ValueError, match=r"max_count|schedule"):
            curation.extra_rollouts(rate, 8, **options)


def test_the_value_of_answers_is_the_papers():
    np.testing.assert_allclose(
        curation.rollout_value(jnp.array([2, 8]), jnp.array([0.5, 0.1])), [0.0625, 0.046132], rtol=1e-4
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_greedy_allocation_is_the_best_there_is(seed):
    p = np.random.default_rng(seed).uniform(0.02, 0.98, 4).astype(np.float32)
    found = np.asarray(curation.knapsack(jnp.asarray(p), 18, low=2, high=9))
    assert found.sum() == 18
    values = lambda counts: float(np.sum(curation.rollout_value(np.array(counts), p.astype(np.float64))))  # noqa: E731
    best = max(values(c) for c in itertools.product(range(2, 10), repeat=4) if sum(c) == 18)
    assert values(found) == pytest.approx(best, rel=1e-4)


def test_what_mixed_prompts_do_not_need_goes_to_those_never_solved():
    rate = jnp.array([0.0, 0.5, 0.0, 1.0])
    found = jax.jit(lambda p: curation.knapsack(p, 41, high=64))(rate)
    # One half is decided after 4 answers with 90% confidence; the two that were never solved share the other 35.
    assert found.tolist() == [18, 4, 17, 2]
    assert curation.knapsack(jnp.array([0.0, 0.0, 1.0]), 20, high=8).tolist() == [8, 8, 4]
    assert curation.knapsack(jnp.array([0.5, 0.5]), 100, high=8).tolist() == [8, 8]
    assert int(curation.knapsack(jnp.array([0.3, 0.6]), 30, high=64).sum()) == 30
    assert curation.knapsack(jnp.ones(3), 12).tolist() == [4, 4, 4]
    for options in ({"low": 0}, {"low": 5, "high": 4}, {"low": 30}, {"confidence": 1.0}):
        with pytest.raises(ValueError, match=r"low|budget|confidence"):
            curation.knapsack(rate, 41, **options)


def test_prompts_that_differ_most_are_promoted_among_the_others():
    rate = jnp.array([0.0, 0.25, 0.5, 1.0])
    np.testing.assert_allclose(curation.variance_promotion(rate), [0.0, 0.75, 1.0, 0.0])
    both = curation.variance_promotion(rate, jnp.array([1.0, 0.0, 0.0, 0.0]), outcome_weight=0.5, diversity_weight=0.5)
    np.testing.assert_allclose(both, [1.0, 0.1875, 0.25, 0.0])
    assert curation.variance_promotion(jnp.ones(3)).tolist() == [1.0] * 3
    found = curation.promoted_prompts(jax.random.key(0), jnp.array([0.0, 1.0]), jnp.array([5, 6, 7, 8, 9]), share=0.4)
    assert found.tolist() == [1, 5, 1, 6, 7]
    many = curation.promoted_prompts(jax.random.key(0), jnp.array([3.0, 1.0, 0.0]), jnp.zeros(4000, int), share=1.0)
    np.testing.assert_allclose(np.bincount(many, minlength=3) / 4000, [0.75, 0.25, 0.0], atol=0.03)
    nothing = curation.promoted_prompts(jax.random.key(0), jnp.zeros(2), jnp.zeros(4000, int), share=1.0)
    np.testing.assert_allclose(np.bincount(nothing) / 4000, [0.5, 0.5], atol=0.03)
    with pytest.raises(ValueError, match="share"):
        curation.promoted_prompts(jax.random.key(0), jnp.ones(2), jnp.zeros(4, int), share=2.0)

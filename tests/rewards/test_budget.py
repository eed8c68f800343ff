"""HBPO's reward against the table's numbers and a loop in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import rewards
from tests.rewards.compiled import compiled

budget_cosine = compiled(rewards.budget_cosine)
budget_level = compiled(rewards.budget_level)


def by_hand(n, right, budget, limit=4096):
    def worth(x):
        return 4 * np.cos(np.pi * x / (2 * limit))

    if not right or n > limit:
        return 0.0
    return min(worth(n) - abs(budget - n) / limit, worth(budget)) if budget else round(worth(n), 2)


def test_the_numbers_of_the_paper_come_out():
    found = budget_cosine(jnp.array([900, 3000, 100]), jnp.ones(3), jnp.array([1024, 1024, 512]))
    np.testing.assert_allclose(found, [3.695518, 1.149755, 3.896473], atol=2e-6)
    free = budget_cosine(jnp.array([900]), jnp.ones(1), jnp.zeros(1), decimals=None)
    # Uncapped, an answer of 900 tokens under a budget of 1024 would be worth 3.733831.
    np.testing.assert_allclose(free - 124 / 4096, 3.733831, atol=2e-6)


def test_every_combination_agrees_with_a_loop_in_float64():
    lengths, budgets = np.array([0, 1, 511, 512, 1300, 4095, 4096, 4097]), np.array([0, 1, 512, 2560])
    n, right, budget = (x.reshape(-1) for x in np.meshgrid(lengths, [0, 1], budgets))
    expected = [by_hand(*row) for row in zip(n, right, budget, strict=True)]
    with jax.enable_x64(True):
        found = budget_cosine(jnp.asarray(n, jnp.float64), jnp.asarray(right), jnp.asarray(budget))
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, expected, atol=1e-12)
    narrow = budget_cosine(jnp.asarray(n), jnp.asarray(right), jnp.asarray(budget))
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, expected, atol=5e-6)


def test_a_right_answer_gains_nothing_below_its_budget_and_loses_beyond_it():
    lengths = jnp.arange(1, 4096, 7)
    found = np.asarray(budget_cosine(lengths, jnp.ones_like(lengths), jnp.full_like(lengths, 1024)))
    level = float(budget_level(1024.0))
    assert np.all(found <= level + 1e-6)
    assert np.all(np.diff(found[np.asarray(lengths) >= 1024]) < 0)
    assert np.all(np.diff(found[np.asarray(lengths) <= 1024]) >= -1e-6)


def test_what_cannot_be_read_gets_its_own_reward_right_or_wrong():
    found = budget_cosine(jnp.ones(3), jnp.array([1, 1, 0]), jnp.zeros(3), jnp.array([1, 0, 0]))
    np.testing.assert_allclose(found, [4.0, -1.0, -1.0])


def test_no_budget_and_one_beyond_the_limit_have_the_level_zero():
    found = budget_level(jnp.array([0, 4096, 9999, 1024]))
    np.testing.assert_allclose(found, [0.0, 0.0, 0.0, 3.695518], atol=1e-6)


def test_bf16_lengths_are_raised_to_float32():
    found = budget_cosine(jnp.array([512.0], jnp.bfloat16), jnp.ones(1), jnp.array([512.0], jnp.bfloat16))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 4 * np.cos(np.pi / 16), rtol=1e-6)


def test_lengths_without_meaning_are_errors_that_say_what_to_change():
    with pytest.raises(ValueError, match="max_length must be above 0 tokens, got 0"):
        budget_level(jnp.ones(2), max_length=0)
    with pytest.raises(ValueError, match="scale must be above 0"):
        budget_cosine(jnp.ones(2), jnp.ones(2), jnp.ones(2), scale=0)
    with pytest.raises(ValueError, match=r"budgets must have the shape of lengths, \(2,\).*give 0 where a prompt"):
        budget_cosine(jnp.ones(2), jnp.ones(2), jnp.ones(3))
    with pytest.raises(ValueError, match="well_formed must have the shape"):
        budget_cosine(jnp.ones(2), jnp.ones(2), jnp.ones(2), jnp.ones(1))

"""HBPO and S-GRPO from rollouts to advantages and updates, against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import methods
from jaxrl_post.types import TokenStats
from tests.advantages.compiled import compiled
from tests.methods import tabular


def batch(reward, lengths, **extras):
    """Two groups of four: rewards and completion lengths `[4]` of the first, which the second repeats."""
    made = tabular.batch(prompts=2)
    size = jnp.asarray([lengths, lengths]).reshape(-1, 1)
    place = jnp.arange(made.mask.shape[1])
    mask = ((place >= 1) & (place < 1 + size)).astype(jnp.float32)
    return made.replace(
        reward=jnp.asarray([reward, reward], jnp.float32),
        valid=jnp.ones((2, 4), bool),
        mask=mask,
        extras={name: jnp.asarray([values, values]) for name, values in extras.items()},
    )


def advantages_of(method, rollouts):
    """`[4]`: the advantage of each member of the first group, the same on all of its tokens."""
    stats = {"policy": TokenStats(logp=rollouts.logp)}
    targets, _ = compiled(method.targets)((), rollouts, stats, jax.random.key(0))
    found, mask = np.asarray(targets.advantages)[:4], np.asarray(rollouts.mask)[:4] > 0
    for row, on in zip(found, mask, strict=True):
        assert np.all(row[~on] == 0)
        assert np.ptp(row[on]) == 0
    return np.array([row[on][0] for row, on in zip(found, mask, strict=True)])


def worth(x):
    return 4 * np.cos(np.pi * x / 16)  # of max_length 8


def test_hbpo_compares_shaped_rewards_across_budgets_and_with_their_levels():
    # Budgets 2, 2, 4 and none; the second answer is wrong, the third within its budget, the last free.
    rollouts = batch([1.0, 0.4, 1.0, 1.0], [3, 2, 4, 1], budget=[2.0, 2.0, 4.0, 0.0])
    rewards = np.array([worth(3) - 1 / 8, 0.0, worth(4), round(worth(1), 2)])
    levels = np.array([worth(2), worth(2), worth(4), 0.0])
    own = np.array([rewards[:2].mean(), rewards[:2].mean(), rewards[2], rewards[3]])
    expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6) + own - levels
    np.testing.assert_allclose(advantages_of(methods.hbpo(max_length=8), rollouts), expected, rtol=2e-5)
    strict = advantages_of(methods.hbpo(max_length=8, correct_above=0.3), rollouts)
    assert not np.allclose(strict, expected, rtol=1e-2)
    twice = advantages_of(methods.hbpo(max_length=8, intra_weight=2.0), rollouts)
    np.testing.assert_allclose(twice, expected + own - levels, rtol=2e-5)


def test_hbpo_takes_what_cannot_be_read_from_a_component_of_the_reward():
    rollouts = batch([1.0, 1.0, 1.0, 1.0], [1, 1, 1, 1], budget=[0.0] * 4)
    readable = jnp.asarray([[1.0, 1.0, 1.0, 0.0]] * 2)
    rewards = np.array([round(worth(1), 2)] * 3 + [-1.0])
    expected = (rewards - rewards.mean()) / rewards.std(ddof=1) + rewards.mean()
    found = advantages_of(
        methods.hbpo(max_length=8, format_reward="format"), rollouts.replace(rewards={"format": readable})
    )
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    with pytest.raises(ValueError, match=r"format_reward names 'style', but the rollouts have the components \(none\)"):
        advantages_of(methods.hbpo(format_reward="style"), rollouts)


def test_s_grpo_pays_right_answers_by_the_order_of_their_exits():
    rollouts = batch([0.0, 1.0, 0.9, 1.0], [1, 2, 1, 4], exit=[1, 2, 3, 4])
    np.testing.assert_allclose(advantages_of(methods.s_grpo(), rollouts), np.array([0, 1, 0.5, 0.25]) - 0.4375)
    strict = advantages_of(methods.s_grpo(correct_above=0.95), rollouts)
    np.testing.assert_allclose(strict, np.array([0, 1, 0, 0.5]) - 0.375)


def test_s_grpo_of_exits_that_are_all_right_still_prefers_the_earliest():
    rollouts = batch([1.0] * 4, [1, 1, 1, 4], exit=[1, 2, 3, 4])
    np.testing.assert_allclose(advantages_of(methods.s_grpo(), rollouts), np.array([1, 0.5, 0.25, 0.125]) - 0.46875)
    np.testing.assert_array_equal(advantages_of(methods.s_grpo(decay=1.0), rollouts), np.zeros(4))


def test_s_grpo_changes_nothing_where_no_exit_is_right():
    rollouts = batch([0.0] * 4, [1, 1, 1, 4], exit=[1, 2, 3, 4])
    np.testing.assert_array_equal(advantages_of(methods.s_grpo(), rollouts), np.zeros(4))
    state, metrics = tabular.one_step(methods.s_grpo(), rollouts)
    assert int(metrics["nonfinite_updates"]) == 0
    before = tabular.params_for(methods.s_grpo())["policy"]
    for one, other in zip(jax.tree.leaves(state.params["policy"]), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("name", "where"), [("hbpo", "rollout.budgets"), ("s_grpo", "rollout.exits")])
def test_rollouts_without_sub_groups_are_an_error_that_says_where_they_come_from(name, where):
    with pytest.raises(ValueError, match=where):
        advantages_of(getattr(methods, name)(), batch([1.0] * 4, [1] * 4))
    with pytest.raises(ValueError, match=where):
        tabular.one_step(getattr(methods, name)(), batch([1.0] * 4, [1] * 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: methods.hbpo(max_length=0), "max_length must be at least 1"),
        (lambda: methods.hbpo(scale=0), "scale must be above 0, got 0"),
        (lambda: methods.hbpo(intra_weight=-1), "intra_weight must be at least 0"),
        (lambda: methods.s_grpo(decay=0.5), "decay must be at least 1"),
    ],
)
def test_keywords_without_meaning_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()

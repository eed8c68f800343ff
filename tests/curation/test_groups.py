"""Choosing groups of rollouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.curation import informative, select_groups, spread_first, take_groups, within_accuracy
from jaxrl_post.types import Rollouts
from tests.advantages.compiled import compiled

informative, select_groups, spread_first, take_groups = map(
    compiled, (informative, select_groups, spread_first, take_groups)
)

REWARD = jnp.array([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.5, 0.5, 1.0], [2.0, 2.0, 2.0]])
VALID = jnp.ones((5, 3), bool)


def rollouts(prompts=5, group=3, length=4):
    """Rollouts whose every number says which sequence and position it belongs to."""
    rows = np.arange(prompts * group)
    grid = rows.reshape(prompts, group)
    token = jnp.asarray(100 * rows[:, None] + np.arange(length), jnp.float32)
    return Rollouts(
        tokens={"action": token[..., None], "id": token.astype(jnp.int32)},
        mask=token,
        logp=-token,
        step=token,
        version=token,
        reward=REWARD[:prompts, :group],
        rewards={"sum": jnp.asarray(grid, jnp.float32), "token": token},
        valid=VALID[:prompts, :group],
        length=jnp.asarray(grid),
        finish=jnp.asarray(grid, jnp.int8),
        id=jnp.asarray(grid, jnp.uint32),
        prompt_id=jnp.arange(prompts) + 10,
        extras={"row": jnp.asarray(rows), "prompt": jnp.arange(prompts)},
    )


def test_a_group_is_informative_if_valid_rewards_differ():
    assert informative(REWARD, VALID).tolist() == [False, True, False, True, False]


def test_rewards_that_are_not_valid_do_not_count_nor_do_differences_below_eps():
    valid = VALID.at[1, 1].set(False).at[4].set(False)
    assert informative(REWARD, valid).tolist() == [False, False, False, True, False]
    assert informative(jnp.array([[0.0, 5e-7], [0.0, 1e-5]]), VALID[:2, :2]).tolist() == [False, True]
    assert informative(jnp.array([[0.0, 0.4]]), VALID[:1, :2], eps=0.5).tolist() == [False]


def test_a_group_with_one_or_no_valid_reward_is_not_informative():
    assert (
        informative(jnp.array([[1.0, jnp.nan], [jnp.nan, 3.0]]), jnp.array([[1, 0], [0, 0]]) > 0).tolist()
        == [False] * 2
    )


@pytest.mark.parametrize(("keep", "expected"), [(1, [1]), (2, [1, 3]), (3, [1, 3, 0]), (5, [1, 3, 0, 2, 4])])
def test_informative_groups_come_first_each_kind_in_its_order(keep, expected):
    assert jax.jit(spread_first, static_argnums=2)(REWARD, VALID, keep).tolist() == expected


@pytest.mark.parametrize("keep", [0, 6])
def test_more_groups_than_there_are_or_none_are_refused(keep):
    with pytest.raises(ValueError, match=f"keep must be between 1 and P=5, got {keep}"):
        spread_first(REWARD, VALID, keep)


@pytest.mark.parametrize("group", [1, 3])
def test_taking_groups_takes_every_field_of_their_rows(group):
    whole = rollouts(group=group)
    taken = jax.jit(take_groups)(whole, jnp.array([4, 1]))
    rows = [4 * group + g for g in range(group)] + [group + g for g in range(group)]
    assert taken.tokens["id"].tolist() == whole.tokens["id"][jnp.array(rows)].tolist()
    assert taken.tokens["action"].shape == (2 * group, 4, 1)
    assert taken.logp.tolist() == whole.logp[jnp.array(rows)].tolist()
    assert taken.rewards["token"].tolist() == taken.mask.tolist() == (-taken.logp).tolist()
    assert taken.reward.tolist() == REWARD[jnp.array([4, 1]), :group].tolist()
    assert taken.id.reshape(-1).tolist() == taken.extras["row"].tolist() == rows
    assert taken.rewards["sum"].reshape(-1).tolist() == rows
    assert taken.prompt_id.tolist() == [14, 11]
    assert taken.extras["prompt"].tolist() == [4, 1]


def test_selecting_keeps_the_groups_whose_rewards_vary():
    assert select_groups(rollouts(), 2).prompt_id.tolist() == [11, 13]


@pytest.mark.parametrize("shape", [(5,), (1, 3), (5, 1)])
def test_rewards_of_another_shape_than_who_counts_are_refused(shape):
    name, rest = ("reward", "") if len(shape) == 1 else ("valid", "must have the shape of reward")
    reward = jnp.ones(shape)
    with pytest.raises(ValueError, match=f"{name} .*{rest}"):
        informative(reward, VALID)
    with pytest.raises(ValueError, match=f"{name} .*{rest}"):
        spread_first(reward, VALID, 1)


def test_groups_that_are_neither_too_hard_nor_too_easy_are_within_the_accuracy():
    reward = jnp.array([[1, 0, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])
    valid = jnp.ones((5, 5), bool).at[4, 0].set(False)
    assert compiled(within_accuracy)(reward, valid).tolist() == [True, True, False, False, False]
    assert not compiled(within_accuracy)(reward, 0 * valid, low=0.0).any()
    with pytest.raises(ValueError, match="low must be at most high"):
        within_accuracy(reward, valid, low=0.9)

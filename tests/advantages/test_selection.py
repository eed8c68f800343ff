"""Advantages that leave rollouts out: signs, balance, outliers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.advantages.selection import effective_positive_share, red_drop, signed, within_sigma
from tests.advantages.compiled import compiled

effective_positive_share, red_drop, signed, within_sigma = map(
    compiled, (effective_positive_share, red_drop, signed, within_sigma)
)


def test_right_and_wrong_answers_have_constant_advantages():
    rewards = jnp.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    valid = jnp.array([[True, True, False], [True, True, True]])
    both, keep = signed(rewards, valid)
    np.testing.assert_allclose(both, [[0.1, -1.0, 0.0], [0.1, 0.1, -1.0]])
    assert keep.tolist() == valid.tolist()
    positive, keep = signed(rewards, valid, sign="positive")
    assert positive.tolist() == [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]
    assert keep.tolist() == [[True, False, False], [True, True, False]]
    negative, keep = signed(rewards, valid, sign="negative")
    assert negative.tolist() == [[0.0, -1.0, 0.0], [0.0, 0.0, -1.0]]
    assert keep.tolist() == [[False, True, False], [False, False, True]]


def test_a_group_without_wrong_answers_gives_nothing_to_learn_from_failures():
    advantages, keep = signed(jnp.ones((2, 4)), sign="negative")
    assert not advantages.any()
    assert not keep.any()


def test_the_step_of_a_failure_spreads_its_probability_in_proportion():
    # Of the table: pi = [.7, .2, .1], token 0 sampled and wrong: the logits move by -.3, +.2, +.1.
    logits, (advantages, _) = jnp.log(jnp.array([0.7, 0.2, 0.1])), signed(jnp.zeros((1, 1)), sign="negative")
    step = -jax.jit(jax.grad(lambda z: -advantages[0, 0] * jax.nn.log_softmax(z)[0]))(logits)
    np.testing.assert_allclose(step, [-0.3, 0.2, 0.1], rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_dropping_leaves_no_more_rollouts_below_the_mean_than_above(seed):
    rng = np.random.default_rng(seed)
    rewards = jnp.asarray((rng.random((20, 9)) < 0.25).astype(np.float32))
    valid = jnp.asarray(rng.random((20, 9)) < 0.8)
    advantages, keep = jax.jit(red_drop)(rewards, jax.random.key(seed), valid)
    for row in range(20):
        inside = np.flatnonzero(valid[row])
        r, kept = np.asarray(rewards)[row], np.asarray(keep)[row]
        below = [i for i in inside if r[i] < r[inside].mean()]
        above = [i for i in inside if i not in below]
        assert kept[above].all()
        assert kept[below].sum() == min(len(below), len(above))
        assert not kept[~np.asarray(valid)[row]].any()
        left = np.flatnonzero(kept)
        expected = np.where(kept, r - (r[left].mean() if len(left) else 0), 0)
        np.testing.assert_allclose(advantages[row], expected, atol=1e-6)


def test_which_rollouts_are_dropped_is_random_and_fair():
    rewards = jnp.array([[1.0, 0.0, 0.0, 0.0, 0.0]])
    keep = jax.vmap(lambda key: red_drop(rewards, key)[1][0])(jax.random.split(jax.random.key(0), 2000))
    np.testing.assert_allclose(np.mean(keep, axis=0), [1, 0.25, 0.25, 0.25, 0.25], atol=0.04)
    assert np.all(np.sum(keep, axis=1) == 2)


def test_the_outlier_of_a_batch_that_is_nearly_all_right_is_filtered():
    rewards = np.ones((4, 64))
    rewards[2, 3] = 0.0
    z = (rewards - rewards.mean()) / rewards.std()
    np.testing.assert_allclose([z[0, 0], z[2, 3]], [0.06262, -15.9687], rtol=1e-4)
    found = within_sigma(jnp.asarray(rewards), jnp.ones((4, 64)))
    np.testing.assert_allclose(found, np.where(np.abs(z) <= 3, z, 0.0), rtol=1e-4)
    wide = within_sigma(jnp.asarray(rewards), jnp.ones((4, 64)), sigma=20.0)
    np.testing.assert_allclose(wide, z, rtol=1e-4)


def test_standardising_is_over_the_mask_and_finite_without_spread():
    advantages, mask = jnp.array([[1.0, 3.0, 900.0]]), jnp.array([[1.0, 1.0, 0.0]])
    np.testing.assert_allclose(within_sigma(advantages, mask), [[-1.0, 1.0, 0.0]])
    for nothing in (jnp.zeros((1, 3)), jnp.array([[1.0, 0.0, 0.0]])):
        assert within_sigma(advantages, nothing).tolist() == [[0.0, 0.0, 0.0]]
    assert within_sigma(jnp.full((1, 3), 0.1), jnp.ones((1, 3))).tolist() == [[0.0] * 3]


def test_a_baseline_changes_the_share_of_right_answers_as_counted_by_weight():
    for p, c in ((0.5, -0.5), (0.2, -0.1), (0.7, 0.3)):
        right, wrong = p * (1 - c), (1 - p) * (1 + c)  # |R - c| of +1 and of -1
        np.testing.assert_allclose(effective_positive_share(p, c), right / (right + wrong), rtol=1e-6)


def test_options_without_meaning_are_refused():
    with pytest.raises(ValueError, match="sign must be one of positive, negative, both"):
        signed(jnp.ones((1, 2)), sign="wrong")
    with pytest.raises(ValueError, match="positive_weight must be >= 0, got -1"):
        signed(jnp.ones((1, 2)), positive_weight=-1)
    with pytest.raises(ValueError, match=r"rewards must be \[P, G\], got shape \(4,\)"):
        red_drop(jnp.ones(4), jax.random.key(0))
    with pytest.raises(ValueError, match="sigma must be above 0"):
        within_sigma(jnp.ones((1, 2)), jnp.ones((1, 2)), sigma=0)

"""Which answers to learn from, against the papers' numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import curation

REWARDS = jnp.array([[1.0, -2.0, 3.0]])


def test_ranks_keep_the_best_and_another():
    assert curation.rank_filter(REWARDS, keep="best").tolist() == [[False, False, True]]
    assert curation.rank_filter(REWARDS, keep="best_worst").tolist() == [[False, True, True]]
    draws = jax.vmap(lambda key: curation.rank_filter(REWARDS, keep="best_random", key=key))(
        jax.random.split(jax.random.key(0), 400)
    )[:, 0]
    assert draws.sum(axis=1).tolist() == [2] * 400
    np.testing.assert_allclose(draws.mean(axis=0), [0.5, 0.5, 1.0], atol=0.08)


def test_ties_and_small_groups_take_no_answer_twice():
    equal = jnp.ones((1, 4))
    assert curation.rank_filter(equal, keep="best_worst").tolist() == [[True, False, False, True]]
    alone = jnp.array([[1, 0, 0, 0]])
    for keep in ("best", "best_worst", "best_random"):
        found = curation.rank_filter(equal, alone, keep=keep, key=jax.random.key(0))
        assert found.tolist() == [[True, False, False, False]]
        assert not bool(jnp.any(curation.rank_filter(equal, 0 * alone, keep=keep, key=jax.random.key(0))))


def test_a_batch_is_drawn_again_by_how_extreme_it_is():
    np.testing.assert_allclose(curation.batch_filter(REWARDS), [[1 / 14, 4 / 14, 9 / 14]], rtol=1e-5)
    np.testing.assert_allclose(curation.batch_filter(REWARDS, form="max_min"), [[0, 0.5, 0.5]], atol=1e-6)
    np.testing.assert_allclose(curation.batch_filter(REWARDS, form="max_random"), [[1 / 6, 1 / 6, 4 / 6]], rtol=1e-6)
    assert float(curation.batch_filter(REWARDS, jnp.zeros((1, 3))).sum()) == 0


def test_r2_is_that_of_the_kept_alone():
    rng = np.random.default_rng(0)
    rewards, truth = rng.normal(size=(2, 4, 5)).astype(np.float32)
    keep = rng.random((4, 5)) < 0.6
    wanted = np.corrcoef(rewards[keep], truth[keep])[0, 1] ** 2
    np.testing.assert_allclose(curation.filter_r2(rewards, truth, keep), wanted, rtol=1e-4)
    assert float(curation.filter_r2(jnp.ones((1, 3)), jnp.ones((1, 3)), jnp.ones((1, 3)))) == 0


def prof(scores, correct, keep, **options):
    two = jnp.repeat(jnp.asarray(scores, jnp.float32)[None, :, None], 2, axis=2)
    found = curation.process_consistency(two, jnp.ones_like(two), jnp.array([correct]), keep=keep, **options)
    return found[0].astype(int).tolist()


def test_answers_whose_steps_contradict_their_outcome_go_first():
    right, wrong = [0.9, 0.8, 0.6, 0.5, 0.2], [0.1, 0.3, 0.7]
    assert prof(right + wrong, [1] * 5 + [0] * 3, 4) == [1, 1, 0, 0, 0, 1, 1, 0]
    assert prof(right, [1] * 5, 2) == [1, 1, 0, 0, 0]
    assert prof(right, [0] * 5, 2) == [0, 0, 0, 1, 1]
    assert prof([0.9, *wrong, 0.5, 0.6], [1, 0, 0, 0, 0, 0], 4) == [1, 1, 1, 0, 1, 0]
    assert prof(right + wrong, [1] * 5 + [0] * 3, 8) == [1] * 8


def test_answers_of_one_step_go_first_and_invalid_ones_are_not_there():
    scores = jnp.full((1, 4, 3), 0.5).at[0, 0].set(0.9)
    exists = jnp.ones((1, 4, 3)).at[0, 0, 1:].set(0)
    correct = jnp.array([[1, 1, 1, 0]])
    found = curation.process_consistency(scores, exists, correct, keep=3)
    assert found.tolist() == [[False, True, True, True]]
    valid = jnp.array([[1, 1, 0, 1]])
    found = curation.process_consistency(scores, exists, correct, valid, keep=3)
    assert found.tolist() == [[True, True, False, True]]
    with pytest.raises(ValueError, match="keep"):
        curation.process_consistency(scores, exists, correct, keep=5)


def test_a_pool_is_finished_and_cut_in_halves():
    positive, negative = jnp.array([0, 1, 2, 2]), jnp.array([8, 7, 1, 6])
    assert curation.pool_finished(positive, negative, keep=4).tolist() == [False, False, False, True]
    found = curation.pool_finished(positive, negative, keep=4, rule="positive")
    assert found.tolist() == [False, True, True, True]
    correct = jnp.zeros((1, 16)).at[0, jnp.array([3, 7, 9])].set(1)
    kept = curation.balanced(correct, keep=4)
    assert np.flatnonzero(kept[0]).tolist() == [0, 1, 3, 7]
    # Of three wrong answers all, and five right ones in their place.
    assert np.flatnonzero(curation.balanced(1 - correct, keep=8)[0]).tolist() == [0, 1, 2, 3, 4, 5, 7, 9]
    few = curation.balanced(jnp.array([[1, 1, 1, 0, 1]]), jnp.array([[1, 1, 0, 0, 1]]), keep=4)
    assert few.tolist() == [[True, True, False, False, True]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: curation.rank_filter(REWARDS, keep="worst"), "keep"),
        (lambda: curation.rank_filter(REWARDS, keep="best_random"), "key"),
        (lambda: curation.batch_filter(REWARDS, form="log"), "form"),
        (lambda: curation.pool_finished(jnp.ones(1), jnp.ones(1), keep=1), "keep"),
        (lambda: curation.pool_finished(jnp.ones(1), jnp.ones(1), keep=2, rule="none"), "rule"),
        (lambda: curation.balanced(REWARDS, keep=4), "keep"),
        (lambda: curation.rank_filter(REWARDS, jnp.ones((1, 2)), keep="best"), "valid"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

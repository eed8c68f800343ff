"""Losses of reward models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses, masked
from tests.advantages.compiled import all_compiled

losses = all_compiled(losses)


def test_wins_and_ties_have_the_tables_numbers():
    d, zero = jnp.array([1.0, 1.0, 0.0]), jnp.zeros(3)
    given = losses.bradley_terry(d, zero, jnp.array([1.0, 0.5, 0.5]))
    np.testing.assert_allclose(given, [0.31326, 0.81326, 0.69315], atol=1e-5)
    # The released code has a margin of 3 and counts ties twice: 2 log(1 + e^3) at d = 0.
    with_margin = losses.bradley_terry(d, zero, jnp.array([1.0, 0.5, 0.5]), margin=3.0)
    np.testing.assert_allclose(with_margin[0], np.log1p(np.exp(2)), rtol=1e-5)
    np.testing.assert_allclose(2 * with_margin[1], np.log1p(np.exp(2)) + np.log1p(np.exp(4)), rtol=1e-5)
    np.testing.assert_allclose(2 * with_margin[2], 6.0972, rtol=1e-5)
    np.testing.assert_allclose(losses.bradley_terry(jnp.array([1.0]), jnp.array([-1.0])), [0.126928], rtol=1e-5)


def test_a_tie_of_equal_scores_has_no_gradient_and_huge_leads_have_a_finite_one():
    for margin in (0.0, 3.0):
        slope = jax.jit(jax.grad(lambda d, m=margin: losses.bradley_terry(d, 0 * d, 0 * d + 0.5, margin=m)))
        assert float(slope(jnp.array(0.0))) == 0
    lead = jnp.array([-1e5, 1e5])
    of_scores, of_label = jax.jit(jax.grad(lambda d, mu: losses.bradley_terry(d, 0 * d, mu).sum(), (0, 1)))(
        lead, jnp.array([1.0, 0.25])
    )
    np.testing.assert_allclose(of_scores, [-1.0, 0.75], atol=1e-6)
    assert not jnp.any(of_label)
    assert losses.bradley_terry(lead.astype(jnp.bfloat16), lead.astype(jnp.bfloat16)).dtype == jnp.float32


def test_no_pair_that_counts_is_a_loss_of_zero():
    def loss(scores):
        return masked.mean(losses.bradley_terry(scores, jnp.full(2, 3.0)), jnp.zeros(2))

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.ones(2))
    assert float(value) == 0
    assert not jnp.any(gradient)


def test_labels_of_answers_become_all_wins_across_prompts_and_each_tie_once():
    passed, valid = np.array([1, 0, 1, 1, 0]), np.array([1, 1, 1, 0, 1])
    label, pairs = losses.pass_pairs(passed, valid)
    found = {(i, j, float(label[i, j])) for i, j in np.argwhere(pairs)}
    assert found == {(0, 1, 1.0), (0, 4, 1.0), (2, 1, 1.0), (2, 4, 1.0), (0, 2, 0.5)}
    assert not losses.pass_pairs(jnp.zeros(3))[1].any()
    assert not losses.pass_pairs(jnp.ones(1))[1].any()


def test_a_ranked_list_is_all_of_its_pairs():
    rng = np.random.default_rng(0)
    scores, quality, valid = rng.normal(size=(6, 4)), rng.integers(0, 3, (6, 4)), rng.random((6, 4)) < 0.8
    expected = np.zeros(6)
    for p in range(6):
        rows = np.flatnonzero(valid[p])
        pairs = [(i, j) for i in rows for j in rows if quality[p, i] > quality[p, j]]
        expected[p] = np.mean([np.log1p(np.exp(scores[p, j] - scores[p, i])) for i, j in pairs]) if pairs else 0
    found = losses.ranked_bradley_terry(np.where(valid, scores, np.nan), quality, valid)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert not losses.ranked_bradley_terry(jnp.ones((1, 1)), jnp.ones((1, 1))).any()
    gradient = jax.jit(jax.grad(lambda x: losses.ranked_bradley_terry(x, jnp.ones((2, 3))).sum()))(jnp.ones((2, 3)))
    assert not gradient.any()


def test_answers_of_the_references_policy_are_told_from_those_of_others_in_all_triples():
    rng = np.random.default_rng(1)
    scores, source, valid = rng.normal(size=(4, 5, 5)), rng.integers(0, 3, (4, 5)), rng.random((4, 5)) < 0.8
    expected = np.zeros(4)
    for p in range(4):
        rows = np.flatnonzero(valid[p])
        leads = [
            scores[p, i, j] - scores[p, i, k]
            for i in rows
            for j in rows
            for k in rows
            if i != j and source[p, i] == source[p, j] != source[p, k]
        ]
        expected[p] = np.mean(np.log1p(np.exp(-np.array(leads)))) if leads else 0
    spoiled = np.where(valid[:, :, None] & valid[:, None, :], scores, np.nan)
    np.testing.assert_allclose(losses.policy_discrimination(spoiled, source, valid), expected, rtol=1e-5)


def test_scores_of_one_and_minus_one_have_the_tables_loss_and_one_policy_alone_none():
    scores = jnp.zeros((1, 3, 3)).at[0, :2, :2].set(1.0).at[0, :2, 2].set(-1.0)
    np.testing.assert_allclose(losses.policy_discrimination(scores, jnp.array([[0, 0, 1]])), [0.126928], rtol=1e-5)
    np.testing.assert_allclose(losses.policy_discrimination(0 * scores, jnp.array([[0, 0, 1]])), [np.log(2)], rtol=1e-6)
    slope = jax.jit(jax.value_and_grad(lambda x, source: losses.policy_discrimination(x, source).sum()))
    for source in ([[0, 0, 0]], [[0, 1, 2]]):
        value, gradient = slope(scores, jnp.array(source))
        assert float(value) == 0
        assert not gradient.any()


def test_the_better_answer_of_a_corrupted_pair_is_any_right_one_with_equal_chance():
    correct = jnp.array([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    valid = jnp.array([[1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1]])
    keys = jax.random.split(jax.random.key(0), 2000)
    chosen, mask = jax.jit(jax.vmap(lambda key: losses.cooper_pairs(key, correct, jnp.ones(3), valid)))(keys)
    assert np.all(mask == np.array([True, False, True]))
    np.testing.assert_allclose(np.bincount(chosen[:, 0], minlength=4) / 2000, [0.5, 0, 0.5, 0], atol=0.05)
    assert set(chosen[:, 1].tolist()) == {0}
    assert set(chosen[:, 2].tolist()) == {1}


def test_a_corruption_that_the_rule_passes_makes_no_pair_and_no_pairs_no_loss():
    _, mask = losses.cooper_pairs(jax.random.key(0), jnp.ones((2, 1)), jnp.zeros(2))
    assert not mask.any()
    scores = jnp.array([1.0, 1.0])
    loss = jax.jit(jax.value_and_grad(lambda s, m: masked.mean(losses.bradley_terry(s, -s), m)))
    np.testing.assert_allclose(loss(scores, jnp.ones(2))[0], 0.126928, rtol=1e-5)
    value, gradient = loss(scores, mask)
    assert float(value) == 0
    assert not gradient.any()


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"second must have the shape of first, \(2,\), got \(3,\)"):
        losses.bradley_terry(jnp.zeros(2), jnp.zeros(3))
    with pytest.raises(ValueError, match="margin must be >= 0"):
        losses.bradley_terry(jnp.zeros(2), jnp.zeros(2), margin=-1.0)
    with pytest.raises(ValueError, match=r"passed must be \[N\], got shape \(2, 2\)"):
        losses.pass_pairs(jnp.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"scores must be \[P, N, N\] for source"):
        losses.policy_discrimination(jnp.zeros((1, 2, 3)), jnp.zeros((1, 3), int))
    with pytest.raises(ValueError, match="accepted must have the shape of one number per row of correct"):
        losses.cooper_pairs(jax.random.key(0), jnp.zeros((2, 3)), jnp.zeros(3))

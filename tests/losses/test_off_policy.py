"""TOPR, REC and DRO: the tables' numbers, float64 loops, and what they become at the ends of their options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses
from jaxrl_post.losses.off_policy import dro, rec, rec_mask, topr
from tests.advantages.compiled import all_compiled, compiled

losses = all_compiled(losses)
dro, rec, rec_mask, topr = map(compiled, (dro, rec, rec_mask, topr))


def _random(seed, rows=6, length=8, spread=0.5):
    rng = np.random.default_rng(seed)
    old_logp = -rng.random((rows, length)) * 3
    logp = old_logp + rng.normal(size=(rows, length)) * spread
    mask = (rng.random((rows, length)) < 0.8).astype(float)
    return logp, old_logp, rng.normal(size=(rows, length)), mask


def _gradient(loss, logp, *constants, **options):
    mask = constants[-1]
    return np.asarray(jax.jit(jax.grad(lambda x: (loss(x, *constants, **options) * mask).sum()))(jnp.asarray(logp)))


def _one(*values):
    return [jnp.full((1, 1), value) for value in (*values, 1.0)]


def test_topr_has_the_numbers_of_the_table():
    loss = topr(*_one(-3.0, -2.0, -1.0))
    np.testing.assert_allclose(loss, [[-1.10364]], rtol=1e-5)  # e^-1 * 3, negative
    np.testing.assert_allclose(_gradient(topr, *_one(-3.0, -2.0, -1.0)), [[0.36788]], rtol=1e-5)
    np.testing.assert_allclose(topr(*_one(-3.0, -2.0, 1.0)), [[3.0]])


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_topr_agrees_with_a_float64_loop(level):
    logp, old_logp, advantages, mask = _random(0)
    bounds = {"positive": (0.5, 2.0), "negative": (0.1, 0.9)}
    expected = np.zeros_like(logp)
    for row in range(len(logp)):
        for t in np.flatnonzero(mask[row]):
            d = (logp - old_logp)[row]
            rho = np.exp(d[t] if level == "token" else np.sum(d * mask[row]))
            low, high = bounds["positive" if advantages[row, t] >= 0 else "negative"]
            expected[row, t] = -min(max(rho, low), high) * advantages[row, t]
    with jax.enable_x64(True):
        gradient = _gradient(topr, logp, old_logp, advantages, mask, level=level, **bounds)
        np.testing.assert_allclose(gradient, expected, rtol=1e-12)


def test_the_truncated_ratio_loss_is_cispo_bounded_at_one():
    logp, old_logp, advantages, mask = _random(1)
    truncated = _gradient(topr, logp, old_logp, advantages, mask, positive=(0, 1), negative=(0, 1), level="token")
    ratio = np.exp(logp - old_logp)
    np.testing.assert_allclose(truncated, -np.minimum(ratio, 1) * advantages * mask, rtol=1e-5)


def test_a_failure_that_has_become_unlikely_is_no_longer_pushed_down_by_topr():
    far = _gradient(topr, *_one(-30.0, -2.0, -1.0))
    assert 0 <= far[0, 0] < 1e-8
    assert _gradient(topr, *_one(-30.0, -2.0, -1.0), negative=(1, 1)).tolist() == [[1.0]]  # as REINFORCE does
    assert _gradient(topr, *_one(-30.0, -2.0, 1.0)).tolist() == [[-1.0]]


@pytest.mark.parametrize(
    ("rho", "advantage", "clip", "kept"),
    [
        (1.5, 1.0, "one_side", 0),
        (1.5, 1.0, "none", 1),
        (0.7, 1.0, "one_side", 1),
        (0.7, 1.0, "two_side", 0),
        (0.7, 1.0, "ring", 0),
        (0.3, 1.0, "ring", 1),
        (3.5, -1.0, "ring", 1),
        (3.5, -1.0, "two_side", 0),
        (0.7, -1.0, "one_side", 0),
        (1.1, -1.0, "two_side", 1),
    ],
)
def test_the_masks_of_rec_are_those_of_the_table(rho, advantage, clip, kept):
    arguments = _one(np.log(rho), 0.0, advantage)
    assert rec_mask(*arguments, clip=clip).tolist() == [[kept]]
    np.testing.assert_allclose(_gradient(rec, *arguments, clip=clip), [[-kept * advantage]])


def test_rec_one_sided_with_weights_has_the_gradient_of_ppo():
    logp, old_logp, advantages, mask = map(jnp.asarray, _random(2))
    weighted = _gradient(rec, logp, old_logp, advantages, mask, importance_weight=True, clip_low=0.1, clip_high=0.3)
    clipped = jax.jit(
        jax.grad(lambda x: (losses.ppo(x, old_logp, advantages, clip_low=0.1, clip_high=0.3) * mask).sum())
    )(logp)
    np.testing.assert_allclose(weighted, clipped, rtol=1e-5)


def test_rec_at_the_level_of_sequences_drops_whole_sequences():
    logp, old_logp, _, mask = _random(3)
    ones = np.ones_like(logp)
    kept = rec_mask(logp, old_logp, ones, mask, clip_high=0.05, level="sequence")
    ratio = np.exp(np.sum((logp - old_logp) * mask, 1) / mask.sum(1))
    np.testing.assert_array_equal(kept, mask * (ratio <= 1.05)[:, None])
    assert 0 < np.sum(ratio <= 1.05) < len(ratio)


def test_the_penalties_of_rep_add_their_gradient():
    logp, old_logp, advantages, mask = _random(4)
    plain = _gradient(rec, logp, old_logp, advantages, mask)
    with_opmd = _gradient(rec, logp, old_logp, advantages, mask, penalty="opmd", tau=0.2)
    np.testing.assert_allclose(with_opmd - plain, 0.4 * (logp - old_logp) * mask, atol=1e-6)
    with_asymre = _gradient(rec, logp, old_logp, advantages, mask, penalty="asymre", tau=0.2)
    np.testing.assert_allclose(with_asymre - plain, -0.2 * mask, atol=1e-6)
    lower_baseline = _gradient(rec, logp, old_logp, advantages + 0.2, mask, clip="none")
    asymre = _gradient(rec, logp, old_logp, advantages, mask, clip="none", penalty="asymre", tau=0.2)
    np.testing.assert_allclose(asymre, lower_baseline, atol=1e-6)


def test_the_weights_of_red_grow_with_the_advantage():
    for advantage in (-1.0, 0.5):
        gradient = _gradient(rec, *_one(-1.0, -1.0, advantage), temperature=2.0)
        np.testing.assert_allclose(gradient, [[-advantage * np.exp(advantage / 2)]], rtol=1e-6)


def test_group_relative_reinforce_is_the_gradient_of_the_pairwise_consistency_loss():
    rewards, tau, logp = np.array([1.0, 0.2, -0.5, 2.0]), 0.7, np.log([0.1, 0.4, 0.2, 0.3])

    def pairwise(x):
        a = rewards - tau * (x - logp)
        return sum((a[i] - a[j]) ** 2 for i in range(4) for j in range(i)) / (2 * tau * 16)

    numerical = [(pairwise(logp + e) - pairwise(logp - e)) / 2e-5 for e in 1e-5 * np.eye(4)]
    column = [jnp.asarray(x)[:, None] for x in (logp, logp, rewards - rewards.mean(), np.ones(4))]
    np.testing.assert_allclose(_gradient(rec, *column)[:, 0] / 4, numerical, atol=1e-6)


def test_the_loss_of_dro_adds_up_to_that_of_the_sequence():
    logp, old_logp, _, mask = _random(5)
    advantages = np.repeat(np.random.default_rng(5).normal(size=(6, 1)), 8, axis=1)

    def objective(x):
        d = np.sum((x - old_logp) * mask, axis=1)
        return np.sum(-advantages[:, 0] * np.sum(x * mask, axis=1) + 0.15 * d**2)

    with jax.enable_x64(True):
        gradient = _gradient(dro, logp, old_logp, advantages, mask, beta=0.3)
        total = np.sum(np.asarray(dro(logp, old_logp, advantages, mask, beta=0.3)) * mask)
    np.testing.assert_allclose(total, objective(logp), rtol=1e-10)
    for i in ((0, 1), (3, 4), (5, 7)):
        step = np.zeros_like(logp)
        step[i] = 1e-6
        np.testing.assert_allclose(gradient[i], (objective(logp + step) - objective(logp - step)) / 2e-6, atol=1e-6)


def test_dro_of_tokens_squares_each_log_ratio():
    logp, old_logp, advantages, mask = _random(6)
    gradient = _gradient(dro, logp, old_logp, advantages, mask, beta=0.3, level="token")
    np.testing.assert_allclose(gradient, (-advantages + 0.3 * (logp - old_logp)) * mask, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (topr, {"positive": (1.0, 0.5)}, "positive must be"),
        (topr, {"negative": (-1.0, 0.5)}, "negative must be"),
        (topr, {"level": "batch"}, 'level must be "token" or "sequence"'),
        (rec, {"clip": "three_side"}, "clip must be one of"),
        (rec, {"clip_low": -0.1}, "clip_low must be >= 0"),
        (rec, {"ring_high": -0.1}, "ring_high must be >= 0"),
        (rec, {"penalty": "k2"}, 'penalty must be None, "opmd" or "asymre"'),
        (rec, {"temperature": 0.0}, "temperature must be above 0"),
        (dro, {"beta": 0.0}, "beta must be above 0, got 0.0; without the penalty the loss is losses.reinforce"),
        (dro, {"level": "batch"}, 'level must be "token" or "sequence"'),
    ],
)
def test_options_without_meaning_are_refused(loss, options, message):
    one = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match=message):
        loss(one, one, one, one, **options)

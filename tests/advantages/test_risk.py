import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages
from tests.advantages.compiled import all_compiled

advantages = all_compiled(advantages)


def test_the_mixed_value_at_risk_gives_the_papers_numbers():
    scores, quantiles = jnp.array([1.0, 3.0, 4.0, 5.0]), jnp.array([2.0, 4.0])
    natural = advantages.mixed_value_at_risk(scores, quantiles, natural_baseline=True)
    np.testing.assert_allclose(natural, [-4.333333, -0.666667, 0, 0], atol=1e-6)
    plain = advantages.mixed_value_at_risk(scores, quantiles)
    np.testing.assert_allclose(plain, [-3, 0.666667, 1.333333, 1.333333], rtol=1e-6)


def test_the_mixed_value_at_risk_averages_to_the_risk_measure_it_is_named_after():
    # Scores uniform on (0, 1).
    grid = (np.arange(100_000) + 0.5) / 100_000
    given = advantages.mixed_value_at_risk(jnp.asarray(grid, jnp.float32), jnp.array([0.2, 0.8]), omega=0.0)
    # The rvar part alone: the integral of (S - .2)^+ - (S - .8)^+ is .32 - .02 = .3, over .6.
    np.testing.assert_allclose(np.mean(np.asarray(given, np.float64)), 0.5, rtol=1e-4)
    # The cvar part alone: the integral of (.2 - S)^+ is .02, over .2: E[S | S < .2] - .2.
    tail = advantages.mixed_value_at_risk(jnp.asarray(grid, jnp.float32), jnp.array([0.2, 0.8]), omega=1e6)
    np.testing.assert_allclose(np.mean(np.asarray(tail, np.float64)), -0.1, rtol=1e-3)


def test_tracked_quantiles_of_uniform_scores_converge_to_their_levels():
    levels = jnp.array([0.2, 0.5, 0.8])

    def step(q, key):
        return advantages.update_quantiles(q, jax.random.uniform(key, (256,)), levels), None

    found, _ = jax.lax.scan(step, jnp.zeros(3), jax.random.split(jax.random.key(0), 400))
    np.testing.assert_allclose(found, levels, atol=0.02)


def test_quantiles_move_by_the_level_less_the_share_below_and_not_without_scores():
    q, levels = jnp.array([1.0, 2.0]), jnp.array([0.25, 0.75])
    scores = jnp.array([0.0, 1.0, 2.0, 3.0])  # shares below: 1/4 and 2/4
    np.testing.assert_allclose(advantages.update_quantiles(q, scores, levels, lr=0.4), [1.0, 2.1], rtol=1e-6)
    valid = jnp.array([1, 0, 0, 0])
    np.testing.assert_allclose(advantages.update_quantiles(q, scores, levels, valid, lr=0.4), [0.7, 1.9], rtol=1e-6)
    np.testing.assert_array_equal(advantages.update_quantiles(q, scores, levels, 0 * valid), q)


REWARDS = np.float32([[1, 0, 1, 0], [1, 1, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0]])  # bundles of two: scores below
SCORES = np.float32([[2, 1, 1, 0], [1, 2, 1, 0]])
QUANTILES = np.float32([0.5, 1.5])


def _judged():
    low, high = QUANTILES
    rvar = (np.maximum(SCORES - low, 0) - np.maximum(SCORES - high, 0)) / 0.6
    return (1.5 * -np.maximum(low - SCORES, 0) / 0.2 + rvar) / 2.5


def test_each_mode_of_credit_gives_members_their_part():
    judged = np.repeat(_judged(), 2, axis=0)
    options = {"bundle_size": 2, "normalize_std": False}
    given, quantiles = advantages.riskpo(REWARDS, QUANTILES, credit="uniform", **options)
    np.testing.assert_allclose(given, judged, rtol=1e-5)
    # Shares of the 8 scores below 0.5 and 1.5: 2/8 and 6/8.
    np.testing.assert_allclose(quantiles, [0.5 + 0.1 * (0.2 - 0.25), 1.5 + 0.1 * (0.8 - 0.75)], rtol=1e-6)
    score, _ = advantages.riskpo(REWARDS, QUANTILES, credit="score", **options)
    np.testing.assert_allclose(score, judged * np.where(REWARDS <= 0, 1.5, 0.5), rtol=1e-5)
    std, _ = advantages.riskpo(REWARDS, QUANTILES, credit="std", **options)
    np.testing.assert_allclose(std, judged / REWARDS.std(axis=1, ddof=1, keepdims=True), rtol=1e-5)
    difference = REWARDS - REWARDS.mean(axis=1, keepdims=True)
    total = np.repeat(difference.reshape(2, 2, 4).sum(axis=1), 2, axis=0)
    share = np.where(abs(total) > 1e-6, difference / np.where(abs(total) > 1e-6, total, 1), 0.5)
    parts, _ = advantages.riskpo(REWARDS, QUANTILES, credit="sum_mean", **options)
    np.testing.assert_allclose(parts, judged * share, rtol=1e-4, atol=1e-6)


def test_normalized_advantages_are_divided_by_the_spread_of_the_bundles_scores():
    given, _ = advantages.riskpo(REWARDS, QUANTILES, bundle_size=2, credit="uniform", normalize_std=True)
    expected = _judged() / SCORES.std(axis=1, ddof=1, keepdims=True)
    np.testing.assert_allclose(given, np.repeat(expected, 2, axis=0), rtol=1e-4)
    equal, _ = advantages.riskpo(jnp.ones((4, 3)), QUANTILES, bundle_size=2)
    assert not np.asarray(equal).any()


def test_a_score_with_an_invalid_member_is_unknown_and_a_last_bundle_may_be_smaller():
    rewards = np.concatenate([REWARDS, REWARDS[:1]])
    valid = np.ones((5, 4), bool)
    valid[0, 1] = False
    options = {"bundle_size": 2, "normalize_std": False, "credit": "uniform"}
    given, quantiles = advantages.riskpo(np.where(valid, rewards, np.nan), QUANTILES, valid, **options)
    expected = np.repeat(_judged(), 2, axis=0)
    expected[:2, 1] = 0
    np.testing.assert_allclose(given[:4], expected, rtol=1e-5)
    alone, _ = advantages.riskpo(rewards[4:], QUANTILES, **options)
    np.testing.assert_allclose(given[4:], alone, rtol=1e-6)
    # Eleven scores are known; 2 + 2 of them are 0, and 7 + 2 below 1.5 less the invalid one.
    known = np.concatenate([SCORES[0, [0, 2, 3]], SCORES[1], rewards[4]])
    low, high = (known < 0.5).mean(), (known < 1.5).mean()
    np.testing.assert_allclose(quantiles, [0.5 + 0.1 * (0.2 - low), 1.5 + 0.1 * (0.8 - high)], rtol=1e-6)


@pytest.mark.parametrize("credit", ["uniform", "std", "sum_mean", "score"])
def test_values_and_gradients_are_finite_in_every_mode(credit):
    several = (jnp.zeros((3, 2)), jnp.ones((1, 1)), jnp.asarray(REWARDS, jnp.bfloat16))
    total = lambda r: jnp.sum(advantages.riskpo(r, QUANTILES, bundle_size=2, credit=credit)[0])  # noqa: E731
    for value, gradient in jax.jit(lambda *x: [jax.value_and_grad(total)(r) for r in x])(*several):
        assert np.isfinite(value)
        assert np.isfinite(np.asarray(gradient, np.float32)).all()
    assert jax.eval_shape(advantages.riskpo, jnp.ones((4, 3), jnp.bfloat16), jnp.zeros(2))[0].dtype == jnp.float32


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="credit must be one of uniform, std, sum_mean, score, got 'mean'"):
        advantages.riskpo(jnp.zeros((2, 2)), jnp.zeros(2), credit="mean")
    with pytest.raises(ValueError, match="bundle_size must be at least 1, got 0"):
        advantages.riskpo(jnp.zeros((2, 2)), jnp.zeros(2), bundle_size=0)
    with pytest.raises(ValueError, match=r"0 < alpha_d < alpha_u <= 1, got 0\.8 and 0\.2"):
        advantages.mixed_value_at_risk(jnp.zeros(2), jnp.zeros(2), alpha_d=0.8, alpha_u=0.2)
    with pytest.raises(ValueError, match=r"quantiles must be \[2\]"):
        advantages.mixed_value_at_risk(jnp.zeros(2), jnp.zeros(3))
    with pytest.raises(ValueError, match="levels must have the shape of quantiles"):
        advantages.update_quantiles(jnp.zeros(2), jnp.zeros(3), jnp.ones(3))

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses
from tests.advantages.compiled import all_compiled

losses = all_compiled(losses)

DPO = jax.jit(losses.trajectory_dpo, static_argnames=("beta", "pairs"))


def test_the_tables_numbers():
    # Steps .2, .4 of the better trajectory and -.1, .1 of the worse one: a margin of .6.
    given = DPO(jnp.array([[0.2 + 0.4, -0.1 + 0.1]]), jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]), beta=1.0)
    np.testing.assert_allclose(given, [0.437488], rtol=1e-5)


@pytest.mark.parametrize("pairs", ["all", "extremes"])
def test_the_loss_is_the_mean_over_pairs_of_a_float64_loop(pairs):
    rng = np.random.default_rng(0)
    logp, ref, valid = rng.normal(size=(5, 4)), rng.normal(size=(5, 4)), rng.random((5, 4)) < 0.8
    rewards = rng.choice([0.0, 0.5, 1.0], (5, 4))
    expected = np.zeros(5)
    for p in range(5):
        rows = np.flatnonzero(valid[p])
        better = [(i, j) for i in rows for j in rows if rewards[p, i] > rewards[p, j]]
        if pairs == "extremes" and better:
            better = [(rows[np.argmax(rewards[p, rows])], rows[np.argmin(rewards[p, rows])])]
        margin = 0.3 * (logp[p] - ref[p])
        if better:
            expected[p] = np.mean([np.log1p(np.exp(margin[j] - margin[i])) for i, j in better])
    spoiled = np.where(valid, logp, np.nan)
    np.testing.assert_allclose(DPO(spoiled, ref, rewards, valid, beta=0.3, pairs=pairs), expected, rtol=1e-5)


def test_equal_outcomes_make_no_pair_and_no_gradient():
    for rewards, valid in (([[0.3, 0.1 + 0.2]], [[1, 1]]), ([[1.0, 0.0]], [[1, 0]]), ([[1.0]], [[1]])):
        rewards, valid = jnp.array(rewards), jnp.array(valid)
        logp = jnp.full(rewards.shape, -2.0)
        for pairs in ("all", "extremes"):
            assert not bool(losses.preference_pairs(rewards, valid, pairs=pairs).any())
            value, gradient = jax.jit(jax.value_and_grad(lambda x, r=rewards, v=valid: jnp.sum(DPO(x, 0 * x, r, v))))(
                logp
            )
            assert float(value) == 0
            assert bool(jnp.all(gradient == 0))


def test_gradients_are_finite_for_huge_margins_and_zero_for_the_reference_and_the_outcomes():
    logp, ref, rewards = jnp.array([[-1e4, 1e4, 0.0]]), jnp.zeros((1, 3)), jnp.array([[1.0, 0.0, 0.5]])
    slopes = jax.jit(jax.grad(lambda *x: jnp.sum(losses.trajectory_dpo(*x, beta=1.0)), argnums=(0, 1, 2)))
    gradients = slopes(logp, ref, rewards)
    assert all(bool(jnp.isfinite(g).all()) for g in gradients)
    assert float(jnp.abs(gradients[0]).sum()) > 0
    assert bool(jnp.all(gradients[1] == 0))
    assert bool(jnp.all(gradients[2] == 0))


def test_a_potential_added_to_the_step_rewards_leaves_the_loss_alone_up_to_its_ends():
    # r + Phi(s') - Phi(s) sums to the same up to the potentials of the first and the last state.
    rng = np.random.default_rng(1)
    steps, potential = rng.normal(size=(1, 4, 6)), rng.normal(size=(1, 4, 7))
    rewards = jnp.array([[1.0, 0.0, 0.5, 0.0]])
    plain = DPO(steps.sum(2), jnp.zeros((1, 4)), rewards, beta=0.7)
    free = potential.copy()
    free[:, :, 0], free[:, :, -1] = 2.0, -1.0  # all trajectories begin and end alike
    shaped = DPO((steps + np.diff(free)).sum(2), jnp.zeros((1, 4)), rewards, beta=0.7)
    np.testing.assert_allclose(shaped, plain, rtol=1e-5)
    ends = potential[:, :, -1] - potential[:, :, 0]
    both = DPO((steps + np.diff(potential)).sum(2), jnp.zeros((1, 4)), rewards, beta=0.7)
    np.testing.assert_allclose(both, DPO(steps.sum(2) + ends, jnp.zeros((1, 4)), rewards, beta=0.7), rtol=1e-5)
    assert float(jnp.abs(both - plain).max()) > 0.01


def test_the_mean_over_steps_keeps_long_trajectories_from_having_larger_margins():
    logp, rewards, steps = jnp.array([[4.0, 1.0]]), jnp.array([[1.0, 0.0]]), jnp.array([[4, 1]])
    given = losses.trajectory_dpo(logp, 0 * logp, rewards, beta=1.0, steps=steps)
    np.testing.assert_allclose(given, [np.log(2)], rtol=1e-6)


def test_half_precision_is_raised_and_float64_stays():
    one = jnp.ones((1, 2), jnp.bfloat16)
    assert losses.trajectory_dpo(one, one, one).dtype == jnp.float32
    with jax.enable_x64(True):
        wide = jnp.ones((1, 2), jnp.float64)
        assert losses.trajectory_dpo(wide, wide, wide).dtype == jnp.float64


def test_impossible_arguments_are_refused():
    one = jnp.ones((1, 2))
    with pytest.raises(ValueError, match='pairs must be "all" or "extremes"'):
        losses.preference_pairs(one, pairs="best")
    with pytest.raises(ValueError, match="min_gap must be at least 0"):
        losses.preference_pairs(one, min_gap=-0.1)
    with pytest.raises(ValueError, match="beta must be above 0"):
        losses.trajectory_dpo(one, one, one, beta=0.0)
    with pytest.raises(ValueError, match=r"ref_logp must have the shape of logp, \(1, 2\), got \(1, 3\)"):
        losses.trajectory_dpo(one, jnp.ones((1, 3)), one)

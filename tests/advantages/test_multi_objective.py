import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages
from tests.advantages.compiled import all_compiled

advantages = all_compiled(advantages)

GDPO = jax.jit(advantages.gdpo, static_argnames=("leave_one_out", "normalize_batch", "ddof", "eps"))
TAMED = jax.jit(advantages.log_tamed, static_argnames=("threshold",))


def _random(seed=0):
    rng = np.random.default_rng(seed)
    rewards = rng.normal(1, 1, size=(5, 4, 3))
    rewards[rng.random(rewards.shape) < 0.2] = np.nan
    rewards[1, :, 2] = 0.5  # one reward that is equal in a group
    rewards[2, 1] = np.nan  # a rollout that nobody could score
    valid = rng.random((5, 4)) < 0.9
    valid[3], valid[4] = [False, True, False, False], False
    return rewards, valid, np.array([0.2, 1.0, 2.0])


def _sum_loop(rewards, valid, weights, eps):
    total = np.zeros(valid.shape)
    for p in range(5):
        for n in range(3):
            rows = np.flatnonzero(valid[p] & ~np.isnan(rewards[p, :, n]))
            group = rewards[p, rows, n]
            if len(group) > 1 and group.std() > 1e-9:
                total[p, rows] += weights[n] * (group - group.mean()) / (group.std(ddof=1) + eps)
    return total


@pytest.mark.parametrize("with_lengths", [False, True])
def test_gdpo_agrees_with_a_float64_loop_and_unscored_rewards_contribute_nothing(with_lengths):
    rewards, valid, weights = _random()
    total = _sum_loop(rewards, valid, weights, 1e-4)
    np.testing.assert_allclose(GDPO(rewards, valid, weights=weights, normalize_batch=False), total, atol=1e-5)
    scored = valid & ~np.isnan(rewards).all(axis=2)
    compared = scored & (scored.sum(axis=1, keepdims=True) > 1)
    lengths = np.random.default_rng(1).integers(1, 9, (5, 4)) if with_lengths else np.ones((5, 4), int)
    spread_out = np.repeat(total[compared], lengths[compared])  # one element per token
    expected = np.where(compared, (total - spread_out.mean()) / (spread_out.std(ddof=1) + 1e-4), 0)
    given = GDPO(rewards, valid, weights=weights, lengths=lengths if with_lengths else None)
    np.testing.assert_allclose(given, expected, atol=2e-5)


def test_gdpo_gives_the_papers_numbers_where_grpo_sees_one_advantage():
    rewards = jnp.array([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]])
    before = GDPO(rewards, normalize_batch=False)
    np.testing.assert_allclose(before, [[-0.707007, 0.707007], [-1.414014, 1.414014]], rtol=1e-6)
    np.testing.assert_allclose(GDPO(rewards), [[-0.54768, 0.54768], [-1.09536, 1.09536]], rtol=1e-5)
    summed = advantages.grpo(jnp.sum(rewards, axis=2), eps=0.0)
    np.testing.assert_allclose(summed, [[-0.7071, 0.7071]] * 2, rtol=1e-4)


def test_gdpo_with_one_reward_is_grpo_up_to_the_scale_of_the_batch():
    rewards = np.random.default_rng(2).normal(size=(6, 4)).astype(np.float32)
    single = GDPO(rewards[:, :, None], normalize_batch=False, eps=1e-6)
    np.testing.assert_allclose(single, advantages.grpo(rewards), rtol=1e-5)
    ratio = np.asarray(GDPO(rewards[:, :, None])) / np.asarray(single)
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-3)
    out = GDPO(rewards[:, :, None], leave_one_out=True, normalize_batch=False, eps=1e-6)
    np.testing.assert_allclose(out, advantages.grpo(rewards, leave_one_out=True), rtol=1e-5)


def test_log_tamed_gives_the_papers_numbers():
    rewards = jnp.stack([jnp.array([[0.8, 0.9, 0.6, 0.7]]), jnp.array([[0.1, 4.0, 0.2, 0.5]])], axis=2)
    np.testing.assert_allclose(TAMED(rewards), [[0.89531, 2.50944, 0.78232, 1.10547]], rtol=1e-5)
    plain = TAMED(rewards, threshold=2.0)  # both coefficients, 0.149 and 1.353, are below it
    np.testing.assert_allclose(plain, [[0.9, 4.9, 0.8, 1.2]], rtol=1e-6)
    both = TAMED(rewards, weights=jnp.array([1.0, 0.0]), threshold=0.1)
    np.testing.assert_allclose(both, np.log1p([[0.8, 0.9, 0.6, 0.7]]), rtol=1e-6)
    # Of two coefficients the median is the mean.
    np.testing.assert_allclose(TAMED(rewards, threshold="median"), TAMED(rewards), rtol=1e-6)


def test_log_tamed_leaves_out_what_was_not_scored_and_is_finite_below_minus_one():
    rewards = np.array([[[1.0, np.nan], [3.0, 2.0], [np.nan, np.nan], [9.0, 2.0]]])
    valid = np.array([[True, True, True, False]])
    # h: std 1 of 1, 3 over mean 2 is 0.5; 0 for the other. Their mean is 0.25, so only the first is tamed.
    np.testing.assert_allclose(TAMED(rewards, valid), [[np.log(2), np.log(4) + 2, 0, 0]], rtol=1e-5)
    low = jnp.array([[[-5.0, 1.0], [8.0, 1.0]]])
    value, gradient = jax.jit(jax.value_and_grad(lambda r: jnp.sum(TAMED(r))))(low)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    negative = jnp.array([[[-5.0, 1.0], [-1.0, 2.0]]])  # a negative mean has no coefficient of variation
    np.testing.assert_allclose(TAMED(negative)[0, 0], -5 + np.log(2), rtol=1e-5)


@pytest.mark.parametrize("function", [GDPO, TAMED])
def test_gradients_are_finite_and_dtypes_wide(function):
    rewards, valid, _ = _random()
    gradient = jax.jit(jax.grad(lambda r: jnp.sum(jnp.arange(20.0).reshape(5, 4) * function(r, valid))))(
        jnp.asarray(rewards)
    )
    assert np.isfinite(gradient).all()
    assert jax.eval_shape(function, jnp.ones((2, 3, 2), jnp.bfloat16)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert jax.eval_shape(function, jnp.ones((2, 3, 2), jnp.float64)).dtype == jnp.float64
    for empty in (jnp.zeros((1, 1, 1)), jnp.full((1, 2, 1), jnp.nan)):
        assert not np.asarray(function(empty)).any()


@pytest.mark.parametrize("function", [advantages.gdpo, advantages.log_tamed])
def test_wrong_shapes_and_options_are_refused(function):
    with pytest.raises(ValueError, match=r"rewards must be \[P, G, N\], got shape \(2, 3\); stack the rewards"):
        function(jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"weights must be \[N\] with N = 4, got shape \(3,\)"):
        function(jnp.zeros((2, 3, 4)), weights=jnp.ones(3))
    with pytest.raises(ValueError, match="valid must have the shape of rewards"):
        function(jnp.zeros((2, 3, 4)), jnp.ones(2))


def test_options_that_do_not_apply_are_refused():
    rewards = jnp.zeros((2, 3, 4))
    with pytest.raises(ValueError, match='threshold must be "mean", "median" or a number, got'):
        advantages.log_tamed(rewards, threshold="max")
    with pytest.raises(ValueError, match="lengths weigh the batch's statistics and do not apply to normalize_batch"):
        advantages.gdpo(rewards, lengths=jnp.ones((2, 3)), normalize_batch=False)

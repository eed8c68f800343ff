import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxrl_post import losses


def _random(seed, shape=(4, 6)):
    rng = np.random.default_rng(seed)
    logp = -rng.random(shape) * 3
    old_logp = logp + rng.normal(size=shape) * 0.4
    return logp, old_logp, rng.normal(size=shape)


def _ppo_loop(logp, old_logp, advantages, clip_low, clip_high, dual_clip):
    loss = np.zeros_like(logp)
    for i in np.ndindex(logp.shape):
        ratio, a = np.exp(logp[i] - old_logp[i]), advantages[i]
        loss[i] = -min(ratio * a, min(max(ratio, 1 - clip_low), 1 + clip_high) * a)
        if dual_clip is not None and a < 0:
            loss[i] = min(loss[i], -dual_clip * a)
    return loss


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.5, 1.0, -1.28),  # clipped from above at 1.28
        (1.1, 1.0, -1.1),
        (0.5, 1.0, -0.5),  # a positive advantage is never clipped from below
        (0.5, -2.0, 1.6),  # clipped from below at 0.8
        (1.5, -2.0, 3.0),  # a negative advantage is not clipped from above ...
        (9.0, -2.0, 6.0),  # ... except by the dual clip at 3
    ],
)
def test_ppo_gives_hand_worked_numbers(ratio, advantage, expected):
    loss = losses.ppo(
        jnp.log(jnp.array([[ratio]])),
        jnp.zeros((1, 1)),
        jnp.array([[advantage]]),
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=3.0,
    )
    np.testing.assert_allclose(loss, [[expected]], rtol=1e-6)


@pytest.mark.parametrize("dual_clip", [None, 1.2])
def test_ppo_agrees_with_a_float64_loop(dual_clip):
    logp, old_logp, advantages = _random(0, (50, 20))
    with jax.enable_x64(True):
        loss = losses.ppo(logp, old_logp, advantages, clip_low=0.1, clip_high=0.3, dual_clip=dual_clip)
        np.testing.assert_allclose(loss, _ppo_loop(logp, old_logp, advantages, 0.1, 0.3, dual_clip), rtol=1e-12)


def test_ppo_has_the_gradient_of_reinforce_where_the_ratio_is_one():
    logp, _, advantages = map(jnp.asarray, _random(1))
    ppo = jax.jit(jax.grad(lambda logp: losses.ppo(logp, logp, advantages, clip_low=0.2, clip_high=0.2).sum()))(logp)
    reinforce = jax.jit(jax.grad(lambda logp: losses.reinforce(logp, advantages).sum()))(logp)
    np.testing.assert_allclose(ppo, reinforce, rtol=1e-6)
    np.testing.assert_allclose(reinforce, -advantages, rtol=1e-6)


def test_tokens_of_the_clipped_region_are_those_without_gradient():
    logp, old_logp, advantages = map(jnp.asarray, _random(2, (20, 20)))
    gradient = jax.jit(
        jax.grad(lambda logp: losses.ppo(logp, old_logp, advantages, clip_low=0.1, clip_high=0.3).sum())
    )(logp)
    region = losses.clipped_region(logp, old_logp, advantages, clip_low=0.1, clip_high=0.3)
    assert 20 < int(region.sum()) < 380
    np.testing.assert_array_equal(np.asarray(region), np.asarray(gradient) == 0)


def test_clip_indicators_ask_for_the_side_and_the_sign_together():
    logp = jnp.log(jnp.array([[0.7, 0.7, 1.3, 1.3, 1.0, 0.7]]))
    advantages = jnp.array([[-1.0, 1.0, -1.0, 1.0, 1.0, 0.0]])
    old_logp = jnp.zeros_like(logp)
    assert losses.clipped_low(logp, old_logp, advantages).tolist() == [[1, 0, 0, 0, 0, 0]]
    assert losses.clipped_high(logp, old_logp, advantages).tolist() == [[0, 0, 0, 1, 0, 0]]
    assert losses.clipped_region(logp, old_logp, advantages).tolist() == [[1, 0, 0, 1, 0, 0]]
    assert losses.clipped_high(logp, old_logp, advantages, clip_high=0.4).sum() == 0


def test_policy_losses_agree_with_finite_differences():
    with jax.enable_x64(True):
        logp, old_logp, advantages = map(jnp.asarray, _random(3))
        check_grads(jax.jit(lambda logp: losses.ppo(logp, old_logp, advantages)), (logp,), order=1, modes=["rev"])
        check_grads(
            jax.jit(lambda logp: losses.ppo(logp, old_logp, advantages, dual_clip=1.1)), (logp,), order=1, modes=["rev"]
        )
        check_grads(jax.jit(lambda logp: losses.reinforce(logp, advantages)), (logp,), order=1, modes=["rev"])


def test_no_gradient_flows_into_old_log_probs_and_advantages():
    logp, old_logp, advantages = map(jnp.asarray, _random(4))
    for gradient in jax.jit(jax.grad(lambda *x: losses.ppo(*x).sum(), argnums=(1, 2)))(logp, old_logp, advantages):
        assert np.all(np.asarray(gradient) == 0)
    assert np.all(np.asarray(jax.jit(jax.grad(lambda a: losses.reinforce(logp, a).sum()))(advantages)) == 0)


def test_ratios_are_clamped_at_e_to_the_twenty_and_stay_finite():
    logp, old_logp = jnp.array([[0.0, -500.0, -1e30]]), jnp.array([[-500.0, 0.0, 0.0]])
    np.testing.assert_allclose(
        losses.importance_ratio(logp, old_logp), [[np.exp(20.0), np.exp(-20.0), np.exp(-20.0)]], rtol=1e-5
    )
    for advantage in (-1.0, 1.0):
        value, gradient = jax.jit(
            jax.value_and_grad(lambda logp, a=advantage: losses.ppo(logp, old_logp, jnp.full((1, 3), a)).sum())
        )(logp)
        assert np.isfinite(value)
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("name", ["ppo", "clipped_low", "clipped_high", "clipped_region"])
def test_policy_functions_raise_narrow_dtypes_and_keep_wide_ones(name):
    function = getattr(losses, name)
    assert jax.eval_shape(function, *[jnp.ones((2, 3), jnp.bfloat16)] * 3).dtype == jnp.float32
    with jax.enable_x64(True):
        assert jax.eval_shape(function, *[jnp.ones((2, 3), jnp.float64)] * 3).dtype == jnp.float64


def test_bfloat16_log_probs_are_subtracted_in_float32():
    # In bfloat16, 1.0078125 - 0.00390625 rounds to 1.0; in float32 it does not.
    logp, old_logp = jnp.array([[1.0078125]], jnp.bfloat16), jnp.array([[0.00390625]], jnp.bfloat16)
    assert losses.log_ratio(logp, old_logp).tolist() == [[1.00390625]]


def test_ppo_under_jit_and_vmap_over_clip_ranges_equals_single_calls():
    logp, old_logp, advantages = map(jnp.asarray, _random(5))
    bounds = jnp.array([0.1, 0.3])
    batched = jax.jit(jax.vmap(lambda c: losses.ppo(logp, old_logp, advantages, clip_low=c, clip_high=c, dual_clip=3)))
    for row, bound in zip(batched(bounds), (0.1, 0.3), strict=True):
        expected = losses.ppo(logp, old_logp, advantages, clip_low=bound, clip_high=bound, dual_clip=3)
        np.testing.assert_allclose(row, expected, rtol=1e-6)


def test_advantages_of_groups_are_refused_with_the_way_out():
    with pytest.raises(
        ValueError, match=r"advantages must have the shape of logp, \(8, 5\), got \(2, 4\); .*per_token"
    ):
        losses.ppo(jnp.zeros((8, 5)), jnp.zeros((8, 5)), jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"old_logp must have the shape of logp"):
        losses.ppo(jnp.zeros((8, 5)), jnp.zeros(8), jnp.zeros((8, 5)))
    with pytest.raises(ValueError, match=r"logp must be \[B, T\] or \[B\], got shape \(2, 8, 5\)"):
        losses.reinforce(jnp.zeros((2, 8, 5)), jnp.zeros((2, 8, 5)))


@pytest.mark.parametrize(("option", "value"), [("clip_low", -0.2), ("clip_high", -0.2), ("dual_clip", 1.0)])
def test_impossible_clip_ranges_are_refused(option, value):
    one = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match=f"{option} must be .* got {value}"):
        losses.ppo(one, one, one, **{option: value})

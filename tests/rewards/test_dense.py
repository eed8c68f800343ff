import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import rewards
from tests.rewards.compiled import compiled

rto = compiled(rewards.rto)

DPO, REF, OLD = (jnp.array([x]) for x in ([-1.0, -2.0], [-1.5, -1.0], [-1.2, -1.4]))


def test_rto_gives_the_closed_form_numbers():
    # d = (0.025, -0.05), k = (-0.003, 0.004), and 2 at the end.
    found = rto(jnp.array([[2.0]]), DPO, REF, OLD, jnp.ones((1, 2)))
    np.testing.assert_allclose(found, [[0.022, 1.954]], rtol=1e-5)


def test_the_clips_bound_each_part_and_none_takes_them_away():
    ones = jnp.ones((1, 2))
    found = rto(jnp.array([[99.0]]), DPO, REF, OLD, ones, beta1=1.0, beta2=0.0, clip=0.4)
    np.testing.assert_allclose(found, [[0.4, 9.6]], rtol=1e-6)
    free = rto(jnp.array([[99.0]]), DPO, REF, OLD, ones, beta1=1.0, beta2=0.0, clip=None, max_reward=None)
    np.testing.assert_allclose(free, [[0.5, 98.0]], rtol=1e-6)


def test_without_the_dpo_policy_it_is_the_reward_of_ppo_from_human_feedback():
    found = rto(jnp.array([[2.0]]), DPO, REF, OLD, jnp.ones((1, 2)), beta1=0.0, beta2=0.1)
    np.testing.assert_allclose(found, [[-0.1 * 0.3, 2 + 0.1 * 0.4]], rtol=1e-5)


def test_with_equal_weights_and_no_other_reward_the_return_is_the_log_ratio_of_dpo_and_policy():
    rng = np.random.default_rng(0)
    dpo, ref, old = -3 * rng.random((3, 4, 6))
    mask = np.arange(6) < np.array([[6], [3], [1], [0]])
    found = rto(jnp.zeros((2, 2)), dpo, ref, old, jnp.asarray(mask), beta1=0.3, beta2=0.3, clip=None)
    np.testing.assert_allclose(found.sum(1), 0.3 * ((dpo - old) * mask).sum(1), rtol=1e-4, atol=1e-6)
    assert np.all(np.asarray(found)[~mask] == 0)


def test_what_is_masked_may_hold_anything_and_nothing_has_a_gradient():
    junk = jnp.array([[jnp.nan, jnp.inf]])
    dpo, ref, old = (jnp.concatenate([x, junk], 1) for x in (DPO, REF, OLD))
    mask = jnp.array([[1, 1, 0, 0]])
    found = rto(jnp.array([[2.0]]), dpo, ref, old, mask)
    np.testing.assert_allclose(found, [[0.022, 1.954, 0, 0]], rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda x: rto(jnp.ones((1, 1)), x, REF, OLD, jnp.ones((1, 2))).sum()))(DPO)
    assert np.all(np.asarray(gradient) == 0)
    empty = rto(jnp.ones((1, 1)), DPO, REF, OLD, jnp.zeros((1, 2)))
    assert np.all(np.asarray(empty) == 0)


def test_float32_or_wider():
    narrow = [x.astype(jnp.bfloat16) for x in (DPO, REF, OLD)]
    assert rto(jnp.ones((1, 1), jnp.bfloat16), *narrow, jnp.ones((1, 2))).dtype == jnp.float32
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in (DPO, REF, OLD)]
        assert rto(np.ones((1, 1)), *wide, np.ones((1, 2))).dtype == jnp.float64


def test_wrong_arguments_are_refused():
    ones = jnp.ones((1, 2))
    with pytest.raises(ValueError, match="clip must be above 0, got 0; None for no bound"):
        rto(jnp.ones((1, 1)), DPO, REF, OLD, ones, clip=0)
    with pytest.raises(ValueError, match=r"rewards must be \[P, G\]"):
        rto(jnp.ones(1), DPO, REF, OLD, ones)
    with pytest.raises(ValueError, match="mask must have the shape of dpo_logp"):
        rto(jnp.ones((1, 1)), DPO, REF, OLD, jnp.ones((1, 3)))

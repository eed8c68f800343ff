import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages
from tests.advantages.compiled import all_compiled

advantages = all_compiled(advantages)


@pytest.mark.parametrize(("right", "weight"), [(3, 0.8698), (2, 0.7431), (1, 0.4932), (0, 1.0), (4, 1.0)])
def test_dads_weights_are_the_tables_numbers_for_what_was_better_than_the_mean(right, weight):
    correct = np.arange(4) < right
    found = advantages.dads_kl_weight(correct[None], correct[None] - right / 4)
    np.testing.assert_allclose(found[0], np.where(correct, weight, 1.0), atol=5e-5)


def test_dads_reads_the_sign_of_the_advantage_and_has_an_exponential_form():
    correct = jnp.array([[1, 0, 0, 0]])
    signs = advantages.dads_kl_weight(correct, jnp.array([[-1.0, 1.0, 0.0, 2.0]]), rate=1.0)
    np.testing.assert_allclose(signs, [[1, 1 - math.exp(-0.25), 1, 1 - math.exp(-0.25)]], rtol=1e-6)
    falling = advantages.dads_kl_weight(correct, correct - 0.5, form="exponential")
    np.testing.assert_allclose(falling[0, 0], math.exp(-math.e * 0.75), rtol=1e-6)


def test_stcr_hits_wrong_answers_by_what_they_are_longer_than_the_right_ones():
    factor = advantages.stcr_factor(jnp.array([[1, 0]]), jnp.array([[500, 1500]]))
    np.testing.assert_allclose(factor, [[1, 1.0099501]], rtol=1e-6)


def test_stcr_is_the_formula_in_a_float64_loop():
    rng = np.random.default_rng(0)
    correct, valid = rng.random((30, 6)) < 0.4, rng.random((30, 6)) < 0.8
    lengths = rng.integers(1, 300, (30, 6))
    with jax.enable_x64(True):
        found = np.asarray(advantages.stcr_factor(correct, lengths.astype(float), valid, base=1.01))
    for p, g in np.ndindex(30, 6):
        right = valid[p] & correct[p]
        excess = lengths[p, g] - lengths[p, right].mean() if right.any() else 0
        hit = valid[p, g] and not correct[p, g] and excess > 0
        np.testing.assert_allclose(found[p, g], 2 - 1.01**-excess if hit else 1, rtol=1e-12)


def test_neither_factor_acts_where_a_group_has_no_contrast_or_a_row_is_invalid():
    lengths, junk = jnp.array([[5.0, 900.0, jnp.nan]]), jnp.array([[1.0, -1.0, jnp.nan]])
    valid = jnp.array([[True, True, False]])
    for correct in ([[0, 0, 1]], [[1, 1, 0]]):
        np.testing.assert_array_equal(advantages.stcr_factor(jnp.array(correct), lengths, valid), [[1, 1, 1]])
        np.testing.assert_array_equal(advantages.dads_kl_weight(jnp.array(correct), junk, valid), [[1, 1, 1]])
    for function in (advantages.stcr_factor, advantages.dads_kl_weight):
        alone = jax.jit(function)(jnp.ones((2, 1)), jnp.ones((2, 1), jnp.bfloat16))
        assert alone.dtype == jnp.float32
        np.testing.assert_array_equal(alone, np.ones((2, 1)))
        slope = jax.jit(jax.grad(lambda x, f=function: f(jnp.array([[1, 0, 0]]), x, valid).sum()))(lengths)
        assert np.all(np.isfinite(slope))


def test_wrong_arguments_are_named():
    ones = jnp.ones((1, 2))
    with pytest.raises(ValueError, match="correct must have the shape of advantages"):
        advantages.dads_kl_weight(ones[:, :1], ones)
    with pytest.raises(ValueError, match="rate must be above 0"):
        advantages.dads_kl_weight(ones, ones, rate=0.0)
    with pytest.raises(ValueError, match="form must be one of"):
        advantages.dads_kl_weight(ones, ones, form="linear")
    with pytest.raises(ValueError, match=r"lengths must be \[P, G\]"):
        advantages.stcr_factor(ones[0], ones[0])
    with pytest.raises(ValueError, match="base must be at least 1"):
        advantages.stcr_factor(ones, ones, base=0.99)

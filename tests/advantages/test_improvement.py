"""The signal of improvement and its attribution, on the numbers of the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.advantages.improvement import attribution, improvement_signal
from tests.advantages.compiled import compiled

attribution, improvement_signal = map(compiled, (attribution, improvement_signal))

HISTORY = jnp.array([0.40, 0.42, 0.44, 0.46])


def test_the_table_s_signals():
    np.testing.assert_allclose(improvement_signal(jnp.array(0.47), HISTORY), 1.549193, rtol=1e-4)
    np.testing.assert_allclose(improvement_signal(jnp.array(0.40), HISTORY), -0.116190, rtol=1e-4)
    np.testing.assert_allclose(improvement_signal(jnp.array(0.40), HISTORY, penalty=1.0), -1.161895, rtol=1e-4)
    assert float(improvement_signal(jnp.array(0.40), HISTORY, penalty=0.0)) == 0.0


def test_a_signal_is_clamped_before_it_is_weakened_and_a_constant_history_is_guarded():
    assert float(improvement_signal(jnp.array(9.0), HISTORY, clamp=2.0)) == 2.0
    np.testing.assert_allclose(improvement_signal(jnp.array(-9.0), HISTORY, clamp=2.0), -0.2)
    flat = jnp.full(4, 0.5)
    assert float(improvement_signal(jnp.array(0.5), flat)) == 0.0
    np.testing.assert_allclose(improvement_signal(jnp.array(0.75), flat), 0.25 / 1e-6, rtol=1e-5)


def test_attribution_keeps_signs_and_has_mean_absolute_value_one_in_every_group():
    rng = np.random.default_rng(0)
    found = np.asarray(attribution(rng.normal(size=(5, 8)) * np.array([[1e-4], [1], [10], [1e4], [0]])))
    np.testing.assert_allclose(np.abs(found).mean(1), [1, 1, 1, 1, 0], rtol=1e-5)
    assert attribution(jnp.array([[0.5, 0.5, -0.5, -0.5]])).tolist() == [[1, 1, -1, -1]]
    some = attribution(jnp.array([[3.0, -1.0, 99.0]]), jnp.array([[True, True, False]]))
    assert some.tolist() == [[1.5, -0.5, 0.0]]


def test_both_are_finite_under_jit_and_in_bfloat16():
    signal = jax.jit(jax.grad(lambda x: improvement_signal(x, jnp.zeros(3))))(jnp.array(0.0))
    assert bool(jnp.isfinite(signal))
    found = attribution(jnp.array([[0.0, 0.0], [1.0, -1.0]], jnp.bfloat16), jnp.zeros((2, 2), bool))
    assert found.dtype == jnp.float32
    assert found.tolist() == [[0, 0], [0, 0]]
    slope = jax.jit(jax.grad(lambda x: attribution(x).sum()))(jnp.zeros((1, 3)))
    assert bool(jnp.all(jnp.isfinite(slope)))


def test_wrong_arguments_are_errors():
    with pytest.raises(ValueError, match="history needs at least two mean rewards"):
        improvement_signal(jnp.array(1.0), jnp.ones(1))
    with pytest.raises(ValueError, match="penalty must be at least 0, got -1"):
        improvement_signal(jnp.array(1.0), HISTORY, penalty=-1)
    with pytest.raises(ValueError, match=r"\[P, G\]"):
        attribution(jnp.ones(3))

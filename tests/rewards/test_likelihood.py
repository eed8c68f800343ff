"""Likelihoods of answers as rewards, against numbers that were computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages, rewards


def test_the_four_forms_are_the_papers_and_padding_does_not_count():
    logp = jnp.log(jnp.array([[0.5, 0.25, 0.9], [0.5, 0.5, 0.5]]))
    mask = jnp.array([[1, 1, 0], [0, 0, 0]])
    for form, wanted in {"log_prob": -2.07944, "mean_log_prob": -1.03972, "prob": 0.125, "mean_prob": 0.375}.items():
        np.testing.assert_allclose(rewards.answer_likelihood(logp, mask, form=form), [wanted, 0.0], atol=1e-5)
    with pytest.raises(ValueError, match="form"):
        rewards.answer_likelihood(logp, mask, form="odds")
    with pytest.raises(ValueError, match="mask"):
        rewards.answer_likelihood(logp, mask[:, :2])


def test_a_groups_likelihood_and_the_leave_one_out_baseline():
    logp = jnp.log(jnp.array([[0.125, 0.5]]))
    np.testing.assert_allclose(advantages.jepo(logp), [[-0.47, 0.91629]], atol=1e-5)
    np.testing.assert_allclose(advantages.rloo(logp), [[-1.38629, 1.38629]], atol=1e-5)


def test_it_is_finite_for_answers_that_are_all_but_impossible():
    found = advantages.jepo(jnp.array([[-2000.0, -1000.0, -3000.0]]))
    np.testing.assert_allclose(found, [[-np.log(1.5), 1000 - np.log(1.5), -np.log(1.5)]], rtol=1e-5)


def test_only_what_is_valid_counts():
    logp = jnp.array([[-1.0, -2.0, 5.0], [-1.0, 3.0, 3.0], [0.0, 0.0, 0.0]])
    valid = jnp.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    found = jax.jit(advantages.jepo)(logp, valid)
    np.testing.assert_allclose(found[0, :2], advantages.jepo(logp[:1, :2])[0], rtol=1e-6)
    assert float(jnp.abs(found[0, 2]) + jnp.abs(found[1:]).sum()) == 0
    gradient = jax.grad(lambda x: advantages.jepo(x, valid).sum())(logp)
    assert bool(jnp.all(jnp.isfinite(gradient)))

"""Soft policies and cliffs, against numbers in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import control
from tests.control.test_tables import chain, random_process

END = jnp.zeros((1, 3, 1))


def test_one_state_is_in_closed_form():
    prior = jnp.array([[0.9, 0.1]])
    policy, value = control.soft_policy(END[:, :2], jnp.array([[1.0, 0.0]]), gamma=0.0, temperature=1.0, prior=prior)
    np.testing.assert_allclose(policy, [[0.960730, 0.039270]], atol=1e-5)
    np.testing.assert_allclose(value, [np.log(0.9 * np.e + 0.1)], rtol=1e-5)


def test_the_value_is_reward_less_the_kl_and_no_other_policy_has_more():
    transitions, reward, prior = map(jnp.asarray, random_process())
    policy, value = control.soft_policy(transitions, reward, gamma=0.8, temperature=0.5, prior=prior)

    def regularized(policy):
        kl = jnp.sum(policy * jnp.log(policy / prior), axis=1, keepdims=True)
        q = control.action_values(transitions, reward - 0.5 * kl, policy, gamma=0.8)
        return jnp.sum(policy * q, axis=1)

    np.testing.assert_allclose(regularized(policy), value, rtol=1e-4)
    for seed in range(5):
        other = jax.nn.softmax(jnp.log(policy) + 0.3 * jax.random.normal(jax.random.key(seed), policy.shape))
        assert bool(jnp.all(regularized(other) <= value + 1e-4))


def test_what_the_prior_forbids_stays_so_and_a_cold_policy_is_the_best():
    transitions, reward = chain(4)
    prior = jnp.array([[1.0, 0.0], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]])
    policy, _ = control.soft_policy(transitions, reward, gamma=0.9, temperature=10.0, prior=prior)
    assert policy[0].tolist() == [1.0, 0.0]
    cold, _ = control.soft_policy(transitions, reward, gamma=0.9, temperature=1e-3)
    np.testing.assert_allclose(cold[:3], control.best_policy(transitions, reward, gamma=0.9)[:3], atol=1e-4)
    with pytest.raises(ValueError, match="temperature"):
        control.soft_policy(transitions, reward, gamma=0.9, temperature=0.0)


def test_a_tie_is_a_cliff_that_entropy_makes_a_slope():
    reward = jnp.array([[1.0, 1.0, 0.0]])
    one, other = (control.best_policy(END, reward + jnp.array([[d, 0.0, 0.0]]), gamma=0.0)[0] for d in (0.01, -0.01))
    assert jnp.sum(jnp.abs(one - other)).item() / 2 == 1.0
    soft = [
        control.soft_policy(END, reward + jnp.array([[d, 0.0, 0.0]]), gamma=0.0, temperature=0.1)[0][0]
        for d in (0.0, 0.01)
    ]
    np.testing.assert_allclose(soft[0], [0.499989, 0.499989, 0.000023], atol=1e-6)
    np.testing.assert_allclose(soft[1], [0.524968, 0.475011, 0.000022], atol=1e-6)
    assert jnp.sum(jnp.abs(soft[0] - soft[1])).item() == pytest.approx(0.049958, abs=1e-5)
    key = jax.random.key(0)
    assert control.policy_cliff(key, END, reward, gamma=0.0, size=0.01).item() == 0.5
    found = control.policy_cliff(key, END, reward, gamma=0.0, size=0.01, temperature=0.1).item()
    assert 0 < found <= 0.01 / 0.1
    apart = jnp.array([[1.0, 0.5, 0.0]])
    assert control.policy_cliff(key, END, apart, gamma=0.0, size=0.2).item() == 0.0


def test_a_clone_is_smoothed():
    np.testing.assert_allclose(control.clone(jnp.array([[2, 0], [0, 0]])), [[0.75, 0.25], [0.5, 0.5]])

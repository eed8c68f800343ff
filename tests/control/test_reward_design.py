"""Designed rewards: they keep the optimum, and are as informative as can be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import control
from tests.control.test_tables import chain, random_process

GAMMA = 0.9


def test_shaping_by_the_optimal_values_is_as_informative_as_can_be_and_the_true_reward_is_not():
    transitions, reward = chain(6)
    best = control.best_policy(transitions, reward, gamma=GAMMA)
    value = jnp.max(control.action_values(transitions, reward, best, gamma=GAMMA), axis=1)
    shaped = reward + GAMMA * transitions @ value - value[:, None]
    options = {"gamma": GAMMA, "horizons": (0, 1, 2, 5)}
    np.testing.assert_allclose(control.informativeness(shaped, transitions, reward, best, **options), 0.0, atol=1e-5)
    assert float(control.informativeness(reward, transitions, reward, best, **options)) < -0.5


@pytest.mark.parametrize("process", ["chain", "random"])
def test_a_designed_reward_keeps_the_optimum_and_is_what_it_is_said_to_be_worth(process):
    if process == "chain":
        transitions, reward = chain(5)
    else:
        transitions, reward, _ = random_process()
        transitions, reward = jnp.asarray(0.9 * transitions), jnp.asarray(reward)
    best = control.best_policy(transitions, reward, gamma=GAMMA)
    states = range(len(reward))
    designed, value = control.design_reward(transitions, reward, best, states, gamma=GAMMA, max_reward=5.0)
    found = control.informativeness(jnp.asarray(designed), transitions, reward, best, gamma=GAMMA)
    np.testing.assert_allclose(found, value, atol=1e-3)
    np.testing.assert_allclose(value, 0.0, atol=1e-6)  # all states may have a reward, as shaping by values has
    again = control.best_policy(transitions, jnp.asarray(designed), gamma=GAMMA)
    assert bool(jnp.all((again > 0) <= (best > 0)))


def test_few_states_are_chosen_one_by_one_and_each_adds_something():
    transitions, reward = chain(6)
    best = control.best_policy(transitions, reward, gamma=GAMMA)
    options = {"gamma": GAMMA, "max_reward": 1.0}
    _, alone = control.design_reward(transitions, reward, best, [5], **options)
    subgoals, designed = control.choose_subgoals(transitions, reward, best, [5], count=2, **options)
    assert len(subgoals) == 2
    assert set(np.flatnonzero(np.abs(designed).sum(axis=1) > 1e-9)) <= {5, *subgoals}
    found = float(control.informativeness(jnp.asarray(designed), transitions, reward, best, gamma=GAMMA))
    assert found > alone + 0.1
    everything, _ = control.choose_subgoals(transitions, reward, best, [5], count=10, **options)
    assert len(everything) <= 5
    with pytest.raises(ValueError, match="keeps the optimum"):
        control.design_reward(transitions, reward, best, [], **options)


def test_a_learners_own_reward_follows_its_advantage():
    end, true = jnp.zeros((1, 2, 1)), jnp.array([[1.0, -1.0]])
    half, once = jnp.full((1, 2), 0.5), jnp.ones(1)
    np.testing.assert_allclose(control.explors_gradient(end, true, half, once, gamma=GAMMA), [[0.25, -0.25]])
    # The same by differentiating the criterion whose gradient it is.
    transitions, reward, policy = map(jnp.asarray, random_process(seed=1))
    visits = jnp.linspace(0.1, 0.4, 4)
    q = control.action_values(transitions, reward, policy, gamma=GAMMA)
    advantage = q - jnp.sum(policy * q, axis=1, keepdims=True)

    def criterion(own):
        lead = own - jnp.sum(policy * own, axis=1, keepdims=True)
        return jnp.sum(visits[:, None] * policy**2 * advantage * lead)

    wanted = jax.grad(criterion)(jnp.zeros_like(reward))
    found = control.explors_gradient(transitions, reward, policy, visits, gamma=GAMMA)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_adaptive_gradient_is_that_of_its_criterion():
    transitions, reward, learner = map(jnp.asarray, random_process(seed=2))
    teacher = control.best_policy(transitions, reward, gamma=GAMMA)
    visits = jnp.linspace(0.1, 0.4, 4)
    advantage = -control.action_gaps(transitions, reward, teacher, gamma=GAMMA)

    def criterion(designed):
        lead, shown = (x - jnp.sum(learner * x, axis=1, keepdims=True) for x in (advantage, designed))
        return jnp.sum(visits[:, None] * learner * lead * shown)

    found = control.adaptive_informativeness(transitions, reward, teacher, learner, visits, gamma=GAMMA)
    np.testing.assert_allclose(found, jax.grad(criterion)(jnp.zeros_like(reward)), rtol=1e-4, atol=1e-6)


def test_a_bonus_falls_with_the_visits_from_its_bound():
    np.testing.assert_allclose(control.explors_bonus(jnp.array([0, 3, 99])), [1.0, 0.5, 0.1], rtol=1e-6)
    np.testing.assert_allclose(control.explors_bonus(jnp.zeros(1), scale=2.0, max_reward=0.5), [0.5], rtol=1e-6)
    for options in ({"scale": 0.0}, {"max_reward": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            control.explors_bonus(jnp.zeros(1), **options)

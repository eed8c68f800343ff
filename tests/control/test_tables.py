"""Values over a horizon, against sums that were written out."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import control


def chain(count):
    """On or stay; the last state ends the episode and pays 1."""
    transitions = np.zeros((count, 2, count))
    for state in range(count - 1):
        transitions[state, 0, state + 1] = transitions[state, 1, state] = 1.0
    reward = np.zeros((count, 2))
    reward[-1] = 1.0
    return jnp.asarray(transitions), jnp.asarray(reward)


def random_process(states=4, actions=3, seed=0):
    rng = np.random.default_rng(seed)
    transitions = rng.dirichlet(np.ones(states), (states, actions))
    reward, policy = rng.normal(size=(states, actions)), rng.dirichlet(np.ones(actions), states)
    return transitions, reward, policy


def test_a_horizon_is_a_sum_of_discounted_rewards_and_all_of_them_its_limit():
    transitions, reward, policy = random_process()
    wanted, reach = np.zeros_like(reward), None
    for step in range(4):
        if reach is None:
            wanted = reward.copy()
            reach = transitions
        else:
            wanted = wanted + 0.9**step * np.einsum("sat,tb,tb->sa", reach, policy, reward)
            reach = np.einsum("sat,tb,tbu->sau", reach, policy, transitions)
        found = control.action_values(transitions, reward, policy, gamma=0.9, horizon=step)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    far = control.action_values(transitions, reward, policy, gamma=0.9, horizon=300)
    np.testing.assert_allclose(control.action_values(transitions, reward, policy, gamma=0.9), far, rtol=1e-4)


def test_the_best_policy_walks_the_chain_and_its_gaps_are_what_waiting_costs():
    transitions, reward = chain(4)
    best = control.best_policy(transitions, reward, gamma=0.5)
    assert best.tolist() == [[1, 0], [1, 0], [1, 0], [0.5, 0.5]]
    gaps = control.action_gaps(transitions, reward, best, gamma=0.5)
    np.testing.assert_allclose(gaps[:, 1], [0.0625, 0.125, 0.25, 0.0], atol=1e-6)
    np.testing.assert_allclose(gaps[:3, 0], 0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"gamma": 1.0}, "gamma"), ({"gamma": 0.9, "horizon": -1}, "horizon"), ({"gamma": 0.9}, "policy")],
)
def test_what_does_not_fit_is_refused(options, message):
    transitions, reward = chain(3)
    policy = jnp.ones((2, 2)) if message == "policy" else jnp.full((3, 2), 0.5)
    with pytest.raises(ValueError, match=message):
        control.action_values(transitions, reward, policy, **options)
    with pytest.raises(ValueError, match="transitions"):
        control.action_values(transitions[..., :2], reward, reward, gamma=0.9)

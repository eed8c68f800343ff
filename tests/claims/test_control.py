"""Claims about decision processes in tables."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post import control
from tests.claims import lab


def test_a_designed_reward_is_learned_from_in_fewer_episodes():
    """A chain of ten states with a goal at its end, and two actions, one of which goes back."""
    count, gamma = 10, 0.9
    transitions = np.zeros((count, 2, count))
    for state in range(count - 1):
        transitions[state, 0, state + 1] = transitions[state, 1, max(state - 1, 0)] = 1.0
    reward = np.zeros((count, 2))
    reward[-1] = 1.0
    best = control.best_policy(jnp.asarray(transitions), jnp.asarray(reward), gamma=gamma)
    subgoals, designed = control.choose_subgoals(
        transitions, reward, best, [count - 1], count=4, gamma=gamma, max_reward=1.0
    )
    assert len(subgoals) == 4
    moves = jnp.asarray(np.argmax(transitions, axis=2))

    def outcome(table, key):
        """Minus the number of steps of Q-learning until its policy reaches the goal for good."""

        def step(carry, key):
            q, state = carry
            of_greedy, of_action, of_ties = jax.random.split(key, 3)
            greedy = jnp.argmax(q[state] + 1e-6 * jax.random.uniform(of_ties, (2,)))
            action = jnp.where(jax.random.bernoulli(of_greedy, 0.3), jax.random.randint(of_action, (), 0, 2), greedy)
            ends = state == count - 1
            after = moves[state, action]
            target = table[state, action] + jnp.where(ends, 0.0, gamma * jnp.max(q[after]))
            q = q.at[state, action].add(0.5 * (target - q[state, action]))
            right = jnp.all(q[:-1, 0] > q[:-1, 1])
            return (q, jnp.where(ends, 0, after)), right

        keys = jax.random.split(key, 1500)
        _, right = jax.lax.scan(step, (jnp.zeros((count, 2)), jnp.int32(0)), keys)
        return -jnp.max(jnp.where(right, 0, jnp.arange(1, len(keys) + 1))).astype(jnp.float32)

    lab.check(
        "exprd-explors",
        outcome,
        method=jnp.asarray(designed, jnp.float32),
        baseline=jnp.asarray(reward, jnp.float32),
        margin=100.0,
    )


def _process(key, states=8, actions=4):
    """Transitions and rewards of a random decision process that ends with one chance in ten."""
    of_moves, of_reward = jax.random.split(key)
    moves = 0.9 * jax.random.dirichlet(of_moves, jnp.full(states, 0.3), (states, actions))
    return moves, jax.random.normal(of_reward, (states, actions))


def test_entropy_turns_the_cliff_of_a_tie_into_a_slope():
    """Two actions of every state are equally good, the others are not."""

    def outcome(soft, key):
        """Minus the change of the policy when rewards change by a hundredth."""
        of_reward, of_changes = jax.random.split(key)
        reward = jnp.full((6, 4), -1.0).at[:, :2].set(jax.random.normal(of_reward, (6, 1)) ** 2)
        end = jnp.zeros((6, 4, 6))
        options = {"gamma": 0.0, "size": 0.01}
        slope = control.policy_cliff(of_changes, end, reward, temperature=0.1, **options)
        cliff = control.policy_cliff(of_changes, end, reward, **options)
        return -jnp.where(soft > 0, slope, cliff)

    lab.check("policy-cliff", outcome, method=1.0, baseline=0.0, margin=0.3)


def test_staying_near_demonstrations_keeps_a_plan_from_exploiting_a_reward_of_few_samples():
    """Rewards are known with noise, and the demonstrations are an expert's fifty steps."""

    def outcome(temperature, key):
        """True return from a uniform start, of the policy that was planned."""
        of_process, of_demos, of_noise = jax.random.split(key, 3)
        moves, reward = _process(of_process)
        expert, _ = control.soft_policy(moves, reward, gamma=0.95, temperature=0.2)
        states = jnp.arange(50) % 8
        chosen = jax.random.categorical(of_demos, jnp.log(expert)[states])
        prior = control.clone(jnp.zeros(reward.shape).at[states, chosen].add(1.0))
        estimate = reward + 2.0 * jax.random.normal(of_noise, reward.shape)
        planned, _ = control.soft_policy(moves, estimate, gamma=0.95, temperature=temperature, prior=prior)
        q = control.action_values(moves, reward, planned, gamma=0.95)
        return jnp.mean(jnp.sum(planned * q, axis=1))

    lab.check("demonstration-regularized-rl", outcome, method=2.0, baseline=0.02, margin=0.2)

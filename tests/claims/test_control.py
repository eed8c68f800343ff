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

"""Claims about rewards that are put together so that the easy ones do not outweigh what matters."""

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxrl_post import advantages, methods
from tests.claims import lab

VOCAB, LENGTH = 3, 5
ANSWERS = VOCAB**LENGTH


def _components(**tables):
    """A judge that gives components of the reward from tables `[V**L]`, and their sum."""

    def judge(rollouts, key):
        del key
        index = lab.sequence_index(rollouts, VOCAB)
        rewards = {name: table[index] for name, table in tables.items()}
        return rollouts.replace(rewards=rewards, reward=sum(rewards.values()))

    return judge


def _digits():
    return jnp.arange(ANSWERS)[:, None] // VOCAB ** jnp.arange(LENGTH - 1, -1, -1) % VOCAB


def _right(method, key):
    """Probability of the one right answer of 243; a reward model likes what begins like it, and what ends in zeros."""
    right, digits = 100, _digits()
    noise_key, key = jax.random.split(key)
    like = jnp.sum(jnp.cumprod(digits == digits[right], axis=1), axis=1)
    score = like + 4.0 * jnp.all(digits[:, -2:] == 0, axis=1) + 0.3 * jax.random.normal(noise_key, (ANSWERS,))
    task = lab.Task(1, VOCAB, LENGTH, _components(score=score, correct=jax.nn.one_hot(right, ANSWERS)))
    trained = lab.train(task, method, key, steps=80, group_size=8, optimizer=optax.adam(0.05))
    return lab.probabilities(trained.params, LENGTH)[0, right]


def test_a_score_within_the_verdict_teaches_where_all_are_wrong_and_cannot_be_hacked():
    """The baseline learns from the sum of score and verdict, which the score outweighs."""
    method = methods.verified_score(score="score", correct="correct")
    lab.check("qwen2.5-math-reward", _right, method=method, baseline=methods.policy_gradient(), seeds=16, margin=0.5)


@pytest.mark.nightly
def test_the_verdict_alone_teaches_later_and_the_score_alone_is_hacked():
    method = methods.verified_score(score="score", correct="correct")
    for name, margin in (("correct", 0.0), ("score", 0.5)):
        alone = methods.policy_gradient(advantage=lambda s, name=name: advantages.grpo(s.component(name), s.valid))
        found, _ = lab.compare(_right, method, alone, 16)
        assert found.interval[0] > margin, (name, found)


def test_gates_keep_an_agent_from_farming_what_is_easy():
    """Each of five turns earns 0.3 for another call, and one in five at most may be a call for the game to be won."""

    def outcome(method, key):
        """Probability of winning."""
        digits = _digits()
        calls = 0.3 * jnp.sum(digits == 0, axis=1).astype(jnp.float32)
        won = (jnp.sum(digits == 1, axis=1) >= 4).astype(jnp.float32)
        task = lab.Task(1, VOCAB, LENGTH, _components(calls=calls, won=won))
        trained = lab.train(task, method, key, steps=80, group_size=8, optimizer=optax.adam(0.05))
        return lab.probabilities(trained.params, LENGTH)[0] @ won

    gated = methods.gated_rewards(levels=["calls", "won"])
    lab.check("g-ra", outcome, method=gated, baseline=methods.policy_gradient(), seeds=16, margin=0.5)


def _found(method, key):
    """Probability of the one right answer of 243, whose proximity is the noisy share of tokens that match."""
    right, digits = 100, _digits()
    noise_key, key = jax.random.split(key)
    match = jnp.mean(digits == digits[right], axis=1)
    near = jnp.clip(match + 0.1 * jax.random.normal(noise_key, (ANSWERS,)), 0.0, 1.0)
    task = lab.Task(1, VOCAB, LENGTH, _components(won=jax.nn.one_hot(right, ANSWERS), near=near))
    trained = lab.train(task, method, key, steps=60, group_size=8, optimizer=optax.adam(0.05))
    return lab.probabilities(trained.params, LENGTH)[0, right]


def _in_zones(zones):
    return methods.sweet_spot(correct="won", proximity="near", zones=zones)


def test_zones_of_proximity_teach_sooner_than_the_verdict():
    lab.check("ssl-sweet-spot", _found, method=_in_zones(4), baseline=_in_zones(1), margin=0.03)

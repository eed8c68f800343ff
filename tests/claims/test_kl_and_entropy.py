"""Claims about the KL to a reference, control of its strength, control of entropy, and imitation of what was right."""

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from jaxrl_post import methods
from tests.claims import lab

GRADED = jnp.array([1.0, 0.8, 0.6, 0.4, 0.2, 0.0, 0.0, 0.0])
TASK = lab.Task(2, 8, 1, lab.by_sequence(GRADED))


def _divergence(params, task):
    p, q = lab.probabilities(params, task.length), lab.probabilities(task.params(), task.length)
    return jnp.mean(jnp.sum(p * jnp.log(p / q), axis=-1))


def test_the_adaptive_coefficient_brings_the_kl_to_its_target_from_a_penalty_that_is_too_weak():
    target = 0.5

    def method(**options):
        shared = {"baseline": "leave_one_out", "kl_in": "reward", "kl_estimator": "k1", **options}
        return methods.reinforce(beta=0.1, **shared)

    def outcome(method, key):
        # The learning rate is large: a policy that follows more slowly than the coefficient moves makes it overshoot.
        found = lab.train(
            TASK, method, key, steps=200, group_size=16, optimizer=2.0, observe=lambda p: _divergence(p, TASK)
        )
        return -jnp.abs(jnp.mean(found.trace[-20:]) - target)

    controlled = method(kl_target=target, kl_horizon=320.0)
    lab.check("adaptive-kl", outcome, method=controlled, baseline=method(), margin=0.1)


def test_the_weighted_k3_reaches_a_better_kl_regularised_reward_than_k3():
    # The best arm is the reference's second rarest: forward and reverse divergence price it differently.
    table, beta = jnp.array([1.0, 0.9, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]), 0.1
    task = lab.Task(2, 8, 1, lab.by_sequence(table), initial=[[[-2.0, 1.5, 1.0, 0.5, 0.0, 0.0, -1.0, -3.0]]])
    best = beta * jnp.mean(logsumexp(jnp.log(lab.probabilities(task.params(), 1)) + table / beta, axis=-1))

    def method(estimator):
        advantage = {"name": "grpo", "normalize_std": False}
        return methods.policy_gradient(advantage=advantage, beta=beta, kl_estimator=estimator)

    def outcome(method, key):
        params = lab.train(task, method, key, steps=150, group_size=16, optimizer=0.5).params
        reward = jnp.mean(jnp.sum(lab.probabilities(params, 1) * table, axis=-1))
        return reward - beta * _divergence(params, task) - best

    lab.check("unbiased-kl", outcome, method=method("k3_weighted"), baseline=method("k3"), margin=0.002)


def test_adaptive_entropy_control_holds_entropy_nearer_to_its_target_than_a_fixed_bonus():
    target = 0.8

    def method(**options):
        return methods.reinforce(baseline="leave_one_out", aggregation="token_mean", entropy_weight=0.05, **options)

    def outcome(method, key):
        def entropy(params):
            return jnp.mean(lab.entropy(params, 1))

        trace = lab.train(TASK, method, key, steps=200, group_size=16, optimizer=0.5, observe=entropy).trace
        return -jnp.abs(jnp.mean(trace[-50:]) - target)

    lab.check("adaptive-entropy", outcome, method=method(entropy_target=target), baseline=method(), margin=0.05)


def test_imitating_right_answers_learns_faster_where_they_are_rare():
    table = jnp.asarray(np.eye(64)[27])  # one sequence of three tokens in 64 is right
    task = lab.Task(2, 4, 3, lab.by_sequence(table))

    def method(nll_weight):
        return methods.grpo(beta=0.0, aggregation="token_mean", nll_weight=nll_weight)

    def outcome(method, key):
        params = lab.train(task, method, key, steps=60, group_size=16, optimizer=2.0).params
        return jnp.mean(jnp.sum(lab.probabilities(params, 3) * table, axis=-1))

    lab.check("vapo-nll", outcome, method=method(0.1), baseline=method(0.0), margin=0.05)

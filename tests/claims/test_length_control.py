"""What the papers claim of methods that shorten answers, on policies whose answers end where they say so.

An answer is a chain of 0 (go on) and 1 (stop); what comes after the stop is no part of it. Whether it is right is drawn
with a probability that depends on the problem and on the answer's length.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post import advantages, methods
from tests.claims import lab

TOKENS = 7
LENGTHS = np.arange(1, TOKENS + 1)
NEED = np.array([1, 2, 4, 6])
"""Tokens that each of four problems needs."""


def digits(tokens):
    """`[2**tokens, tokens]`: all sequences, in the order of `lab.probabilities`."""
    return np.arange(2**tokens)[:, None] >> np.arange(tokens - 1, -1, -1) & 1


def answer_length(sequences, choices=0):
    """Tokens of `[N, T]` sequences up to their stop; before the chain come `choices` tokens that cannot stop it."""
    going = np.cumprod(sequences[:, choices:-1] == 0, axis=1)
    return choices + 1 + going.sum(1)


def judge(chance, choices=0, reward=lambda right, length: right):
    """Ends answers at their stop, and draws whether they are right: `chance` is `[P, V**L]` or `[V**L]`."""

    def judged(rollouts, key):
        going = jnp.cumprod(rollouts.tokens[:, 1 + choices : -1] == 0, axis=1)
        mask = rollouts.mask.at[:, 2 + choices :].set(going)
        length = jnp.sum(mask, axis=1).reshape(rollouts.reward.shape)
        index = lab.sequence_index(rollouts, 2)
        table = jnp.broadcast_to(jnp.asarray(chance), (rollouts.num_prompts, np.shape(chance)[-1]))
        right = jax.random.bernoulli(key, table[jnp.arange(rollouts.num_prompts)[:, None], index])
        end = (1 + length).astype(jnp.int32)
        return rollouts.replace(mask=mask, length=end, reward=reward(right.astype(jnp.float32), length))

    return judged


def chain(top, floor, reward=lambda right, length: right):
    """Problems that are solved with probability `top` by answers as long as they need, and `floor` by shorter ones."""
    lengths = answer_length(digits(TOKENS))
    chance = np.where(lengths >= NEED[:, None], np.reshape(top, (-1, 1)), floor)
    return lab.Task(4, 2, TOKENS, judge(chance, reward=reward), initial=np.array([1.5, 0.0])), chance, lengths


def measured(params, chance, lengths, tokens):
    """Accuracy, and mean length of right and of wrong answers, of each problem: exactly."""
    p = lab.probabilities(params, tokens)
    right, wrong = p * chance, p * (1 - chance)
    return jnp.sum(right, 1), right @ lengths / jnp.sum(right, 1), wrong @ lengths / jnp.sum(wrong, 1)


def over_seeds(function, seeds=8):
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(function))(jax.random.split(jax.random.key(0), seeds)))


def test_drpo_shortens_at_no_cost_in_accuracy_where_grpo_with_a_length_penalty_gives_up_hard_problems():
    penalty, top = 0.05, [0.9, 0.9, 0.6, 0.3]

    def trained(compared, key):
        method, weight = compared
        task, chance, lengths = chain(top, 0.02, lambda right, length: right - weight * length)
        params = lab.train(task, method, key, steps=60, group_size=8, optimizer=8.0).params
        return measured(params, chance, lengths, TOKENS)

    def accuracy(compared, key):
        return jnp.mean(trained(compared, key)[0])

    short = (methods.drpo(max_length=TOKENS), 0.0)
    penalised = (methods.grpo(beta=0.0), penalty)
    lab.check("drpo-decoupled", accuracy, method=short, baseline=penalised, seeds=16, margin=0.02)
    solved, length, _ = over_seeds(functools.partial(trained, short))
    plain, plain_length, _ = over_seeds(functools.partial(trained, (methods.disco(), 0.0)))
    assert solved.mean() > plain.mean() - 0.01
    assert np.all(length.mean(0) < plain_length.mean(0) - 0.25)
    assert length[:, :2].mean() < 1.7  # of problems that need 1 and 2 tokens

    # What the penalty does from the first batch on: right answers that are long are held against the policy.
    task, *_ = chain(top, 0.02)
    first = lab.sample(task, task.params(), jax.random.key(0), 64)
    length = jnp.sum(first.mask, axis=1).reshape(first.reward.shape)
    credit = np.asarray(advantages.grpo(first.reward - penalty * length))
    assert np.mean(credit[np.asarray(first.reward) > 0] < 0) > 0.02


def test_hapo_shortens_right_answers_by_difficulty_at_equal_accuracy_where_one_budget_for_all_loses_it():
    def trained(compared, key):
        method, budget = compared
        task, chance, lengths = chain(0.9, 0.0, lambda right, length: right * (length <= budget))
        params = lab.train(task, method, key, steps=60, group_size=8, optimizer=8.0).params
        return measured(params, chance, lengths, TOKENS)

    def accuracy(compared, key):
        return jnp.mean(trained(compared, key)[0])

    own, shared = (methods.hapo(beta=0.0), TOKENS), (methods.grpo(beta=0.0), 4)
    lab.check("hapo", accuracy, method=own, baseline=shared, seeds=16, margin=0.05)
    solved, length, _ = over_seeds(functools.partial(trained, own))
    plain, plain_length, _ = over_seeds(functools.partial(trained, (methods.grpo(beta=0.0), TOKENS)))
    assert solved.mean() > plain.mean() - 0.01
    assert np.all(length.mean(0) < plain_length.mean(0) - 0.5)
    assert np.all(np.diff(length.mean(0)) > 0.5)  # harder problems keep longer answers


def test_a_budget_that_shrinks_reaches_the_length_of_a_fixed_one_with_higher_accuracy():
    # Four choices, then a chain. With room to go on, every right choice helps; in a short answer only all four do. So
    # there is something to learn from long answers that short ones do not show.
    choices, tokens = 4, 10
    sequences = digits(tokens)
    lengths = answer_length(sequences, choices)
    made, room = sequences[:, :choices].mean(1), (lengths - lengths.min()) / np.ptp(lengths)
    chance = 0.05 + 0.9 * (room * made + (1 - room) * (made == 1))
    initial = np.concatenate([np.tile([0.0, -1.0], (2**choices - 1, 1)), np.tile([0.0, -1.5], (1008, 1))])
    task = lab.Task(1, 2, tokens, judge(chance, choices), initial=initial)

    def trained(method, key):
        params = lab.train(task, method, key, steps=200, group_size=16, optimizer=2.0).params
        p = lab.probabilities(params, tokens)[0]
        return p @ chance, p @ lengths

    def accuracy(method, key):
        return trained(method, key)[0]

    long_to_short = methods.curriculum_grpo(budget=10, decay=0.5 ** (1 / 3), every=50, beta=0.0)
    always_short = methods.curriculum_grpo(budget=5, decay=1.0, beta=0.0)
    lab.check("curriculum-grpo", accuracy, method=long_to_short, baseline=always_short, seeds=16, margin=0.1)
    lengths_reached = [over_seeds(functools.partial(trained, m))[1].mean() for m in (long_to_short, always_short)]
    assert abs(lengths_reached[0] - lengths_reached[1]) < 0.35


def test_asymmetric_po_makes_wrong_answers_shorter_at_equal_accuracy():
    # One choice, of which one way is right more often, then a chain whose length does not matter.
    choices = 1
    sequences = digits(TOKENS)
    lengths = answer_length(sequences, choices)
    chance = np.tile(np.where(sequences[:, 0] == 1, 0.8, 0.3), (4, 1))
    initial = np.concatenate([[[0.0, -1.0]], np.tile([1.0, 0.0], (2**TOKENS - 2, 1))])
    task = lab.Task(4, 2, TOKENS, judge(chance, choices), initial=initial)

    def trained(method, key):
        params = lab.train(task, method, key, steps=100, group_size=8, optimizer=3.0).params
        return measured(params, chance, lengths, TOKENS)

    def brevity_of_wrong_answers(method, key):
        return -jnp.mean(trained(method, key)[2])

    # The paper's base is for thousands of tokens.
    both, neither = methods.asymmetric_po(base=1.5), methods.asymmetric_po(dads=False, stcr=False)
    lab.check("apo-view-r1", brevity_of_wrong_answers, method=both, baseline=neither, margin=0.1)
    accuracy = [over_seeds(functools.partial(trained, method), 32)[0].mean() for method in (both, neither)]
    assert accuracy[0] > accuracy[1] - 0.005

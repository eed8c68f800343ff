"""What the papers claim of methods that shorten answers, on policies whose answers end where they say so.

An answer is a chain of 0 (go on) and 1 (stop); what comes after the stop is no part of it. Whether it is right is drawn
with a probability that depends on the problem and on the answer's length.
"""

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


def solved_shortly(method, task, chance, lengths, key):
    """Probability of an answer that is right and at most a token longer than its problem needs."""
    params = lab.train(task, method, key, steps=60, group_size=8, optimizer=8.0).params
    short = lengths <= NEED[:, None] + 1
    return jnp.mean(jnp.sum(lab.probabilities(params, TOKENS) * chance * short, axis=1))


def test_drpo_shortens_at_no_cost_in_accuracy_where_grpo_with_a_length_penalty_gives_up_hard_problems():
    penalty, top = 0.05, [0.9, 0.9, 0.6, 0.3]

    def outcome(compared, key):
        method, weight = compared
        return solved_shortly(method, *chain(top, 0.02, lambda right, length: right - weight * length), key)

    short, penalised = (methods.drpo(max_length=TOKENS), 0.0), (methods.grpo(beta=0.0), penalty)
    found = lab.check("drpo-decoupled", outcome, method=short, baseline=penalised, seeds=16, margin=0.02)
    assert found.method.mean() > 0.95 * np.mean(top)  # of all that can be solved

    # What the penalty does from the first batch on: right answers that are long are held against the policy.
    task, *_ = chain(top, 0.02)
    first = jax.jit(lambda key: lab.sample(task, task.params(), key, 64))(jax.random.key(0))
    length = jnp.sum(first.mask, axis=1).reshape(first.reward.shape)
    credit = np.asarray(advantages.grpo(first.reward - penalty * length))
    assert np.mean(credit[np.asarray(first.reward) > 0] < 0) > 0.02


def test_hapo_shortens_right_answers_by_difficulty_at_equal_accuracy_where_one_budget_for_all_loses_it():
    def outcome(compared, key):
        method, budget = compared
        return solved_shortly(method, *chain(0.9, 0.0, lambda right, length: right * (length <= budget)), key)

    own, shared = (methods.hapo(beta=0.0), float(TOKENS)), (methods.grpo(beta=0.0), 4.0)
    found = lab.check("hapo", outcome, method=own, baseline=shared, seeds=16, margin=0.05)
    # No shorter answer is ever right, so that of every problem nine in ten right answers have the length it needs, or
    # one more.
    assert found.method.mean() > 0.9 * 0.9


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

    def right_within_six_tokens(method, key):
        params = lab.train(task, method, key, steps=200, group_size=16, optimizer=2.0).params
        return lab.probabilities(params, tokens)[0] @ (chance * (lengths <= 6))

    long_to_short = methods.curriculum_grpo(budget=10, decay=0.5 ** (1 / 3), every=50, beta=0.0)
    always_short = methods.curriculum_grpo(budget=5, decay=1.0, beta=0.0)
    lab.check(
        "curriculum-grpo", right_within_six_tokens, method=long_to_short, baseline=always_short, seeds=16, margin=0.1
    )


def test_asymmetric_po_makes_wrong_answers_shorter_at_equal_accuracy():
    # One choice, of which one way is right more often, then a chain whose length does not matter.
    choices = 1
    sequences = digits(TOKENS)
    lengths = answer_length(sequences, choices)
    chance = np.where(sequences[:, 0] == 1, 0.8, 0.3)
    initial = np.concatenate([[[0.0, -1.0]], np.tile([1.0, 0.0], (2**TOKENS - 2, 1))])
    task = lab.Task(4, 2, TOKENS, judge(chance, choices), initial=initial)

    def observe(params):
        p = lab.probabilities(params, TOKENS)
        wrong = p * (1 - chance)
        return jnp.mean(p @ chance), jnp.mean(wrong @ lengths / jnp.sum(wrong, axis=1))

    def brevity_of_wrong_answers(method, key):
        trained = lab.train(task, method, key, steps=100, group_size=8, optimizer=3.0, observe=observe)
        accuracy, length = trained.trace
        reached = accuracy >= 0.77
        return -jnp.where(jnp.any(reached), length[jnp.argmax(reached)], float(TOKENS))

    # The paper's base is for thousands of tokens.
    both, neither = methods.asymmetric_po(base=1.5), methods.asymmetric_po(dads=False, stcr=False)
    lab.check("apo-view-r1", brevity_of_wrong_answers, method=both, baseline=neither, margin=0.05)

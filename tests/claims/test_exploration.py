"""Claims about entropy that does not collapse, about tokens that matter, and about bonuses for what is new."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_post import advantages, methods, rewards
from tests.claims import lab


def _digits(vocab, length):
    """`[vocab**length, length]`: the tokens of every sequence, in order."""
    return np.stack(np.unravel_index(np.arange(vocab**length), (vocab,) * length), axis=1)


def test_entropy_does_not_collapse_with_kl_cov_and_clip_cov_at_the_reward_where_that_of_ppo_does():
    # The first of two tokens decides, the other is a matter of style; the reward is noisy, as judges are.
    prompts, vocab, length = 16, 4, 2
    best = jax.random.randint(jax.random.key(1), (prompts, 1), 0, vocab)
    table = (_digits(vocab, length)[:, 0] == best).astype(float)
    initial = np.asarray(jax.random.normal(jax.random.key(2), (prompts, 5, vocab)))
    task = lab.Task(prompts, vocab, length, lab.by_sequence(table, noise=0.3), initial=initial)

    def one(method, key):
        params = lab.train(task, method, key, steps=100, group_size=8, optimizer=16.0, epochs=4).params
        reward = jnp.mean(jnp.sum(lab.probabilities(params, length) * table, axis=-1))
        return jnp.where(reward >= 0.98, jnp.mean(lab.entropy(params, length)), 0.0)

    def outcome(several, key):
        """Entropy of a policy that gets 98% of the reward, none for one that does not; of several the least."""
        return jnp.min(jnp.stack([one(method, key) for method in several]))

    both = (methods.kl_cov(fraction=0.02), methods.clip_cov(fraction=0.02))
    lab.check("entropy-mechanism", outcome, method=both, baseline=[methods.policy_gradient()], seeds=8, margin=0.2)


def test_the_fifth_of_the_tokens_with_highest_entropy_learns_what_the_other_four_fifths_do_not():
    # Of five tokens the third is a decision, the others are as good as given.
    vocab, length, decision = 3, 5, 2
    initial = [np.full((vocab**level, vocab), [4.0 * (level != decision), 0, 0]) for level in range(length)]
    table = (_digits(vocab, length)[:, decision] == 1).astype(float)
    task = lab.Task(4, vocab, length, lab.by_sequence(jnp.asarray(table)), initial=np.concatenate(initial))

    def outcome(method, key):
        params = lab.train(task, method, key, steps=50, group_size=8, optimizer=4.0).params
        return jnp.mean(jnp.sum(lab.probabilities(params, length) * table, axis=-1))

    high, low = methods.high_entropy_tokens(), methods.high_entropy_tokens(tokens="low")
    found = lab.check("high-entropy-tokens", outcome, method=high, baseline=low, seeds=8, margin=0.3)
    keys = jax.random.split(jax.random.key(2026), 8)
    every = jax.jit(jax.vmap(functools.partial(outcome, methods.dapo())))(keys)
    assert found.method.mean() > float(jnp.mean(every)) - 0.05  # little is lost by leaving the others out


@pytest.mark.nightly
def test_rapo_finds_an_answer_that_the_reference_hardly_ever_gives():
    # One arm of fifty is right, with a probability of 1e-4 under the reference.
    prompts, vocab = 8, 50
    others = np.random.default_rng(0).dirichlet(np.full(vocab - 1, 0.5), prompts)
    others = np.maximum(others, 1e-5)
    others *= (1 - 1e-4) / others.sum(axis=1, keepdims=True)
    initial = np.log(np.concatenate([np.full((prompts, 1), 1e-4), others], axis=1))[:, None]
    task = lab.Task(prompts, vocab, 1, lab.by_sequence(jnp.eye(vocab)[0]), initial=initial)

    def outcome(method, key):
        """pass@256."""
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05))
        params = lab.train(task, method, key, steps=300, group_size=8, optimizer=optimizer).params
        return jnp.mean(1 - (1 - lab.probabilities(params, 1)[:, 0]) ** 256)

    rapo = methods.rapo(alpha=0.01, vocab_size=vocab)
    found = lab.check(
        "rapo", outcome, method=rapo, baseline=methods.grpo(aggregation="token_mean"), seeds=16, margin=0.3
    )
    assert found.method.mean() > 1 - (1 - 1e-4) ** 256  # what the reference has


@pytest.mark.nightly
def test_with_egpo_the_reasoning_keeps_more_entropy_on_the_way_to_the_same_accuracy():
    # Two tokens of reasoning (the first path leads on to one continuation only), its end, a function and an argument.
    vocab, length, end = 4, 5, 3
    initial = []
    for level in range(length):
        logits = np.zeros((vocab**level, vocab))
        logits[:, np.arange(vocab) == end if level != 2 else np.arange(vocab) != end] = -20.0
        if level == 1:
            logits[0, 0] = 4.0
        initial.append(logits)
    table = np.all(_digits(vocab, length)[:, 3:] == [1, 2], axis=1).astype(float)
    task = lab.Task(8, vocab, length, lab.by_sequence(jnp.asarray(table)), initial=np.concatenate(initial))

    def observe(params):
        first, second = (jax.nn.log_softmax(params[:, rows]) for rows in (slice(0, 1), slice(1, 5)))
        within = -jnp.sum(jnp.exp(second) * second, axis=-1)
        p = jnp.exp(first[:, 0])
        thinking = jnp.sum(p * within, axis=-1) - jnp.sum(p * first[:, 0], axis=-1)
        return jnp.mean(jnp.sum(lab.probabilities(params, length) * table, axis=-1)), jnp.mean(thinking)

    def outcome(method, key):
        """Entropy of the reasoning, nats, when four calls in five are right; 0 if they never are."""
        found = lab.train(task, method, key, steps=90, group_size=8, optimizer=16.0, observe=observe)
        accuracy, thinking = found.trace
        reached = accuracy >= 0.8
        return jnp.where(jnp.any(reached), thinking[jnp.argmax(reached)], 0.0)

    same = {"beta": 0.0, "aggregation": "token_mean"}
    egpo = methods.egpo(think_end=[end], **same)
    lab.check("funrl-egpo", outcome, method=egpo, baseline=methods.grpo(**same), seeds=32)


CORRIDORS, DEPTH, STEPS, EPISODES, UPDATES = 20, 12, 16, 16, 60
BONUSES = ("episodic", "global", "product")


def _explored(bonus, fresh, key):
    """Share of episodes that reach the goal, the end of the last corridor, after training by policy gradient.

    With `fresh`, every episode is in a maze of its own, of that one corridor: nothing that was counted before is met
    again. Without, all episodes are in one maze, whose first corridor the policy is used to; an episode has time for
    one.
    """
    last = jnp.arange(CORRIDORS) == CORRIDORS - 1
    there = last | ~fresh

    def episode(params, key):
        choice, moves = jax.random.split(key)
        corridor = jax.random.categorical(choice, jnp.where(there, params["corridor"], -jnp.inf))
        ahead = jax.random.bernoulli(moves, jax.nn.sigmoid(params["ahead"]), (STEPS,))

        def move(depth, ahead):
            depth = jnp.clip(depth + jnp.where(ahead, 1, -1), 0, DEPTH)
            return depth, depth

        _, depth = jax.lax.scan(move, 0, ahead)
        return corridor, ahead, depth, (jnp.any(depth == DEPTH) & last[corridor]).astype(jnp.float32)

    def update(carry, key):
        params, counts, moments = carry
        keys = jax.random.split(key, EPISODES)
        corridor, ahead, depth, goal = jax.vmap(functools.partial(episode, params))(keys)
        # A global measure is learned between episodes, as a random network's predictor is.
        visited = jnp.where(depth > 0, corridor[:, None] * DEPTH + depth, 0)
        overall = rewards.count_bonus(jnp.where(fresh, 0, counts)[visited] + 1)
        # An episode stays in its corridor: how deep it went tells its states apart.
        episodic = jax.vmap(rewards.elliptical_bonus)(jax.nn.one_hot(depth, DEPTH + 1))
        found = jnp.stack([episodic, overall, rewards.combine_bonuses(episodic, overall)])[bonus]
        moments = moments.include(found)
        scaled = found / jnp.where(moments.std > 1e-6, moments.std, jnp.inf)
        weight = advantages.grpo((goal + 0.1 * jnp.mean(scaled, axis=1))[None])[0]

        def objective(params):
            moves = jnp.where(ahead, jax.nn.log_sigmoid(params["ahead"]), jax.nn.log_sigmoid(-params["ahead"]))
            chosen = jax.nn.log_softmax(jnp.where(there, params["corridor"], -1e9))[corridor]
            return jnp.mean(weight * (chosen + jnp.sum(moves, axis=1) / STEPS**0.5))

        params = jax.tree.map(jnp.add, params, jax.grad(objective)(params))
        return (params, counts.at[visited].add(1), moments), jnp.mean(goal)

    start = {"corridor": jnp.zeros(CORRIDORS).at[0].set(6.0), "ahead": jnp.array(-0.3)}
    carry = start, jnp.zeros(CORRIDORS * DEPTH + 1), rewards.RunningMoments.zero()
    _, reached = jax.lax.scan(update, carry, jax.random.split(key, UPDATES))
    return jnp.mean(reached[-10:])


@pytest.mark.nightly
def test_the_product_of_bonuses_explores_where_episodic_novelty_fails_and_where_global_novelty_does():
    def outcome(names, key):
        """The worse of the two families, for the better of the bonuses."""
        bonuses = jnp.array([BONUSES.index(name) for name in names])
        one = jax.vmap(_explored, (None, 0, 0))
        both = jax.vmap(one, (0, None, None))(bonuses, jnp.array([True, False]), jax.random.split(key))
        return jnp.max(jnp.min(both, axis=1))

    lab.check("e3b-global", outcome, method=["product"], baseline=["episodic", "global"], seeds=16, margin=0.1)

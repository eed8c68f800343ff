"""Claims of methods that read values off the policy, and of rewards of their own."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_post import methods, rewards, training
from tests.claims import lab


def test_rover_covers_more_of_the_ways_to_succeed_than_grpo():
    right = np.array([1, 6, 12])
    task = lab.Task(1, 2, 4, lab.by_sequence(np.isin(np.arange(16), right).astype(float)))

    def outcome(method, key):
        trained = lab.train(task, method, key, steps=40, group_size=8, optimizer=1.0, epochs=16)
        found = lab.probabilities(trained.params, 4)[0, right]
        return jnp.sum(1 - (1 - found) ** 16)  # different right answers among 16 samples

    lab.check("rover", outcome, method=methods.rover(), baseline=methods.grpo(beta=0.0))


def test_rlprompts_scores_per_input_serve_all_inputs_where_raw_rewards_serve_the_loudest():
    # Two hidden tokens to be found for each input; what a match is worth differs a hundredfold.
    inputs, vocab, length = 4, 6, 2
    hidden = np.random.default_rng(0).integers(0, vocab, (inputs, length))
    sequences = np.array(list(itertools.product(range(vocab), repeat=length)))
    match = (sequences == hidden[:, None]).mean(-1)
    task = lab.Task(inputs, vocab, length, lab.by_sequence(match * np.array([[1], [1], [100], [100]])))

    def outcome(spec, key):
        method, rate = spec
        trained = lab.train(task, method, key, steps=60, group_size=8, optimizer=rate)
        return jnp.mean(jnp.sum(lab.probabilities(trained.params, length) * match, axis=1))

    # Each at the best of the rates 0.1, 0.3, 1 and 3, and raw rewards at the better of the factors 1 and 1/20.
    scored, raw = methods.rlprompt(reward_scale=3.0), methods.rlprompt(zscore=False)
    lab.check("rlprompt", outcome, method=(scored, 3.0), baseline=(raw, 0.1))


def _self_critical(task, method, key, *, steps, rate):
    """Logits after training on one sample per prompt; greedy answers are decoded and judged in every step."""
    optimizer = optax.sgd(rate)
    shapes = jax.eval_shape(lambda: lab.sample(task, task.params(), key, 1))
    state = training.init({"policy": task.params()}, method, optimizer, key, rollouts=shapes, num_prompts=task.prompts)
    step = training.make_step(lab.score, method, optimizer)

    def one(state, number):
        draw, tie = jax.random.split(jax.random.fold_in(key, number))
        params = state.params["policy"]
        greedy = lab.sample(task, 1e4 * params, tie, 1).reward[:, 0]
        rollouts = lab.sample(task, params, draw, 1)
        return step(state, rollouts.replace(extras={"greedy_reward": greedy}))[0], None

    return jax.lax.scan(one, state, jnp.arange(steps))[0].params["policy"]


def test_self_critical_training_on_meaning_has_less_variance_than_reinforce_and_raises_it():
    # Tokens come in pairs of synonyms; the model that maximises likelihood uses either of the two, and others too.
    prompts, vocab, length = 8, 6, 3
    embeddings = np.repeat(np.eye(3), 2, axis=0)
    reference = np.random.default_rng(0).integers(0, vocab, (prompts, length))
    sequences = np.array(list(itertools.product(range(vocab), repeat=length)))
    same = np.stack([np.tile(embeddings[y], (len(sequences), 1, 1)) for y in reference])
    meaning = np.stack([rewards.greedy_matching(embeddings[sequences], y).f1 for y in same])
    levels = np.repeat(np.arange(length), [vocab**level for level in range(length)])  # the place of each prefix's token
    initial = 1.0 * (np.arange(vocab) // 2 == reference[:, levels, None] // 2)
    task = lab.Task(prompts, vocab, length, lab.by_sequence(meaning), initial=initial)

    def outcome(method, key):
        keys = jax.random.split(key, 32)
        once = functools.partial(_self_critical, task, steps=1, rate=1.0)
        updates = lab.pick(method, lambda method: jax.vmap(functools.partial(once, method))(keys))
        return -jnp.sum(jnp.var(updates, axis=0, ddof=1))

    lab.check("semantic-scst", outcome, method=methods.scst(), baseline=methods.reinforce())

    def expected(params):
        return jnp.mean(jnp.sum(lab.probabilities(params, length) * meaning, axis=1))

    keys = jax.random.split(jax.random.key(1), 8)
    after = jax.jit(jax.vmap(lambda key: expected(_self_critical(task, methods.scst(), key, steps=80, rate=8.0))))(keys)
    assert float(after.min()) > float(expected(task.params())) + 0.05


def test_subpo_covers_more_of_a_grid_than_the_same_rewards_added_up():
    side, horizon = 4, 5
    moves = jnp.array([[0, 1], [1, 0], [0, -1], [-1, 0]])
    weights = jnp.asarray(np.random.default_rng(0).random(side**2))

    def cells(tokens):
        def walk(place, move):
            place = jnp.clip(place + moves[move], 0, side - 1)
            return place, place

        start = jnp.ones((tokens.shape[0], 2), int)
        visited = jax.lax.scan(walk, start, tokens[:, 1:].T)[1]
        return jnp.pad((visited @ jnp.array([side, 1])).T, ((0, 0), (1, 0)))

    def covered(tokens, mask):
        return rewards.coverage(cells(tokens), jnp.eye(side**2), mask, weights=weights)

    def added_up(tokens, mask):
        return jnp.cumsum(jnp.where(mask > 0, weights[cells(tokens)], 0.0), axis=1)

    every = jnp.pad(jnp.asarray(list(itertools.product(range(4), repeat=horizon))), ((0, 0), (1, 0)))
    value = covered(every, jnp.ones(every.shape).at[:, 0].set(0))[:, -1]
    task = lab.Task(1, 4, horizon, lambda rollouts, key: rollouts)

    def outcome(method, key):
        trained = lab.train(task, method, key, steps=80, group_size=16, optimizer=2.0)
        return lab.probabilities(trained.params, horizon)[0] @ value

    subpo, additive = (methods.subpo(set_function=function) for function in (covered, added_up))
    found = lab.check("subpo", outcome, method=subpo, baseline=additive)
    assert found.method.mean() > (1 - 1 / np.e) * float(value.max())

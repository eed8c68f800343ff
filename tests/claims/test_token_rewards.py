"""Claims of methods whose tokens, places or agents have rewards of their own."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_post import advantages, data, losses, methods, training
from jaxrl_post.types import TokenStats
from tests.claims import lab


@pytest.mark.nightly
def test_rto_reaches_a_given_return_with_fewer_samples_than_ppo_with_the_reward_at_the_end():
    # Hidden rewards of tokens add up to a sequence's; 2000 pairs, labelled by Bradley-Terry, train the DPO policy.
    prompts, vocab, length, beta = 4, 2, 8, 0.5
    hidden = np.random.default_rng(0).normal(size=(prompts, length, vocab))
    sequences = np.array(list(itertools.product(range(vocab), repeat=length)))
    returns = hidden[:, np.arange(length), sequences].sum(-1)
    task = lab.Task(prompts, vocab, length, lab.by_sequence(returns))

    def expected(params):
        return jnp.mean(jnp.sum(lab.probabilities(params, length) * returns, axis=1))

    dpo = jax.jit(functools.partial(_dpo_policy, task, pairs=500, beta=beta))(jax.random.key(1))
    goal = expected(dpo)

    def outcome(method, key):
        trained = lab.train(
            task,
            method,
            key,
            steps=120,
            group_size=2,
            optimizer=optax.adam(0.1),
            roles=lambda start: {"dpo": dpo, "critic": {"logits": start, "value": start[..., 0]}},
            observe=expected,
        )
        return -8.0 * jnp.sum(trained.trace < goal)  # samples drawn before the policy is as good as that of DPO

    method = methods.rto(beta1=beta, beta2=0.01, clip=None)
    lab.check("rto", outcome, method=method, baseline=methods.ppo(beta=0.01), margin=64.0)  # about a tenth fewer


def _dpo_policy(task, key, *, pairs, beta):
    """A table of logits after DPO on pairs that the uniform policy samples; what it learns of a place holds for all
    prefixes, as a model's knowledge does.
    """
    draw, label = jax.random.split(key)
    made = lab.sample(task, task.params(), draw, 2 * pairs)
    first, second = made.reward.reshape(-1, 2).T
    rows = jnp.arange(made.batch_size).reshape(-1, 2)
    won = jax.random.bernoulli(label, jax.nn.sigmoid(first - second))[:, None]
    rows = jnp.where(won, rows, rows[:, ::-1]).reshape(-1)
    shape = (task.prompts * pairs, 2)
    flat = {name: getattr(made, name).reshape(shape) for name in ("reward", "valid", "length", "finish", "id")}
    batch = made.replace(tokens=made.tokens[rows], **flat, prompt_id=jnp.repeat(made.prompt_id, pairs))
    level = np.repeat(np.arange(task.length), [task.vocab**level for level in range(task.length)])
    method, optimizer = methods.dpo(beta=beta), optax.adam(0.1)
    by_place = jnp.zeros((task.prompts, task.length, task.vocab))
    state = training.init({"policy": by_place, "reference": by_place}, method, optimizer, key)
    step = training.make_step(lambda params, *rest: lab.score(params[:, level], *rest), method, optimizer)
    return jax.lax.scan(lambda s, _: (step(s, batch)[0], None), state, None, length=60)[0].params["policy"][:, level]


LENGTH, DECISIVE, BETTER, WORSE = 10, 4, 2, 3


def _by_place(params, rollouts, fields, key):
    """A score whose distribution depends on the place alone; after `BETTER` or `WORSE`, on what was asked for too."""
    del fields, key
    tokens = rollouts.tokens
    asked = tokens.shape[1] > LENGTH + 1
    first = 2 if asked else 1
    wanted = (tokens[:, 1] == BETTER)[:, None, None]
    table = jnp.where(wanted, params["better"], params["worse"]) if asked else params["plain"][None]
    logp = jnp.take_along_axis(jax.nn.log_softmax(table), tokens[:, first:, None], axis=2)[..., 0]
    return TokenStats(logp=jnp.pad(logp, ((0, 0), (first, 0))))


def _pairs(key, count):
    """Answers of ten tokens, 0 or 1, of which one alone decides which is preferred."""
    tokens = jax.random.bernoulli(key, 0.5, (count, 2, LENGTH)).astype(jnp.int32)
    tokens = tokens.at[:, :, DECISIVE].set(jnp.array([1, 0])).reshape(2 * count, LENGTH)
    template = data.to_rollouts([[0]] * count, [[[0] * LENGTH] * 2] * count, length=LENGTH + 1)
    return template.replace(tokens=jnp.pad(tokens, ((0, 0), (1, 0))))


def _after_pairs(method, knowledge, key):
    """Logits by place `[10, 2]` after a few pairs, with a reference that knows so much of the decisive token."""
    draw, noise = jax.random.split(key)
    uniform = jnp.zeros((LENGTH, 2))
    signal = uniform.at[DECISIVE].set(jnp.array([-0.5, 0.5]) * knowledge)
    better, worse = 0.5 * jax.random.normal(noise, (2, LENGTH, 2))
    params = {
        "policy": dict.fromkeys(("plain", "better", "worse"), uniform),
        "reference": {"plain": uniform, "better": signal + better, "worse": -signal + worse},
    }
    optimizer, batch = optax.sgd(2.0), _pairs(draw, 8)
    state = training.init(params, method, optimizer, key, rollouts=jax.eval_shape(lambda: batch))
    step = training.make_step(_by_place, method, optimizer)
    state = jax.lax.scan(lambda s, _: (step(s, batch)[0], None), state, None, length=100)[0]
    return state.params["policy"]["plain"]


def _mass(logits):
    """Share of the implicit reward, token 1 against token 0, that lies on the decisive place."""
    mass = jnp.abs(logits[:, 1] - logits[:, 0])
    return mass[DECISIVE] / jnp.sum(mass)


def _accuracy(logits, key):
    """Share of new pairs that the implicit reward ranks rightly; they have only the decisive token in common."""
    pairs = _pairs(key, 256)
    first, second = jnp.sum(_by_place({"plain": logits}, pairs, None, None).logp, axis=1).reshape(-1, 2).T
    return jnp.mean(first > second)


def test_t_reg_puts_more_of_the_implicit_reward_on_the_decisive_token_than_dpo():
    t_reg, dpo = methods.t_reg(better=[BETTER], worse=[WORSE], alpha=0.5), methods.dpo()

    def outcome(method, key):
        return lab.pick(method, lambda method: _mass(_after_pairs(method, 2.0, key)))

    lab.check("t-reg", outcome, method=t_reg, baseline=dpo)

    # New pairs are ranked better too, and a reference that knows nothing is of no use.
    def both(method):
        def measured(knowledge, key):
            logits = _after_pairs(method, knowledge, key)
            return _mass(logits), _accuracy(logits, jax.random.fold_in(key, 1))

        keys, knowledge = jax.random.split(jax.random.key(3), 64), jnp.repeat(jnp.array([2.0, 0.0]), 32)
        return map(np.asarray, jax.jit(jax.vmap(measured))(knowledge, keys))

    (mass, accuracy), (plain_mass, plain_accuracy) = both(t_reg), both(dpo)
    assert lab.Comparison(accuracy[:32], plain_accuracy[:32]).interval[0] > 0
    assert lab.Comparison(mass[32:], plain_mass[32:]).interval[0] <= 0


def test_tw_grpo_learns_what_must_follow_from_the_context_sooner_than_grpo():
    # A fixed beginning, a free token, and one that must follow from it.
    vocab, length = 3, 3
    sequences = np.array(list(itertools.product(range(vocab), repeat=length)))
    right = (sequences[:, 2] == (sequences[:, 1] + 1) % vocab).astype(float)
    initial = np.zeros((1 + vocab + vocab**2, vocab))
    initial[0, 0] = 8.0
    task = lab.Task(4, vocab, length, lab.by_sequence(right), initial=initial)
    # Steps of one length: a larger weight is no larger step.
    optimizer = optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.5))

    def expected(params):
        return jnp.mean(lab.probabilities(params, length) @ right)

    def outcome(method, key):
        trained = lab.train(task, method, key, steps=30, group_size=8, optimizer=optimizer, observe=expected)
        return jnp.mean(trained.trace)

    baseline = methods.policy_gradient(advantage={"name": "grpo", "eps": 1e-4})
    lab.check("tw-grpo", outcome, method=methods.tw_grpo(alpha=1.7), baseline=baseline)

    # Where the context is the same the weight is 1, however open the choice; where it differs it is alpha.
    follows = initial.copy()
    for one in range(vocab):
        follows[1 + vocab + one, (one + 1) % vocab] = 2.0

    @jax.jit
    def weights_of(params, key):
        rollouts = lab.sample(task, params, key, 8)
        found = lab.score(params, rollouts, frozenset({"group_log_divergence"}), key).group_log_divergence
        return losses.position_weights(found.reshape(4, -1), rollouts.mask.reshape(4, -1))

    weights = weights_of(jnp.broadcast_to(follows, task.params().shape), jax.random.key(0))
    weights = np.asarray(weights).reshape(4, 8, length + 1)[:, :, 1:]
    assert np.all(weights[..., :2] < 1.01)
    assert np.all(weights[..., 2] > 1.69)


def test_comam_does_not_beat_equal_shares_but_own_rewards_alone():
    # Success needs both agents. The first one's own reward rises with it, the second's falls.
    vocab = 4
    quality = np.linspace(0, 1, vocab)
    names = ("aligned", "opposed")

    def judge(rollouts, key):
        first, second = (jnp.asarray(quality, jnp.float32)[rollouts.tokens[:, i]] for i in (1, 2))
        one, two, success = jax.random.split(key, 3)
        shape = rollouts.reward.shape
        won = jax.random.bernoulli(success, first * second).astype(jnp.float32).reshape(shape)
        own = (first, 0.5 - 0.5 * second)
        noise = (0.2 * jax.random.normal(k, shape) for k in (one, two))
        local = {name: x.reshape(shape) + extra for name, x, extra in zip(names, own, noise, strict=True)}
        agent = jnp.broadcast_to(jnp.arange(-1, 2), rollouts.mask.shape)
        return rollouts.replace(reward=won, rewards=local, extras={"agent": agent})

    task = lab.Task(4, vocab, 2, judge)
    value = np.outer(quality, quality).reshape(-1)

    def outcome(method, key):
        trained = lab.train(task, method, key, steps=60, group_size=8, optimizer=2.0)
        return jnp.mean(lab.probabilities(trained.params, 2) @ value)

    def fixed(share):
        def apply(s):
            own = jnp.stack([s.rollouts.rewards[name] for name in names])
            by_agent = jax.vmap(lambda r: advantages.grpo(r + share * s.reward, s.valid))(own).reshape(2, -1).T
            return jnp.take_along_axis(by_agent, jnp.maximum(s.rollouts.extras["agent"], 0), axis=1)

        return methods.policy_gradient(advantage=apply)

    comam = methods.comam(local=names)
    found = lab.check("comam", outcome, method=comam, baseline=fixed(0.5), held=False)
    alone = jax.jit(jax.vmap(functools.partial(outcome, fixed(0.0))))(jax.random.split(jax.random.key(1), 32))
    assert found.method.mean() > float(alone.mean()) + 0.3

    @jax.jit
    def shares(key):
        made = lab.sample(task, task.params(), key, 64)
        return advantages.agent_weights(jnp.stack([made.rewards[name] for name in names]), made.reward)

    aligned, opposed = shares(jax.random.key(0))
    assert bool(jnp.all(aligned > opposed))

"""Claims of methods that change what a step costs: work that is shared, slots that do not wait."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_post import data, methods, models, training
from jaxrl_post.types import FINISH_NONE, FINISH_STOP, TokenStats
from tests.claims import lab


@functools.cache
def _flops(shared):
    """Of scoring a group, compiled: a prompt of 512 tokens, 8 completions of 32."""
    model = models.decoder(vocab_size=64, width=64, layers=2, heads=4)
    rollouts = data.to_rollouts([[1] * 512], [[[2] * 32] * 8], length=544)
    score = models.score(model, max_chosen=32, shared_prompt=512 if shared else None)
    params = jax.eval_shape(model.init, jax.random.key(0))
    run = jax.jit(lambda params: score(params, rollouts, frozenset({"logp"}), jax.random.key(0)).logp)
    return run.lower(params).compile().cost_analysis()["flops"]


def test_prefix_grouper_gives_the_gradient_of_the_plain_batch_for_a_fraction_of_its_flops():
    model, method = models.decoder(vocab_size=16, width=32, layers=2, heads=4), methods.grpo(beta=0.0)
    batch = jax.tree.map(np.asarray, data.to_rollouts([[0] * 6, [0] * 3], [[[0] * 4, [0] * 2]] * 2, length=10))
    own = batch.mask.reshape(2, 2, 10) > 0

    @jax.jit
    def distance(params, rollouts):
        """The furthest that a log-prob, or the gradient of GRPO's loss by a parameter, is from the plain batch's."""

        def loss(params, shared_prompt):
            score = models.score(model, shared_prompt=shared_prompt)
            stats = {"policy": score(params, rollouts, frozenset({"logp"}), jax.random.key(0))}
            made, _ = method.targets((), rollouts, jax.lax.stop_gradient(stats), jax.random.key(0))
            return jnp.sum(method.loss(stats, rollouts, made)["policy"].value), stats["policy"].logp

        both = (jax.grad(loss, has_aux=True)(params, size) for size in (None, 6))
        return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), *both))))

    def draw(seed):
        random = np.random.default_rng(seed)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        params = jax.tree.map(lambda x: 0.3 * random.standard_normal(x.shape).astype(x.dtype), shapes)
        tokens = random.integers(0, 16, (2, 2, 10)).astype(np.int32)
        tokens = np.where(own, tokens, tokens[:, :1]).reshape(4, 10)
        return params, batch.replace(tokens=tokens, reward=random.standard_normal((2, 2)).astype(np.float32))

    saved = {shared: 1 - _flops(shared) / _flops(False) for shared in (True, False)}
    equal = max(float(distance(*draw(seed))) for seed in range(32)) < 1e-5

    def outcome(shared, key):
        """The share of FLOPs that is saved, if all numbers are the same."""
        del key
        return jnp.asarray(saved[shared] if equal else -1.0)

    lab.check("prefix-grouper", outcome, method=True, baseline=False, margin=0.8)


SLOTS, LONGEST, STATES = 16, 60, 5
RIGHT = jnp.array([0, 1, 1, 0, 1])


def _chain_score(params, rollouts, fields, key):
    """A policy `[states, 2]` by place in the chain; a critic by place and by the share of right actions so far."""
    del key
    place = jnp.arange(LONGEST)
    tokens = rollouts.tokens[:, 1:]
    if "logp" in fields:
        log_p = jax.nn.log_softmax(params[place % STATES])
        found = jnp.where(tokens == 1, log_p[:, 1], log_p[:, 0])
        return TokenStats(logp=jnp.pad(found, ((0, 0), (1, 0))))
    right = jnp.cumsum(tokens == RIGHT[place % STATES], axis=1) - (tokens == RIGHT[place % STATES])
    share = jnp.round(10 * right / jnp.maximum(place, 1)).astype(jnp.int32)
    return TokenStats(value=jnp.pad(params[jnp.minimum(place // 5, 11), share], ((0, 0), (1, 0))))


def _decode_steps_to_success(spec, key, *, budget=2400):
    """Decode steps until 90% of the actions are right, `budget` if that is not reached: all slots wait for the last."""
    method, window, pieces = spec
    optimizer = optax.adam(0.05)
    place, shape = jnp.arange(LONGEST), (SLOTS, 1)

    def fresh(key):
        return jax.random.randint(key, (SLOTS,), 5, LONGEST + 1)

    def rollouts_of(tokens, logp, version, done, length, key):
        """The verifier looks at one action of a response that has ended."""
        at = (jax.random.uniform(key, (SLOTS,)) * length).astype(jnp.int32)
        right = jnp.take_along_axis(tokens == RIGHT[place % STATES], at[:, None], axis=1)
        before = ((0, 0), (1, 0))
        inside = (place < done[:, None]).astype(jnp.float32)
        return data.to_rollouts([[0]] * SLOTS, [[[0]]] * SLOTS, length=LONGEST + 1).replace(
            tokens=jnp.pad(tokens, before),
            mask=jnp.pad(inside, before),
            logp=jnp.pad(logp * inside, before),
            version=jnp.pad(jnp.where(inside > 0, version, -1), before, constant_values=-1),
            reward=right.astype(jnp.float32),
            length=1 + done[:, None],
            finish=jnp.where(done == length, FINISH_STOP, FINISH_NONE).astype(jnp.int8)[:, None],
            valid=jnp.ones(shape, bool),
        )

    start = {"policy": jnp.zeros((STATES, 2)), "critic": jnp.full((12, 11), 0.5)}
    state = training.init(start, method, optimizer, key, num_prompts=SLOTS)
    step = training.make_step(_chain_score, method, optimizer)

    def one(carry, number):
        state, tokens, logp, version, done, length, spent = carry
        draw, check, new = jax.random.split(jax.random.fold_in(key, number), 3)
        log_p = jnp.broadcast_to(jax.nn.log_softmax(state.params["policy"])[place % STATES], (SLOTS, LONGEST, 2))
        action = jax.random.categorical(draw, log_p)
        until = jnp.minimum(done + window, length)
        now = (place >= done[:, None]) & (place < until[:, None])
        tokens = jnp.where(now, action, tokens)
        logp = jnp.where(now, jnp.take_along_axis(log_p, action[..., None], axis=-1)[..., 0], logp)
        version = jnp.where(now, number, version)
        spent += jnp.max(until - done)
        rollouts = rollouts_of(tokens, logp, version, until, length, check)

        def update(state, piece):
            mine = jnp.arange(SLOTS)[:, None] % pieces == piece
            return step(state, rollouts.replace(valid=mine))[0], None

        state, _ = jax.lax.scan(update, state, jnp.arange(pieces))
        ended = until == length
        success = jnp.mean(jax.nn.softmax(state.params["policy"])[jnp.arange(STATES), RIGHT])
        done, length = jnp.where(ended, 0, until), jnp.where(ended, fresh(new), length)
        return (state, tokens, logp, version, done, length, spent), (success, spent)

    empty = jnp.zeros((SLOTS, LONGEST))
    carry = (state, empty.astype(jnp.int32), empty, empty.astype(jnp.int32), jnp.zeros(SLOTS, jnp.int32), fresh(key), 0)
    _, (success, spent) = jax.lax.scan(one, carry, jnp.arange(budget // window))
    return jnp.min(jnp.where(success >= 0.9, spent, budget))


@pytest.mark.nightly
def test_truncated_ppo_needs_fewer_decode_steps_than_ppo_that_waits_for_the_longest_response():
    def outcome(spec, key):
        return -_decode_steps_to_success(spec, key).astype(jnp.float32)

    # A response has 32 tokens on average: a quarter of the slots holds as many as a window of all of them. So both
    # learn from every token once, and from as many at each update.
    options = {"lam": 0.95, "clip_high": 0.28, "value_clip": None}
    lab.check(
        "t-ppo",
        outcome,
        method=(methods.t_ppo(**options), 10, 1),
        baseline=(methods.ppo(**options), LONGEST, 4),
    )

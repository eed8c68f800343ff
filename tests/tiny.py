"""A tiny model and a task that rewards copying the prompt, shared by the tests of methods and of training."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax

from jaxrl_post import data, models, training
from jaxrl_post.rollout import Prompts, SamplingParams, generate
from jaxrl_post.types import Method, Policy, Rollouts

VOCAB, WIDTH, PROMPT, NEW = 8, 16, 3, 4


@functools.cache
def policy(value_head: bool = False, dtype: str = "float32") -> Policy:
    return models.decoder(
        vocab_size=VOCAB, width=WIDTH, layers=2, heads=2, mlp_width=32, value_head=value_head, dtype=jnp.dtype(dtype)
    )


def prompts(count: int = 4) -> Prompts:
    tokens = jax.random.randint(jax.random.key(11), (count, PROMPT), 2, VOCAB)
    return Prompts(tokens, 1 + jnp.arange(count, dtype=jnp.int32) % PROMPT)


def reward(rollouts: Rollouts) -> jax.Array:
    """`[P, G]`: the fraction of completion tokens that equal the prompt's first token."""
    right = (rollouts.tokens == rollouts.tokens[:, :1]) * rollouts.mask
    return (right.sum(1) / rollouts.mask.sum(1)).reshape(rollouts.reward.shape)


@functools.cache
def sampler(group_size: int, temperature: float = 1.0):
    sampling = SamplingParams(temperature=temperature, stop_tokens=(1,))

    @jax.jit
    def sample(params, some_prompts, key):
        out = generate(
            policy(), params, some_prompts, key, sampling=sampling, max_new_tokens=NEW, group_size=group_size
        )
        return out.replace(reward=reward(out))

    return sample


def batch(group_size: int = 4, count: int = 4, seed: int = 0) -> Rollouts:
    """Rollouts of the untrained model with spread-out rewards and one invalid sequence."""
    params = policy().init(jax.random.key(0))
    out = sampler(group_size)(params, prompts(count), jax.random.key(seed))
    noise = jax.random.normal(jax.random.key(seed + 1), out.reward.shape)
    return out.replace(reward=noise, valid=out.valid.at[1, 0].set(group_size < 3))


def pairs(count: int = 4) -> Rollouts:
    """Preference pairs: three times the prompt's first token is chosen, three times another one rejected."""
    some = prompts(count)
    rows = [some.tokens[i, : some.length[i]].tolist() for i in range(count)]
    completions = [[[row[0]] * 3, [2 + (row[0] - 1) % (VOCAB - 2)] * 2] for row in rows]
    return data.to_rollouts(rows, completions, length=PROMPT + NEW)


def params_for(method: Method, seed: int = 0) -> dict:
    key = jax.random.key(seed)
    every = {
        "policy": policy().init(key),
        "reference": policy().init(jax.random.key(seed + 1)),
        "critic": policy(value_head=True).init(jax.random.key(seed + 2)),
    }
    return {role: every[role] for role in method.roles}


def scores_for(method: Method) -> dict:
    return {role: models.score(policy(value_head=role == "critic")) for role in method.roles}


def one_step(method: Method, rollouts: Rollouts, optimizer=None, **options):
    """State and metrics after a step of plain gradient descent, whose size shows the gradient's."""
    optimizer = optax.sgd(0.1) if optimizer is None else optimizer
    axes = {role: policy(value_head=role == "critic").axes() for role in method.roles}
    mesh = options.get("mesh")
    state = training.init(params_for(method), method, optimizer, jax.random.key(5), mesh=mesh, axes=axes)
    step = training.make_step(scores_for(method), method, optimizer, **options)
    return step(state, rollouts)

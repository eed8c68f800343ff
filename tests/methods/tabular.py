"""A step of any method on tables of logits, whose programs are compiled in a quarter of the time of a tiny model's.

The counterpart of `tests.tiny` for tests that ask nothing of a model.
"""

from __future__ import annotations

import functools

import jax
import optax

from jaxrl_post import training
from jaxrl_post.types import Array, Method, Rollouts
from tests.advantages.compiled import compiled
from tests.claims import lab

PROMPTS, LENGTH = 4, 4
TASK = lab.Task(prompts=PROMPTS, vocab=3, length=LENGTH, judge=lambda rollouts, key: rollouts)


@functools.cache
def table(seed: int) -> Array:
    """Logits; those of seed 0 are the policy, and sampled the batches."""
    return jax.random.normal(jax.random.key(seed), (PROMPTS, TASK.prefixes, 3))


@functools.cache
def batch(seed: int = 0, group_size: int = 4, prompts: int = PROMPTS) -> Rollouts:
    """Rollouts of the policy with spread-out rewards and, in groups of more than two, one invalid sequence."""
    made = compiled(lab.sample)(TASK._replace(prompts=prompts), table(0), jax.random.key(seed), group_size)
    noise = jax.random.normal(jax.random.key(seed + 1), made.reward.shape)
    return made.replace(reward=noise, valid=made.valid.at[1, 0].set(group_size < 3))


def params_for(method: Method) -> dict:
    params = {}
    for number, role in enumerate(sorted(method.roles)):
        logits = table(0) if role == "policy" else table(10 + number)
        params[role] = {"logits": logits, "value": logits[..., 0]} if "value" in method.needs.get(role, ()) else logits
    return params


def start(method: Method, optimizer=None, rollouts: Rollouts | None = None):
    """The state before the first step."""
    optimizer = optax.sgd(1.0) if optimizer is None else optimizer
    rollouts = batch() if rollouts is None else rollouts  # not while it is traced, as it is kept
    shapes = jax.eval_shape(lambda: rollouts)
    return training.init(params_for(method), method, optimizer, jax.random.key(5), rollouts=shapes, num_prompts=PROMPTS)


def make_step(method: Method, optimizer=None, **options):
    return training.make_step(lab.score, method, optax.sgd(1.0) if optimizer is None else optimizer, **options)


def one_step(method: Method, rollouts: Rollouts, optimizer=None, **options):
    """State and metrics after a step of plain gradient descent, whose size shows the gradient's."""
    return make_step(method, optimizer, **options)(start(method, optimizer, rollouts), rollouts)

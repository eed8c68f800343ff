"""What may not change an update of any method: how the batch is cut, and over how many devices it lies.

On tabular policies, for every configuration of `configs/methods`.
"""

import functools

import jax
import numpy as np
import optax
import pytest

from jaxrl_post import methods, training
from jaxrl_post.mesh import make_mesh
from tests.claims import lab
from tests.methods.test_method_configs import PATHS, load, named_as_in, with_extras

TASK = lab.Task(prompts=4, vocab=3, length=4, judge=lambda rollouts, key: rollouts)


@functools.cache
def table(seed):
    return jax.random.normal(jax.random.key(seed), (4, TASK.prefixes, 3))


@functools.cache
def rollouts(group_size):
    batch = with_extras(lab.sample(TASK, table(0), jax.random.key(1), group_size))
    # Ragged, with a span inside that the policy did not choose, and an invalid sequence.
    mask = batch.mask.at[::3, -1].set(0).at[1::4, 2].set(0)
    return batch.replace(mask=mask, valid=batch.valid.at[2, 1].set(False))


def updated(method, batch, **options):
    params = {}
    for number, role in enumerate(sorted(method.roles)):
        logits = table(10 + number)
        params[role] = {"logits": logits, "value": logits[..., 0]} if "value" in method.needs.get(role, ()) else logits
    params = {"policy": table(10), **params}
    state = training.init(
        params, method, optax.sgd(0.1), jax.random.key(5), rollouts=jax.eval_shape(lambda: batch), num_prompts=4,
        mesh=options.get("mesh"),
    )  # fmt: skip
    step = training.make_step(lab.score, method, optax.sgd(0.1), **options)
    for _ in range(2):  # the second step of a method with a memory is another than its first
        state, _ = step(state, batch)
    return {role: jax.device_get(state.params[role]) for role in method.trains}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_micro_batches_and_devices_change_no_update(path):
    config = load(path)
    method = getattr(methods, config.method.name)(**config.method.keywords)
    if method.learns_from != "rollouts":
        pytest.skip("learns from given pairs; their batch is cut in test_token_rewards and in tests/training/test_step")
    batch = named_as_in(config, rollouts(max(method.min_group, 4)))
    whole = updated(method, batch)
    cut = {} if method.unit == "batch" else {"micro_batches": 2}
    parts = updated(method, batch, mesh=make_mesh(data=2), **cut)
    for role in method.trains:
        for a, b in zip(jax.tree.leaves(whole[role]), jax.tree.leaves(parts[role]), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6, err_msg=role)

"""Every configuration of `configs/methods` trains tabular policies two steps.

They stay finite, move, and not as by GRPO; how the batch is cut, and over how many devices it lies, changes nothing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_post import methods, training
from jaxrl_post.mesh import make_mesh
from tests.advantages.compiled import compiled
from tests.claims import lab
from tests.methods.test_method_configs import PATHS, SAME_AS_GRPO, load, named_as_in, with_extras

TASK = lab.Task(prompts=4, vocab=3, length=4, judge=lambda rollouts, key: rollouts)


@functools.cache
def table(seed):
    return jax.random.normal(jax.random.key(seed), (4, TASK.prefixes, 3))


@functools.cache
def rollouts(group_size):
    batch = compiled(with_extras)(compiled(lab.sample)(TASK, table(0), jax.random.key(1), group_size))
    # Ragged, with a span inside that the policy did not choose, and an invalid sequence.
    mask = batch.mask.at[::3, -1].set(0).at[1::4, 2].set(0)
    return batch.replace(mask=mask, valid=batch.valid.at[2, 1].set(False))


def updated(method, batch, **options):
    params = {}
    for number, role in enumerate(sorted({"policy", *method.roles})):
        logits = table(0) + 0.3 * table(10 + number)  # near those that sampled, whose tokens no method may all refuse
        params[role] = {"logits": logits, "value": logits[..., 0]} if "value" in method.needs.get(role, ()) else logits
    state = training.init(
        params, method, optax.sgd(0.1), jax.random.key(5), rollouts=jax.eval_shape(lambda: batch), num_prompts=4,
        mesh=options.get("mesh"),
    )  # fmt: skip
    step = training.make_step(lab.score, method, optax.sgd(0.1), **options)
    before = jax.device_get(state.params)
    for _ in range(2):  # the second step of a method with a memory is another than its first
        state, metrics = step(state, batch)
    assert int(metrics["nonfinite_updates"]) == 0
    return tuple({role: jax.device_get(params[role]) for role in method.trains} for params in (before, state.params))


@functools.cache
def by_grpo(group_size):
    return updated(methods.grpo(), rollouts(group_size))[1]["policy"]


def largest_difference(one, other):
    flat, other = (jax.flatten_util.ravel_pytree(tree)[0] for tree in (one, other))
    assert bool(jnp.all(jnp.isfinite(flat)))
    return float(jnp.max(jnp.abs(flat - other)))


def made(path):
    config = load(path)
    return getattr(methods, config.method.name)(**config.method.keywords)


FROM_ROLLOUTS = [path for path in PATHS if made(path).learns_from == "rollouts"]
"""The others learn from given pairs; their batch is cut in `test_token_rewards` and in `tests/training/test_step`."""


def kind(method):
    """What the train step does differently for it: units, who is trained, whether others are asked, probes, stages."""
    stages = (method.stages or {"": method}).values()
    return tuple(
        (
            *(stage.unit, tuple(sorted(stage.trains)), set(stage.needs) <= stage.trains),
            *(stage.probes is None, stage.combine is None, stage.batch is None),
        )
        for stage in stages
    )


def one_of_each_kind():
    """All, of which those that are not the first of their kind are cut at night."""
    seen = set()
    for path in FROM_ROLLOUTS:
        known = kind(made(path)) in seen
        seen.add(kind(made(path)))
        yield pytest.param(path, id=path.stem, marks=pytest.mark.nightly if known else ())


def batch_of(path):
    return named_as_in(load(path), rollouts(max(made(path).min_group, 4) + (path.stem == "mc-grpo")))


@functools.cache
def whole(path):
    """Parameters before and after."""
    return updated(made(path), batch_of(path))


@pytest.mark.parametrize("path", FROM_ROLLOUTS, ids=lambda path: path.stem)
def test_two_steps_are_the_methods_own(path):
    before, after = whole(path)
    for role in made(path).trains:
        assert largest_difference(after[role], before[role]) > 1e-7, f"{role} did not move"
    if path.stem not in SAME_AS_GRPO:
        size = batch_of(path).group_size
        assert largest_difference(after["policy"], by_grpo(size)) > 1e-7, "moves exactly as plain GRPO does"


@pytest.mark.parametrize("path", list(one_of_each_kind()))
def test_two_steps_do_not_depend_on_micro_batches_or_devices(path):
    method = made(path)
    cut = {} if method.unit == "batch" else {"micro_batches": 2}
    _, parts = updated(method, batch_of(path), mesh=make_mesh(data=2), **cut)
    for role in method.trains:
        for a, b in zip(jax.tree.leaves(whole(path)[1][role]), jax.tree.leaves(parts[role]), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6, err_msg=role)

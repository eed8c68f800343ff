"""Every configuration of `configs/methods` trains a decoder two steps: it stays finite, moves, and not as by GRPO.

All share one stored batch of rollouts of one tiny model, whose extras hold whatever a method may ask for. On every
commit those train that ask the most different things of a model; `test_invariance` has tabular policies train.
"""

import functools
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_post import methods, models, training
from jaxrl_post.training import config as configs
from jaxrl_post.training.config import ConfigWarning
from jaxrl_post.training.reward_setup import reward_components
from tests import tiny

DIRECTORY = Path(__file__).parents[2] / "configs" / "methods"
PATHS = sorted(DIRECTORY.glob("*.yaml"))

SAME_AS_GRPO: dict[str, str] = {
    "grpo": "it is the baseline",
    "gui-g2": "it is GRPO on another reward, and the stored batch has its own",
    "multirole-r1": "so is it",
    "prefix-grouper": "the prompt is run once for a group, and the update is that of GRPO",
    "pipo": "it makes its second update once eight batches have been seen",
    "ppo": "it trains a critic as well, and is compared with nothing",
}
"""Rows whose first two steps may equal those of plain GRPO, with the reason."""

EVERY_COMMIT = ("grpo", "ppo", "prefix-grouper", "opd")
"""A critic, a shared prompt, a teacher; those that ask a model for no more train at night, and those with probes, which
models answer in `test_probing`."""

ROLES = ("policy", "reference", "critic", "teacher", "target")


@functools.cache
def load(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConfigWarning)
        # The batch is stored, so that neither data nor other runs have to be there.
        return configs.load(path, check_files=False)


def with_extras(batch):
    """Rewards that differ, a sampler that lags, two turns, and every extra array that a method may read."""
    group_size, prompts = batch.group_size, batch.num_prompts
    rng = np.random.default_rng(3)
    reward = rng.choice([0.0, 0.5, 1.0], batch.reward.shape).astype(np.float32)
    reward[0] = np.resize([1.0, 0.0], group_size)
    rows, length = batch.tokens.shape
    lag = jnp.asarray(rng.normal(0, 0.3, (rows, length)), jnp.float32) * batch.mask
    place = jnp.cumsum(batch.mask, axis=1) * batch.mask
    return batch.replace(
        reward=jnp.asarray(reward),
        rewards={"format": jnp.asarray(reward > 0, jnp.float32), "accuracy": jnp.asarray(reward)},
        logp=batch.logp + lag,
        step=jnp.where(batch.mask > 0, (place > 2).astype(jnp.int32), -1),
        version=jnp.where(batch.mask > 0, (place > 2).astype(jnp.int32), -1),
        extras={
            "greedy_reward": jnp.asarray(rng.choice([0.0, 1.0], prompts), jnp.float32),
            "agent": jnp.where(batch.mask > 0, (place > 2).astype(jnp.int32), -1),
            "answer": jnp.asarray(rng.integers(0, 3, batch.reward.shape), jnp.int32),
            "episode": jnp.broadcast_to(jnp.arange(group_size, dtype=jnp.int32) // 2, batch.reward.shape),
            "state": jnp.where(batch.mask > 0, jnp.asarray(rng.integers(0, 3, (rows, 1)), jnp.int32), -1),
            "answer_tokens": jnp.asarray([[2, 2, -1], [1, -1, -1], [2, 1, 1]], jnp.int32)[jnp.arange(prompts) % 3],
            "budget": jnp.broadcast_to(jnp.resize(jnp.array([2.0, 0.0]), group_size), batch.reward.shape),
            "entropy": jnp.asarray(rng.random((rows, length)), jnp.float32) * batch.mask,
            "exit": jnp.broadcast_to(jnp.arange(group_size, dtype=jnp.int32), batch.reward.shape),
            "prompt_weight": jnp.linspace(0.5, 1.5, prompts),
            "reference_reward": jnp.linspace(0.0, 1.0, prompts),
        },
    )


@functools.cache
def rollouts(group_size):
    """Four prompts of the tiny model, with an invalid sequence."""
    return with_extras(tiny.batch(group_size, count=4))


def named_as_in(config, batch):
    """The batch with the reward's components under the names that a configuration of as many gives them."""
    if len(config.rewards) != len(batch.rewards):
        return batch
    return batch.replace(rewards=dict(zip(reward_components(config), batch.rewards.values(), strict=True)))


def moved(method, batch):
    """Parameters of the policy before and after two steps of gradient descent."""
    policies = {role: tiny.policy(value_head=role == "critic") for role in method.roles}
    keys = {role: jax.random.key(ROLES.index(role) if role in ROLES else 9) for role in policies}
    params = {role: policy.init(keys[role]) for role, policy in policies.items()}
    optimizer = optax.sgd(0.05)
    shapes = jax.eval_shape(lambda: batch)
    state = training.init(params, method, optimizer, jax.random.key(5), rollouts=shapes, num_prompts=8)
    before = jax.tree.map(jnp.copy, state.params)
    step = training.make_step(
        {role: models.score(policy) for role, policy in policies.items()}, method, optimizer, epochs=1
    )
    for _ in range(2):
        state, metrics = step(state, batch)
    return before, state.params, metrics


@functools.cache
def grpo_parameters(group_size):
    _, after, _ = moved(methods.grpo(), rollouts(group_size))
    return jax.flatten_util.ravel_pytree(after["policy"])[0]


def marked(path):
    config = load(path)
    pairs = getattr(methods, config.method.name)(**config.method.keywords).learns_from != "rollouts"
    return pytest.param(path, id=path.stem, marks=[] if pairs or path.stem in EVERY_COMMIT else pytest.mark.nightly)


@pytest.mark.parametrize("path", [marked(path) for path in PATHS])
def test_a_methods_configuration_trains_two_steps_of_its_own(path):
    config = load(path)
    method = getattr(methods, config.method.name)(**config.method.keywords)
    if method.learns_from != "rollouts":
        batch, size = tiny.pairs(), 2
        batch = batch.replace(extras={"uncertainty": jnp.linspace(0.0, 0.6, batch.num_prompts)})
    else:
        size = max(method.min_group, 4) + (path.stem == "mc-grpo")
        batch = named_as_in(config, rollouts(size))
    before, after, metrics = moved(method, batch)
    assert int(metrics["nonfinite_updates"]) == 0
    for role in method.trains:
        old, new = (jax.flatten_util.ravel_pytree(tree[role])[0] for tree in (before, after))
        assert bool(jnp.all(jnp.isfinite(new)))
        assert float(jnp.max(jnp.abs(new - old))) > 1e-7, f"{role} did not move"
    if method.learns_from == "rollouts" and path.stem not in SAME_AS_GRPO:
        own = jax.flatten_util.ravel_pytree(after["policy"])[0]
        assert float(jnp.max(jnp.abs(own - grpo_parameters(size)))) > 1e-7, "moves exactly as plain GRPO does"


def test_every_training_row_of_the_catalog_names_a_configuration_of_its_own_method():
    for record in methods.catalog():
        if record.method is not None:
            assert callable(getattr(methods, record.method)), record.id
        if record.config is not None:
            assert Path(record.config).name == f"{record.id}.yaml"
            assert load(DIRECTORY.parents[1] / record.config).method.name == record.method, record.id

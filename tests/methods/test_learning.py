"""Every method learns something small."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_post import data, methods, models, training
from tests import tiny
from tests.methods import tabular

ONLINE = {
    "grpo": (methods.grpo(), 4),
    "mc_grpo": (methods.mc_grpo(), 5),
    "ppo": (methods.ppo(), 4),
    "reinforce": (methods.reinforce(baseline="leave_one_out"), 4),
}


def train_online(method, group_size, steps=40):
    optimizer = optax.adam(1e-2)
    params = tiny.params_for(method)
    if "reference" in params:
        params["reference"] = params["policy"]
    state = training.init(params, method, optimizer, jax.random.key(0))
    step = training.make_step(tiny.scores_for(method), method, optimizer)
    rewards = []
    for number in range(steps):
        rollouts = tiny.sampler(group_size)(state.params["policy"], tiny.prompts(8), jax.random.key(number))
        rewards.append(float(rollouts.reward.mean()))
        state, metrics = step(state, rollouts)
        assert np.isfinite(float(metrics["loss"]))
    return rewards, metrics


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "grpo" else pytest.mark.nightly) for name in ONLINE]
)
def test_a_method_with_rollouts_raises_the_reward_of_a_copying_task(name):
    method, group_size = ONLINE[name]
    rewards, metrics = train_online(method, group_size)
    assert np.mean(rewards[:3]) < 0.3
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.3, rewards
    assert float(metrics["sampling/sampling_logp_difference/max"]) < 1e-5


def test_ppo_trains_its_critic_towards_the_returns():
    method, optimizer = methods.ppo(lam=1.0), optax.adam(0.05)
    rollouts = tabular.batch()
    rollouts = rollouts.replace(reward=jnp.full_like(rollouts.reward, 0.7))
    state = tabular.start(method, optimizer, rollouts)
    step = tabular.make_step(method, optimizer, epochs=4)
    for _ in range(40):
        state, metrics = step(state, rollouts)
    assert float(metrics["critic/returns/mean"]) == pytest.approx(0.7, abs=1e-5)
    assert float(metrics["critic/values/mean"]) == pytest.approx(0.7, abs=0.1)


@pytest.mark.nightly  # on every commit a run does, tests/training/test_loop.py
def test_dpo_prefers_the_chosen_completions():
    method = methods.dpo()
    optimizer = optax.adam(3e-3)
    params = tiny.params_for(method)
    params["reference"] = params["policy"]
    state = training.init(params, method, optimizer, jax.random.key(0))
    step = training.make_step(tiny.scores_for(method), method, optimizer)
    history = []
    for _ in range(25):
        state, metrics = step(state, tiny.pairs())
        history.append({name: float(value) for name, value in metrics.items()})
    assert history[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)  # policy and reference are equal
    assert history[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert history[-1]["rewards/accuracies"] == 1.0
    assert history[-1]["rewards/margins"] > 0.3
    assert "sampling/sampling_logp_difference/max" not in history[0] or np.isnan(
        history[0]["sampling/sampling_logp_difference/max"]
    )


@pytest.mark.nightly  # on every commit a warm start does, tests/training/test_loop.py
def test_sft_makes_the_given_completions_probable():
    method = methods.sft()
    optimizer = optax.adam(1e-2)
    state = training.init(tiny.params_for(method), method, optimizer, jax.random.key(0))
    step = training.make_step(tiny.scores_for(method), method, optimizer)
    rollouts = data.to_rollouts([[2, 3], [4]], [[[5, 6, 1]], [[7, 1]]], length=6)
    for _ in range(40):
        state, metrics = step(state, rollouts)
    score = jax.jit(models.score(tiny.policy()), static_argnums=2)
    logp = score(state.params["policy"], rollouts, frozenset({"logp"}), jax.random.key(0)).logp
    assert float(metrics["loss"]) < 0.1
    assert np.all(np.asarray(jnp.exp(logp))[np.asarray(rollouts.mask) > 0] > 0.8)

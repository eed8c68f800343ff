"""Models written elsewhere are sampled from and trained: Flax NNX, Flax Linen, a bare apply function, any score."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from jaxrl_post import methods, models, training
from jaxrl_post.rollout import Prompts, SamplingParams, generate
from jaxrl_post.types import Policy, TokenStats

VOCAB, WIDTH, NEW = 6, 16, 3


class NNXModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.mix = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)
        self.out = nnx.Param(0.1 * jax.random.normal(rngs.params(), (VOCAB, WIDTH)))

    def encode(self, tokens, positions):
        x = self.embed(tokens)
        past = jnp.cumsum(x, axis=1) / (1 + positions[..., None])
        return x + jnp.tanh(self.mix(jnp.concatenate([x, past], -1)))


class LinenModel(linen.Module):
    def setup(self):
        self.embed = linen.Embed(VOCAB, WIDTH)
        self.mix = linen.Dense(WIDTH)
        self.out = self.param("out", linen.initializers.normal(0.1), (VOCAB, WIDTH))

    def encode(self, tokens, positions):
        x = self.embed(tokens)
        past = jnp.cumsum(x, axis=1) / (1 + positions[..., None])
        return x + jnp.tanh(self.mix(jnp.concatenate([x, past], -1)))

    def __call__(self, tokens):
        return self.encode(tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)) @ self.out.T


def from_nnx() -> Policy:
    return models.from_nnx(NNXModel, hidden=NNXModel.encode, unembed=lambda model: model.out)


def from_linen() -> Policy:
    return models.from_linen(LinenModel(), hidden="encode", unembed=lambda params: params["out"])


def from_apply() -> Policy:
    def init(key):
        table, mix = jax.random.split(key)
        return {"table": jax.random.normal(table, (VOCAB, WIDTH)), "out": 0.1 * jax.random.normal(mix, (WIDTH, VOCAB))}

    def apply(params, tokens):
        x = params["table"][tokens]
        return (x + jnp.tanh(jnp.cumsum(x, axis=1))) @ params["out"]

    with pytest.warns(UserWarning, match="logits"):
        return models.from_apply(apply, init)


# All are sampled from, scored and differentiated on every commit, in `tests/models/test_model_adapters`.
@pytest.mark.parametrize(
    "make", [from_nnx, *(pytest.param(f, marks=pytest.mark.nightly) for f in (from_linen, from_apply))]
)
def test_a_foreign_model_learns_to_repeat_its_prompt(make):
    policy = make()
    method, optimizer = methods.grpo(beta=0.0), optax.adam(3e-2)
    state = training.init({"policy": policy.init(jax.random.key(0))}, method, optimizer, jax.random.key(1))
    step = training.make_step(models.score(policy), method, optimizer)
    prompts = Prompts(jnp.array([[2], [3], [4], [5]]), jnp.ones(4, jnp.int32))

    @jax.jit
    def sample(params, key):
        out = generate(policy, params, prompts, key, sampling=SamplingParams(), max_new_tokens=NEW, group_size=8)
        right = ((out.tokens == out.tokens[:, :1]) * out.mask).sum(1) / NEW
        return out.replace(reward=right.reshape(4, 8))

    rewards = []
    for number in range(40):
        rollouts = sample(state.params["policy"], jax.random.key(number))
        rewards.append(float(rollouts.reward.mean()))
        state, metrics = step(state, rollouts)
        assert float(metrics["sampling/sampling_logp_difference/max"]) < 1e-5
    assert np.mean(rewards[:2]) < 0.4
    assert np.mean(rewards[-3:]) > 0.8, rewards


def test_training_knows_a_model_only_by_its_score():
    """A policy over one action without any sequence model: a table of logits by prompt."""

    def score(params, rollouts, fields, key):
        assert fields == {"logp"}
        logp = jax.nn.log_softmax(params)[rollouts.prompt_id.repeat(rollouts.group_size)]
        chosen = jnp.take_along_axis(logp, rollouts.tokens[:, 1:], axis=1)
        return TokenStats(logp=jnp.pad(chosen, ((0, 0), (1, 0))))

    from jaxrl_post import data

    # Both actions of each of two prompts, one rewarded: the optimum is to choose it always.
    batch = data.to_rollouts([[0], [0]], [[[0], [1]], [[0], [1]]], length=2, rewards=[[1.0, 0.0], [0.0, 1.0]])
    method, optimizer = methods.reinforce(baseline="leave_one_out"), optax.sgd(1.0)
    state = training.init({"policy": jnp.zeros((2, 2))}, method, optimizer, jax.random.key(0))
    step = training.make_step(score, method, optimizer)
    for _ in range(50):
        state, _ = step(state, batch)
    np.testing.assert_array_equal(jnp.argmax(state.params["policy"], axis=1), [0, 1])

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jaxrl_post import models
from jaxrl_post.types import Rollouts, Unembedding

V, D = 7, 6


class NNXModel(nnx.Module):
    """A causal model with a list of blocks, dropout and a tied table: the parts that parameters must survive."""

    def __init__(self, rngs):
        self.table = nnx.Embed(V, D, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(D, D, rngs=rngs) for _ in range(2)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def encode(self, tokens, positions):
        x = self.table(tokens) + 0.1 * positions[..., None]
        for block in self.blocks:
            x = self.dropout(x + jnp.tanh(block(jnp.cumsum(x, axis=1))))
        return x

    def __call__(self, tokens):
        return self.encode(tokens, jnp.arange(tokens.shape[1])[None]) @ self.table.embedding[...].T


class LinenModel(linen.Module):
    def setup(self):
        self.table = linen.Embed(V, D)
        self.block = linen.Dense(D)
        self.out = linen.Dense(V)

    def encode(self, tokens, positions):
        x = self.table(tokens) + 0.1 * positions[..., None]
        return x + jnp.tanh(self.block(jnp.cumsum(x, axis=1)))

    def __call__(self, tokens):
        return self.out(self.encode(tokens, jnp.arange(tokens.shape[1])[None]))


def nnx_case():
    policy = models.from_nnx(NNXModel, hidden=NNXModel.encode, unembed=lambda model: model.table.embedding)

    def apply(params, tokens):
        # The same numbers put into a module by hand.
        model = NNXModel(nnx.Rngs(5))
        model.eval()
        model.table.embedding[...] = params["table"]["embedding"]
        for name, block in enumerate(model.blocks):
            block.kernel[...] = params["blocks"][str(name)]["kernel"]
            block.bias[...] = params["blocks"][str(name)]["bias"]
        return model(tokens)

    return policy, apply


def linen_case():
    def unembed(params):
        return Unembedding(params["out"]["kernel"].T, bias=params["out"]["bias"])

    policy = models.from_linen(LinenModel(), hidden="encode", unembed=unembed)
    return policy, lambda params, tokens: LinenModel().apply({"params": params}, tokens)


def apply_case():
    _, apply = linen_case()
    with pytest.warns(UserWarning, match=r"holds all \[B, T, V\] logits"):
        policy = models.from_apply(
            apply, init=lambda key: LinenModel().init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        )
    return policy, apply


CASES = {"nnx": nnx_case, "linen": linen_case, "apply": apply_case}


@functools.cache
def case(name):
    policy, apply = CASES[name]()
    params = jax.jit(lambda key: jax.tree.map(lambda x: x + 0.2, policy.init(key)))(jax.random.key(0))
    return policy, params, jax.jit(apply)


def rollouts_of(tokens, lengths):
    batch, length = tokens.shape
    return Rollouts(
        tokens=tokens,
        mask=jnp.ones((batch, length)),
        logp=jnp.zeros((batch, length)),
        step=jnp.full((batch, length), -1),
        version=jnp.full((batch, length), -1),
        reward=jnp.zeros((batch, 1)),
        rewards={},
        valid=jnp.ones((batch, 1), bool),
        length=jnp.asarray(lengths).reshape(batch, 1),
        finish=jnp.zeros((batch, 1), jnp.int8),
        id=jnp.arange(batch, dtype=jnp.uint32).reshape(batch, 1),
        prompt_id=jnp.arange(batch),
    )


@pytest.mark.parametrize("name", CASES)
def test_score_is_the_log_softmax_of_the_models_own_logits(name):
    policy, params, apply = case(name)
    tokens = jnp.array([[1, 2, 3, 4, 5], [6, 0, 1, 1, 2]])
    score = jax.jit(models.score(policy), static_argnums=2)
    logp_of_tokens = np.asarray(score(params, rollouts_of(tokens, [5, 5]), frozenset({"logp"}), jax.random.key(0)).logp)
    logp = np.asarray(jax.nn.log_softmax(apply(params, tokens), axis=-1))
    for row in range(2):
        expected = [0.0] + [logp[row, t - 1, int(tokens[row, t])] for t in range(1, 5)]
        np.testing.assert_allclose(logp_of_tokens[row], expected, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_gets_a_gradient_through_the_score(name):
    policy, params, _ = case(name)
    rollouts = rollouts_of(jnp.array([[1, 2, 3, 4, 5]]), [5])

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: models.score(policy)(p, rollouts, frozenset({"logp"}), jax.random.key(0)).logp.sum())(
            params
        )

    assert all(np.abs(g).max() > 1e-5 for g in jax.tree.leaves(gradient(params)))


@pytest.mark.parametrize("name", CASES)
def test_generating_by_recomputation_equals_the_direct_forward_of_ragged_prompts(name):
    policy, params, apply = case(name)
    sequences = np.array([[1, 2, 3, 4, 5, 6], [6, 0, 1, 1, 2, 3]], np.int32)
    lengths, new = np.array([4, 2]), 2
    positions = np.where(np.arange(4) < lengths[:, None], np.arange(4), -1)
    prompts = np.where(positions >= 0, sequences[:, :4], 5)

    @jax.jit
    def run(params):
        states, cache = policy.prefill(params, prompts, positions, policy.init_cache(2, 6))

        def step(cache, i):
            places = (lengths + i)[:, None]
            tokens = jnp.take_along_axis(jnp.asarray(sequences), places, axis=1)
            state, cache = policy.decode(params, tokens, places, cache)
            return cache, models.logits(policy.unembed(params), state)[:, 0]

        return models.logits(policy.unembed(params), states), jax.lax.scan(step, cache, jnp.arange(new))[1]

    prompt_logits, new_logits = jax.tree.map(np.asarray, run(params))
    for row, n in enumerate(lengths.tolist()):
        alone = np.asarray(apply(params, sequences[row : row + 1, : n + new]))[0]
        np.testing.assert_allclose(prompt_logits[row, :n], alone[:n], atol=1e-5)
        np.testing.assert_allclose(new_logits[:, row], alone[n:], atol=1e-5)
    assert np.isfinite(prompt_logits).all()


def test_nnx_parameters_are_a_nested_dict_with_strings_for_keys():
    params = case("nnx")[1]
    assert sorted(params) == ["blocks", "table"]
    assert sorted(params["blocks"]) == ["0", "1"]
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(params))


def test_an_nnx_module_that_draws_random_numbers_on_its_way_runs_inside_jit():
    class Recurrent(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(5, 4, rngs=rngs)
            self.cell = nnx.RNN(nnx.GRUCell(4, 4, rngs=rngs))  # whose first state may be drawn at each call

    policy = models.from_nnx(
        Recurrent,
        hidden=lambda model, tokens, positions: model.cell(model.embed(tokens)),
        unembed=lambda model: model.embed.embedding[...],
    )
    params, tokens = policy.init(jax.random.key(0)), jnp.array([[1, 2, 3]])
    compiled, _ = jax.jit(policy.hidden)(params, tokens, jnp.arange(3)[None])
    again, _ = policy.hidden(params, tokens, jnp.arange(3)[None])
    np.testing.assert_allclose(compiled, again, atol=1e-6)


def test_linen_accepts_a_function_in_place_of_a_method_name():
    policy, params, _ = case("linen")
    other = models.from_linen(
        LinenModel(), hidden=lambda model, tokens, positions: model.encode(tokens, positions), unembed=policy.unembed
    )
    tokens, positions = jnp.array([[1, 2]]), jnp.array([[0, 1]])
    np.testing.assert_array_equal(
        other.hidden(params, tokens, positions)[0], policy.hidden(params, tokens, positions)[0]
    )


def test_heads_and_auxiliary_losses_of_a_module_arrive():
    class Critic(nnx.Module):
        def __init__(self, rngs):
            self.table = nnx.Embed(V, D, rngs=rngs)
            self.value = nnx.Linear(D, 1, rngs=rngs)

    policy = models.from_nnx(
        Critic,
        hidden=lambda model, tokens, positions: (model.table(tokens), {"balance": jnp.ones(())}),
        unembed=lambda model: model.table.embedding,
        heads=lambda model, hidden: {"value": model.value(hidden)[..., 0]},
    )
    params = policy.init(jax.random.key(0))
    states, aux = policy.hidden(params, jnp.array([[1, 2]]), jnp.array([[0, 1]]))
    expected = states @ params["value"]["kernel"][:, 0] + params["value"]["bias"]
    np.testing.assert_allclose(policy.heads(params, states)["value"], expected, rtol=1e-6)
    assert aux == {"balance": 1.0}


def test_segments_reach_a_model_that_takes_them_and_are_refused_by_one_that_does_not():
    policy, params, _ = case("nnx")
    tokens = jnp.array([[1, 2]])
    with pytest.raises(ValueError, match="takes no segment_ids"):
        policy.hidden(params, tokens, tokens, tokens)
    taking = models.from_nnx(
        NNXModel,
        hidden=lambda model, tokens, positions, segment_ids=None: segment_ids[..., None] * 1.0,
        unembed=lambda model: model.table.embedding,
    )
    assert taking.hidden(params, tokens, tokens, jnp.array([[3, 4]]))[0][..., 0].tolist() == [[3.0, 4.0]]


def test_a_cache_is_given_whole_or_not_at_all():
    with pytest.raises(ValueError, match=r"\['init_cache', 'decode'\] are missing"):
        models.from_linen(LinenModel(), hidden="encode", unembed=lambda p: p, prefill="encode")


def test_a_bare_function_without_init_says_what_to_pass():
    with pytest.warns(UserWarning, match="recomputes the whole sequence"):
        policy = models.from_apply(lambda params, tokens: params[tokens])
    with pytest.raises(ValueError, match="from_apply"):
        policy.init(jax.random.key(0))


def test_a_linen_module_with_other_collections_is_refused():
    class Counting(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            return linen.BatchNorm(use_running_average=True)(linen.Embed(V, D)(tokens))

    policy = models.from_linen(Counting(), hidden="__call__", unembed=lambda params: params["Embed_0"]["embedding"])
    with pytest.raises(ValueError, match=r"Counting also has \['batch_stats'\]"):
        policy.init(jax.random.key(0))

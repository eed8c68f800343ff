import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import models
from jaxrl_post.types import Policy, Rollouts, Unembedding
from tests.tpu import one_chip

FIELDS = frozenset({"logp", "entropy", "mean_logp", "sum_p_squared", "max_prob", "value"})
V = 5


def hand_made(weight=None, softcap=None, bias=None, heads=None):
    """The state of token x at any position is row x of a table; parameters are that table."""
    return Policy(
        init=lambda key: jax.random.normal(key, (V, V)),
        hidden=lambda params, tokens, positions, segment_ids=None, *, key=None: (params[tokens], {}),
        unembed=lambda params: Unembedding(weight, softcap, bias),
        heads=heads or (lambda params, states: {"value": jnp.sum(states, axis=-1), "novelty": states[..., 0]}),
        init_cache=None,
        prefill=None,
        decode=None,
    )


def rollouts_of(tokens, lengths):
    tokens = jnp.asarray(tokens)
    batch, length = tokens.shape
    return Rollouts(
        tokens=tokens,
        mask=jnp.zeros((batch, length)),
        logp=jnp.zeros((batch, length)),
        step=jnp.full((batch, length), -1),
        version=jnp.full((batch, length), -1),
        reward=jnp.zeros((1, batch)),
        rewards={},
        valid=jnp.ones((1, batch), bool),
        length=jnp.asarray(lengths).reshape(1, batch),
        finish=jnp.zeros((1, batch), jnp.int8),
        id=jnp.arange(batch, dtype=jnp.uint32).reshape(1, batch),
        prompt_id=jnp.arange(1),
    )


def expected_row(logits, tokens, t):
    """The fields of token `t` in float64, from the logits of the token before it."""
    z = np.asarray(logits[tokens[t - 1]], np.float64)
    logp = z - np.log(np.sum(np.exp(z)))
    p = np.exp(logp)
    return {
        "logp": logp[tokens[t]],
        "entropy": -np.sum(p * logp),
        "mean_logp": np.mean(logp),
        "sum_p_squared": np.sum(p**2),
        "max_prob": np.max(p),
    }


@pytest.mark.parametrize("form", ["weight", "logits"])
def test_every_field_speaks_of_its_own_token_and_is_zero_at_the_start_and_beyond_the_length(form):
    weight = jax.random.normal(jax.random.key(1), (V, V)) if form == "weight" else None
    bias = jnp.linspace(-1.0, 1.0, V)
    policy = hand_made(weight, softcap=3.0, bias=bias)
    table = 3.0 * policy.init(jax.random.key(0))
    raw = np.asarray(table, np.float64) @ (np.eye(V) if weight is None else np.asarray(weight, np.float64).T)
    logits = 3.0 * np.tanh((raw + np.asarray(bias)) / 3.0) / 0.7
    tokens, lengths = [[1, 4, 0, 2], [3, 3, -7, 10**6]], [4, 2]
    stats = jax.jit(models.score(policy, temperature=0.7), static_argnums=2)(
        table, rollouts_of(tokens, lengths), FIELDS, jax.random.key(2)
    )
    for name in FIELDS:
        field = np.asarray(getattr(stats, name))
        assert field.shape == (2, 4)
        assert field.dtype == jnp.float32
        for row in range(2):
            for t in range(4):
                if not 1 <= t < lengths[row]:
                    expected = 0.0
                elif name == "value":
                    expected = np.sum(np.asarray(table)[tokens[row][t - 1]])
                else:
                    expected = expected_row(logits, tokens[row], t)[name]
                np.testing.assert_allclose(field[row, t], expected, atol=1e-5, err_msg=f"{name} {row} {t}")


def test_fields_that_were_not_asked_for_are_none():
    policy = hand_made(jnp.eye(V))
    rollouts = rollouts_of([[1, 2]], [2])
    stats = models.score(policy)(jnp.eye(V), rollouts, frozenset({"entropy"}), jax.random.key(0))
    assert stats.logp is None
    assert stats.value is None
    stats = models.score(policy)(jnp.eye(V), rollouts, frozenset({"value"}), jax.random.key(0))
    assert stats.logp is None
    assert stats.value.tolist() == [[0.0, 1.0]]


def test_an_unknown_field_names_what_there_is():
    score = models.score(hand_made(jnp.eye(V)))
    rollouts = rollouts_of([[1, 2]], [2])
    with pytest.raises(ValueError, match=r"unknown fields \['confidence'\]: this policy gives \['entropy', 'logp'"):
        score(jnp.eye(V), rollouts, frozenset({"confidence"}), jax.random.key(0))
    headless = models.score(hand_made(jnp.eye(V), heads=lambda params, states: {}))
    with pytest.raises(ValueError, match="needs a model with a value head"):
        headless(jnp.eye(V), rollouts, frozenset({"value"}), jax.random.key(0))


def test_actions_that_are_no_token_array_are_refused():
    rollouts = rollouts_of([[1, 2]], [2]).replace(tokens={"x": jnp.zeros((1, 2))})
    with pytest.raises(ValueError, match=r"must be an array \[B, T\]"):
        models.score(hand_made(jnp.eye(V)))(jnp.eye(V), rollouts, frozenset({"logp"}), jax.random.key(0))


def test_padding_gets_no_gradient_even_where_its_token_is_no_row_of_the_embedding():
    # jnp.take, which Flax embeddings use, gives NaN for a row that is not there.
    policy = hand_made()._replace(
        hidden=lambda params, tokens, *_, key: (jnp.take(params, tokens, axis=0), {}),
        unembed=lambda params: Unembedding(params),
    )
    rollouts = rollouts_of([[1, 2, 99, 99]], [2])

    def total(table):
        return models.score(policy)(table, rollouts, frozenset({"logp"}), jax.random.key(0)).logp.sum()

    gradient = jax.jit(jax.grad(total))(jnp.ones((V, V)))
    # All logits of the one state are equal. As unembedding, row v gets (onehot(2) - 1/V)[v] times the state, which is
    # all ones; as embedding, row 1 gets the sum of these factors, which is 0.
    np.testing.assert_allclose(gradient, np.outer([-0.2, -0.2, 0.8, -0.2, -0.2], np.ones(V)), atol=1e-6)


def test_sampling_and_scoring_agree_on_the_log_prob():
    policy = models.decoder(vocab_size=11, width=16, heads=4, kv_heads=2, softcap=4.0, init_std=0.4)
    params = jax.jit(policy.init)(jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (3, 6)))

    @jax.jit
    def run(params):
        scored = models.score(policy, temperature=0.6)(
            params, rollouts_of(tokens, [6, 6, 6]), frozenset({"logp"}), jax.random.key(2)
        )

        def step(cache, t):
            state, cache = policy.decode(params, tokens[:, t, None], jnp.full((3, 1), t), cache)
            logits = models.logits(policy.unembed(params), state[:, 0]) / 0.6
            return cache, jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, t + 1, None], axis=1)[:, 0]

        return scored.logp[:, 1:], jax.lax.scan(step, policy.init_cache(3, 6, None), jnp.arange(5))[1].T

    scored, sampled = run(params)
    np.testing.assert_allclose(scored, sampled, atol=1e-5)


def test_logits_of_bfloat16_are_float32():
    hidden, weight = jnp.ones((2, 3), jnp.bfloat16), jnp.full((4, 3), 1 / 3, jnp.bfloat16)
    logits = models.logits(Unembedding(weight), hidden)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, np.full((2, 4), 3 * float(weight[0, 0])), rtol=1e-6)


def test_with_a_bound_only_the_chosen_tokens_are_scored_and_alike():
    policy = hand_made(weight=0.5 * jax.random.normal(jax.random.key(1), (V, V)))
    params = policy.init(jax.random.key(0))
    rollouts = rollouts_of([[1, 2, 3, 4, 0, 1], [2, 2, 1, 0, 3, 4], [4, 1, 0, 2, 3, 3]], [4, 6, 6])
    mask = np.zeros(rollouts.mask.shape, np.float32)
    mask[0, 2:4] = 1
    mask[1, [1, 3]] = 1  # two turns
    mask[1:, 4] = 1
    rollouts = dataclasses.replace(rollouts, mask=jnp.asarray(mask))
    fields = frozenset({"logp", "entropy"})

    def run(bound):
        def total(params):
            stats = models.score(policy, max_chosen=bound)(params, rollouts, fields, jax.random.key(0))
            return jnp.sum(mask * (stats.logp + 0.3 * stats.entropy)), stats

        return jax.jit(jax.value_and_grad(total, has_aux=True))

    (_, whole), gradients = run(None)(params)
    (_, few), same = run(3)(params)
    inside = mask * (np.arange(mask.shape[1]) < np.asarray(rollouts.length).reshape(-1, 1))
    for name in fields:
        np.testing.assert_allclose(getattr(few, name), getattr(whole, name) * inside, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradients, same)
    (_, short), _ = run(1)(params)
    surplus = (np.cumsum(mask, axis=1) > 1) * inside
    assert np.array_equal(np.isnan(short.logp), surplus > 0)


def test_on_a_tpu_scoring_and_its_gradient_run_the_kernels():
    policy = models.decoder(vocab_size=300, width=128, layers=1, heads=2)
    params = jax.eval_shape(policy.init, jax.random.key(0))
    rollouts = rollouts_of(np.ones((4, 9), np.int32), [9, 9, 9, 9])

    def loss(params):
        stats = models.score(policy)(params, rollouts, frozenset({"logp", "entropy"}), jax.random.key(0))
        return jnp.sum(stats.logp), stats

    with one_chip("v5e"):
        text = str(jax.make_jaxpr(jax.grad(loss, has_aux=True))(params))
    assert {"token_logprob_forward_keeping", "token_logprob_d_unembedding"} <= set(
        re.findall(r"token_logprob_\w+", text)
    )

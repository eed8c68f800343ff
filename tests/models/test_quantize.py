"""Weights in few bits: how far off they are, and a model that stands on them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_post import methods, models, training
from jaxrl_post.models.quantize import NF4, Quantized, quantize_array
from tests import tiny

SIZES = {"vocab_size": tiny.VOCAB, "width": tiny.WIDTH, "layers": 2, "heads": 2, "mlp_width": 32}
TOKENS = np.random.default_rng(3).integers(0, tiny.VOCAB, (2, 6))
POSITIONS = np.broadcast_to(np.arange(6), (2, 6))
BASE = models.decoder(**SIZES)
EXPERTS = models.decoder(
    **SIZES,
    experts=4,
    experts_per_token=2,
    init_std=0.3,
    lora=models.Lora(rank=2, targets=("gate_up", "down")),
)
one_quantized = jax.jit(quantize_array, static_argnames=("kind", "axis", "block"))
quantized = jax.jit(models.quantize, static_argnames=("kind", "block"))
hidden = {policy: jax.jit(policy.hidden) for policy in (BASE, EXPERTS)}


@pytest.mark.parametrize("axis", [0, 2, -2])
def test_int8_is_off_by_at_most_half_a_step_of_its_block(axis):
    x = np.random.default_rng(0).normal(size=(8, 16, 8)).astype(np.float32)
    small = one_quantized(jnp.asarray(x), axis=axis, block=4)
    blocks = np.moveaxis(x, axis, -1)
    blocks = blocks.reshape(*blocks.shape[:-1], -1, 4)
    bound = np.abs(blocks).max(-1, keepdims=True) / 254 + 1e-7
    error = np.moveaxis(np.asarray(small.astype(jnp.float32)) - x, axis, -1).reshape(blocks.shape)
    assert (np.abs(error) <= bound).all()
    assert small.shape == x.shape


def test_nf4_takes_the_nearest_of_its_values_and_keeps_those_it_has():
    x = np.random.default_rng(1).uniform(-1, 1, (6, 8)).astype(np.float32)
    x[:, 0] = 1.0
    found = np.asarray(one_quantized(jnp.asarray(x), kind="nf4", block=8).astype(jnp.float32))
    values = np.asarray(NF4, np.float32)
    nearest = values[np.abs(x[..., None] - values).argmin(-1)]
    np.testing.assert_allclose(found, nearest, atol=1e-6)
    exact = one_quantized(jnp.asarray(values)[None] * 3.0, kind="nf4", block=16)
    np.testing.assert_allclose(exact.astype(jnp.float32)[0], 3 * values, rtol=1e-6)
    assert exact.values.nbytes == 8


def test_a_block_of_zeros_stays_zero_and_an_odd_axis_is_refused_in_4_bits():
    assert one_quantized(jnp.zeros((2, 4))).astype(jnp.float32).tolist() == [[0.0] * 4] * 2
    with pytest.raises(ValueError, match="odd"):
        quantize_array(jnp.ones(3), kind="nf4")
    with pytest.raises(ValueError, match="kind"):
        quantize_array(jnp.ones(4), kind="fp4")


@pytest.mark.parametrize(
    ("kind", "limit", "bytes_per_weight"),
    [pytest.param("int8", 0.02, 1.3, marks=pytest.mark.nightly), ("nf4", 0.2, 0.8)],
)
def test_a_quantized_model_runs_in_the_place_of_the_other_and_is_smaller(kind, limit, bytes_per_weight):
    params = jax.jit(BASE.init)(jax.random.key(0))
    small = quantized(params, kind=kind, block=16)
    exact, found = (np.asarray(hidden[BASE](p, TOKENS, POSITIONS)[0]) for p in (params, small))
    assert np.abs(found - exact).max() < limit
    up = small["layers"]["mlp"]["up"]
    assert isinstance(up, Quantized)
    assert (up.values.nbytes + up.scale.nbytes) / params["layers"]["mlp"]["up"].size < bytes_per_weight
    rounded = jax.tree.map(
        lambda x: x.astype(jnp.float32) if isinstance(x, Quantized) else x,
        small,
        is_leaf=lambda x: isinstance(x, Quantized),
    )
    np.testing.assert_allclose(found, hidden[BASE](rounded, TOKENS, POSITIONS)[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", pytest.param("nf4", marks=pytest.mark.nightly)])
def test_quantized_experts_compute_with_the_weights_that_they_stand_for(kind):
    params = jax.jit(EXPERTS.init)(jax.random.key(0))
    for projection in ("gate", "up", "down"):
        params["layers"]["mlp"][f"{projection}_lora"]["b"] += 0.1
    small = quantized(params, kind=kind, block=16)
    assert isinstance(small["layers"]["mlp"]["down"], Quantized)
    given = (jax.jit(models.dequantize)(small), small, params)
    expected, found, exact = (np.asarray(hidden[EXPERTS](p, TOKENS, POSITIONS)[0]) for p in given)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(exact - expected).max() > 1e-4


@pytest.mark.nightly  # on every commit a run does both, tests/training/test_adapters.py
def test_adapters_are_trained_on_a_quantized_model_and_sampling_from_it_works():
    lora = models.Lora(rank=2, targets=("query", "up"))
    policy = models.decoder(**SIZES, lora=lora)
    params = quantized(jax.jit(policy.init)(jax.random.key(0)), kind="nf4", block=16)
    method, optimizer = methods.grpo(beta=0.1), optax.adam(0.05)
    given = {"trainable": {"policy": models.trainable(params)}, "borrows": {"reference": "policy"}}
    state = training.init({"policy": params}, method, optimizer, jax.random.key(5), **given)
    scores = {"policy": models.score(policy), "reference": models.score(BASE)}
    step = training.make_step(scores, method, optimizer, micro_batches=2, **given)
    batch = tiny.batch()
    for _ in range(2):
        state, metrics = step(state, batch)
    own, adapters = models.split_adapters(state.params["policy"])
    jax.tree.map(np.testing.assert_array_equal, models.split_adapters(params)[0], own)
    assert all(np.any(np.asarray(x)) for x in jax.tree.leaves(adapters))
    assert np.isfinite(metrics["loss"])
    merged = jax.jit(lambda params: models.merge_adapters(params, lora))(state.params["policy"])
    np.testing.assert_allclose(
        hidden[BASE](merged, TOKENS, POSITIONS)[0],
        jax.jit(policy.hidden)(state.params["policy"], TOKENS, POSITIONS)[0],
        rtol=1e-3,
        atol=1e-4,
    )

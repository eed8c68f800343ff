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


@pytest.mark.parametrize("axis", [0, 1, 2, -2])
def test_int8_is_off_by_at_most_half_a_step_of_its_block(axis):
    x = np.random.default_rng(0).normal(size=(8, 16, 8)).astype(np.float32)
    small = quantize_array(jnp.asarray(x), axis=axis, block=4)
    blocks = np.moveaxis(x, axis, -1)
    blocks = blocks.reshape(*blocks.shape[:-1], -1, 4)
    bound = np.abs(blocks).max(-1, keepdims=True) / 254 + 1e-7
    error = np.moveaxis(np.asarray(small.astype(jnp.float32)) - x, axis, -1).reshape(blocks.shape)
    assert (np.abs(error) <= bound).all()
    assert small.shape == x.shape


def test_nf4_takes_the_nearest_of_its_values_and_keeps_those_it_has():
    x = np.random.default_rng(1).uniform(-1, 1, (6, 8)).astype(np.float32)
    x[:, 0] = 1.0
    found = np.asarray(quantize_array(jnp.asarray(x), kind="nf4", block=8).astype(jnp.float32))
    values = np.asarray(NF4, np.float32)
    nearest = values[np.abs(x[..., None] - values).argmin(-1)]
    np.testing.assert_allclose(found, nearest, atol=1e-6)
    exact = quantize_array(jnp.asarray(values)[None] * 3.0, kind="nf4", block=16)
    np.testing.assert_allclose(exact.astype(jnp.float32)[0], 3 * values, rtol=1e-6)
    assert exact.values.nbytes == 8


def test_a_block_of_zeros_stays_zero_and_an_odd_axis_is_refused_in_4_bits():
    assert quantize_array(jnp.zeros((2, 4))).astype(jnp.float32).tolist() == [[0.0] * 4] * 2
    with pytest.raises(ValueError, match="odd"):
        quantize_array(jnp.ones(3), kind="nf4")
    with pytest.raises(ValueError, match="kind"):
        quantize_array(jnp.ones(4), kind="fp4")


@pytest.mark.parametrize(("kind", "limit", "bytes_per_weight"), [("int8", 0.02, 1.3), ("nf4", 0.2, 0.8)])
def test_a_quantized_model_runs_in_the_place_of_the_other_and_is_smaller(kind, limit, bytes_per_weight):
    policy = models.decoder(**SIZES)
    params = policy.init(jax.random.key(0))
    small = models.quantize(params, kind=kind, block=16)
    tokens = jax.random.randint(jax.random.key(3), (2, 6), 0, tiny.VOCAB)
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    exact, _ = policy.hidden(params, tokens, positions)
    found, _ = policy.hidden(small, tokens, positions)
    assert float(jnp.max(jnp.abs(found - exact))) < limit
    up = small["layers"]["mlp"]["up"]
    assert isinstance(up, Quantized)
    assert (up.values.nbytes + up.scale.nbytes) / params["layers"]["mlp"]["up"].size < bytes_per_weight
    rounded = jax.tree.map(
        lambda x: x.astype(jnp.float32) if isinstance(x, Quantized) else x,
        small,
        is_leaf=lambda x: isinstance(x, Quantized),
    )
    np.testing.assert_allclose(found, policy.hidden(rounded, tokens, positions)[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_experts_compute_with_the_weights_that_they_stand_for(kind):
    options = SIZES | {"experts": 4, "experts_per_token": 2, "init_std": 0.3}
    policy = models.decoder(**options, lora=models.Lora(rank=2, targets=("gate_up", "down")))
    params = policy.init(jax.random.key(0))
    for projection in ("gate", "up", "down"):
        params["layers"]["mlp"][f"{projection}_lora"]["b"] += 0.1
    small = models.quantize(params, kind=kind, block=16)
    assert isinstance(small["layers"]["mlp"]["down"], Quantized)
    tokens = jax.random.randint(jax.random.key(3), (2, 6), 0, tiny.VOCAB)
    run = jax.jit(lambda params: policy.hidden(params, tokens, jnp.broadcast_to(jnp.arange(6), (2, 6)))[0])
    expected = run(models.dequantize(small))
    np.testing.assert_allclose(run(small), expected, atol=1e-5)
    assert float(jnp.max(jnp.abs(run(params) - expected))) > 1e-4


def test_adapters_are_trained_on_a_quantized_model_and_sampling_from_it_works():
    lora = models.Lora(rank=2, targets=("query", "up"))
    policy, base = models.decoder(**SIZES, lora=lora), models.decoder(**SIZES)
    params = models.quantize(policy.init(jax.random.key(0)), kind="nf4", block=16)
    method, optimizer = methods.grpo(beta=0.1), optax.adam(0.05)
    given = {"trainable": {"policy": models.trainable(params)}, "borrows": {"reference": "policy"}}
    state = training.init({"policy": params}, method, optimizer, jax.random.key(5), **given)
    scores = {"policy": models.score(policy), "reference": models.score(base)}
    step = training.make_step(scores, method, optimizer, micro_batches=2, **given)
    for _ in range(2):
        state, metrics = step(state, tiny.batch())
    own, adapters = models.split_adapters(state.params["policy"])
    jax.tree.map(np.testing.assert_array_equal, models.split_adapters(params)[0], own)
    assert all(float(jnp.max(jnp.abs(x))) > 0 for x in jax.tree.leaves(adapters))
    assert np.isfinite(metrics["loss"])
    merged = models.merge_adapters(state.params["policy"], lora)
    tokens, positions = jnp.array([[3, 1, 4]]), jnp.arange(3)[None]
    np.testing.assert_allclose(
        base.hidden(merged, tokens, positions)[0],
        policy.hidden(state.params["policy"], tokens, positions)[0],
        rtol=1e-3,
        atol=1e-4,
    )

"""`kernels.attention` and the decoder that uses it as TPU programs, compiled without a TPU."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from jaxrl_post import models
from jaxrl_post.kernels.attention import attention
from jaxrl_post.mesh import spec
from tests.tpu import CHIPS, one_chip, pod

NAMES = ("batch", "length", "act_heads", None)


def loss(query, key, value, ids, **options):
    return jnp.sum(attention(query, key, value, segment_ids=ids, **options).astype(jnp.float32) ** 2)


def compiled(batch, length, heads, kv_heads, head_dim, dtype=jnp.bfloat16, mesh=None, **options):
    """Forward and backward pass of splash for the devices of the ambient mesh."""

    def placed(shape, dtype, names):
        where = None if mesh is None else NamedSharding(mesh, spec(names, shape, dict(mesh.shape)))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    query = placed((batch, length, heads, head_dim), dtype, NAMES)
    key = placed((batch, length, kv_heads, head_dim), dtype, NAMES)
    ids = placed((batch, length), jnp.int32, NAMES[:2])
    step = jax.value_and_grad(functools.partial(loss, **options), argnums=(0, 1, 2))
    lowered = jax.jit(step, out_shardings=(None, (query.sharding, key.sharding, key.sharding))).lower(
        query, key, key, ids
    )
    assert lowered.as_text().count("tpu_custom_call") >= 3  # forward, gradient of the query, of key and value
    return lowered.compile()


@pytest.mark.parametrize(
    "chip", [pytest.param(chip, marks=() if chip == "v5e" else pytest.mark.nightly) for chip in CHIPS]
)
def test_a_packed_row_with_a_shared_prefix_compiles_for_every_tpu_without_an_array_of_scores(chip):
    with one_chip(chip):
        memory = compiled(1, 3072, 16, 4, 128, completion_starts=(1024, 1536, 2048, 2560)).memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 16 * 3072**2 / 8


@pytest.mark.nightly
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_head_size_compiles_for_every_tpu(chip, head_dim, dtype):
    with one_chip(chip):
        compiled(2, 4096, 8, 2, head_dim, dtype)
        compiled(2, 1100, 8, 2, head_dim, dtype, softcap=30.0)


@pytest.mark.nightly
@pytest.mark.parametrize("chip", CHIPS)
def test_eight_long_completions_of_one_prompt_compile_for_every_tpu(chip):
    with one_chip(chip):
        compiled(1, 2048 + 8 * 8192, 16, 4, 128, completion_starts=tuple(range(2048, 2048 + 8 * 8192, 8192)))


@pytest.mark.parametrize("kv_heads", [pytest.param(8, marks=pytest.mark.nightly), 2])
def test_on_a_pod_every_device_works_on_the_heads_and_rows_that_it_holds(kv_heads):
    with pod("v5e:2x4", fsdp=2, tensor=4) as mesh:
        text = compiled(4, 2048, 16, kv_heads, 128, mesh=mesh).as_text()
    assert not re.findall(r"\b(all-gather|all-to-all|collective-permute|reduce-scatter)", text)
    # Heads that every device has whole get a gradient from each.
    summed = [line for line in text.splitlines() if re.search(r" all-reduce(-start)?\(", line) and "bf16[" in line]
    assert bool(summed) == (kv_heads == 2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"window": 700}, marks=pytest.mark.nightly),
        pytest.param({"completion_starts": (1024, 2048, 3072)}, marks=pytest.mark.nightly),
    ],
)
def test_of_a_row_that_a_pod_splits_only_keys_and_values_travel(options):
    with pod("v5e:2x4", fsdp=2, tensor=2, sequence=2) as mesh:
        program = compiled(2, 4096, 8, 2, 128, mesh=mesh, **options)
    sent = re.findall(r"\b(all-gather|all-reduce|all-to-all|reduce-scatter)(?:-start)?\(", program.as_text())
    assert sorted(sent) == ["all-gather"] * 3 + ["all-reduce"] + ["reduce-scatter"] * 2
    assert program.memory_analysis().temp_size_in_bytes < 4 * 4 * 2048 * 4096 / 8  # an eighth of a device's scores


def decoder_step():
    """The gradient of a decoder's parameters, and the shapes of what it takes."""
    policy = models.decoder(vocab_size=256, width=256, layers=2, heads=4, kv_heads=2, dtype=jnp.bfloat16, remat="dots")
    tokens = jax.ShapeDtypeStruct((2, 1536), jnp.int32)

    def step(params, tokens, positions):
        return jax.grad(lambda p: jnp.sum(policy.hidden(p, tokens, positions)[0].astype(jnp.float32) ** 2))(params)

    return step, (jax.eval_shape(policy.init, jax.random.key(0)), tokens, tokens)


def test_a_decoder_trains_on_tpu_without_an_array_of_scores_or_a_mask():
    step, shapes = decoder_step()
    assert "1536,1536" in str(jax.make_jaxpr(step)(*shapes))
    with one_chip("v6e"):
        program = str(jax.make_jaxpr(step)(*shapes))
    assert program.count("pallas_call[") == 4  # forward, and again in the backward pass, which is two kernels
    assert "1536,1536" not in program


@pytest.mark.nightly
@pytest.mark.parametrize("chip", CHIPS)
def test_a_decoder_step_compiles_for_every_tpu(chip):
    step, shapes = decoder_step()
    with one_chip(chip):
        lowered = jax.jit(step).lower(*shapes)
        assert "tpu_custom_call" in lowered.as_text()
        lowered.compile()

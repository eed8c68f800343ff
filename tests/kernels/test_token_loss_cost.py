"""What `token_loss` costs: products, memory, and communication on a pod."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_post.kernels import token_logprob
from jaxrl_post.kernels.token_logprob.token_loss import token_loss
from tests.kernels.counting import collectives, dot_flops, largest_array
from tests.tpu import pod


def weighted(stats, weights):
    return -weights * stats.logp


def test_gradients_cost_no_more_products_than_with_all_logits_and_what_is_frozen_costs_none():
    tokens, vocabulary, width = 1024, 512, 64
    shapes = (
        jax.ShapeDtypeStruct((tokens, width), jnp.float32),
        jax.ShapeDtypeStruct((vocabulary, width), jnp.float32),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
        jax.ShapeDtypeStruct((tokens,), jnp.float32),
    )
    product = 2 * tokens * vocabulary * width

    def ours(hidden, unembedding, targets, weights):
        return token_loss(hidden, unembedding, targets, weights, weighted, chunk_bytes=4 * vocabulary * 256)[0]

    def other(implementation):
        def total(hidden, unembedding, targets, weights):
            stats = token_logprob(hidden, unembedding, targets, implementation=implementation)
            return jnp.sum(weighted(stats, weights))

        return total

    def cost(function, argnums):
        return dot_flops(jax.value_and_grad(function, argnums=argnums), *shapes) / product

    assert dot_flops(ours, *shapes) == product
    assert cost(ours, (0, 1)) == cost(other("reference"), (0, 1)) == 3
    assert cost(other("chunked"), (0, 1)) == 4
    assert cost(ours, 0) == cost(ours, 1) == 2
    assert cost(ours, 3) == 1  # aux alone needs no gradient of a logit


def test_tokens_by_vocabulary_are_never_held():
    tokens, vocabulary, width = 1024, 1500, 16
    shapes = (
        jax.ShapeDtypeStruct((tokens, width), jnp.float32),
        jax.ShapeDtypeStruct((vocabulary, width), jnp.float32),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
        jax.ShapeDtypeStruct((tokens,), jnp.float32),
    )

    def ours(hidden, unembedding, targets, weights):
        return token_loss(hidden, unembedding, targets, weights, weighted, chunk_bytes=4 * vocabulary * 32)[0]

    def plain(hidden, unembedding, targets, weights):
        return jnp.sum(weighted(token_logprob(hidden, unembedding, targets, implementation="reference"), weights))

    compiled, whole = (
        jax.jit(jax.value_and_grad(function, argnums=(0, 1))).lower(*shapes).compile() for function in (ours, plain)
    )
    assert largest_array(whole) >= tokens * vocabulary, "the measure must see the array that the plain loss holds"
    assert largest_array(compiled) <= 2 * vocabulary * 32
    assert compiled.memory_analysis().temp_size_in_bytes < whole.memory_analysis().temp_size_in_bytes / 8


def test_on_a_pod_devices_trade_columns_for_rows_and_none_has_all_of_its_unembedding():
    tokens, width, vocabulary = 16384, 1024, 151936
    with pod("v5e:2x4", fsdp=4, tensor=2) as mesh:

        def struct(shape, dtype, *names):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*names)))

        arguments = (
            struct((tokens, width), jnp.bfloat16, "fsdp", None),
            struct((vocabulary, width), jnp.bfloat16, "tensor", "fsdp"),
            struct((tokens,), jnp.int32, "fsdp"),
            struct((tokens,), jnp.float32, "fsdp"),
        )

        def total(*arguments):
            return token_loss(*arguments, weighted)

        lowered = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True)).lower(*arguments)
        compiled = lowered.compile()
    assert lowered.as_text().count("stablehlo.all_to_all") == 2
    assert f"[{vocabulary // 2},{width}]" not in compiled.as_text()
    found = collectives(compiled)
    # Outside of the loop over chunks of tokens: the unembedding there, its gradient back, and the total.
    outside = [(c.operation, math.prod(c.shapes[0])) for c in found if not c.in_loop]
    moved = vocabulary // 2 * width // 4
    assert sorted(outside) == [("all-reduce", 1), ("all-to-all", moved), ("all-to-all", moved)]
    # In each chunk states, targets and weights are gathered, sums over the vocabulary reduced or scattered.
    inside = [c for c in found if c.in_loop]
    assert {c.operation for c in inside} == {"all-gather", "all-reduce", "reduce-scatter"}
    assert len(inside) <= 7
    assert max(math.prod(shape) for c in inside for shape in c.shapes) <= 8192 * width
    # A chunk of logits (1 GiB at the most in float32, and as bfloat16), a quarter of rows and their gradient.
    assert compiled.memory_analysis().temp_size_in_bytes < 0.75 * 2**30

"""What `token_loss` costs: products, memory, and communication on a pod."""

import jax
import jax.numpy as jnp
import numpy as np
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


def test_on_a_pod_the_unembedding_is_gathered_over_fsdp_once_and_over_the_vocabulary_never():
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
    text = lowered.as_text()
    assert text.count("stablehlo.all_gather") == text.count("stablehlo.reduce_scatter") == 1
    found = collectives(compiled)
    local = (vocabulary // 2, width)
    gathers = [c for c in found if c.operation == "all-gather"]
    assert [(c.shapes[0], c.in_loop) for c in gathers] == [(local, False)]
    # Besides it: the gradient of the unembedding once (the compiler may scatter it by reducing all and slicing), the
    # total, and in each chunk of tokens the maxima, the sums and the gradient of the states.
    rest = [c for c in found if c.operation != "all-gather"]
    assert {c.operation for c in rest} <= {"all-reduce", "reduce-scatter"}
    assert sum(local in c.shapes or (local[0], width // 4) in c.shapes for c in rest) == 1
    assert len([c for c in rest if not c.in_loop]) == 2
    assert len([c for c in rest if c.in_loop]) <= 4
    assert max(np.prod(shape) for c in rest if c.in_loop for shape in c.shapes) <= 2048 * width
    # A chunk of logits (1 GiB at the most, and as bfloat16), the unembedding and its gradient in float32.
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * 2**30

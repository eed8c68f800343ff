"""What the chunked `token_logprob` holds in memory, and that it gives the same numbers on eight devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_post.kernels.token_logprob.chunked import chunk_count, token_logprob_chunked
from jaxrl_post.kernels.token_logprob.reference import OUTPUTS, token_logprob_reference
from jaxrl_post.mesh import make_mesh

REAL = tuple(name for name in OUTPUTS if name != "argmax")


def big_loss(chunks, outputs=("logp", "entropy")):
    function = functools.partial(token_logprob_chunked, chunks=chunks) if chunks else token_logprob_reference

    def loss(hidden, unembedding, targets):
        out = function(hidden, unembedding, targets, temperature=0.8, outputs=outputs)
        return jnp.sum(sum(getattr(out, name) for name in outputs))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def test_the_chunked_backward_pass_never_holds_tokens_by_vocabulary():
    tokens, vocabulary, width = 1024, 1500, 16
    shapes = (
        jax.ShapeDtypeStruct((tokens, width), jnp.float32),
        jax.ShapeDtypeStruct((vocabulary, width), jnp.float32),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    )

    def compiled(chunks):
        program = big_loss(chunks).lower(*shapes).compile()
        # Any layout and any split of the token axis: 1024 tokens (whole) beside 1500 columns.
        elements = [
            int(np.prod([int(n) for n in dims.split(",")]))
            for dims in re.findall(r"f32\[([\d,]+)\]", program.as_text())
        ]
        return program.memory_analysis().temp_size_in_bytes, max(elements)

    whole = 4 * tokens * vocabulary
    plain_bytes, plain_largest = compiled(None)
    assert plain_bytes >= whole, "the measure must see the array that the plain implementation holds"
    assert plain_largest >= tokens * vocabulary
    chunked_bytes, chunked_largest = compiled(32)
    assert chunked_bytes < whole / 8
    assert chunked_largest <= max(vocabulary * width, tokens * vocabulary // 32)


def test_chunks_hold_no_more_than_128_mib_of_logits_by_default():
    for tokens, vocabulary in [(1, 10), (16384, 151936), (4096, 50257), (100_000, 39)]:
        count = chunk_count(tokens, vocabulary)
        assert -(-tokens // count) * vocabulary * 4 <= 128 * 2**20
        assert count == 1 or -(-tokens // (count - 1)) * vocabulary * 4 > 64 * 2**20


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_eight_devices_agree_with_one(sizes):
    random = np.random.default_rng(11)
    hidden = random.standard_normal((64, 16)).astype(np.float32)
    unembedding = (0.5 * random.standard_normal((48, 16))).astype(np.float32)
    targets = random.integers(0, 48, 64).astype(np.int32)
    run = big_loss(4, REAL)
    loss, gradients = run(hidden, unembedding, targets)
    mesh = make_mesh(**sizes)

    def put(x, *names):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*names)))

    rows = ("data", "fsdp")
    split_loss, split_gradients = run(put(hidden, rows, None), put(unembedding, "tensor", None), put(targets, rows))
    assert len(split_gradients[0].sharding.device_set) == 8
    np.testing.assert_allclose(split_loss, loss, rtol=1e-5)
    for one, eight in zip(gradients, split_gradients, strict=True):
        np.testing.assert_allclose(eight, one, atol=1e-5 * float(jnp.max(jnp.abs(one))), rtol=0)

"""What the chunked `token_logprob` holds in memory, and that it gives the same numbers on eight devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_post.kernels import token_logprob
from jaxrl_post.kernels.token_logprob.chunked import plan
from jaxrl_post.kernels.token_logprob.reference import OUTPUTS
from jaxrl_post.mesh import make_mesh
from tests.kernels.counting import dot_flops
from tests.tpu import one_chip

REAL = tuple(name for name in OUTPUTS if name != "argmax")


def loss_and_gradients(outputs=("logp", "entropy"), **keywords):
    def loss(hidden, unembedding, targets):
        out = token_logprob(hidden, unembedding, targets, temperature=0.8, outputs=outputs, **keywords)
        return sum(jnp.sum((index + 1) * getattr(out, name)) for index, name in enumerate(outputs))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def shapes(tokens, vocabulary, width, dtype=jnp.float32):
    return (
        jax.ShapeDtypeStruct((tokens, width), dtype),
        jax.ShapeDtypeStruct((vocabulary, width), dtype),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    )


def test_the_chunked_backward_pass_never_holds_tokens_by_vocabulary():
    tokens, vocabulary, width = 1024, 1500, 16

    def compiled(**keywords):
        program = loss_and_gradients(**keywords).lower(*shapes(tokens, vocabulary, width)).compile()
        elements = [
            int(np.prod([int(n) for n in dims.split(",")]))
            for dims in re.findall(r"f32\[([\d,]+)\]", program.as_text())
        ]
        return program.memory_analysis().temp_size_in_bytes, max(elements)

    whole = 4 * tokens * vocabulary
    plain_bytes, plain_largest = compiled(implementation="reference")
    assert plain_bytes >= whole, "the measure must see the array that the plain implementation holds"
    assert plain_largest >= tokens * vocabulary
    chunked_bytes, chunked_largest = compiled(chunk_bytes=whole // 32)
    assert chunked_bytes < whole / 8
    assert chunked_largest <= max(vocabulary * width, tokens * vocabulary // 32)


@pytest.mark.parametrize("chip", ["v5e", pytest.param("v6e", marks=pytest.mark.nightly)])
def test_on_a_tpu_the_chunked_form_holds_at_most_1100_mib(chip):
    # Ahead of time: 16384 tokens, a vocabulary of 151936, states of 1024. Plain logits alone are 9496 MiB.
    with one_chip(chip):
        run = loss_and_gradients(("logp",), implementation="chunked")
        program = run.lower(*shapes(16384, 151936, 1024, jnp.bfloat16)).compile()
    assert program.memory_analysis().temp_size_in_bytes <= 1100 * 2**20


def test_going_back_costs_one_more_product_than_with_all_logits_kept_and_frozen_inputs_cost_nothing():
    tokens, vocabulary, width = 64, 96, 16
    one = 2 * tokens * vocabulary * width
    given = jnp.ones((tokens, width)), jnp.ones((vocabulary, width)), jnp.zeros(tokens, jnp.int32)

    def products(argnums):
        def loss(hidden, unembedding, targets):
            return jnp.sum(token_logprob(hidden, unembedding, targets, chunk_bytes=4 * tokens * 32).logp)

        return dot_flops(loss if argnums is None else jax.value_and_grad(loss, argnums), *given) / one

    assert products(None) == 1
    assert products((0, 1)) == 4  # logits twice, both gradients; three if logits were kept
    assert products(0) == products(1) == 3


@pytest.mark.parametrize("tokens", [1, 7, 4096, 100_000])
@pytest.mark.parametrize("vocabulary", [10, 50257, 151936])
def test_a_piece_of_the_logits_stays_within_the_bound(tokens, vocabulary):
    rows, columns = plan(tokens, vocabulary, 32 * 2**20)
    assert rows * columns * 4 <= 32 * 2**20
    assert columns == vocabulary or rows * columns * 4 > 8 * 2**20, "no smaller than it needs to be"
    assert rows <= max(16384, 1)


@pytest.fixture(scope="module")
def on_one_device():
    """A program that is not compiled yet, what it takes, and what one device gives."""
    random = np.random.default_rng(11)
    hidden = random.standard_normal((60, 16)).astype(np.float32)  # 60 tokens do not divide by 8
    unembedding = (0.5 * random.standard_normal((48, 16))).astype(np.float32)
    targets = random.integers(0, 48, 60).astype(np.int32)
    run = functools.partial(loss_and_gradients, REAL, chunk_bytes=4 * 60 * 8)
    return run, (hidden, unembedding, targets), run()(hidden, unembedding, targets)


@pytest.mark.parametrize(
    ("sizes", "ambient"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, True),
        ({"tensor": 8}, False),
        pytest.param({"data": 2, "fsdp": 4}, True, marks=pytest.mark.nightly),
        pytest.param({"data": 2, "fsdp": 4}, False, marks=pytest.mark.nightly),
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, False, marks=pytest.mark.nightly),
        pytest.param({"tensor": 8}, True, marks=pytest.mark.nightly),
    ],
)
def test_eight_devices_agree_with_one(sizes, ambient, on_one_device):
    run, (hidden, unembedding, targets), (loss, gradients) = on_one_device
    mesh = make_mesh(**sizes)

    def put(x, *names):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*names)))

    arguments = put(hidden), put(unembedding, "tensor", "fsdp" if "fsdp" in sizes else None), put(targets)
    if ambient:
        with jax.set_mesh(mesh):
            split_loss, split_gradients = run()(*arguments)
    else:  # the compiler splits the work as it sees fit
        split_loss, split_gradients = run()(*arguments)
    assert len(split_gradients[1].sharding.device_set) == 8
    np.testing.assert_allclose(split_loss, loss, rtol=1e-5)
    for one, eight in zip(gradients, split_gradients, strict=True):
        np.testing.assert_allclose(eight, one, atol=1e-5 * float(jnp.max(jnp.abs(one))), rtol=0)


@pytest.mark.parametrize("bound", [None, 7, 12])
def test_eight_devices_find_room_for_what_one_has_room_for(bound):
    # All unmasked tokens lie on the first device, which has 8 of the 64 tokens.
    random = np.random.default_rng(12)
    hidden = jnp.asarray(random.standard_normal((64, 16)), jnp.float32)
    unembedding = jnp.asarray(0.5 * random.standard_normal((48, 16)), jnp.float32)
    targets = jnp.asarray(random.integers(0, 48, 64))
    mask = jnp.asarray(np.arange(64) < 7, jnp.float32)

    def run():
        def loss(hidden, unembedding):
            return jnp.sum(
                token_logprob(hidden, unembedding, targets, mask=mask, max_tokens=bound, chunk_bytes=1000).logp
            )

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, unembedding)

    value, gradients = run()
    with jax.set_mesh(make_mesh(data=4, fsdp=2)):
        split_value, split_gradients = run()
    np.testing.assert_allclose(split_value, value, rtol=1e-6)
    for one, eight in zip(gradients, split_gradients, strict=True):
        np.testing.assert_allclose(eight, one, atol=1e-5 * float(jnp.max(jnp.abs(one))), rtol=0)

"""An unembedding split over `fsdp` that is gathered a piece at a time gives what it gives as a whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxrl_post.kernels import token_logprob
from jaxrl_post.kernels.token_logprob import core
from jaxrl_post.mesh import make_mesh
from tests.kernels.counting import collectives, largest_array


def problem(tokens, vocabulary, width):
    random = np.random.default_rng(11)
    hidden = jnp.asarray(random.standard_normal((tokens, width)), jnp.float32)
    unembedding = jnp.asarray(0.5 * random.standard_normal((vocabulary, width)), jnp.float32)
    return hidden, unembedding, jnp.asarray(random.integers(0, vocabulary, tokens))


def program(outputs, **keywords):
    def loss(hidden, unembedding, targets):
        out = token_logprob(hidden, unembedding, targets, temperature=0.8, softcap=9.0, outputs=outputs, **keywords)
        return sum(jnp.sum((index + 1) * getattr(out, name)) for index, name in enumerate(outputs)), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def agree(left, right):
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5 * float(jnp.max(jnp.abs(one))), rtol=0)


@pytest.mark.parametrize(("vocabulary", "rows"), [pytest.param(48, 6, marks=pytest.mark.nightly), (46, 8)])
def test_pieces_give_the_values_and_gradients_of_the_whole(vocabulary, rows, monkeypatch):
    given = problem(60, vocabulary, 16)  # of 46, 23 rows a device: 8, 8 and 7
    outputs = ("logp", "entropy", "mean_logp", "sum_p_squared", "max_prob", "argmax")
    differentiated = ("logp", "entropy", "mean_logp", "sum_p_squared", "max_prob")
    expected = program(differentiated, implementation="chunked")(*given)
    monkeypatch.setattr(core, "GATHERED_BYTES", 4 * 16 * rows)
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        found = program(differentiated, implementation="chunked")(*given)
        best = jax.jit(lambda *x: token_logprob(*x, softcap=9.0, outputs=outputs, implementation="chunked").argmax)
        np.testing.assert_array_equal(best(*given), jnp.argmax(given[0] @ given[1].T, axis=1))
    agree(expected, found)


def test_pieces_give_what_the_kernels_give_of_the_whole(monkeypatch):
    given = problem(128, 512, 128)
    expected = program(("logp",), implementation="reference")(*given)
    monkeypatch.setattr(core, "GATHERED_BYTES", 4 * 128 * 256)
    with pltpu.force_tpu_interpret_mode(), jax.set_mesh(make_mesh(fsdp=2)):
        found = program(("logp",), implementation="pallas_tpu")(*given)
    agree(expected, found)


def test_no_device_holds_the_whole_unembedding_and_its_gradient_is_scattered_once(monkeypatch):
    tokens, vocabulary, width = 64, 1024, 16
    monkeypatch.setattr(core, "GATHERED_BYTES", 4 * width * vocabulary // 4)
    mesh = make_mesh(fsdp=8)
    with jax.set_mesh(mesh):

        def struct(dtype, *shape, split):
            spec = jax.sharding.PartitionSpec(*split)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

        given = (
            struct(jnp.float32, tokens, width, split=("fsdp", None)),
            struct(jnp.float32, vocabulary, width, split=(None, "fsdp")),
            struct(jnp.int32, tokens, split=("fsdp",)),
        )
        compiled = program(("logp",), implementation="chunked").lower(*given).compile()
    assert largest_array(compiled) < vocabulary * width
    found = collectives(compiled)
    large = [c for c in found if max(map(np.prod, c.shapes)) > tokens * width]
    assert [(c.operation, c.in_loop) for c in large] == [("all-gather", True)] * 2  # forward and backward
    piece = (1, vocabulary // 4, width // 8)
    assert [c.in_loop for c in found if c.operation == "reduce-scatter" and piece in c.shapes] == [True]
    assert sum(c.operation == "reduce-scatter" for c in found) == 1

"""Functions of tokens under meshes as a caller may have them: axes typed `Explicit`, and a `shard_map` of the caller's.

`jax.make_mesh` and `jax.shard_map` as they come, with all their checks: no option is given.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_post.kernels import token_divergence, token_logprob, token_loss

N, V, D = 24, 301, 16
CHUNK_BYTES = 4 * N * 64


def scored(hidden, weight, targets, advantages, implementation="chunked"):
    chunks = {"chunk_bytes": CHUNK_BYTES} if implementation == "chunked" else {}
    stats = token_logprob(hidden, weight, targets, outputs=("logp", "entropy"), implementation=implementation, **chunks)
    return jnp.sum(advantages * stats.logp) + jnp.sum(stats.entropy)


def in_one_pass(hidden, weight, targets, advantages):
    return token_loss(hidden, weight, targets, advantages, lambda s, a: -a * s.logp, chunk_bytes=4 * V * 5)[0]


def distilled(hidden, weight, targets, advantages):
    del targets
    return jnp.sum(advantages * token_divergence(hidden, weight, 0.5 * hidden, weight, kind="jsd", chunk_bytes=8 * V))


FUNCTIONS = [scored, in_one_pass, distilled]
BY_TOKEN = (P("data"), P(), P("data"), P("data"))


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(0)
    hidden, weight, advantages = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((N, D), (V, D), (N,)))
    return hidden, weight, jnp.asarray(rng.integers(0, V, N), jnp.int32), advantages


@pytest.fixture(scope="module")
def without_a_mesh(given):
    """`function -> (value, gradients)` on one device, each once."""
    return functools.cache(lambda function: jax.jit(jax.value_and_grad(function, (0, 1, 3)))(*given))


def assert_equal(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=2e-5)


def placed_on(mesh, given):
    name = mesh.axis_names[0]
    over = P(name), P(), P(name), P(name)
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(given, over, strict=True)]


@pytest.mark.parametrize(
    ("function", "names"),
    [
        *((function, ("data", "tensor")) for function in FUNCTIONS),
        (scored, ("x", "y")),
        *(pytest.param(function, ("x", "y"), marks=pytest.mark.nightly) for function in FUNCTIONS[1:]),
    ],
)
def test_a_mesh_with_typed_shardings(function, names, given, without_a_mesh):
    mesh = jax.make_mesh((4, 2), names)
    placed = placed_on(mesh, given)
    with jax.set_mesh(mesh):
        got = jax.jit(jax.value_and_grad(function, (0, 1, 3)))(*placed)
    assert_equal(got, without_a_mesh(function))


def test_log_probs_have_the_typed_sharding_of_their_tokens(given):
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    hidden, weight, targets, _ = placed_on(mesh, given)
    with jax.set_mesh(mesh):
        stats = token_logprob(hidden, weight, targets, chunk_bytes=CHUNK_BYTES)
    assert stats.logp.sharding.spec == P("x")


@pytest.mark.parametrize("function", [scored, *(pytest.param(f, marks=pytest.mark.nightly) for f in FUNCTIONS[1:])])
def test_a_gradient_taken_through_the_callers_own_map_over_devices(function, given, without_a_mesh):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(*args):
        return jax.lax.psum(function(*args), "data")

    mapped = jax.shard_map(local, mesh=mesh, in_specs=BY_TOKEN, out_specs=P())
    assert_equal(jax.jit(jax.value_and_grad(mapped, (0, 1, 3)))(*given), without_a_mesh(function))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_gradient_taken_within_the_callers_own_map_over_devices(function, given, without_a_mesh):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(*args):
        value, gradients = jax.value_and_grad(function, (0, 1, 3))(*args)
        return jax.lax.psum(value, "data"), gradients

    out = (P(), (P("data"), P(), P("data")))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=BY_TOKEN, out_specs=out)
    assert_equal(jax.jit(mapped)(*given), without_a_mesh(function))

"""What is drawn, recorded and searched for on eight devices is what one device draws, records and finds.

Rows lie over two axes of the mesh, the vocabulary, heads and key-value heads over a third.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_post import models
from jaxrl_post.mesh import make_mesh, place, shardings
from jaxrl_post.rollout import Prompts, SamplingParams, beam_search, generate
from jaxrl_post.sampling import alternatives, sample, token_statistics, transform

MESHES = {
    "data, fsdp, tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp, tensor": {"fsdp": 2, "tensor": 4},
}
on_every_mesh = pytest.mark.parametrize(
    "axes", ["data, fsdp, tensor", pytest.param("fsdp, tensor", marks=pytest.mark.nightly)]
)

# Logits whose vocabulary lies over devices.

ROWS, V = 8, 48


def logits():
    """With ties across the devices' borders, forbidden tokens, and a row whose best tokens all lie on one device."""
    z = np.random.default_rng(0).normal(size=(ROWS, V)).astype(np.float32) * 2
    z[1, ::6] = z[1].max()
    z[2, ::5] = -np.inf
    z[3] = np.linspace(5, 0, V)
    z[4, [0, 47]] = 9.0
    return z


def of_logits(function):
    """What a function of logits `[ROWS, V]` gives on one device, and on a mesh by its name."""

    @functools.cache
    def on(axes):
        z = jnp.asarray(logits())
        if axes is not None:
            rows = ("data", "fsdp")
            z = jax.device_put(z, NamedSharding(make_mesh(**MESHES[axes]), PartitionSpec(rows, "tensor")))
            assert z.sharding.shard_shape(z.shape)[1] == V // MESHES[axes]["tensor"]
        return jax.tree.map(np.asarray, jax.jit(function)(z))

    return on


TRUNCATIONS = {
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all, of each row its own": {
        "top_k": jnp.array([3, 0, 1, 5, 2, V, 7, 11]),
        "top_p": jnp.linspace(0.3, 1.0, ROWS),
        "min_p": jnp.linspace(0.0, 0.3, ROWS),
        "temperature": jnp.linspace(0.5, 2.0, ROWS),
    },
}


@of_logits
def truncated(z):
    return {name: transform(z, **given) for name, given in TRUNCATIONS.items()}


@on_every_mesh
def test_truncations_keep_the_same_tokens_of_a_vocabulary_on_several_devices(axes):
    for name, expected in truncated(None).items():
        found = truncated(axes)[name]
        kept = np.isfinite(expected)
        assert 0 < kept.sum() < kept.size
        np.testing.assert_array_equal(np.isfinite(found), kept, err_msg=name)
        np.testing.assert_allclose(found[kept], expected[kept], rtol=1e-5, err_msg=name)


@of_logits
def recorded(z):
    tokens = jnp.argsort(-z, axis=-1)[jnp.arange(ROWS), jnp.arange(ROWS)].astype(jnp.int32)
    keys = jax.random.split(jax.random.key(1), ROWS)
    return sample(keys, z), alternatives(z, 12)[0], token_statistics(z, tokens), alternatives(z, 12)[1]


@on_every_mesh
def test_draws_statistics_and_alternatives_are_those_of_one_device(axes):
    expected, found = recorded(None), recorded(axes)
    for a, b in zip(found[:2], expected[:2], strict=True):  # tokens; of equal ones the smaller id
        np.testing.assert_array_equal(a, b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found[2:], expected[2:])
    assert expected[1][4, :2].tolist() == [0, 47]


WIDE = {"blocks across the borders of devices": 8 * 150, "whole blocks on each": 8 * 512}


def wide_logits(size):
    z = np.random.default_rng(3).normal(size=(ROWS, size)).astype(np.float32) * 3
    z[2, ::3] = -np.inf
    return z


def collectives(text):
    """The shapes of the arrays that a program's devices exchange."""
    made = re.findall(r"= \(?\w+\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all|collective-permute)", text)
    return [tuple(int(n) for n in dims.split(",") if n) for dims in made]


@pytest.mark.parametrize("size", WIDE)
@pytest.mark.parametrize("axes", MESHES)
def test_a_large_vocabulary_on_several_devices_is_looked_at_where_it_lies(axes, size):
    def drawn_and_likely(keys, z):
        return sample(keys, z), alternatives(z, 5)[0]

    keys, z = jax.random.split(jax.random.key(1), ROWS), jnp.asarray(wide_logits(WIDE[size]))
    alone = jax.jit(drawn_and_likely)(keys, z)
    mesh = make_mesh(**MESHES[axes])
    with jax.set_mesh(mesh):
        split = jax.device_put(z, NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "tensor")))
        program = jax.jit(drawn_and_likely).lower(keys, split).compile()
        jax.tree.map(np.testing.assert_array_equal, program(keys, split), alone)
        with jax.enable_x64(True):  # where the numbers of blocks are of two widths
            assert {x.dtype for x in jax.eval_shape(drawn_and_likely, keys, split)} == {jnp.dtype("int32")}
    exchanged = [math.prod(shape) for shape in collectives(program.as_text())]
    assert 0 < max(exchanged) < WIDE[size]


# Whole sequences.

SIZES = {"vocab_size": 16, "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 16, "init_std": 0.5}
WINDOW, DOUBLE = {"window": 3, "local_layers": (True, False)}, {"dtype": jnp.float64, "param_dtype": jnp.float64}
POLICIES = {"windowed": models.decoder(**SIZES, **WINDOW)}
with jax.enable_x64(True):
    # For int8, where the last bits of two programs may round an element to either of two neighbours: of so many bits
    # they do not.
    POLICIES["plain in float64"] = models.decoder(**SIZES, **DOUBLE)
    POLICIES["windowed in float64"] = models.decoder(**SIZES, **WINDOW, **DOUBLE)
LENGTH, NEW = np.array([5, 1, 3, 4]), 6
PROMPTS = Prompts(jnp.asarray(np.random.default_rng(2).integers(2, 16, (4, 5)), jnp.int32), jnp.asarray(LENGTH))


@functools.cache
def params_of(name):
    return jax.jit(POLICIES[name].init)(jax.random.key(0))


def of_policy(function):
    """What a function of a policy and its parameters gives on one device, or on a mesh by its name."""

    @functools.cache
    def on(name, axes, **options):
        policy, mesh = POLICIES[name], make_mesh(**({} if axes is None else MESHES[axes]))
        run = jax.jit(functools.partial(function, policy, **options))
        with jax.enable_x64("float64" in name), jax.set_mesh(mesh):
            params = params_of(name)
            if axes is not None:
                params = place(params, shardings(params, policy.axes(), mesh))
                assert not params["embedding"].is_fully_replicated
            return jax.tree.map(np.asarray, run(params, PROMPTS))

    return on


def assert_same(found, expected):
    """All tokens alike, and all numbers to 1e-5."""
    for name in ("tokens", "length", "finish", "valid"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    numbers = {"logp": (found.logp, expected.logp)}
    numbers |= {name: (found.extras[name], value) for name, value in expected.extras.items()}
    for name, (a, b) in numbers.items():
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5, err_msg=name)


@of_policy
def searched(policy, params, prompts):
    return beam_search(policy, params, prompts, beams=3, max_new_tokens=NEW, stop_tokens=(1,))


def test_a_search_finds_the_beams_of_one_device():
    expected = searched("windowed", None)
    assert len(set(expected.length.ravel().tolist())) > 2
    assert_same(searched("windowed", "data, fsdp, tensor"), expected)


def test_a_search_exchanges_no_array_of_the_vocabulary():
    sizes, mesh = SIZES | {"vocab_size": 1000, "layers": 1}, make_mesh(**MESHES["data, fsdp, tensor"])
    policy = models.decoder(**sizes)

    def search(params, prompts):
        return beam_search(policy, params, prompts, beams=3, max_new_tokens=NEW, stop_tokens=(1,))

    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(policy.init, jax.random.key(0))
        lying = shardings(shapes, policy.axes(), mesh)
        params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, lying)
        text = jax.jit(search).lower(params, PROMPTS).compile().as_text()
    exchanged = collectives(text)
    assert exchanged
    assert not [shape for shape in exchanged if max(shape, default=0) >= 1000]


PLAIN = SamplingParams(temperature=0.9, stop_tokens=(1,))
TRUNCATED = PLAIN._replace(top_k=12, top_p=0.95)


@of_policy
def sampled(policy, params, prompts, *, sampling=PLAIN, dtype=None, slots=None):
    return generate(
        policy,
        params,
        prompts,
        jax.random.key(3),
        sampling=sampling,
        max_new_tokens=NEW,
        group_size=2,
        cache_dtype=dtype,
        slots=slots,
        alternatives=3,
    )


@pytest.mark.parametrize(
    ("name", "axes", "options"),
    [
        ("windowed", "data, fsdp, tensor", {"sampling": TRUNCATED, "slots": 3}),
        pytest.param("windowed in float64", "data, fsdp, tensor", {"dtype": "int8"}, marks=pytest.mark.nightly),
        pytest.param("plain in float64", "fsdp, tensor", {"dtype": "int8"}, marks=pytest.mark.nightly),
    ],
    ids=["a window in slots that the devices cannot share evenly", "a window in int8", "int8"],
)
def test_caches_of_a_window_and_in_int8_give_the_samples_of_one_device(name, axes, options):
    expected = sampled(name, None, **options)
    assert len(set(expected.length.ravel().tolist())) > 2
    assert_same(sampled(name, axes, **options), expected)

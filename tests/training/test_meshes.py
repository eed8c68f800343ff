"""What a step learns and what is sampled does not depend on the mesh, and no device holds what belongs to several."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_post import data, methods, models, training
from jaxrl_post.kernels.token_logprob import core
from jaxrl_post.mesh import make_mesh, place, shardings
from jaxrl_post.rollout import Prompts, SamplingParams, generate
from jaxrl_post.training import RouterLoss
from tests.kernels.counting import collectives, largest_array

SIZES = {"width": 16, "layers": 2, "heads": 4, "kv_heads": 2}
EXPERTS = {"mlp_width": 8, "experts": 4, "experts_per_token": 2}
POLICIES = {
    "dense": models.decoder(vocab_size=16, **SIZES, init_std=0.3, remat="full"),
    "experts": models.decoder(vocab_size=16, **SIZES, **EXPERTS, tied=True, init_std=0.3),
}
MESHES = {
    "fsdp": {"fsdp": 8},
    "data, fsdp, tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp, tensor, expert": {"fsdp": 2, "tensor": 2, "expert": 2},
    "fsdp, tensor, sequence": {"fsdp": 2, "tensor": 2, "sequence": 2},
}
METHOD, OPTIMIZER = methods.grpo(beta=0.0), optax.sgd(1.0)


def run(name, mesh=None, micro_batches=1):
    """The completions of a policy, the gradient of a step on them, and its metrics, as host arrays."""
    policy = POLICIES[name]
    params = jax.jit(policy.init)(jax.random.key(0))
    before = jax.tree.map(np.asarray, params)
    some = Prompts(jax.random.randint(jax.random.key(2), (4, 4), 2, 16), jnp.array([3, 1, 2, 3], jnp.int32))
    layout = None if mesh is None else shardings(params, policy.axes(), mesh)

    def sample(params, key):
        sampling = SamplingParams(stop_tokens=(1,))
        return generate(policy, params, some, key, sampling=sampling, max_new_tokens=4, group_size=4)

    with jax.set_mesh(make_mesh() if mesh is None else mesh):
        rollouts = jax.jit(sample)(params if layout is None else place(params, layout), jax.random.key(3))
    rollouts = jax.tree.map(np.asarray, rollouts)
    rewards = np.random.default_rng(4).standard_normal(rollouts.reward.shape).astype(np.float32)
    batch = rollouts.replace(reward=rewards)
    losses = {"policy": RouterLoss(0.1)} if name == "experts" else None
    state = training.init(
        {"policy": params}, METHOD, OPTIMIZER, jax.random.key(5), mesh=mesh, axes={"policy": policy.axes()}
    )
    step = training.make_step(
        models.score(policy, max_chosen=4),
        METHOD,
        OPTIMIZER,
        micro_batches=micro_batches,
        router_losses=losses,
        mesh=mesh,
    )
    state, metrics = step(state, batch)
    gradient = jax.tree.map(lambda a, b: a - np.asarray(b), before, state.params["policy"])
    return rollouts, gradient, jax.tree.map(float, metrics)


alone = functools.cache(run)


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("experts", "fsdp, tensor, expert"),
        ("dense", "fsdp, tensor, sequence"),
        pytest.param("dense", "data, fsdp, tensor", marks=pytest.mark.nightly),
        pytest.param("experts", "fsdp, tensor, sequence", marks=pytest.mark.nightly),
        pytest.param("dense", "fsdp", marks=pytest.mark.nightly),
        pytest.param("dense", "fsdp, tensor, expert", marks=pytest.mark.nightly),
        pytest.param("experts", "fsdp", marks=pytest.mark.nightly),
        pytest.param("experts", "data, fsdp, tensor", marks=pytest.mark.nightly),
    ],
)
def test_eight_devices_sample_the_tokens_and_take_the_step_of_one(name, axes):
    rollouts, gradient, metrics = alone(name)
    found, other, measured = run(name, make_mesh(**MESHES[axes]), micro_batches=2)
    np.testing.assert_array_equal(found.tokens, rollouts.tokens)
    np.testing.assert_array_equal(found.length, rollouts.length)
    np.testing.assert_allclose(found.logp, rollouts.logp, atol=1e-5)
    assert metrics.keys() == measured.keys()
    for key, value in metrics.items():
        assert measured[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(gradient))
    assert scale > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-5 * scale, rtol=1e-5), gradient, other)


@pytest.mark.parametrize(
    ("sizes", "more"),
    [
        pytest.param({"fsdp": 8}, {}, marks=pytest.mark.nightly),
        ({"fsdp": 2, "tensor": 2, "expert": 2}, EXPERTS | {"tied": True}),
        ({"fsdp": 2, "tensor": 2, "sequence": 2}, {}),
    ],
)
def test_no_device_holds_a_whole_table_or_tokens_by_vocabulary(sizes, more, monkeypatch):
    vocabulary, width, rows, length = 8192, 64, 8, 66
    monkeypatch.setattr(core, "GATHERED_BYTES", vocabulary * width)  # a fourth of a table of float32
    mesh = make_mesh(**sizes)
    policy = models.decoder(vocab_size=vocabulary, width=width, layers=1, heads=2, **{"mlp_width": 16} | more)
    method, optimizer, key = methods.sft(), optax.adam(1e-3), jax.random.key(0)
    shapes = jax.eval_shape(lambda: training.init({"policy": policy.init(key)}, method, optimizer, jax.random.key(1)))
    layout = training.state_shardings(shapes, method, optimizer, mesh, {"policy": policy.axes()})
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)
    batch = data.to_rollouts([[1] * 32] * rows, [[[1] * 33]] * rows, length=length)
    step = training.make_step(models.score(policy), method, optimizer, mesh=mesh)
    compiled = step.lower(state, batch).compile()
    assert largest_array(compiled) < min(vocabulary * width, rows * (length - 1) * vocabulary)
    shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled.as_text())]
    split = "sequence" in sizes
    assert any(shape.count(length) >= 2 for shape in shapes) != split  # scores of all places for all places
    assert any({length // 2, length} <= set(shape) for shape in shapes) == split  # ... of half of them for all
    assert any(length in shape and width in shape for shape in shapes) != split  # states of a whole row
    # The unembedding is gathered in pieces, forward and backward, and the gradient of each scattered. The embedding is
    # not: what its devices exchange are rows of the tokens.
    piece = max(np.prod(shape) for c in collectives(compiled) for shape in c.shapes)
    large = [(c.operation, c.in_loop) for c in collectives(compiled) if max(map(np.prod, c.shapes)) == piece]
    assert piece == vocabulary * width // 4
    assert large == [("all-gather", True)] * 2
    columns = width * mesh.shape["tensor"] // 8
    scattered = [c.shapes for c in collectives(compiled) if c.operation == "reduce-scatter" and c.in_loop]
    assert scattered == [((1, vocabulary // 4, columns),)]

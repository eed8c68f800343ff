"""Experts, and the embedding, on meshes that do not divide what they are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import models
from jaxrl_post.kernels.platform import Device
from jaxrl_post.mesh import make_mesh, place, shardings
from jaxrl_post.models import experts

LORA = models.Lora(rank=2, alpha=3.0, targets=("gate_up", "down"))
SIZES = {"vocab_size": 12, "width": 8, "layers": 2, "heads": 2, "mlp_width": 8, "experts": 4, "experts_per_token": 2}
POLICY = models.decoder(**SIZES, tied=True, init_std=0.4, lora=LORA)
TOKENS = jax.random.randint(jax.random.key(1), (6, 5), 0, 12)


def program(mesh=None):
    """The sum of a function of the states, its gradient, and on a mesh those after prefill and one decoded token."""
    params = jax.jit(POLICY.init)(jax.random.key(0))
    for projection in ("gate", "up", "down"):  # at first they add nothing
        params["layers"]["mlp"][f"{projection}_lora"]["b"] += 0.3
    positions = jnp.broadcast_to(jnp.arange(5), TOKENS.shape)

    def run(params):
        def loss(params):
            hidden, aux = POLICY.hidden(params, TOKENS, positions)
            return jnp.sum(jnp.sin(hidden)) + jnp.sum(aux["router_probability"] ** 2), hidden

        found = jax.value_and_grad(loss, has_aux=True)(params)
        if mesh is None:
            return found, None
        cache = POLICY.init_cache(*TOKENS.shape, jnp.float32)
        first, cache = POLICY.prefill(params, TOKENS[:, :4], positions[:, :4], cache)
        last, _ = POLICY.decode(params, TOKENS[:, 4:], positions[:, 4:], cache)
        return found, jnp.concatenate([first, last], axis=1)

    if mesh is None:
        return jax.jit(run)(params)
    with jax.set_mesh(mesh):
        params = place(params, shardings(params, POLICY.axes(), mesh))
        return jax.jit(run)(params)


@pytest.fixture(scope="module")
def alone():
    return program()


@pytest.mark.parametrize(
    "sizes",
    [
        # Six rows are split over fsdp alone, so that devices with different experts have the same rows.
        {"fsdp": 2, "tensor": 2, "expert": 2},
        pytest.param({"data": 3, "expert": 2}, marks=pytest.mark.nightly),  # over both
        pytest.param({"expert": 8}, marks=pytest.mark.nightly),  # neither experts nor rows are split
    ],
)
def test_states_and_gradients_are_those_of_one_device(sizes, alone):
    agree(program(make_mesh(**sizes)), alone)


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "tensor": 2, "expert": 2}])
def test_the_chosen_experts_come_to_the_same_as_all_of_them(sizes, alone, monkeypatch):
    """As accelerators have it: many tokens go through the experts that they chose, few through all."""
    rows = []

    def ragged_dot(x, *others):
        rows.append(len(x))
        return real(x, *others)

    real = jax.lax.ragged_dot
    monkeypatch.setattr(jax.lax, "ragged_dot", ragged_dot)
    monkeypatch.setattr(experts, "current_device", lambda: Device("gpu", ""))
    monkeypatch.setattr(experts, "FEW", 6)
    agree(program(make_mesh(**sizes)), alone)
    assert rows
    assert min(rows) > 2 * 6  # two experts for each token


def agree(found, wanted):
    ((value, hidden), gradient), cached = found
    ((expected, states), wanted), _ = wanted
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(hidden, states, atol=1e-5)
    np.testing.assert_allclose(cached, states, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5), gradient, wanted)

"""Published models, with fewer layers, through the real TPU compiler: scoring and its gradient on a slice of chips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_post import data, models
from jaxrl_post import mesh as mesh_lib
from jaxrl_post.models.pretrained import known_configs
from tests.tpu import pod

LENGTH = 256
EVERY_COMMIT = ("Qwen/Qwen3-0.6B",)
"""The one that is compiled soonest; those with windows, with experts and the larger ones are compiled every night."""


def names():
    for name in known_configs():
        yield pytest.param(name, marks=() if name in EVERY_COMMIT else pytest.mark.nightly)


@pytest.mark.parametrize("name", list(names()))
def test_a_published_model_is_compiled_for_a_slice_and_spread_over_it(name):
    layers = 6 if "gemma" in name else 2  # one of six layers of Gemma 3 is global
    policy = models.from_config(
        {**known_configs()[name], "num_hidden_layers": layers}, dtype=jnp.bfloat16, remat="full"
    )
    shapes, seed = jax.eval_shape(policy.init, jax.random.key(0)), jax.random.key(0)
    batch = jax.eval_shape(lambda: data.to_rollouts([[0] * 8] * 4, [[[0] * 200] * 2] * 4, length=LENGTH))

    def loss(params, rollouts, key):
        return models.score(policy, max_chosen=200)(params, rollouts, frozenset({"logp"}), key).logp.sum()

    with pod("v5e:2x4", fsdp=8) as mesh:
        layout = mesh_lib.shardings(shapes, policy.axes(), mesh)
        place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
        params = jax.tree.map(place, shapes, layout)
        rollouts = jax.tree.map(place, batch, mesh_lib.rollout_shardings(batch, mesh))
        key = jax.ShapeDtypeStruct((), seed.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
        compiled = jax.jit(jax.grad(loss), out_shardings=layout).lower(params, rollouts, key).compile()
    memory = compiled.memory_analysis()
    whole = sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    assert memory.argument_size_in_bytes < 1.05 * whole / 8 + 2**20
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 16e9  # of a v5e chip

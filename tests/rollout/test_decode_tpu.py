"""A step of decoding of a published model, compiled for slices of TPUs: what it reads, and that it copies no cache."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_post import mesh as mesh_lib
from jaxrl_post import models
from jaxrl_post.models.cache import CACHE_AXES
from jaxrl_post.models.pretrained import known_configs
from jaxrl_post.planning import chips, costs
from tests.tpu import pod

CAPACITY = 1536


def shapes(tree, shardings):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def local_bytes(tree):
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compiled_step(model, topology, tensor, rows):
    """The step on a mesh that splits heads, and bytes of a device's weights and cache."""
    policy = models.from_config(known_configs()[model], dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)

    def step(params, tokens, positions, cache):
        hidden, cache = policy.decode(params, tokens, positions, cache)
        return jnp.argmax(models.logits(policy.unembed(params), hidden[:, 0]), axis=-1), cache

    params = jax.eval_shape(policy.init, jax.random.key(0))  # nothing is computed where devices are described only
    with pod(topology, tensor=tensor) as mesh:
        params = shapes(params, mesh_lib.shardings(params, policy.axes(), mesh))
        cache = jax.eval_shape(lambda: policy.init_cache(rows, CAPACITY))
        axes = cache._replace(k=CACHE_AXES, v=CACHE_AXES, positions=("batch", None), index=())
        cache = shapes(cache, mesh_lib.shardings(cache, axes, mesh))
        tokens = jax.ShapeDtypeStruct((rows, 1), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
        compiled = jax.jit(step, donate_argnums=3).lower(params, tokens, tokens, cache).compile()
    return compiled, local_bytes(params), local_bytes((cache.k, cache.v)), cache.k.sharding.shard_shape(cache.k.shape)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("model", "topology", "tensor", "rows"),
    [
        ("Qwen/Qwen3-8B", "v5e:2x4", 8, 64),
        ("Qwen/Qwen3-8B", "v5p:2x2x1", 4, 64),
        ("Qwen/Qwen3-30B-A3B", "v5p:2x2x1", 4, 64),
    ],
)
def test_a_step_reads_weights_and_cache_about_once_fits_and_copies_no_cache(model, topology, tensor, rows):
    compiled, weights, cache, shape = compiled_step(model, topology, tensor, rows)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert costs.count(text).total.bytes < 1.15 * (weights + cache)
    assert memory.alias_size_in_bytes >= cache  # it is donated
    assert memory.temp_size_in_bytes < 0.05 * cache
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < chips.topology(topology).chip.memory
    whole = ",".join(map(str, shape))
    assert whole in text
    assert not re.search(rf"= bf16\[{whole}\]\S* (copy|copy-start|transpose)\(", text)

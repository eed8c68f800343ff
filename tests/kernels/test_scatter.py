"""The gradient of rows that were gathered goes back to the devices that hold their columns, each its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_post.kernels.token_logprob import core
from jaxrl_post.mesh import make_mesh
from jaxrl_post.planning import compiler, costs
from jaxrl_post.planning.costs import Collective

AT = core.Layout(rows=("fsdp",), width=("fsdp",), row_shards=8)


def scattered(mesh):
    """`[8, R, D]`, of each device the gradient of all columns, to `[R, D]`."""
    given, columns = PartitionSpec("fsdp"), PartitionSpec(None, "fsdp")
    local = jax.shard_map(lambda x: core.scatter(AT, x[0]), mesh=mesh, in_specs=given, out_specs=columns)
    return jax.jit(local, in_shardings=NamedSharding(mesh, given))


@pytest.mark.parametrize(("rows", "width"), [(64, 1024), (64, 8), (5, 24)])  # whole tiles, and columns that are none
def test_each_device_gets_the_sum_of_its_columns(rows, width):
    x = np.random.default_rng(0).integers(-9, 9, (8, rows, width)).astype(np.float32)
    np.testing.assert_array_equal(scattered(make_mesh(fsdp=8))(x), x.sum(0))


@pytest.mark.parametrize(
    ("rows", "width"),
    [
        (4748, 4096),  # a piece of Qwen3-8B's table: 594 tiles by 4
        (18992, 1024),  # of Qwen3-0.6B's: 2374 tiles, which are no multiple of 8
        (6848, 2560),  # 320 columns: two tiles and a half
    ],
)
@pytest.mark.parametrize("chips", ["v5e:2x4", "v6e:2x4"])
def test_no_tpu_is_sent_the_columns_of_others(chips, rows, width):
    mesh = make_mesh(fsdp=8, devices=compiler.devices(chips))
    with compiler.uncached():
        compiled = scattered(mesh).lower(jax.ShapeDtypeStruct((8, rows, width), jnp.float32)).compile()
    sent = costs.count(compiled.as_text() or "").total.collectives
    assert sent[Collective("reduce-scatter", 8)] == (pytest.approx(4 * rows * width, rel=0.01), 1)
    # A shard is laid out in whole tiles, and what that moves over its ends goes to the next device.
    assert sum(moved for moved, _ in sent.values()) < 1.01 * 4 * rows * width

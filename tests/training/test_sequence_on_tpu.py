"""A whole train step of real layers, compiled for a slice of TPUs whose mesh splits positions too."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxrl_post import data, methods, models, training
from jaxrl_post.mesh import make_mesh
from jaxrl_post.planning import compiler, costs
from jaxrl_post.planning.costs import Collective

VOCABULARY, WIDTH, LAYERS, ROWS, LENGTH = 65536, 1024, 3, 8, 2048


@pytest.mark.nightly
def test_no_device_of_a_slice_that_splits_positions_holds_a_whole_parameter_or_is_sent_a_whole_gradient():
    mesh = make_mesh(fsdp=4, sequence=2, devices=compiler.devices("v5e:2x4"))
    policy = models.decoder(
        vocab_size=VOCABULARY,
        width=WIDTH,
        layers=LAYERS,
        heads=16,
        kv_heads=8,
        head_dim=128,
        mlp_width=3072,
        qk_norm=True,
        dtype=jnp.bfloat16,
        remat="full",
    )
    method, optimizer, key = methods.sft(), optax.adam(1e-3), jax.random.key(0)
    shapes = jax.eval_shape(lambda: training.init({"policy": policy.init(key)}, method, optimizer, jax.random.key(1)))
    layout = training.state_shardings(shapes, method, optimizer, mesh, {"policy": policy.axes()})
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)
    batch = data.to_rollouts([[1] * (LENGTH // 4)] * ROWS, [[[1] * (LENGTH // 2)]] * ROWS, length=LENGTH)
    step = training.make_step(models.score(policy), method, optimizer, mesh=mesh)
    with compiler.uncached():
        text = step.lower(state, batch).compile().as_text()
    held = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)}
    matrices = {x.shape for x in jax.tree.leaves(shapes.params) if x.size > 2**20}
    assert len(matrices) == 6  # the tables; of the layers' maps, keys' and values', and two of the MLP's, are alike
    assert not matrices & held
    sent = costs.count(text).total.collectives
    assert sent[Collective("reduce-scatter", 8)][0] == pytest.approx(4 * VOCABULARY * WIDTH, rel=0.01)
    assert sum(moved for kind, (moved, _) in sent.items() if kind.operation == "all-reduce") < 2**20

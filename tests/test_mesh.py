"""Where arrays lie on a mesh: the table, and the functions that read it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrl_post.data import to_rollouts
from jaxrl_post.mesh import AXES, RULES, constrain, make_mesh, place, rollout_shardings, shardings, spec, spread

SIZES = {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1, "expert": 1}


def entries(axes, shape, sizes=SIZES, **keywords):
    return tuple(spec(axes, shape, sizes, **keywords))


def test_a_mesh_has_all_axes_in_order_and_takes_the_first_devices():
    mesh = make_mesh(data=2, tensor=3)
    assert mesh.axis_names == AXES == ("data", "fsdp", "tensor", "sequence", "expert")
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 3, "sequence": 1, "expert": 1}
    assert mesh.devices.reshape(-1).tolist() == jax.devices()[:6]
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert make_mesh(fsdp=2, devices=jax.devices()[6:]).devices.reshape(-1).tolist() == jax.devices()[6:]


def test_a_mesh_that_cannot_be_is_refused():
    with pytest.raises(
        ValueError, match=r"'fsdp': 4, 'tensor': 4.* needs 16 devices but 8 are available; make an axis"
    ):
        make_mesh(fsdp=4, tensor=4)
    with pytest.raises(ValueError, match=r"needs 2 devices but 1 are available"):
        make_mesh(data=2, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match=r"mesh sizes must be at least 1, got .*'data': 0"):
        make_mesh(data=0)


def test_each_logical_axis_goes_where_the_table_says():
    assert entries(("vocab", "embed"), (8, 4)) == ("tensor", "fsdp")
    assert entries(("layers", "embed", "heads", "head_dim"), (3, 4, 4, 4)) == (None, "fsdp", "tensor", None)
    assert entries(("batch", "length", None), (8, 6, 6)) == (("data", "fsdp"), None, None)


def test_a_dimension_that_the_axis_does_not_divide_is_kept_whole():
    assert entries(("vocab", "embed"), (39, 4)) == (None, "fsdp")
    assert entries(("heads",), (1,)) == (None,)


def test_of_several_axes_those_are_taken_that_divide_what_is_left():
    assert entries(("batch",), (4,)) == (("data", "fsdp"),)
    assert entries(("batch",), (6,)) == ("data",)  # 6 / 2 = 3, which fsdp does not divide
    assert entries(("batch",), (4,), {"data": 3, "fsdp": 4}) == ("fsdp",)
    assert entries(("batch",), (5,)) == (None,)


def test_a_mesh_axis_is_used_once_by_the_first_that_asks():
    assert entries(("vocab", "heads", "embed"), (4, 4, 4)) == ("tensor", None, "fsdp")
    assert entries(("batch", "embed"), (4, 4)) == (("data", "fsdp"), None)
    assert entries(("heads", "vocab"), (3, 4)) == (None, "tensor")  # not used by what it does not divide


def test_sequence_splits_positions_where_it_can_and_else_rows():
    sizes = {"fsdp": 2, "sequence": 2}
    assert entries(("batch", "length", None), (4, 6, 6), sizes) == ("fsdp", "sequence", None)
    assert entries(("batch", "length"), (4, 1), sizes) == (("fsdp", "sequence"), None)
    assert entries(("batch", "length"), (2, 3), sizes) == ("fsdp", None)
    assert entries(("layers", "batch", None), (3, 4, 6), sizes) == (None, ("fsdp", "sequence"), None)  # no positions
    assert entries(("vocab", "embed"), (8, 8), sizes) == (None, ("fsdp", "sequence"))


def test_axes_of_size_one_and_axes_that_the_mesh_lacks_are_not_named():
    assert entries(("vocab", "embed"), (8, 8), {"tensor": 1, "fsdp": 2}) == (None, "fsdp")
    assert entries(("vocab", "embed"), (8, 8), {"fsdp": 2}) == (None, "fsdp")


def test_no_names_replicate_and_another_table_may_be_given():
    assert entries(None, (4, 4)) == ()
    assert entries((None, None), (4, 4)) == (None, None)
    assert entries(("vocab",), (8,), rules={"vocab": ("data", "tensor")}) == (("data", "tensor"),)


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match=r"unknown logical axis 'vocabulary'; the table holds \['act_embed', "):
        spec(("vocabulary",), (8,), SIZES)
    with pytest.raises(ValueError, match=r"1 logical axes \('vocab',\) were given for an array of shape \(8, 4\)"):
        spec(("vocab",), (8, 4), SIZES)


def test_every_rule_names_axes_of_the_mesh():
    for rule in RULES.values():
        assert set(AXES) >= set((rule,) if isinstance(rule, str) else rule or ())


def test_every_leaf_of_a_tree_gets_its_sharding():
    mesh = make_mesh(fsdp=2, tensor=2)
    tree = {
        "table": jax.ShapeDtypeStruct((8, 4), jnp.float32),
        "layers": [jnp.zeros((3, 4)), jnp.zeros(())],
        "pair": (jnp.zeros(4), jnp.zeros((5, 5))),
    }
    axes = {"table": ("vocab", "embed"), "layers": [("layers", "mlp"), ()], "pair": (("embed",), None)}
    out = shardings(tree, axes, mesh)
    assert jax.tree.structure(out) == jax.tree.structure(tree)
    assert all(leaf.mesh == mesh for leaf in jax.tree.leaves(out))
    assert tuple(out["table"].spec) == ("tensor", "fsdp")
    assert tuple(out["layers"][0].spec) == (None, "tensor")
    assert tuple(out["layers"][1].spec) == ()
    assert tuple(out["pair"][0].spec) == ("fsdp",)
    assert out["pair"][1].is_fully_replicated
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(shardings(tree, None, mesh)))


def test_a_tree_of_another_structure_or_shape_is_refused():
    mesh = make_mesh(fsdp=2)
    with pytest.raises(ValueError):
        shardings({"a": jnp.zeros(4), "b": jnp.zeros(4)}, {"a": ("embed",)}, mesh)
    with pytest.raises(ValueError, match=r"1 logical axes \('embed',\) were given for an array of shape \(4, 4\)"):
        shardings({"a": jnp.zeros((4, 4))}, {"a": ("embed",)}, mesh)


def test_without_a_mesh_constrain_gives_the_very_array_but_still_reads_the_names():
    x = jnp.ones((4, 4))
    assert constrain(x, ("batch", None)) is x
    assert "sharding" not in str(jax.make_jaxpr(lambda x: constrain(x, ("batch", None)))(x))
    with pytest.raises(ValueError, match="unknown logical axis 'bach'"):
        constrain(x, ("bach", None))
    with pytest.raises(ValueError, match="1 logical axes"):
        constrain(x, ("batch",))


def test_on_a_mesh_of_one_device_constrain_does_nothing():
    x = jnp.ones((4, 4))
    with jax.set_mesh(make_mesh()):
        assert constrain(x, ("batch", None)) is x


def test_under_a_mesh_constrain_places_the_array_in_a_compiled_function():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    x = jnp.arange(32.0).reshape(4, 8)
    with jax.set_mesh(mesh):
        out = jax.jit(lambda x: constrain(2 * x, ("batch", "act_mlp")))(x)
        odd = jax.jit(lambda x: constrain(2 * x, ("batch", "act_mlp")))(jnp.ones((3, 8)))
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "tensor")), 2)
    assert {shard.data.shape for shard in out.addressable_shards} == {(1, 4)}
    assert {shard.data.shape for shard in odd.addressable_shards} == {(3, 4)}
    np.testing.assert_array_equal(out, 2 * x)


def test_constrain_leaves_axes_alone_that_the_caller_handles():
    mesh = make_mesh(data=2, fsdp=2)
    x = jnp.arange(8.0).reshape(4, 2)

    def local(x):
        assert x.shape == (1, 2)
        return constrain(2 * x, ("batch", None))

    rows = PartitionSpec(("data", "fsdp"))
    with jax.set_mesh(mesh):
        out = jax.jit(jax.shard_map(local, in_specs=rows, out_specs=rows))(x)
    np.testing.assert_array_equal(out, 2 * x)
    explicit = Mesh(np.asarray(jax.devices()[:2]), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(explicit):
        np.testing.assert_array_equal(jax.jit(functools.partial(constrain, axes=("batch", None)))(x), x)


def test_what_runs_per_device_is_told_the_axes_of_each_dimension_unless_the_caller_is_per_device():
    mesh = make_mesh(fsdp=2, tensor=2, expert=2)
    experts = ("experts", "embed", "mlp")
    assert spread(experts, (4, 4, 4)) == ((), (), ())
    with jax.set_mesh(mesh):
        assert spread(experts, (4, 4, 4)) == (("expert",), ("fsdp",), ("tensor",))
        assert spread(experts, (3, 4, 4)) == ((), ("fsdp", "expert"), ("tensor",))
        assert spread(("batch", "length"), (8, 3)) == (("fsdp", "expert"), ())

        def local(x):
            assert spread(("batch",), (8,)) == ((),)
            return x

        jax.eval_shape(
            jax.shard_map(local, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec("fsdp")), np.ones(8)
        )


def test_rollouts_are_split_over_the_batch_in_whole_groups():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    four = to_rollouts([[1]] * 4, [[[2], [3], [4]]] * 4, length=2)
    layout = rollout_shardings(four, mesh)
    assert tuple(layout.tokens.spec) == (("data", "fsdp"), None)
    assert tuple(layout.reward.spec) == (("data", "fsdp"), None)
    assert tuple(layout.prompt_id.spec) == (("data", "fsdp"),)
    placed = place(four, layout)
    # Each device holds the rows of the prompts that it holds.
    for tokens, reward in zip(placed.tokens.addressable_shards, placed.reward.addressable_shards, strict=True):
        assert tokens.data.shape == (3, 2)
        assert tokens.index[0].start == 3 * reward.index[0].start


def test_rows_are_split_even_where_there_are_fewer_groups_than_devices():
    mesh = make_mesh(data=2, fsdp=2)
    two = to_rollouts([[1]] * 2, [[[2], [3]]] * 2, length=2)  # four rows, but two groups
    layout = rollout_shardings(two, mesh)
    assert tuple(layout.tokens.spec) == (("data", "fsdp"), None)
    assert tuple(layout.reward.spec) == ("data", None)
    odd = to_rollouts([[1]] * 3, [[[2]]] * 3, length=2)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(rollout_shardings(odd, mesh)))


def test_of_rollouts_what_has_positions_is_split_along_them():
    mesh = make_mesh(fsdp=2, sequence=2)
    four = to_rollouts([[1]] * 4, [[[2], [3]]] * 4, length=6)
    layout = rollout_shardings(four.replace(extras={"hint": np.zeros((4, 6)), "latent": np.zeros((8, 6, 3))}), mesh)
    assert tuple(layout.tokens.spec) == tuple(layout.logp.spec) == ("fsdp", "sequence")
    assert tuple(layout.extras["latent"].spec) == ("fsdp", "sequence", None)
    assert tuple(layout.extras["hint"].spec) == tuple(layout.reward.spec) == (("fsdp", "sequence"), None)


def test_place_puts_host_arrays_on_their_devices_unchanged():
    mesh = make_mesh(fsdp=4, tensor=2)
    tree = {"w": np.arange(32.0, dtype=np.float32).reshape(4, 8), "n": np.int32(3)}
    out = place(tree, shardings(tree, {"w": ("embed", "mlp"), "n": ()}, mesh))
    assert {shard.data.shape for shard in out["w"].addressable_shards} == {(1, 4)}
    assert len(out["w"].addressable_shards) == 8
    np.testing.assert_array_equal(out["w"], tree["w"])
    assert int(out["n"]) == 3

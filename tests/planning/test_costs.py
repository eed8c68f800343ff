"""What compiled programs are counted to do, held against hand counts, XLA's own figures and known trip counts."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import models
from jaxrl_post.planning import buffers, costs, hlo
from jaxrl_post.planning.costs import Collective

N = 16


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


def nested(x):
    """3 rounds of (5 rounds of one product, then one more), after one: 1 + 3 * (5 + 1) = 19 products."""

    def inner(x, _):
        return jnp.sin(x @ x), None

    def outer(x, _):
        return jax.lax.scan(inner, x, None, length=5)[0] @ x, None

    return jax.lax.scan(outer, x @ x, None, length=3)[0]


def test_products_in_nested_loops_count_as_often_as_they_run():
    program = compiled(nested, jnp.ones((N, N)))
    counted = costs.count(program.as_text())
    assert counted.total.flops == 19 * 2 * N**3
    assert counted.once.flops == 3 * 2 * N**3
    assert sorted(counted.loops) == [3, 5]
    assert not counted.open_loops


def test_trip_counts_read_off_the_condition_are_those_that_the_compiler_knows():
    text = compiled(nested, jnp.ones((N, N))).as_text()
    assert text.count("known_trip_count") == 2
    bare = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", text)
    assert costs.count(bare).loops == costs.count(text).loops


def test_elements_of_tuples_may_be_written_where_they_are_used():
    text = compiled(nested, jnp.ones((N, N))).as_text()
    inline = text
    pattern = r"\n *%([\w.\-]+) = [^\n]* get-tuple-element\(%([\w.\-#]+)\), index=(\d+)[^\n]*"
    while found := re.search(pattern, inline):
        inline = inline.replace(found[0], "", 1)
        inline = re.sub(rf"%{re.escape(found[1])}(?![\w.\-])", f"%{found[2]}#{found[3]}", inline)
    assert "#0" in inline
    before, after = costs.count(text), costs.count(inline)
    assert sorted(after.loops) == [3, 5]
    assert (after.total, after.once) == (before.total, before.once)
    assert [one.bytes for one in buffers.at_peak(inline)] == [one.bytes for one in buffers.at_peak(text)]


def test_a_loop_that_the_data_may_end_counts_to_its_bound_and_is_known_as_such():
    def generate(x):
        def go(carry):
            count, x = carry
            return (count < 9) & (x[0, 0] < 1e9)

        return jax.lax.while_loop(go, lambda carry: (carry[0] + 1, carry[1] @ carry[1]), (jnp.int32(2), x))[1]

    counted = costs.count(compiled(generate, jnp.ones((N, N))).as_text())
    assert [one.trips for one in counted.open_loops] == [7]
    assert counted.total.flops == counted.open_loops[0].costs.flops == 7 * 2 * N**3


def test_a_loop_that_only_the_data_ends_counts_as_often_as_one_says():
    def run(x):
        return jax.lax.while_loop(lambda x: jnp.all(x < 1e9), lambda x: x @ x, x)

    text = compiled(run, jnp.ones((N, N))).as_text()
    assert costs.count(text).total.flops == 2 * N**3
    counted = costs.count(text, rounds=11)
    assert counted.total.flops == counted.open_loops[0].costs.flops == 11 * 2 * N**3
    assert counted.loops == [None]


def test_of_two_such_loops_in_each_other_the_inner_one_runs_so_often_in_all():
    def run(x):
        def outer(x):
            return jax.lax.while_loop(lambda x: jnp.all(x < 1e3), lambda x: x @ x, x + 1)

        return jax.lax.while_loop(lambda x: jnp.all(x < 1e9), outer, x)

    text = compiled(run, jnp.ones((N, N))).as_text()
    counted = costs.count(text, rounds=12, outer=5)
    assert counted.loops == [None, None]
    assert counted.total.flops == pytest.approx(12 * 2 * N**3)
    assert sorted(one.trips for one in counted.open_loops) == [2.4, 5]


def gradient(layers):
    """The gradient of a decoder's log-probs, the shapes of what it takes, and what its definition asks for."""
    width, mlp, vocab, rows, length = 64, 192, 96, 2, 64
    policy = models.decoder(vocab_size=vocab, width=width, layers=layers, heads=4, mlp_width=mlp)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def loss(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        hidden, _ = policy.hidden(params, tokens, positions)
        return jnp.sum(jax.nn.log_softmax(hidden @ policy.unembed(params).weight.T)[..., 0])

    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    matrices = layers * (4 * width**2 + 3 * width * mlp) + vocab * width
    attention = 3 * layers * 4 * rows * length**2 * width  # every score is computed, also those that are masked
    return jax.grad(loss), (shapes, tokens), 6 * matrices * rows * length + attention


@pytest.fixture(scope="module")
def depths():
    found = {}
    for layers in (2, 5):
        function, shapes, expected = gradient(layers)
        found[layers] = (compiled(function, *shapes), expected)
    return found


@pytest.mark.parametrize("layers", [2, 5])
def test_a_gradient_costs_six_for_each_parameter_and_token_and_its_attention_at_two_depths(depths, layers):
    program, expected = depths[layers]
    assert costs.count(program.as_text()).total.flops == pytest.approx(expected, rel=0.1)


def test_with_loops_counted_once_products_are_what_xla_counts_and_every_depth_is_a_multiple_of_it(depths):
    counted = {layers: costs.count(program.as_text()) for layers, (program, _) in depths.items()}
    xla = {layers: program.cost_analysis()["flops"] for layers, (program, _) in depths.items()}
    for layers in depths:
        # XLA also counts what is no product: norms, the softmax.
        assert 0.85 * xla[layers] < counted[layers].once.flops < xla[layers]
        # c(0) + n (c - c(0)), where c has one layer whatever the depth.
        once = counted[layers].once.flops
        layer = (counted[layers].total.flops - once) / (layers - 1)
        assert counted[layers].total.flops == pytest.approx(once - layer + layers * layer)
    per_layer = (counted[5].total.flops - counted[2].total.flops) / 3
    assert per_layer == pytest.approx((counted[2].total.flops - counted[2].once.flops), rel=1e-6)


LAYERS, ROW = 8, 1024


def test_a_loop_that_reads_a_slice_of_a_stack_moves_the_stack_once():
    def run(stack, x):
        return jax.lax.scan(lambda x, row: (x + jnp.cumsum(row), None), x, stack)[0]

    moved = costs.count(compiled(run, jnp.ones((LAYERS, ROW)), jnp.ones(ROW)).as_text()).total.bytes
    stack = 4 * LAYERS * ROW
    assert stack < moved < 12 * stack  # were the stack read whole in every round, it would be 8 times as much and more


TEXT = """
HloModule test, is_scheduled=true

%slice_of (p0: f32[8,128], p1: s32[]) -> f32[1,128] {
  %p0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[] constant(0)
  ROOT %ds = f32[1,128]{1,0:T(1,128)} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,128}
}

%laid_anew (l0: f32[8,128]) -> f32[8,128] {
  %l0 = f32[8,128]{1,0:T(4,128)} parameter(0)
  ROOT %copied = f32[8,128]{1,0:T(8,128)} copy(%l0)
}

%outer (q0: f32[8,128], q1: s32[]) -> f32[1,128] {
  %q0 = f32[8,128]{1,0:T(4,128)} parameter(0)
  %q1 = s32[]{:T(128)} parameter(1)
  %laid = f32[8,128]{1,0:T(8,128)} fusion(%q0), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%laid_anew
  %inner = f32[1,128]{1,0:T(1,128)} fusion(%laid, %q1), kind=kLoop, calls=%slice_of
  ROOT %negate = f32[1,128]{1,0:T(1,128)} negate(%inner)
}

%update (u0: f32[8,128], u1: f32[1,128], u2: s32[]) -> f32[8,128] {
  %u0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %u1 = f32[1,128]{1,0:T(1,128)} parameter(1)
  %u2 = s32[]{:T(128)} parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %dus = f32[8,128]{1,0:T(8,128)} dynamic-update-slice(%u0, %u1, %u2, %zero.1)
}

%all-reduce-scatter (a0: f32[8,128]) -> f32[2,128] {
  %a0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %ar = f32[8,128]{1,0:T(8,128)} all-reduce(%a0), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %id = s32[] constant(0)
  ROOT %part = f32[2,128]{1,0:T(2,128)} dynamic-slice(%ar, %id, %id), dynamic_slice_sizes={2,128}
}

%begun (b0: f32[2,128]) -> (f32[2,128], f32[8,128]) {
  %b0 = f32[2,128]{1,0:T(2,128)S(1)} parameter(0)
  %bg = f32[8,128]{1,0:T(8,128)S(1)} all-gather(%b0), replica_groups=mesh['a'=2,'b'=8] {'a','b':(2)2}, config={ASYNC}
  ROOT %bs = (f32[2,128]{1,0:T(2,128)S(1)}, f32[8,128]{1,0:T(8,128)S(1)}) custom-call(%bg), "AsyncCollectiveStart"
}

%beside (c0: f32[2,128]) -> (f32[2,128], f32[8,128]) {
  %c0 = f32[2,128]{1,0:T(2,128)S(1)} parameter(0)
  %cg = f32[8,128]{1,0:T(8,128)S(1)} all-gather(%c0), replica_groups=mesh['a'=2,'b'=8] {'a','b':(2)2}, config={ASYNC}
  ROOT %cs = (f32[2,128]{1,0:T(2,128)S(1)}, f32[8,128]{1,0:T(8,128)S(1)}) tuple(%c0, %cg)
}

%aside (s0: f32[2,128]) -> f32[2,128] {
  %s0 = f32[2,128]{1,0:T(2,128)} parameter(0)
  ROOT %moved = f32[2,128]{1,0:T(2,128)} collective-permute(%s0), source_target_pairs={{0,1},{1,0}}
}, execution_thread="sparsecore"

ENTRY %main (x: f32[8,128], i: s32[]) -> f32[8,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %row = f32[1,128]{1,0:T(1,128)} fusion(%x, %i), kind=kOutput, calls=%outer
  %written = f32[8,128]{1,0:T(8,128)} fusion(%x, %row, %i), kind=kLoop, calls=%update
  %near = f32[8,128]{1,0:T(8,128)S(1)} copy(%written)
  %scattered = f32[2,128]{1,0:T(2,128)} fusion(%written), kind=kCustom, calls=%all-reduce-scatter
  %gathered = f32[8,128]{1,0:T(8,128)} all-gather(%scattered), replica_groups=[2,4]<=[8], dimensions={0}
  %strided = f32[2,128]{1,0:T(2,128)} all-reduce(%scattered), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %started = ((f32[2,128]), f32[2,128], s32[]) async-start(%strided), calls=%aside
  %copied = (f32[2,128]{1,0:T(2,128)}, f32[2,128]{1,0:T(2,128)}, u32[]{:S(2)}) copy-start(%strided)
  %fetched = ((f32[8,128]{1,0:T(8,128)}), f32[1,128]{1,0:T(1,128)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:1]}
  %begins = (f32[2,128]{1,0:T(2,128)S(1)}, f32[8,128]{1,0:T(8,128)S(1)}) fusion(%near), kind=kCustom, calls=%begun
  %goes = (f32[2,128]{1,0:T(2,128)S(1)}, f32[8,128]{1,0:T(8,128)S(1)}) fusion(%near), kind=kOutput, calls=%beside
  %out = (f32[2,128]{1,0:T(2,128)}, u32[]{:S(2)}, token[]) send(%strided), config={_xla_megascale_transfer_type="SENT"}
  %kernel = f32[8,128]{1,0:T(8,128)} custom-call(%gathered), custom_call_target="tpu_custom_call", metadata={x="
broken over lines
}}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"77","transcendentals":"0","bytes_accessed":"99"}}}
  ROOT %last = f32[8,128]{1,0:T(8,128)} fusion(%kernel, %row, %i), kind=kLoop, calls=%update, config={CYCLES}
}
"""
TEXT = TEXT.replace("CYCLES", '"estimated_cycles":"1500"').replace("ASYNC", '"async_collective_fusion_config":{}')


def test_traffic_communication_and_kernels_of_a_program_counted_by_hand():
    total = costs.count(TEXT.replace("SENT", "ALL_REDUCE"), slices=3).total
    row, whole, part, index = 512, 4096, 1024, 4
    expected = row + index + row  # a slice of x through a fusion within a fusion
    expected += row + index + row  # written in place
    expected += 2 * part  # sent by another part of the chip
    expected += 2 * part + row  # started: within main memory, and a slice of x to the chip
    expected += whole  # read; what it is copied to is on the chip
    expected += whole + part + part + whole + part + part + 99 + row + index + row
    expected += part  # sent to other slices
    assert total.bytes == expected
    assert total.collectives == {
        Collective("reduce-scatter", 4): (whole, 1),
        Collective("all-gather", 4): (2 * 4 * part, 2),  # one of them beside other work
        Collective("collective-permute", 2): (part, 1),
        Collective("all-reduce", 2): (part, 1),
        Collective("all-reduce", 3, crosses_slices=True): (part, 1),
    }
    assert (total.flops, total.cycles) == (77, 1500)
    # What each of three slices sends, all of them have in the end.
    gathered = costs.count(TEXT.replace("SENT", "ALL_GATHER"), slices=3).total.collectives
    assert gathered[Collective("all-gather", 3, crosses_slices=True)] == (3 * part, 1)


OF_A_SPARSE_CORE = """
HloModule test, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%called (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  ROOT %ar = f32[8,128]{1,0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%sum
}

%offloaded (y: f32[8,128]) -> f32[8,128] {
  %y = f32[8,128]{1,0} parameter(0)
  ROOT %cc = f32[8,128]{1,0} custom-call(%y), custom_call_target="other", called_computations={%called}
}

ENTRY %main (z: f32[8,128]) -> f32[8,128] {
  %z = f32[8,128]{1,0} parameter(0)
  %go = ((f32[8,128]{1,0}), f32[8,128]{1,0}, u32[]) async-start(%z), calls=%offloaded
  ROOT %end = f32[8,128]{1,0} async-done(%go)
}
"""


def test_what_a_sparse_core_communicates_is_counted_once():
    found = costs.count(OF_A_SPARSE_CORE).total
    assert found.collectives == {costs.Collective("all-reduce", 4): (4.0 * 8 * 128, 1.0)}


@pytest.mark.parametrize(
    ("shapes", "attributes", "out", "expected"),
    [
        # A plain product as the TPU's compiler writes it.
        ("f32[6,8] f32[8,10]", "dim_labels=bf_io->bf", "f32[6,10]", 2 * 6 * 8 * 10),
        # A batch of 5 products as a dilated convolution: most of the window lies on zeros.
        (
            "bf16[5,6,8] bf16[5,8,10]",
            "window={size=5 stride=4 pad=0_0 lhs_dilate=5}, dim_labels=0bf_0io->0bf",
            "bf16[5,6,10]",
            2 * 5 * 6 * 8 * 10,
        ),
        # 7 places, a window of 3 with a padding of one on each side: 3 * 7 - 2 pairs.
        ("f32[2,7,4] f32[3,4,9]", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", "f32[2,7,9]", 2 * 19 * 2 * 4 * 9),
    ],
)
def test_convolutions_count_what_is_not_padding(shapes, attributes, out, expected):
    left, right = shapes.split()
    text = f"""
ENTRY %main (a: {left}, b: {right}) -> {out} {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  ROOT %c = {out} convolution(%a, %b), {attributes}
}}
"""
    assert costs.count(text).total.flops == expected


def test_the_arrays_at_the_worst_moment_are_those_that_are_alive_then():
    def run(x):
        def step(carry, _):
            big = jnp.outer(carry, carry)
            return jnp.sort(big, axis=0)[0], None

        return jax.lax.scan(step, x, None, length=4)[0]

    found = buffers.at_peak(compiled(run, jnp.ones(512)).as_text())
    big = [one for one in found if one.bytes == 4 * 512**2]
    assert 1 <= len(big) <= 3
    assert big[0].shape == "f32[512,512]"
    assert "while/body" in big[0].source


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="has no ENTRY"):
        hlo.parse("nothing")
    assert np.isclose(sum(a.bytes for a in hlo.arrays("(s4[3,4], pred[2], token[])")), 8)

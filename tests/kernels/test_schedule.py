"""The reader of schedules: a hand-written dump whose counts can be worked out on paper, and kernels of known work."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tests.benchmarks.serial_logsumexp import serial_logsumexp
from tests.kernels.bundles import read_bundles, read_vmem
from tests.kernels.issue import issue_counts
from tests.kernels.prediction import predict
from tests.kernels.schedule import ScheduleError, Work, compare, measure

# Six rounds of a loop (bundles 1 to 0xf). Each copies 64 granules in; every second round skips bundles 7 and 8, and
# bundles 9 and 0xa are a loop of four rounds around a multiplication. A branch is taken after four more bundles.
DUMP = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %s1_s0 = smov.u32 0 /* a ;; comment with a } in it */  ;;  %s9_s9 = smov.u32 64 }
   0x1 LB: > { %s2_s0 = sphi %s1_s0, %s3_s0  ;;  %s4_s1 = sand.u32 1, %s2_s0 } /* Start region 10 */
   0x2   : > { %p5_p0 = scmp.eq.s32.totalorder %s4_s1, 0  ;;  %7 = dma.hbm_to_vmem [thread:$0]  (!%p5_p1), \
/*hbm=*/%s8_s3, /*size_in_granules=*/%s9_s9, /*vmem=*/%s8_s3 /*
iteration_bounds: (3, 2)
 */ }
   0x3   : > { %10 = sbr.rel (%p5_p0) target = $region21  ;;  %p5_p1 = scmp.eq.s32.totalorder 1, 2 }
   0x4   : > { %11 = sst [smem:[#allocation2_spill]] %s2_s0 }
   0x5   :  {}
   0x6   : > { %s12_s2 = smov.u32 0 }
   0x7   :  {} /* Start region 20 */
   0x8   : > { %v1_v1 = vexp2.f32 %v0_v0 } /* End region 20 */
   0x9 PF: >> { %s13_s2 = sphi %s12_s2, %s14_s2  ;;  %v2_v2 = vmatmul.mubr.bf16.gmra.mxu0 %v1_v1 } \
/* Start/End empty region 21 */
   0xa   : >> { %s14_s2 = sadd.s32 1, %s13_s2 }
   0xb   : >> { %p15_p2 = scmp.lt.s32.totalorder %s14_s2, 4 }
   0xc   : >> { %16 = sbr.rel (%p15_p2) target = $region21 }
   0xd   : >> { %17 = vst [vmem:[#allocation3_spill] sm:$0xff] %v2_v2 }
   0xe   :  {}
   0xf   :  {}
  0x10   :  {}
  0x11   : > { %s18_s5 = sld [smem:[#allocation2_spill]] }
  0x12   : > { %s3_s0 = sadd.s32 1, %s18_s5 }
  0x13   : > { %p19_p3 = scmp.ge.s32.totalorder %s3_s0, 6 /* loop exit test */ }
  0x14   : > { %20 = sbr.rel (!%p19_p3) target = $region10 }
  0x15   :  {}
  0x16   :  {}
  0x17   :  {}
  0x18   :  {}
  0x19   :  { %21 = vsyncpa [#allocation5], 1 }
"""
COUNTS = [1] + [6] * 7 + [3] + [24] * 8 + [6] * 8 + [1]


def utilization(bundles: int = 26) -> str:
    rows = [[0] * 9 for _ in range(bundles)]
    rows[0x8][3] = 1
    rows[0x9][0] = 2
    rows[0xD][6:8] = [1, 1]
    names = "MATMUL, VALU, XLU, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"
    table = "\n".join(" ".join(map(str, row)) for row in rows)
    return f"== CAPACITY:\n{names}\n 2 4 2 1 3 3 2 2 2\n== UTILIZATION:\n{table}\n"


def test_bundles_are_counted_as_often_as_their_loops_and_branches_issue_them():
    issued = issue_counts(read_bundles(DUMP), slots=4)
    assert issued.counts == COUNTS


def test_bytes_copied_are_those_of_the_copies_whose_predicate_holds():
    # The first round reads a predicate that nothing has set yet, so the sum is not known; set, it is six copies.
    assert issue_counts(read_bundles(DUMP), slots=4).copied is None
    known = DUMP.replace("%s9_s9 = smov.u32 64 }", "%s9_s9 = smov.u32 64  ;;  %p5_p1 = scmp.eq.s32.totalorder 1, 2 }")
    assert issue_counts(read_bundles(known), slots=4).copied == 6 * 64 * 32


def test_a_prediction_adds_up_what_was_issued_and_holds_multiplications_to_their_peak():
    found = predict(DUMP, utilization(), "v6e", "hand", Work(flops=24 * 2 * 256 * 256 * 16))
    assert found.steps == 6
    assert found.bundles == sum(COUNTS)
    # A multiplication of 16 x 256 x 256 takes 4 cycles at 524288 FLOP a cycle, less than its block's 8 bundles.
    assert found.cycles == found.bundles
    assert found.floor == 24 * 4
    assert found.fraction == pytest.approx(96 / sum(COUNTS))
    assert found.per_step["vmatmul"] == 4
    assert found.per_step["EUP"] == 0.5
    assert found.spill_share == 1.0
    assert found.body == 0x18


def test_a_block_is_no_shorter_than_its_multiplications():
    crowded = DUMP.replace("%p15_p2 = scmp", "%v3_v3 = vmatmul.f32.gmra.mxu1 %v1_v1  ;;  %p15_p2 = scmp")
    crowded = crowded.replace("vmatmul.mubr.bf16.gmra.mxu0 %v1_v1", "  ;;  ".join(["vmatmul.mubr.bf16 %v1_v1"] * 3))
    found = predict(crowded, utilization(), "v6e")
    # 3 x 4 cycles of bf16 and 2 of f32, which has 8 rows a register, against 8 bundles; 24 times.
    assert found.cycles == sum(COUNTS) + 24 * (14 - 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("   0x5   :", "   0x6   :"), "expected bundle 0x5"),
        (("smov.u32 0 }\n   0x7", "smov.u32 0 \n   0x7"), "does not end with a brace"),
        (("target = $region10", "target = $region77"), "cannot follow the branch"),
        (("sbr.rel (!%p19", "sbr.ind (!%p19"), "cannot follow the branch"),
        (("%s2_s0 = sphi", "%s2_s0 = snew.u32"), "3 branches depend on data|2 branches depend on data"),
        (("vmatmul.mubr.bf16.gmra", "vmatmul.mubr.s8.gmra"), "bf16 and f32"),
        (("vmatmul.mubr.bf16.gmra", "vnewmul.mubr.bf16.gmra"), "disagree on whether there are multiplications"),
    ],
)
def test_a_dump_that_is_not_understood_gives_no_number(change, message):
    assert change[0] in DUMP
    with pytest.raises(ScheduleError, match=message):
        predict(DUMP.replace(*change), utilization(), "v6e")


def test_work_that_the_schedule_does_not_hold_is_an_error():
    with pytest.raises(ScheduleError, match="asked for"):
        predict(DUMP, utilization(), "v6e", "hand", Work(flops=25 * 2 * 256 * 256 * 16))
    with pytest.raises(ScheduleError, match="expected 26 rows"):
        predict(DUMP, utilization(25), "v6e")


def test_a_branch_on_data_runs_as_often_as_the_caller_says():
    dump = DUMP.replace("%s4_s1 = sand.u32 1, %s2_s0", "%s4_s1 = sld [smem:[#allocation7 + %s2_s0]]")
    with pytest.raises(ScheduleError, match=r"1 branches depend on data, at \['0x3'\]"):
        issue_counts(read_bundles(dump), slots=4)
    assert issue_counts(read_bundles(dump), slots=4, unknown=(1 / 3,)).counts[8] == 2
    with pytest.raises(ScheduleError, match="share"):
        issue_counts(read_bundles(dump), slots=4, unknown=(3.0,))


def test_vmem_is_read_from_the_report():
    report = """<script>const DATA ={
  "hlo_breakdowns": {"hand.1": {"total_size": 96, "blocks": [
    {"allocations": [{"size": 64, "tag": "scratch operand"}, {"size": 32, "tag": "SPILL"}]}]}}
};</script>"""
    assert read_vmem([report]) == {"hand.1": (96, 32)}
    with pytest.raises(ScheduleError, match="no data"):
        read_vmem(["<html/>"])


def test_the_guard_names_losses_beyond_the_tolerance_and_what_has_no_record():
    recorded = {"a": 0.9, "b": 0.9, "c": 0.9, "gone": 0.9}
    found = {"a": 0.86, "b": 0.85, "c": 0.99, "new": 0.5}
    complaints = compare(recorded, found, tolerance=0.05)
    assert [line.partition(":")[0] for line in complaints] == ["b", "gone", "new"]
    assert "predicted from the compiler's schedule" in complaints[0]


def counted(steps: int = 16):
    """Exponentials of known number: 15 a step in nested loops, 2 in steps 1, 6 and 11, 4 in steps 5 to 9."""

    def kernel(x, out):
        step = pl.program_id(0)
        out[...] = jnp.zeros_like(out)

        def inner(i, _):
            out[0:8] += jnp.exp(x[0:8] * i.astype(jnp.float32))

        jax.lax.fori_loop(0, 3, lambda *_: jax.lax.fori_loop(0, 5, inner, None), None)

        @pl.when(step % 5 == 1)
        def _():
            out[0:16] += jnp.exp(x[0:16])

        @pl.when(step // 5 == 1)
        def _():
            out[...] += jnp.exp(x[...])

    tile = pl.BlockSpec((32, 128), lambda step: (step, 0))
    shape = jax.ShapeDtypeStruct((steps * 32, 128), jnp.float32)
    return pl.pallas_call(kernel, out_shape=shape, grid=(steps,), in_specs=[tile], out_specs=tile), (shape,), None


@pytest.mark.parametrize("chip", [pytest.param("v5e", marks=pytest.mark.nightly), "v6e"])
def test_loops_and_rare_blocks_of_a_compiled_kernel_are_counted_by_what_they_do(chip):
    (found,) = measure("tests.kernels.test_schedule:counted", chip)
    assert found.steps == 16
    assert found.per_step["EUP"] * found.steps == 16 * 15 + 3 * 2 + 5 * 4
    assert found.hbm_bytes == 2 * 16 * 32 * 128 * 4
    assert dataclasses.asdict(found)["matmul_flops"] == 0


@pytest.mark.parametrize(("chip", "cores"), [("v5p", 2), pytest.param("tpu7x", 1, marks=pytest.mark.nightly)])
def test_the_multiplications_in_a_schedule_are_those_of_the_shapes(chip, cores):
    shape = {"tokens": 4096, "width": 256, "vocabulary": 4096, "tile_tokens": 512, "tile_vocabulary": 512}
    (found,) = measure("tests.benchmarks.serial_logsumexp:build", chip, **shape, vmem_limit=60 << 20)
    assert found.matmul_flops == 2 * 4096 * 256 * 4096
    assert found.steps * cores == 8 * 8
    assert 0.1 < found.fraction < 1.0
    # Scratch logits, double-buffered tiles of both operands.
    assert found.vmem is not None
    assert found.vmem > 4 * 512 * 512 + 2 * 2 * 2 * 512 * 256


def test_the_serial_baseline_agrees_with_float64():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, unembedding = jax.random.normal(keys[0], (8, 64)), jax.random.normal(keys[1], (300, 64))
    targets = jax.random.randint(keys[2], (8,), 0, 300)
    logsumexp, logit = serial_logsumexp(
        hidden,
        unembedding,
        targets,
        tile_tokens=8,
        tile_vocabulary=128,
        tile_width=32,
        interpret=pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="uninitialized"),
    )
    logits = np.asarray(hidden, np.float64) @ np.asarray(unembedding, np.float64).T
    np.testing.assert_allclose(logsumexp, np.log(np.exp(logits).sum(1)), rtol=1e-6)
    np.testing.assert_allclose(logit, logits[np.arange(8), targets], rtol=1e-5, atol=1e-5)

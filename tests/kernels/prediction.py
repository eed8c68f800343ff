"""The cost of a kernel, predicted from the bundles that the TPU compiler scheduled for it.

A bundle is one cycle; a block of bundles takes at least the cycles that its matrix multiplications need at the chip's
peak, because the scheduler of some chips issues them faster than the unit accepts them. Nothing is known here of stalls
(memory, instruction fetch, power).
"""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Sequence

from tests.kernels.bundles import (
    CORE,
    Bundle,
    ScheduleError,
    matmul_flops,
    read_bundles,
    read_grid,
    read_utilization,
)
from tests.kernels.issue import branches_of, issue_counts


class Chip(typing.NamedTuple):
    """A chip as jax sees it: one device, which on a v5p is two cores that share a kernel's parallel grid axis.

    Attributes:
        clock: cycles per second.
        flop_per_cycle: of one core, with bf16 operands.
        cores: of one device.
        side: rows and columns of a matrix unit.
        slots: bundles after a branch that are issued before it is taken.
        bandwidth: of one device's HBM, bytes per second.
        vmem: of one core, bytes.
    """

    clock: float
    flop_per_cycle: int
    cores: int
    side: int
    slots: int
    bandwidth: float
    vmem: int


# FLOP per cycle: four 128 x 128 units on v5 (197 TFLOP/s at 1.5 GHz; two cores, 459 at 1.75 GHz); on v6e the schedule
# itself spaces multiplications at 524288 FLOP/cycle (918 TFLOP/s at 1.75 GHz); on tpu7x the same rate is libtpu's
# 996 TFLOP/s a core at 1.9 GHz (the nominal 1153 would need 2.2 GHz). Bandwidths are those of libtpu's cost model.
CHIPS = {
    "v5e": Chip(1.5e9, 131072, 1, 128, 4, 738e9, 128 << 20),
    "v5p": Chip(1.75e9, 131072, 2, 128, 4, 2350e9, 64 << 20),
    "v6e": Chip(1.75e9, 524288, 1, 256, 4, 1638e9, 128 << 20),
    "tpu7x": Chip(1.9e9, 524288, 1, 256, 6, 3686e9, 64 << 20),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """What a kernel is asked to do, as its author counts it.

    Attributes:
        flops: of the matrix multiplications, without padding; None takes those that the schedule issues.
        steps: of the grid; None takes the grid's bounds from the dump.
        unknown: frequencies of branches that depend on data, as `issue_counts` takes them.
    """

    flops: float | None = None
    steps: int | None = None
    unknown: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive bundles that are issued together: where, how often, and their slots' use (once through)."""

    start: int
    stop: int
    count: int
    depth: int
    slots: dict[str, int]
    flops: float
    cycles: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predicted from the compiler's schedule; per step means per grid step of one core.

    Attributes:
        kernel: its name in the program.
        chip: a name in `CHIPS`.
        steps: grid steps that one core runs.
        cycles: of the whole call, blocks held to the rate of the matrix unit.
        bundles: of the whole call, as scheduled.
        floor: cycles that the multiplications alone need at peak rate (`Work.flops`, over all cores).
        fraction: `floor / cycles`.
        milliseconds: `cycles` at the chip's clock, or the time of the HBM traffic if that is longer.
        hbm_milliseconds: the kernel's copies between HBM and VMEM at full bandwidth; None if a size is not known.
        hbm_bytes: bytes of these copies over all cores.
        body: bundles of the code inside the grid's loop; a measure of code size.
        vmem: bytes of VMEM, windows, scratch and spills together.
        spill_vmem: bytes of it that hold spilled registers.
        per_step: slots used in one step, by kind.
        matmul_flops: what the issued multiplications do, padding included.
        blocks: where the cycles go, in order of address.
    """

    kernel: str
    chip: str
    steps: int
    cycles: float
    bundles: int
    floor: float
    fraction: float
    milliseconds: float
    hbm_milliseconds: float | None
    hbm_bytes: int | None
    body: int
    vmem: int | None
    spill_vmem: int | None
    per_step: dict[str, float]
    matmul_flops: float
    blocks: tuple[Block, ...] = ()

    @property
    def cycles_per_step(self) -> float:
        return self.cycles / self.steps

    @property
    def spill_share(self) -> float:
        """Of the vector stores, those that spill a register."""
        return self.per_step["VSTORE:SPILL"] / max(self.per_step["VSTORE"], 1e-9)

    def __str__(self) -> str:
        hbm = "not known" if self.hbm_milliseconds is None else f"{self.hbm_milliseconds:.3f} ms"
        vmem = "not known" if self.vmem is None else f"{self.vmem / 2**20:.1f} MiB"
        use = ", ".join(f"{name} {count:.0f}" for name, count in self.per_step.items() if count)
        return (
            f"{self.kernel} on {self.chip}, predicted from the compiler's schedule: {self.milliseconds:.3f} ms "
            f"({self.fraction:.3f} of the MXU floor), HBM {hbm}\n"
            f"  {self.cycles_per_step:.0f} cycles, {self.bundles / self.steps:.0f} bundles a step over {self.steps} "
            f"steps; floor {self.floor / self.steps:.0f}; body {self.body} bundles; VMEM {vmem}, "
            f"spilled stores {self.spill_share:.1%}\n  slots a step: {use}"
        )


def _blocks(counts: Sequence[int], bundles: Sequence[Bundle], chip: Chip, names, rows) -> list[Block]:
    """Cuts a kernel into blocks that are issued equally often and lie in the same loop."""
    flops = [matmul_flops(bundle, chip.side) for bundle in bundles]
    multiplications = [sum(o.opcode.startswith("vmatmul") for o in bundle.operations) for bundle in bundles]
    # The table counts the cycles that a matrix unit is busy, not the instructions; it must agree that there are some.
    if any(flops) != any(row[names.index("MATMUL")] for row in rows):
        raise ScheduleError("the table of slot use and the bundles disagree on whether there are multiplications")
    depths: list[int] = []
    for bundle in bundles:  # empty bundles carry no mark of their loop
        depths.append(bundle.depth if bundle.operations or not depths else depths[-1])
    cuts = [i for i in range(1, len(bundles)) if (counts[i], depths[i]) != (counts[i - 1], depths[i - 1])]
    blocks = []
    for start, stop in itertools.pairwise([0, *cuts, len(bundles)]):
        slots = {"vmatmul": sum(multiplications[start:stop])}
        slots |= {name: sum(row[column] for row in rows[start:stop]) for column, name in enumerate(names)}
        work = sum(flops[start:stop])
        cycles = max(float(stop - start), work / chip.flop_per_cycle)
        blocks.append(Block(start, stop, counts[start], depths[start], slots, work, cycles))
    return blocks


def predict(
    bundles_text: str,
    utilization_text: str,
    chip: str,
    kernel: str = "",
    work: Work | None = None,
    vmem: tuple[int, int] | None = None,
) -> Prediction:
    """What the dump of one kernel says of its cost.

    Args:
        bundles_text: the `final_bundles` dump.
        utilization_text: the dump of slots used per bundle.
        chip: a name in `CHIPS`.
        kernel: name to report.
        work: what the kernel is asked to do.
        vmem: bytes of VMEM, all and for spills.

    Raises:
        ScheduleError: if anything in the dump is not understood or contradicts `work`.
    """
    spec, work = CHIPS[chip], work or Work()
    bundles = read_bundles(bundles_text)
    names, rows = read_utilization(utilization_text, len(bundles))
    split = any(CORE in operation.operands for bundle in bundles for operation in bundle.operations)
    cores = spec.cores if split else 1
    flops, copied, cycles, slowest = 0.0, 0, -1.0, None
    for core in range(cores):
        issued = issue_counts(bundles, spec.slots, core, work.unknown)
        blocks = _blocks(issued.counts, bundles, spec, names, rows)
        flops += sum(block.count * block.flops for block in blocks)
        copied = None if copied is None or issued.copied is None else copied + issued.copied
        taken = sum(block.count * block.cycles for block in blocks) + issued.delays
        if taken > cycles:
            cycles, slowest = taken, (issued, blocks)
    assert slowest is not None
    issued, blocks = slowest

    if work.flops is not None and flops < 0.999 * work.flops:
        raise ScheduleError(f"{kernel}: {work.flops:.6g} FLOP asked for, {flops:.6g} found in the schedule")
    steps = (work.steps // cores if work.steps else None) or read_grid(bundles_text) or 1
    floor = (flops if work.flops is None else work.flops) / (spec.flop_per_cycle * spec.cores)
    hbm = None if copied is None else copied / spec.bandwidth * 1e3
    loops = [b.last + 1 - b.target for at, b in branches_of(bundles, spec.slots).items() if b.target <= at]
    return Prediction(
        kernel=kernel,
        chip=chip,
        steps=steps,
        cycles=cycles,
        bundles=sum(issued.counts) + issued.delays,
        floor=floor,
        fraction=floor / cycles,
        milliseconds=max(cycles / spec.clock * 1e3, hbm or 0.0),
        hbm_milliseconds=hbm,
        hbm_bytes=copied,
        body=max(loops, default=len(bundles)),
        vmem=vmem[0] if vmem else None,
        spill_vmem=vmem[1] if vmem else None,
        per_step={name: sum(block.count * block.slots[name] for block in blocks) / steps for name in blocks[0].slots},
        matmul_flops=flops,
        blocks=tuple(blocks),
    )

"""Programs compiled for a topology, and what that says: memory by kind, operations, traffic, times."""

from __future__ import annotations

import dataclasses
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrl_post.planning import buffers, compiler, costs
from jaxrl_post.planning.chips import Chip, Topology
from jaxrl_post.planning.costs import Costs
from jaxrl_post.planning.programs import Program

LARGEST = 10
"""Arrays that are named of a program that does not fit."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds that a device needs, none of them measured.

    Attributes:
        compute: matrix products at the chip's peak.
        memory: traffic with main memory at its peak.
        communication: between devices, all links busy.
        compiler: what the compiler estimates for its own code, and custom kernels at the peak rates; communication is
            not in it.
    """

    compute: float
    memory: float
    communication: float
    compiler: float | None

    @property
    def roofline(self) -> float:
        """What no program that does the same can beat."""
        return max(self.compute, self.memory, self.communication)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one program, for one device.

    Attributes:
        program: what was compiled.
        memory: bytes by kind: `parameters`, `optimizer`, `other state`, `batch`, `cache`, `temporary`, `output`,
            `code`; kinds that stay in memory without going in are among them.
        peak: bytes at the worst moment, with what stays there meanwhile; None where the compiler gave up.
        fits: whether that is within the chip's memory.
        problem: the compiler's words, if it gave up, for want of memory or for another reason.
        largest: the largest arrays at the worst moment.
        total: operations and traffic; None if the compiler wrote no text.
        unread_loops: those of which neither the program nor the compiler says how often they run; they are counted
            as `program.rounds` and `program.refills` say.
        phases: parts of it, `prefill` and `decode` of a rollout.
        xla: what `cost_analysis` says, with loops counted once.
        once: the same by our count, to be held against it.
        times: of `total`.
        phase_times: of `phases`.
        seconds: that the compiler took.
        executable: the compiled program.
    """

    program: Program
    memory: dict[str, int]
    peak: int | None
    fits: bool
    problem: str | None = None
    largest: tuple[buffers.Buffer, ...] = ()
    total: Costs | None = None
    unread_loops: int = 0
    phases: dict[str, Costs] = dataclasses.field(default_factory=dict)
    xla: dict[str, float] = dataclasses.field(default_factory=dict)
    once: Costs | None = None
    times: Times | None = None
    phase_times: dict[str, Times] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    executable: Any = None


def compile_program(program: Program, topology: Topology) -> Compiled:
    """Compile one program and read off what it needs.

    Args:
        program: from `programs.programs`.
        topology: that its mesh is on.

    Returns:
        The account, also of a program that does not fit, or that the compiler gives up on: one that fails does not
        take away what is known of others.
    """
    began = time.perf_counter()
    executable, problem = None, None
    # What the compiler writes down on its way is there for programs that do not fit too, and where the text of an
    # executable cannot be had (of those with parts on a SparseCore).
    with compiler.uncached(), tempfile.TemporaryDirectory() as notes:
        lowered = program.lower()
        try:
            executable = lowered.compile(compiler_options={"xla_dump_to": notes})
        except Exception as error:  # of many kinds: the compiler's, that of its kernels, the runtime's
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            problem = next(filter(out_of_memory, lines), lines[0])
        text = _text(Path(notes)) if problem is None or out_of_memory(problem) else None
    seconds = time.perf_counter() - began
    counted = None if text is None else costs.count(text, topology.slices, program.rounds, program.refills)
    local = [] if text is None else buffers.at_peak(text)
    memory, peak = _memory(program, executable, local, problem)
    chip = topology.chip
    made = Compiled(
        program,
        memory,
        peak,
        problem is None and peak is not None and peak <= chip.memory,
        problem=problem,
        largest=tuple(local[:LARGEST]),
        xla={} if executable is None else _cost_analysis(executable),
        seconds=seconds,
        executable=executable,
    )
    if counted is None:
        return made
    phases = {}
    if program.cache and counted.open_loops:
        decode = max((one.costs for one in counted.open_loops), key=lambda one: one.bytes)
        prefill = Costs()
        prefill.add(counted.total)
        prefill.add(decode, -1.0)
        phases = {"prefill": prefill, "decode": decode}
    return dataclasses.replace(
        made,
        total=counted.total,
        unread_loops=counted.loops.count(None),
        once=counted.once,
        phases=phases,
        times=times(counted.total, chip),
        phase_times={name: times(part, chip) for name, part in phases.items()},
    )


def _text(notes: Path) -> str | None:
    """The compiled program: as it was at the end, with the compiler's estimates, or as far as it got."""
    for stage in ("after_codegen", "after_optimizations"):
        written = sorted(notes.glob(f"*.{stage}.txt"), key=lambda path: path.stat().st_size)
        if written:
            return written[-1].read_text()
    return None


def _memory(
    program: Program, executable: Any, local: Sequence[buffers.Buffer], problem: str | None
) -> tuple[dict[str, int], int | None]:
    """Bytes by kind, and at the worst moment with what stays in memory without going in."""
    kinds = dict.fromkeys([*program.arguments, *program.resident])
    memory = {kind: program.arguments.get(kind, 0) + program.resident.get(kind, 0) for kind in kinds}
    outside = sum(program.resident.values())
    if executable is None:
        if local:
            temporary = sum(one.bytes for one in local)
            memory |= {"cache": program.cache, "temporary": max(0, temporary - program.cache)}
        stated = re.search(r"\(([\d.]+)([GM])\) exceeds", problem or "")
        unit = 2**30 if stated and stated[2] == "G" else 2**20
        return memory, int(float(stated[1]) * unit) + outside if stated else None
    found = executable.memory_analysis()
    output = found.output_size_in_bytes - found.alias_size_in_bytes
    cache = min(program.cache, found.temp_size_in_bytes)
    memory |= {
        "cache": cache,
        "temporary": found.temp_size_in_bytes - cache,
        "output": output,
        "code": found.generated_code_size_in_bytes,
    }
    most = found.peak_memory_in_bytes or found.argument_size_in_bytes + output + found.temp_size_in_bytes
    return memory, outside + most + found.generated_code_size_in_bytes


def _cost_analysis(executable: Any) -> dict[str, float]:
    found = executable.cost_analysis() or {}
    names = {"flops": "flops", "bytes accessed": "bytes", "optimal_seconds": "optimal_seconds"}
    return {ours: float(found[theirs]) for theirs, ours in names.items() if theirs in found}


def out_of_memory(message: str) -> bool:
    """Whether the compiler gave up for want of the device's main memory."""
    return bool(re.search(r"(?i)CompileTimeHbmOom|exceeds available HBM|out of memory on hbm", message))


def times(total: Costs, chip: Chip) -> Times:
    """How long a device takes at the least, and as the compiler estimates it.

    Args:
        total: what it does.
        chip: what it is.
    """
    inside = outside = 0.0
    for kind, (moved, _) in total.collectives.items():
        sent = (
            moved
            * ((kind.group - 1) / kind.group if kind.group else 1.0)
            * (2 if kind.operation == "all-reduce" else 1)
        )
        sent = moved if kind.operation == "collective-permute" else sent
        if kind.crosses_slices:
            outside += sent
        else:
            inside += sent
    network = outside / chip.network if chip.network else 0.0
    kernels = sum(often * max(flops / chip.flops, moved / chip.bandwidth) for often, flops, moved in total.kernels)
    estimate = total.cycles / chip.clock + kernels if total.cycles else None
    return Times(total.flops / chip.flops, total.bytes / chip.bandwidth, inside / chip.interconnect + network, estimate)

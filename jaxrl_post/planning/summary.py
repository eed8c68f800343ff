"""What was compiled, as a table to read and as one JSON object."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_post.planning.chips import GIB, Topology
from jaxrl_post.planning.costs import Costs
from jaxrl_post.planning.report import Compiled, Times

NOTE = (
    "Nothing here was measured: memory, operations and traffic are the compiler's account for one device (memory of "
    "all kinds is not held at one moment, nor what is donated twice), loops "
    "counted as often as they run; a rollout counts as if every completion took all its tokens. The roofline is the "
    "largest of products, memory and interconnect at the chip's peak rates; the compiler's own estimate has been "
    "within about 15% of hardware on v5 and 10 to 60% too low on v6e and tpu7x."
)


def as_json(compiled: Sequence[Compiled], topology: Topology, mesh: Mapping[str, int]) -> dict[str, Any]:
    """Everything as JSON's types: bytes, operations and seconds of one device.

    Args:
        compiled: the programs of a run.
        topology: what they were compiled for.
        mesh: sizes of its axes.
    """
    chip = topology.chip
    return {
        "topology": topology.name,
        "slices": topology.slices,
        "devices": topology.devices,
        "chips": topology.slices * topology.chips,
        "mesh": dict(mesh),
        "device": {
            "memory_bytes": chip.memory,
            "flops_per_second": chip.flops,
            "memory_bytes_per_second": chip.bandwidth,
            "interconnect_bytes_per_second": chip.interconnect,
        },
        "fits": all(one.fits for one in compiled),
        "programs": [_program(one, topology) for one in compiled],
        "step": step(compiled, topology),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")},
        "note": NOTE,
    }


def step(compiled: Sequence[Compiled], topology: Topology) -> dict[str, float | None] | None:
    """One step of the run's last stage: what it samples and its train step, one after the other, without rewards.

    Args:
        compiled: the programs of a run.
        topology: what they were compiled for.

    Returns:
        `seconds` (the larger of the two that follow), `roofline_seconds`, `compiler_seconds`, `tokens_per_second` (that
        are trained on) and `mfu` (of the model's own operations, by `seconds`); None if one of these programs is not
        among `compiled`, or did not compile.
    """
    by_name = {one.program.name: one for one in compiled}
    trains = [name for name in by_name if name.startswith("step")]
    if not trains:
        return None
    names = (*by_name[trains[-1]].program.needs, trains[-1])
    parts = [by_name[name] for name in names if name in by_name]
    known = [one.times for one in parts if one.times is not None]
    if len(known) < len(names):
        return None
    roofline = sum(one.roofline for one in known)
    estimates = [_estimate(one) for one in known]
    compiler = None if None in estimates else sum(one for one in estimates if one is not None)
    seconds = max(roofline, compiler or 0.0)
    flops = sum(one.program.model_flops for one in parts)
    return {
        "seconds": seconds,
        "roofline_seconds": roofline,
        "compiler_seconds": compiler,
        "tokens_per_second": parts[-1].program.tokens / seconds,
        "mfu": flops / (seconds * topology.devices * topology.chip.flops),
    }


def _estimate(found: Times) -> float | None:
    return None if found.compiler is None else max(found.compiler, found.communication)


def _times(found: Times | None) -> dict[str, float | None] | None:
    if found is None:
        return None
    return {
        "roofline": found.roofline,
        "compute": found.compute,
        "memory": found.memory,
        "communication": found.communication,
        "compiler": _estimate(found),
    }


def _costs(total: Costs | None) -> dict[str, Any] | None:
    if total is None:
        return None
    return {
        "flops": total.flops,
        "bytes": total.bytes,
        "collectives": [
            {
                "operation": kind.operation,
                "group": kind.group,
                "between_slices": kind.crosses_slices,
                "bytes": moved,
                "count": count,
            }
            for kind, (moved, count) in sorted(total.collectives.items())
        ],
        "uncounted_kernels": total.unknown_kernels,
    }


def _program(one: Compiled, topology: Topology) -> dict[str, Any]:
    seconds = None if one.times is None else max(one.times.roofline, _estimate(one.times) or 0.0)
    return {
        "name": one.program.name,
        "fits": one.fits,
        "problem": one.problem,
        "memory_bytes": one.memory,
        "peak_bytes": one.peak,
        "largest": [buffer._asdict() for buffer in one.largest],
        "costs": _costs(one.total),
        "unread_loops": one.unread_loops,
        "phases": {
            name: {"costs": _costs(part), "seconds": _times(one.phase_times[name])} for name, part in one.phases.items()
        },
        "seconds": _times(one.times),
        "tokens": one.program.tokens,
        "tokens_per_second": one.program.tokens / seconds if seconds else None,
        "model_flops": one.program.model_flops,
        "mfu": one.program.model_flops / (seconds * topology.devices * topology.chip.flops) if seconds else None,
        "loops_counted_once": {"xla": one.xla, "ours": None if one.once is None else _costs(one.once)},
        "compile_seconds": one.seconds,
    }


def table(compiled: Sequence[Compiled], topology: Topology, mesh: Mapping[str, int]) -> str:
    """The same to be read.

    Args:
        compiled: the programs of a run.
        topology: what they were compiled for.
        mesh: sizes of its axes.
    """
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.items() if size > 1) or "not split"
    slices = f"{topology.slices} x " if topology.slices > 1 else ""
    devices = "1 device" if topology.devices == 1 else f"{topology.devices} devices"
    lines = [
        f"{slices}{topology.name}: {devices} ({sizes}), {_gib(topology.chip.memory)} GiB each",
        "",
    ]
    kinds = list(dict.fromkeys(kind for one in compiled for kind in one.memory))
    kinds = [kind for kind in kinds if any(one.memory.get(kind, 0) > 1e-3 * (one.peak or 0) for one in compiled)]
    rows = [["memory of a device, GiB", *(one.program.name for one in compiled)]]
    rows += [[f"  {kind}", *(_gib(one.memory.get(kind)) for one in compiled)] for kind in kinds]
    rows += [["  at the worst moment", *(_gib(one.peak) for one in compiled)]]
    rows += [["  fits", *("yes" if one.fits else "NO" for one in compiled)], []]
    columns = [part for one in compiled for part in _columns(one)]
    lines += aligned(rows)
    rows = [["a device's work", *(name for name, _, _ in columns)]]
    rows += [
        ["  products, TFLOP", *(_number(total and total.flops / 1e12) for _, total, _ in columns)],
        ["  memory traffic, GB", *(_number(total and total.bytes / 1e9) for _, total, _ in columns)],
    ]
    found = sorted({kind for _, total, _ in columns if total for kind in total.collectives})
    for kind in found:
        name = f"  {kind.operation} of {kind.group}{' between slices' if kind.crosses_slices else ''}, GB"
        moved = [total.collectives.get(kind, (0.0, 0.0))[0] / 1e9 if total else None for _, total, _ in columns]
        rows.append([name, *map(_number, moved)])
    rows += [
        ["  roofline, s", *(_number(found and found.roofline) for _, _, found in columns)],
        ["  bound by", *(_bound(found) for _, _, found in columns)],
        ["  compiler's estimate, s", *(_number(found and _estimate(found)) for _, _, found in columns)],
    ]
    lines += aligned(rows)
    for one in compiled:
        if one.problem:
            lines += [f"{one.program.name} does not compile: {one.problem}", ""]
        if not one.fits and one.largest:
            lines += [f"The largest arrays of {one.program.name} at its worst moment:"]
            lines += [f"  {b.bytes / GIB:7.2f} GiB  {b.shape}  {b.source}" for b in one.largest] + [""]
        if one.total is not None and one.total.unknown_kernels:
            lines += [f"{one.program.name}: kernels that do not say what they cost: {one.total.unknown_kernels}", ""]
        # Of those that sample, the loop over tokens is one, and what fills slots again is another.
        if one.unread_loops > (one.program.rounds > 1) + (one.program.refills > 1):
            lines += [
                f"{one.program.name}: loops that do not say how often they run: {one.unread_loops}, counted "
                f"{one.program.rounds} times",
                "",
            ]
    whole = step(compiled, topology)
    if whole is not None:
        lines += [
            f"a step (rollout and training, no rewards): {_number(whole['seconds'])} s, "
            f"{_number(whole['tokens_per_second'])} tokens/s, {100 * (whole['mfu'] or 0):.1f}% of peak (MFU)",
            "",
        ]
    else:
        lines += ["a step: not known, since not every program of it was compiled", ""]
    return "\n".join([*lines, NOTE])


def _columns(one: Compiled) -> list[tuple[str, Costs | None, Times | None]]:
    if one.phases and not one.program.name.startswith("evaluate"):
        return [(f"{one.program.name} {name}", part, one.phase_times[name]) for name, part in one.phases.items()]
    return [(one.program.name, one.total, one.times)]


def _bound(found: Times | None) -> str:
    if found is None:
        return "?"
    return max(
        ("products", found.compute), ("memory", found.memory), ("links", found.communication), key=lambda x: x[1]
    )[0]


def _gib(size: float | None) -> str:
    if size is None:
        return "?"
    return f"{size / GIB:.{4 if 0 < size < 0.01 * GIB else 2}f}"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows with their columns under each other, the first to the left."""
    widths = [max(len(row[i]) for row in rows if len(row) > i) for i in range(max(map(len, rows)))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]] if row else []).rstrip())
    return [*lines, ""] if lines[-1] else lines

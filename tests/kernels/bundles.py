"""Reads what libtpu dumps of a compiled kernel: VLIW bundles, use of their slots, VMEM.

A bundle holds the instructions of one cycle. Of vector instructions only the name is kept, since their number is all
that matters here; scalar ones are kept whole, so that `issue` can run them. Anything unfamiliar is an error: a schedule
that is half understood gives numbers that are wholly wrong.
"""

from __future__ import annotations

import json
import math
import re
import typing
from collections.abc import Iterable


class ScheduleError(ValueError):
    """A dump says something that is not understood, or that contradicts what its kernel is asked to do."""


class Operation(typing.NamedTuple):
    """One instruction: `%result = opcode (predicate, otherwise), operands`, done only where the predicate holds."""

    result: str
    opcode: str
    predicate: str
    otherwise: str
    operands: tuple[str, ...]

    @property
    def target(self) -> str:
        """The register or spill slot that it writes."""
        return self.operands[0] if self.opcode == "sst" else self.result


class Bundle(typing.NamedTuple):
    """The instructions of one cycle.

    Attributes:
        label: `LB` starts a loop, `PF` follows a guarded region, and so on; mostly empty.
        depth: loops around it.
        operations: in the order written.
        starts: numbers of the regions that start with it.
        ends: numbers of the regions that end with it.
    """

    label: str
    depth: int
    operations: tuple[Operation, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]


CORE = "#core"  # stands where the dump says in a comment that a value is the core's number

# "  0x1c PF: > > { instruction ;; instruction } /* comment */"; bundles and comments may span lines.
_START = re.compile(r"^ *(?:0x([0-9a-f]+)|(0)) *([A-Z]{2})?: *((?:>+ *)*)\{", re.MULTILINE)
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_REGION = re.compile(r"(Start/End empty|Start|End) region (\d+)")
_OPERATION = re.compile(r"(?:(%\w+) = )?([a-z][\w.]*)(.*)", re.DOTALL)
_PREDICATE = re.compile(r"\((!?%\w+)(?:, ([^()]*))?\),?")
_SPILL = re.compile(r"\[smem:\[(#\w+_spill)\]\]")


def _keep(comment: re.Match) -> str:
    """What of a comment an instruction cannot be understood without."""
    division = re.fullmatch(r"/\* (k\w+) \*/", comment[0])
    return f", {division[1]}" if division else CORE if "megacore core id" in comment[0] else ""


def _operation(text: str) -> Operation:
    matched = _OPERATION.fullmatch(text)
    if matched is None:
        raise ScheduleError(f"cannot read the instruction {text[:120]!r}")
    result, opcode, rest = matched.groups()
    if opcode[0] == "v":
        return Operation(result or "", opcode, "", "", ())
    predicate = _PREDICATE.search(rest)
    if predicate is not None:
        rest = rest.replace(predicate[0], "", 1)
    if opcode in ("sld", "sst"):
        # Spilled registers are followed through memory; everything else that lies there is data of the program.
        spill = _SPILL.search(rest)
        value = rest[rest.rindex("]") + 1 :].replace(CORE, "").strip()
        operands = (CORE if CORE in rest else spill[1] if spill else "", *([value] if value else []))
    else:
        rest = re.sub(r"\[thread:\S*\]", "", rest)
        operands = tuple(part.strip() for part in rest.split(",") if part.strip())
    name, otherwise = (predicate[1], predicate[2] or "") if predicate else ("", "")
    return Operation(result or "", opcode, name, otherwise.strip(), operands)


def read_bundles(text: str) -> list[Bundle]:
    """The bundles of a `final_bundles` dump, in order of address; none may be missing."""
    starts = list(_START.finditer(text))
    bundles = []
    for index, found in enumerate(starts):
        if int(found[1] or found[2], 16) != index:
            raise ScheduleError(f"expected bundle {index:#x}, found {found[0].strip()!r}")
        line = text[found.end() : starts[index + 1].start() if index + 1 < len(starts) else len(text)]
        body = _COMMENT.sub(_keep, line).strip()
        if not body.endswith("}"):
            raise ScheduleError(f"bundle {index:#x} does not end with a brace: {body[-80:]!r}")
        parts = [part.strip() for part in body[:-1].split(";;") if part.strip()]
        regions = [mark for comment in _COMMENT.findall(line) for mark in _REGION.findall(comment)]
        starting = tuple(int(number) for kind, number in regions if kind != "End")
        ending = tuple(int(number) for kind, number in regions if kind == "End")
        operations = tuple(_operation(part) for part in parts)
        bundles.append(Bundle(found[3] or "", found[4].count(">"), operations, starting, ending))
    if not bundles:
        raise ScheduleError("the dump holds no bundles; was it written by another libtpu?")
    return bundles


def matmul_flops(bundle: Bundle, side: int) -> float:
    """Of one bundle: each `vmatmul` sends one register of rows (8 of 32 bits, 16 of bf16) through side x side cells."""
    total = 0.0
    for operation in bundle.operations:
        if operation.opcode.startswith("vmatmul"):
            kinds = set(operation.opcode.split(".")) & {"bf16", "f32"}
            if len(kinds) != 1 or re.search(r"\.([su]4|[su]8|f8\w+)\b", operation.opcode):
                raise ScheduleError(f"peak rates are known for bf16 and f32 here, found {operation.opcode}")
            total += 2.0 * side * side * (8 if kinds == {"f32"} else 16)
    return total


def read_utilization(text: str, bundles: int) -> tuple[list[str], list[list[int]]]:
    """Names of the slots, and how many of each every bundle uses.

    Loads, stores and vector arithmetic are counted where they are issued; `MATMUL` and `MATPUSH` are the matrix units
    that are busy in that cycle.
    """
    head, found, table = text.partition("== UTILIZATION:")
    lines = head.splitlines()
    if not found or len(lines) < 3:
        raise ScheduleError(f"not a table of slot use: {text[:120]!r}")
    names = [name.strip() for name in lines[1].split(",")]
    rows = [[int(number) for number in line.split()] for line in table.splitlines() if line.strip()]
    if len(rows) != bundles or any(len(row) != len(names) for row in rows):
        raise ScheduleError(f"expected {bundles} rows of {len(names)} slots, found {len(rows)} rows")
    missing = {"MATMUL", "VALU", "EUP", "VLOAD", "VSTORE", "VSTORE:SPILL", "VLOAD:FILL"} - set(names)
    if missing:
        raise ScheduleError(f"the table of slot use lacks {sorted(missing)}")
    return names, rows


def read_grid(text: str) -> int | None:
    """Steps of one core's grid, from the comments at the pipeline's copies; None if the kernel has no pipeline."""
    bounds = set(re.findall(r"^iteration_bounds: \(([\d, ]*)\)", text, re.MULTILINE))
    if len(bounds) > 1:
        raise ScheduleError(f"several grids in one kernel: {sorted(bounds)}; give Work.steps")
    return math.prod(int(size) for size in bounds.pop().split(",") if size.strip()) if bounds else None


def read_vmem(reports: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Bytes of VMEM of each kernel, all and those of spilled registers, from `vmem_report.html` files."""
    sizes = {}
    for report in reports:
        found = re.search(r"const DATA = ?(\{.*?\n\});", report, re.DOTALL)
        if found is None:
            raise ScheduleError("the VMEM report holds no data")
        for name, entry in json.loads(found[1])["hlo_breakdowns"].items():
            parts = [part for block in entry["blocks"] for part in block.get("allocations", ())]
            spilled = sum(part["size"] for part in parts if part["tag"].upper() == "SPILL")
            sizes[name] = entry["total_size"], spilled
    return sizes

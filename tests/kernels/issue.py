"""How often each bundle of a kernel is issued: runs the scalar instructions that its branches depend on.

Grid indices, loop counters and the predicates of `pl.when` are all computed by the scalar unit, in a few dozen kinds of
instruction. Running them counts every block as often as the hardware would issue it; what depends on data (values that
come from memory or from vectors) is unknown, and a branch on it takes the frequencies that the caller gives.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import operator
import re
import typing
from collections.abc import Callable, Sequence

from tests.kernels.bundles import CORE, Bundle, Operation, ScheduleError


def _signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "sadd.s32": operator.add,
    "ssub.s32": operator.sub,
    "smul.u32": operator.mul,
    "smul.s32": operator.mul,
    "smulhi.u32": lambda a, b: (a * b) >> 32,
    "sand.u32": operator.and_,
    "sor.u32": operator.or_,
    "sxor.u32": operator.xor,
    "sshll.u32": lambda a, b: a << b if b < 32 else 0,
    "sshrl.u32": lambda a, b: a >> b if b < 32 else 0,
    "sshra.s32": lambda a, b: _signed(a) >> min(b, 31),
    "smin.s32": lambda a, b: min(_signed(a), _signed(b)),
    "smax.s32": lambda a, b: max(_signed(a), _signed(b)),
    "smin.u32": min,
    "smax.u32": max,
}
for _relation in ("eq", "ne", "lt", "le", "gt", "ge"):
    _compare = getattr(operator, _relation)
    _ARITHMETIC[f"scmp.{_relation}.u32.totalorder"] = _compare
    _ARITHMETIC[f"scmp.{_relation}.s32.totalorder"] = lambda a, b, compare=_compare: compare(_signed(a), _signed(b))


def _both(a: int | None, b: int | None) -> int | None:
    """`a and b`, known also when one side is known to be false."""
    return 0 if 0 in (a, b) else None if None in (a, b) else 1


def _not(a: int | None) -> int | None:
    return None if a is None else 1 - a


_LOGIC: dict[str, Callable[[int | None, int | None], int | None]] = {
    "pand": _both,
    "pnand": lambda a, b: _not(_both(a, b)),
    "por": lambda a, b: _not(_both(_not(a), _not(b))),
    "pnor": lambda a, b: _both(_not(a), _not(b)),
    "pxor": lambda a, b: None if a is None or b is None else a ^ b,
}


class _Scalars:
    """Scalar registers and spill slots of a core; a value that depends on data is None."""

    def __init__(self, core: int):
        self.values: dict[str, int | None] = {CORE: core}
        self.written: dict[str, int] = {}
        self.divisions: dict[str, list[int]] = {}

    def read(self, operand: str) -> int | None:
        negated, name = operand.startswith("!"), operand.lstrip("!")
        if name[:1] in "%#":
            value = self.values.get(name)
        else:
            value = int(name, 0) & 0xFFFFFFFF if re.fullmatch(r"-?\d+|0x[0-9a-f]+", name) else None
        return _not(value) if negated else value

    def _compute(self, operation: Operation) -> int | None:
        opcode, operands = operation.opcode, operation.operands
        if opcode == "sphi":  # its operands share one register: it holds the one written last
            return self.values.get(max(operands, key=lambda name: self.written.get(name, -1)))
        if opcode == "scalar_select":
            chosen = self.read(operands[0])
            return None if chosen is None else self.read(operands[1 if chosen else 2])
        if opcode == "pneg":
            return _not(self.read(operands[0]))
        if opcode in ("smov.u32", "pmov", "sld", "sst"):
            return self.read(operands[-1]) if operands[-1] else None
        if opcode == "spop.drf":
            results = self.divisions.get(operands[0])
            return results.pop(0) if results else None
        if opcode not in _LOGIC and opcode not in _ARITHMETIC and opcode != "sdivrem.u32":
            return None
        a, b = self.read(operands[0]), self.read(operands[1])
        if opcode in _LOGIC:
            return _LOGIC[opcode](a, b)
        if a is None or b is None:
            return None
        if opcode == "sdivrem.u32":
            if b:
                results = {"kDivAndRem": [a // b, a % b], "kRem": [a % b]}
                self.divisions[operation.result] = results.get(operands[2], [])
            return None
        return int(_ARITHMETIC[opcode](a, b)) & 0xFFFFFFFF

    def run(self, operation: Operation, now: int) -> None:
        holds = self.read(operation.predicate) if operation.predicate else 1
        if holds:
            value = self._compute(operation)
        elif holds is None:
            value = None
        elif operation.otherwise:
            value = self.read(operation.otherwise)
        else:
            return
        self.values[operation.target] = value
        self.written[operation.target] = now


_MOVES = {"sphi", "scalar_select", "pneg", "smov.u32", "pmov", "sld", "sst", "sdivrem.u32", "spop.drf"}


def _understood(operation: Operation) -> bool:
    if operation.opcode in ("sld", "sst") and not operation.operands[0]:
        return False  # memory that is not a spilled register
    return operation.opcode in _MOVES or operation.opcode in _LOGIC or operation.opcode in _ARITHMETIC


_COPY = re.compile(r"dma\.(hbm_to_vmem|vmem_to_hbm)$")
_NO_COPY = re.compile(r"dma\.(done|hbm_to_smem|smem_to_hbm)")  # waits, and a few words of scalars
_GRANULE = 32  # bytes


def _needed(bundles: Sequence[Bundle]) -> list[list[Operation]]:
    """Of every bundle, the instructions that branches and copies depend on."""
    writers: dict[str, list[Operation]] = {}
    wanted: list[str] = []
    for operation in itertools.chain.from_iterable(bundle.operations for bundle in bundles):
        writers.setdefault(operation.target, []).append(operation)
        if operation.opcode.startswith("sbr"):
            wanted.append(operation.predicate)
        elif _COPY.match(operation.opcode):
            wanted += [operation.predicate, operation.operands[1]]
    names: set[str] = set()
    while wanted:
        name = wanted.pop().lstrip("!")
        if name and name not in names:
            names.add(name)
            for operation in writers.get(name, ()):
                wanted += [operation.predicate, operation.otherwise, *operation.operands]

    def keep(operation: Operation) -> bool:
        popped = operation.opcode == "spop.drf" and operation.operands[0] in names  # each pop moves the queue on
        return popped or operation.target in names or bool(_COPY.match(operation.opcode))

    kept = [[operation for operation in bundle.operations if keep(operation)] for bundle in bundles]
    # Phis stand for what happened on the way into their bundle.
    return [sorted(operations, key=lambda operation: operation.opcode != "sphi") for operations in kept]


class Branch(typing.NamedTuple):
    """A jump from one bundle to another, taken when the bundles up to `last` have been issued too."""

    operation: Operation
    target: int
    last: int


def branches_of(bundles: Sequence[Bundle], slots: int) -> dict[int, Branch]:
    """The branches by their address; `slots` bundles after a branch are issued before it is taken."""
    regions: dict[int, int] = {}
    for address, bundle in enumerate(bundles):
        # Region n follows region n - 1, which its branch skips, and is not written out where it holds nothing.
        for region in bundle.ends if bundles[address + 1 : address + 2] and bundles[address + 1].label == "PF" else ():
            regions.setdefault(region + 1, address + 1)
    for address, bundle in reversed(list(enumerate(bundles))):
        regions |= dict.fromkeys(bundle.starts, address)
    found: dict[int, Branch] = {}
    last = -1
    for address, bundle in enumerate(bundles):
        for operation in bundle.operations:
            if not operation.opcode.startswith(("sbr", "scall", "sret")):
                continue
            target = re.fullmatch(r"target = \$region(\d+)", " ".join(operation.operands))
            if operation.opcode != "sbr.rel" or target is None or int(target[1]) not in regions:
                raise ScheduleError(f"bundle {address:#x}: cannot follow the branch {operation}")
            if address <= last:
                raise ScheduleError(f"bundle {address:#x}: a branch while the one before it is not taken yet")
            last = address + slots
            after = bundles[address + 1 : address + 3]
            if slots == 6 and len(after) == 2 and not after[0].operations and after[1].operations:
                last = address + 1  # tpu7x writes a delay with nothing in it as one empty bundle
            found[address] = Branch(operation, regions[int(target[1])], last)
    return found


@dataclasses.dataclass
class _Guess:
    """Takes a branch on data as often as the caller says, evenly."""

    share: float
    due: float = 0.5

    def next(self) -> int:
        self.due += self.share
        taken = self.due > 1 - 1e-9
        self.due -= taken
        return int(taken)


def _guesses(
    branches: dict[int, Branch], needed: Sequence[Sequence[Operation]], unknown: Sequence[float]
) -> dict[int, _Guess]:
    """The branches whose condition may depend on data, and how often they are taken."""
    operations = [o for bundle in needed for o in bundle if o.target]
    depends: set[str] = {o.target for o in operations if not _understood(o)}
    while True:
        reads = (
            (o, {o.predicate.lstrip("!"), o.otherwise, *(name.lstrip("!") for name in o.operands)}) for o in operations
        )
        more = {o.target for o, names in reads if names & depends} - depends
        if not more:
            break
        depends |= more
    found = {at: branch for at, branch in branches.items() if branch.operation.predicate.lstrip("!") in depends}
    if len(found) != len(unknown):
        raise ScheduleError(
            f"{len(found)} branches depend on data, at {[hex(at) for at in found]}; give Work.unknown one number for "
            f"each, in this order, got {tuple(unknown)}"
        )
    guesses = {}
    for (at, branch), given in zip(found.items(), unknown, strict=True):
        backward = branch.target <= at
        if not (given >= 1 if backward else 0 <= given <= 1):
            wanted = "rounds >= 1 of the loop" if backward else "a share in [0, 1] of the block"
            raise ScheduleError(f"Work.unknown: expected {wanted} at {at:#x}, got {given}")
        guesses[at] = _Guess((given - 1) / given if backward else 1 - given)
    return guesses


class Issued(typing.NamedTuple):
    """How often each bundle is issued, bytes copied between HBM and VMEM (None: not known), cycles of empty delays."""

    counts: list[int]
    copied: int | None
    delays: int


def issue_counts(bundles: Sequence[Bundle], slots: int, core: int = 0, unknown: Sequence[float] = ()) -> Issued:
    """Runs a kernel's scalar instructions from its first bundle to its last.

    Args:
        bundles: of one kernel.
        slots: bundles issued after a branch before it is taken.
        core: which of the chip's cores this is.
        unknown: for each branch that depends on data, in order of address: how often the block that it guards runs (0
            to 1), or for the branch that closes a loop the mean number of rounds.

    Raises:
        ScheduleError: if a branch depends on data and `unknown` does not say how often, or the kernel does not end.
    """
    branches = branches_of(bundles, slots)
    needed = _needed(bundles)
    marks = {0, len(bundles)} | {b.last + 1 for b in branches.values()} | {b.target for b in branches.values()}
    starts = sorted(marks)
    stops = dict(itertools.pairwise(starts))
    programs: dict[int, list[tuple[int, Operation]]] = {start: [] for start in stops}
    for address in range(len(bundles)):
        program = programs[starts[bisect.bisect_right(starts, address) - 1]]
        program += [(address, operation) for operation in needed[address]]
        if address in branches:
            program.append((address, branches[address].operation))

    scalars, guesses = _Scalars(core), _guesses(branches, needed, unknown)
    passed = dict.fromkeys(stops, 0)
    others = (o.opcode for bundle in bundles for o in bundle.operations if o.opcode.startswith("dma."))
    copied: int | None = 0 if all(_COPY.match(name) or _NO_COPY.match(name) for name in others) else None
    delays, now, at, jump = 0, 0, 0, None
    while at < len(bundles):
        passed[at] += 1
        for address, operation in programs[at]:
            now += 1
            if operation.opcode == "sbr.rel":
                branch = branches[address]
                taken = scalars.read(operation.predicate) if operation.predicate else 1
                if taken is None:
                    taken = guesses[address].next()
                if taken:
                    jump, delays = branch, delays + slots - (branch.last - address)
            elif _COPY.match(operation.opcode):
                size, copies = scalars.read(operation.operands[1]), 1
                if operation.predicate:
                    copies = scalars.read(operation.predicate)
                if copied is None or size is None or copies is None:
                    copied = None
                else:
                    copied += size * copies * _GRANULE
            else:
                scalars.run(operation, now)
        if now > 200_000_000:
            raise ScheduleError("the kernel does not end; is the condition of a loop misread?")
        at = stops[at]
        if jump is not None and at > jump.last:
            at, jump = jump.target, None
    counts = [0] * len(bundles)
    for start, stop in stops.items():
        counts[start:stop] = [passed[start]] * (stop - start)
    return Issued(counts, copied, delays)

"""What a compiled program does on one device: products, memory traffic, communication; loops as often as they run.

XLA's own `cost_analysis` counts the body of a loop once. Here every instruction counts as often as it runs, and the
same sums with every loop counted once can be held against XLA's.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import NamedTuple

import numpy as np

from jaxrl_post.planning import hlo
from jaxrl_post.planning.hlo import Array, Computation, Instruction, Module

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = frozenset(
    {
        "after-all",
        "bitcast",
        "constant",
        "domain",
        "get-dimension-size",
        "get-tuple-element",
        "iota",
        "opt-barrier",
        "optimization-barrier",
        "parameter",
        "partition-id",
        "replica-id",
        "tuple",
    }
)
"""What moves nothing by itself."""


class Collective(NamedTuple):
    """A kind of communication.

    Attributes:
        operation: one of `COLLECTIVES`.
        group: devices that take part together; 0 where the text does not say.
        crosses_slices: whether the group is one device of each slice, which only a slower network joins.
    """

    operation: str
    group: int
    crosses_slices: bool = False


@dataclasses.dataclass
class Costs:
    """Sums over what one device runs.

    Attributes:
        flops: of matrix products (two for each multiply and add).
        bytes: read from and written to main memory.
        cycles: of the device, as the compiler estimates them, without custom kernels.
        kernels: of each custom kernel how often it runs, its operations and its bytes.
        collectives: bytes of the larger side of each kind of communication, and how many there are.
        unknown_kernels: custom kernels that say nothing of what they cost, and how often they run.
    """

    flops: float = 0.0
    bytes: float = 0.0
    cycles: float = 0.0
    kernels: list[tuple[float, float, float]] = dataclasses.field(default_factory=list)
    collectives: dict[Collective, tuple[float, float]] = dataclasses.field(default_factory=dict)
    unknown_kernels: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, other: Costs, times: float = 1.0) -> None:
        """Add what another has done `times` times."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        self.cycles += times * other.cycles
        self.kernels += [(times * often, flops, moved) for often, flops, moved in other.kernels]
        for kind, (moved, count) in other.collectives.items():
            before = self.collectives.get(kind, (0.0, 0.0))
            self.collectives[kind] = (before[0] + times * moved, before[1] + times * count)
        for name, count in other.unknown_kernels.items():
            self.unknown_kernels[name] = self.unknown_kernels.get(name, 0.0) + times * count


class OpenLoop(NamedTuple):
    """A loop that something in the data may end before its bound, as generating does.

    Attributes:
        trips: the bound.
        costs: of all of them.
    """

    trips: float
    costs: Costs


class Counted(NamedTuple):
    """What a program costs.

    Attributes:
        total: everything, loops at their bound.
        once: the same with every loop run once, as `cost_analysis` counts.
        open_loops: the loops whose number of rounds depends on the data.
        loops: rounds of each loop, outermost first; None where they cannot be read off, and `rounds` are taken.
    """

    total: Costs
    once: Costs
    open_loops: list[OpenLoop]
    loops: list[int | None]


def count(text: str, slices: int = 1, rounds: int = 1, outer: int = 1) -> Counted:
    """Count what a compiled program does.

    Args:
        text: `compiled.as_text()`, of any backend.
        slices: that it was compiled for.
        rounds: of a loop whose number of rounds cannot be read off, as one that only the data ends.
        outer: rounds of such a loop that has another in it, which then runs `rounds / outer` times in each.

    Returns:
        The counts of one device.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> loop = lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=5)[0]
        >>> text = jax.jit(loop).lower(jnp.ones((8, 8))).compile().as_text()
        >>> count(text).total.flops, count(text).once.flops
        (5120.0, 1024.0)
    """
    module = hlo.parse(text)
    counter = _Counter(module, slices, rounds, outer)
    total = counter.computation(module.entry, loops=True)
    once = _Counter(module, slices, 1, 1).computation(module.entry, loops=False)
    return Counted(total, once, counter.open_loops, counter.rounds)


class _Counter:
    def __init__(self, module: Module, slices: int, rounds: int, outer: int):
        self.module, self.slices, self.unread, self.outer = module, slices, rounds, outer
        self.open_loops: list[OpenLoop] = []
        self.rounds: list[int | None] = []

    def computation(self, name: str, loops: bool) -> Costs:
        """Costs of a computation that runs by itself: the entry, a body, a branch."""
        costs, where = Costs(), self.module.computations[name]
        for instruction in where.instructions.values():
            opcode = instruction.opcode
            if opcode == "while":
                self._while(costs, where, instruction, loops)
            elif opcode == "conditional":
                branches = [self.computation(branch, loops) for branch in instruction.branches()]
                costs.add(max(branches, key=lambda one: (one.flops, one.bytes)))
            elif opcode == "call":
                costs.add(self.computation(instruction.attribute("to_apply") or "", loops))
            elif opcode not in FREE:
                self._instruction(costs, where, instruction)
        return costs

    def _while(self, costs: Costs, where: Computation, instruction: Instruction, loops: bool) -> None:
        found = hlo.loop(self.module, where, instruction)
        place = len(self.rounds)
        if loops:
            self.rounds.append(found.trips)
        parts = [self.computation(instruction.attribute(part) or "", loops) for part in ("body", "condition")]
        bound = self.outer if None in self.rounds[place + 1 :] else self.unread / self.outer
        bound = bound if found.trips is None else found.trips
        inside = Costs()
        for part in parts:
            inside.add(part, bound if loops else 1)
        costs.add(inside)
        if loops and not found.exact:
            self.open_loops.append(OpenLoop(bound, inside))

    def _instruction(self, costs: Costs, where: Computation, instruction: Instruction) -> None:
        costs.cycles += _estimated_cycles(instruction)
        if operation := self._collective(where, instruction):
            kind, moved = operation
            before = costs.collectives.get(kind, (0.0, 0.0))
            costs.collectives[kind] = (before[0] + moved, before[1] + 1)
        if instruction.opcode.endswith(("-done", "-update")):
            return
        if instruction.opcode == "custom-call":
            self._kernel(costs, where, instruction)
            return
        costs.flops += self._flops(where, instruction)
        costs.bytes += self._moved(where, instruction)

    def _kernel(self, costs: Costs, where: Computation, instruction: Instruction) -> None:
        if "tpu_custom_call" not in instruction.attributes:
            return  # what lays out memory, or marks it
        moved = sum(a.main_bytes for a in instruction.arrays) + sum(a.main_bytes for a in _operands(where, instruction))
        estimate = re.search(r'"cost_estimate":\{([^}]*)\}', instruction.attributes)
        declared = dict(re.findall(r'"(\w+)":"(\d+)"', estimate[1])) if estimate else {}
        tiles = re.search(r"attention_tiles_(\d+)_of_(\d+)", instruction.attributes)
        if declared:
            flops, moved = float(declared.get("flops", 0)), float(declared.get("bytes_accessed", moved))
        elif tiles:
            flops = _attention_flops(where, instruction) * int(tiles[1]) / int(tiles[2])
        else:
            name = re.sub(r"[._]*\d+$", "", instruction.name)
            costs.unknown_kernels[name] = costs.unknown_kernels.get(name, 0) + 1
            flops = 0.0
        costs.flops += flops
        costs.bytes += moved
        costs.kernels.append((1.0, flops, moved))

    def _flops(self, where: Computation, instruction: Instruction) -> float:
        if instruction.opcode == "dot":
            left = _operands(where, instruction)[0]
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
            sizes = [left.dims[int(i)] for i in contracted[1].split(",") if i] if contracted else []
            return 2.0 * math.prod(instruction.arrays[0].dims) * math.prod(sizes)
        if instruction.opcode == "convolution":
            return _convolution_flops(where, instruction)
        called = instruction.attribute("calls")
        if called is None:
            return 0.0
        inner = self.module.computations[called]
        return sum(self._flops(inner, one) for one in inner.instructions.values())

    def _moved(self, where: Computation, instruction: Instruction) -> float:
        """Bytes between main memory and the chip."""
        opcode, out = instruction.opcode, instruction.arrays
        given = _operands(where, instruction)
        if opcode in ("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start"):
            sides = out[:2]  # where from and where to, in either order; of a slice one is larger than what moves
            return float(min(a.bytes for a in sides) * sum(a.space == 0 for a in sides))
        if opcode.removesuffix("-start") in COLLECTIVES and opcode.endswith("-start"):
            return float(sum(a.main_bytes for a in out))  # which has the operands before the results
        if opcode == "send":
            return given[0].main_bytes
        if opcode in ("dynamic-slice", "slice", "gather"):
            return sum(a.main_bytes for a in out) + sum(a.bytes for a in out if given and given[0].space == 0)
        if opcode == "dynamic-update-slice":
            return given[1].main_bytes + given[1].bytes * (out[0].space == 0)
        called = instruction.attribute("calls")
        if called is None:
            return sum(a.main_bytes for a in out) + sum(a.main_bytes for a in given)
        inner = self.module.computations[called]
        return self._read(inner) + self._written(inner)

    def _read(self, inner: Computation) -> float:
        """Bytes that a fusion reads from main memory: of an operand that it only takes slices of, those."""
        total = 0.0
        for parameter in inner.parameters():
            main = sum(a.main_bytes for a in parameter.arrays)
            if main:
                total += min(main, self._read_of(inner, parameter.name))
        return total

    def _read_of(self, inner: Computation, name: str) -> float:
        """Bytes that the users of a value read of it; infinite for all of them."""
        total = 0.0
        for user in _past_views(inner, name):
            if user.opcode in ("dynamic-slice", "slice", "gather"):
                total += sum(a.bytes for a in user.arrays)
            elif user.opcode == "dynamic-update-slice" and _source(inner, user.operands[0]) == name:
                continue  # written in place
            elif user.opcode == "fusion":
                nested = self.module.computations[user.attribute("calls") or ""]
                places = [i for i, operand in enumerate(user.operands) if _source(inner, operand) == name]
                total += sum(self._read_of(nested, nested.parameters()[i].name) for i in places)
            else:
                return math.inf
        return total

    def _written(self, inner: Computation) -> float:
        """Bytes that a fusion writes to main memory: of an array that it changes in place, what it changes."""
        root = inner.root
        ends = [inner.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
        total = 0.0
        for end, out in zip(ends, root.arrays, strict=False):
            one = inner.instructions[_source(inner, end.name)]
            if one.opcode == "dynamic-update-slice":
                total += inner.instructions[one.operands[1]].arrays[0].bytes if out.space == 0 else 0
            elif one.opcode == "fusion" and len(one.arrays) == 1 and out.space == 0:
                total += self._written(self.module.computations[one.attribute("calls") or ""])
            else:
                total += out.main_bytes
        return total

    def _collective(self, where: Computation, instruction: Instruction) -> tuple[Collective, float] | None:
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in COLLECTIVES:
            return _described(where, instruction, opcode)
        if opcode == "send":
            return self._between_slices(where, instruction)
        called = instruction.attribute("calls")
        if called is None or instruction.opcode.endswith(("-done", "-update")):
            return None
        inner = self.module.computations[called]
        begins = any("AsyncCollectiveStart" in one.attributes for one in inner.instructions.values())
        for one in inner.instructions.values():
            if one.opcode in COLLECTIVES:
                # One that goes on beside other work stands in several fusions, the first of which begins it.
                if "async_collective_fusion_config" in one.attributes and not begins:
                    return None
                scattered = one.opcode == "all-reduce" and "reduce-scatter" in called.replace("_", "-")
                return _described(inner, one, "reduce-scatter" if scattered else one.opcode)
            if (nested := _called(one)) and one.opcode != "fusion":
                found = self._collective(inner, dataclasses.replace(one, attributes=f"calls=%{nested}"))
                if found:
                    return found
        return None

    def _between_slices(self, where: Computation, instruction: Instruction) -> tuple[Collective, float] | None:
        """What the hosts pass on for a device: programs of several slices have each slice's groups, and this."""
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
        if not kind:
            return None
        named = kind[1].lower().replace("_", "-")
        operation = "collective-permute" if named == "one-to-one" else named
        moved = _operands(where, instruction)[0].bytes * (self.slices if operation == "all-gather" else 1)
        return Collective(operation, self.slices, True), float(moved)


def _described(where: Computation, instruction: Instruction, operation: str) -> tuple[Collective, float]:
    given = sum(a.bytes for a in _operands(where, instruction))
    made = sum(a.bytes for a in instruction.arrays)
    if instruction.opcode.endswith("-start"):
        made -= given  # operands come before results
    return Collective(operation, _group(instruction.attributes)), float(max(given, made))


def _called(instruction: Instruction) -> str | None:
    """The computation that an instruction runs, by any of the names that it goes by: a sparse core's is a kernel's."""
    found = re.search(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)", instruction.attributes)
    return found[1] if found and instruction.opcode not in COLLECTIVES else None


def _estimated_cycles(instruction: Instruction) -> int:
    found = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    return int(found[1]) if found else 0


def _operands(where: Computation, instruction: Instruction) -> list[Array]:
    """What goes in, the elements of tuples one after the other."""
    found = [where.instructions[name].arrays for name in instruction.operands if name in where.instructions]
    return [one for each in found for one in each]


def _is_view(one: Instruction) -> bool:
    """Whether, inside a fusion, it names the elements of its operand in another way and moves none by itself."""
    relaid = one.opcode == "fusion" and len(one.operands) == 1 and "output_to_operand_aliasing={{}: " in one.attributes
    return one.opcode == "bitcast" or relaid


def _past_views(where: Computation, name: str) -> list[Instruction]:
    """The users of a value, those of its views in place of them."""
    found = []
    for user in where.users(name):
        found += _past_views(where, user.name) if _is_view(user) else [user]
    return found


def _source(inner: Computation, name: str) -> str:
    while _is_view(inner.instructions[name]):
        name = inner.instructions[name].operands[0]
    return name


def _attention_flops(where: Computation, instruction: Instruction) -> float:
    """Of an attention kernel that skips no tile: scores and values, or their gradients with the scores again."""
    # Masks are integers; of a single row the compiler leaves the first axis out.
    floats = [a.dims for a in _operands(where, instruction) if len(a.dims) >= 3 and a.dtype in ("bf16", "f32")]
    if len(floats) < 2:
        return 0.0
    (*batch, heads, queries, size), (*_, keys, _) = floats[:2]  # fewer queries than keys where a mesh splits the row
    products = 4 if "_dkv" in instruction.name else 3 if "_dq" in instruction.name else 2
    return 2.0 * products * math.prod(batch) * heads * queries * keys * size


def _convolution_flops(where: Computation, instruction: Instruction) -> float:
    """Two for each product of an element of the input and one of the kernel; padding is not multiplied."""
    left, right = _operands(where, instruction)[:2]
    out = instruction.arrays[0]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if not labels:
        return 0.0
    into, kernel, result = labels.groups()
    window = dict(
        re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", instruction.attributes) or [""])[0])
    )
    spatial = sum(c.isdigit() for c in into)

    def numbers(name: str, default: int) -> list[int]:
        return [int(x) for x in window[name].split("x")] if name in window else [default] * spatial

    sizes, strides = numbers("size", 1), numbers("stride", 1)
    dilated, spread = numbers("lhs_dilate", 1), numbers("rhs_dilate", 1)
    low = [int(x.split("_")[0]) for x in window["pad"].split("x")] if "pad" in window else [0] * spatial
    pairs = 1
    for i in range(spatial):
        places = left.dims[into.index(str(i))]
        outputs = np.arange(out.dims[result.index(str(i))])[:, None] * strides[i]
        at = outputs + np.arange(sizes[i])[None, :] * spread[i] - low[i]
        inside = (at >= 0) & (at <= (places - 1) * dilated[i]) & (at % dilated[i] == 0)
        pairs *= int(inside.sum())
    batch, features = out.dims[result.index("b")], out.dims[result.index("f")]
    groups = int((re.search(r"batch_group_count=(\d+)", instruction.attributes) or [0, 1])[1])
    return 2.0 * pairs * batch * features * right.dims[kernel.index("i")] / groups


def _group(attributes: str) -> int:
    """Devices of each group of a communication."""
    if found := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", attributes):
        return max(len(re.findall(r"\d+", one)) for one in re.findall(r"\{([\d,]*)\}", found[1]))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", found[1])}
        axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", found[2])  # `'a'`, or of its size a factor: `'a':(2)4`
        return math.prod(int(part or sizes[name]) for name, part in axes)
    return 2 if "source_target_pairs=" in attributes else 0

"""The text of a compiled program, read into computations and instructions, with loops and how often they run.

What the instructions cost is in `costs`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

ITEM_BITS = {
    "pred": 8,
    "s2": 2,
    "u2": 2,
    "s4": 4,
    "u4": 4,
    "f4e2m1fn": 4,
    "s8": 8,
    "u8": 8,
    "s16": 16,
    "u16": 16,
    "f16": 16,
    "bf16": 16,
    "s32": 32,
    "u32": 32,
    "f32": 32,
    "s64": 64,
    "u64": 64,
    "f64": 64,
    "c64": 64,
    "c128": 128,
}
"""Bits of an element; every type of eight bits that begins with `f8` is eight."""

_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+(?:#\d+)*)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_END = re.compile(r"^\}(, execution_thread=.*)?\s*$")  # of parts that run on a SparseCore
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")


class Array(NamedTuple):
    """One array of a shape.

    Attributes:
        dtype: e.g. `"bf16"`.
        dims: its sizes.
        space: the memory it lies in: 0 is the device's main memory (HBM), others are on the chip.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> int:
        """Size without padding; 0 for tokens and opaque values."""
        bits = 8 if self.dtype.startswith("f8") else ITEM_BITS.get(self.dtype, 0)
        return math.prod(self.dims) * bits // 8

    @property
    def main_bytes(self) -> int:
        """`bytes` if it lies in the device's main memory, else 0."""
        return self.bytes if self.space == 0 else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation.

    Attributes:
        name: unique within the computation.
        opcode: e.g. `"fusion"`.
        shape: text of what comes out.
        operands: names of what goes in.
        inner: text between the parentheses: a constant's value, a parameter's number.
        attributes: text after them.
        root: whether it is the computation's result.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    inner: str
    attributes: str
    root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """What comes out, a tuple's elements one after the other."""
        return tuple(arrays(self.shape))

    def attribute(self, name: str) -> str | None:
        """The name of the computation that an attribute such as `body` gives."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    def branches(self) -> list[str]:
        """The computations of a conditional."""
        found = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if found:
            return _NAME.findall(found[1])
        return [name for part in ("true", "false") if (name := self.attribute(f"{part}_computation"))]


class Computation(NamedTuple):
    """Instructions by name, in the order in which they run."""

    name: str
    instructions: Mapping[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The result."""
        return next(i for i in reversed(list(self.instructions.values())) if i.root)

    def parameters(self) -> list[Instruction]:
        """The parameters by their number."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.inner))

    def users(self, name: str) -> Iterator[Instruction]:
        """The instructions that read one."""
        return (i for i in self.instructions.values() if name in i.operands)


class Module(NamedTuple):
    """A compiled program.

    Attributes:
        computations: by name.
        entry: the name of the first.
    """

    computations: Mapping[str, Computation]
    entry: str


class Loop(NamedTuple):
    """How often a loop runs.

    Attributes:
        trips: the most there can be; None if it could not be read.
        exact: whether nothing but a counter ends the loop.
    """

    trips: int | None
    exact: bool


def arrays(shape: str) -> Iterator[Array]:
    """The arrays of a shape's text.

    Example:
        >>> [a.bytes for a in arrays("(s32[]{:T(128)}, bf16[8,2]{1,0:T(8,128)(2,1)S(1)})")]
        [4, 32]
        >>> [a.main_bytes for a in arrays("(s32[]{:T(128)}, bf16[8,2]{1,0:T(8,128)(2,1)S(1)})")]
        [4, 0]
    """
    for dtype, dims, layout in _ARRAY.findall(shape):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        yield Array(dtype, sizes, int(space[1]) if space else 0)


def elements(shape: str) -> list[str]:
    """The texts of a tuple's elements, which may be tuples.

    Example:
        >>> elements("(s32[], /*index=1*/(f32[2,3]{1,0:T(8,128)}, pred[]))")
        ['s32[]', '(f32[2,3]{1,0:T(8,128)}, pred[])']
    """
    found, depth, start = [], 0, 1
    text = re.sub(r"/\*.*?\*/", "", shape)
    for at, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if (character == "," and depth == 1) or depth == 0:
            found.append(text[start:at].strip())
            start = at + 1
        if depth == 0:
            break
    return found


def parse(text: str) -> Module:
    """Read the text of a compiled program (`compiled.as_text()`).

    An element of a tuple that is written where it is used (`%tuple#1`, as newer compilers do) becomes an instruction of
    that name, `get-tuple-element`, as older ones have it.

    Raises:
        ValueError: if it has no entry.

    Example:
        >>> program = '''
        ... ENTRY %main (x: f32[4]) -> f32[4] {
        ...   %x = f32[4]{0} parameter(0)
        ...   ROOT %y = f32[4]{0} add(%x, %x), metadata={}
        ... }'''
        >>> module = parse(program)
        >>> module.computations[module.entry].root.operands
        ('x', 'x')
    """
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in _joined(text):
        if current is None:
            if head := _HEAD.match(line):
                current = Computation(head[2], {})
                entry = head[2] if head[1] else entry
        elif _END.match(line):
            computations[current.name] = current
            current = None
        elif made := _instruction(line):
            for name in made.operands:
                _add_element(current.instructions, name)  # type: ignore[arg-type]
            current.instructions[made.name] = made  # type: ignore[index]
    if entry is None:
        raise ValueError("this is no text of a compiled program: it has no ENTRY computation")
    return Module(computations, entry)


def _add_element(instructions: dict[str, Instruction], name: str) -> None:
    of, mark, index = name.rpartition("#")
    if mark and name not in instructions:
        _add_element(instructions, of)
        shape = elements(instructions[of].shape)[int(index)]
        instructions[name] = Instruction(name, "get-tuple-element", shape, (of,), "", f", index={index}", False)


def _joined(text: str) -> Iterator[str]:
    """Lines, with those that a text within an instruction has broken put together again."""
    held = ""
    for line in text.splitlines():
        starts = (
            _LINE.match(line) or line.startswith(("%", "ENTRY", "HloModule")) or _END.match(line) or not line.strip()
        )
        if starts:
            if held:
                yield held
            held = line
        else:
            held += line if held else ""
    yield held


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` is closed."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text) - 1


def _instruction(line: str) -> Instruction | None:
    start = _LINE.match(line)
    if not start:
        return None
    at = start.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.find(" ", at)
    opening = line.find("(", end)
    if end < 0 or opening < 0:
        return None
    closing = _closing(line, opening)
    inner = line[opening + 1 : closing]
    return Instruction(
        name=start[2],
        opcode=line[end:opening].strip(),
        shape=line[at:end],
        operands=tuple(_NAME.findall(inner)),
        inner=inner,
        attributes=line[closing + 1 :],
        root=bool(start[1]),
    )


def loop(module: Module, where: Computation, instruction: Instruction) -> Loop:
    """How often a `while` runs, from the counter that its condition holds against a constant.

    What another compiler pass says (`known_trip_count`) is believed first. Otherwise the counter's first value, what
    the body adds to it and the bound are read; of several conditions the smallest bound is taken, and the loop is then
    not exact.

    Args:
        module: the program.
        where: the computation that the instruction is in.
        instruction: the `while`.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.attributes):
        return Loop(int(known[1]), True)
    condition = module.computations[instruction.attribute("condition") or ""]
    body = module.computations[instruction.attribute("body") or ""]
    bounds, others = _bounds(module, condition)
    trips = [
        max(0, math.ceil((bound - start) / step))
        for index, bound in bounds
        for start, step in [(_first(where, instruction, index), _step(module, body, index))]
        if start is not None and step
    ]
    return Loop(min(trips) if trips else None, bool(trips) and not others)


def _bounds(module: Module, condition: Computation) -> tuple[list[tuple[int, int]], bool]:
    """`(element of the loop's tuple, bound)` of each comparison of a counter, and whether anything else decides."""
    found, others = [], False

    def visit(computation: Computation, instruction: Instruction, outer: Mapping[int, tuple]) -> None:
        nonlocal others
        inputs = [computation.instructions[name] for name in instruction.operands if name in computation.instructions]
        if instruction.opcode in ("and", "bitcast", "copy", "reshape"):
            for one in inputs:
                visit(computation, one, outer)
        elif instruction.opcode == "fusion":
            called = module.computations[instruction.attribute("calls") or ""]
            visit(called, called.root, {i: (computation, one) for i, one in enumerate(inputs)})
        elif (
            instruction.opcode == "compare"
            and len(inputs) == 2
            and re.search("direction=(LT|GT)", instruction.attributes)
        ):
            pair = [_seen(computation, one, outer) for one in inputs]
            if "direction=GT" in instruction.attributes:
                pair.reverse()
            (home, counter), (_, bound) = pair
            ahead = 0
            if counter.opcode == "add":  # the counter's next value is compared
                sides = [_seen(home, home.instructions[name], outer) for name in counter.operands]
                sides.sort(key=lambda side: side[1].opcode == "constant")
                (_, counter), (_, added) = sides
                ahead = int(added.inner) if added.opcode == "constant" else 0
            if counter.opcode == "get-tuple-element" and bound.opcode == "constant":
                found.append((_index(counter), int(bound.inner) - ahead))
            else:
                others = True
        else:
            others = True

    visit(condition, condition.root, {})
    return found, others


def _seen(computation: Computation, instruction: Instruction, outer: Mapping[int, tuple]) -> tuple:
    """What a value is, past copies and past the parameter of a fusion."""
    while True:
        if instruction.opcode == "parameter" and outer:
            computation, instruction = outer[int(instruction.inner)]
            outer = {}
        elif instruction.opcode in ("copy", "bitcast", "reshape", "convert", "copy-done", "copy-start"):
            instruction = computation.instructions[instruction.operands[0]]
        else:
            return computation, instruction


def _index(instruction: Instruction) -> int:
    found = re.search(r"index=(\d+)", instruction.attributes)
    return int(found[1]) if found else 0


def _first(where: Computation, instruction: Instruction, index: int) -> int | None:
    """The first value of an element of a loop's tuple, if it is a constant."""
    given = where.instructions.get(instruction.operands[0])
    if given is None or given.opcode != "tuple" or index >= len(given.operands):
        return None
    _, value = _seen(where, where.instructions[given.operands[index]], {})
    return int(value.inner) if value.opcode == "constant" and re.fullmatch(r"-?\d+", value.inner) else None


def _step(module: Module, body: Computation, index: int) -> int | None:
    """What a loop's body adds to an element of its tuple, if it is a constant."""
    root = body.root
    if root.opcode != "tuple":
        return None
    _, value = _seen(body, body.instructions[root.operands[index]], {})
    outer: Mapping[int, tuple] = {}
    computation = body
    if value.opcode == "fusion":
        inputs = [body.instructions[name] for name in value.operands]
        outer = {i: (body, one) for i, one in enumerate(inputs)}
        computation = module.computations[value.attribute("calls") or ""]
        value = computation.root
    if value.opcode != "add":
        return None
    for name in value.operands:
        _, one = _seen(computation, computation.instructions[name], outer)
        if one.opcode == "constant":
            return int(one.inner)
    return None

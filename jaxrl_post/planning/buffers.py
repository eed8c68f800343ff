"""Which arrays lie in a device's memory at the worst moment of a compiled program.

The compiler's own account (`memory_analysis`) gives the sum; here is what it is made of, followed through the schedule
in the program's text. An array that a loop carries is one array, and what changes it in place makes no other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from jaxrl_post.planning import hlo
from jaxrl_post.planning.hlo import Computation, Instruction, Module

_PASSED_ON = frozenset(
    {"bitcast", "copy-done", "get-tuple-element", "opt-barrier", "optimization-barrier", "tuple", "while"}
)


class Buffer(NamedTuple):
    """An array in main memory.

    Attributes:
        bytes: without padding.
        shape: e.g. `"bf16[8,2048,1024]"`.
        source: the operation that it comes from, in the words of the traced function.
    """

    bytes: int
    shape: str
    source: str


def at_peak(text: str) -> list[Buffer]:
    """The arrays that a program itself makes and that are there at its worst moment, largest first.

    Args:
        text: `compiled.as_text()` of a scheduled program.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> text = jax.jit(lambda x: jnp.sort(x)[::2]).lower(jnp.ones(1024)).compile().as_text()
        >>> at_peak(text)[0].bytes >= 2048
        True
    """
    module = hlo.parse(text)
    live = _Peak(module).of(module.computations[module.entry])
    return sorted(live, key=lambda one: -one.bytes)


class _Peak:
    def __init__(self, module: Module):
        self.module = module

    def of(self, where: Computation) -> list[Buffer]:
        """The local arrays at the worst moment; arguments and what goes to the caller's arrays are not local."""
        order = list(where.instructions.values())
        owners: dict[str, list[frozenset[str]]] = {}
        made: dict[str, list[Buffer]] = {}
        for instruction in order:
            owners[instruction.name], made[instruction.name] = self._owners(where, instruction, owners)
        last: dict[str, int] = {}
        for index, instruction in enumerate(order):
            # Of a tuple that a part is taken of, no other part is read.
            read = () if instruction.opcode == "get-tuple-element" else instruction.operands
            for name in (*read, instruction.name):
                for holders in owners.get(name, ()):
                    last.update(dict.fromkeys(holders, index))
        outside = set().union(*owners[where.root.name]) if owners[where.root.name] else set()
        live: dict[str, Buffer] = {}
        best: list[Buffer] = []
        most = -1
        for index, instruction in enumerate(order):
            for i, one in enumerate(made[instruction.name]):
                if one.bytes and f"{instruction.name}/{i}" not in outside:
                    live[f"{instruction.name}/{i}"] = one
            within = self._within(instruction)
            total = sum(one.bytes for one in live.values()) + sum(one.bytes for one in within)
            if total > most:
                most, best = total, [*live.values(), *within]
            for name in [name for name in live if last.get(name, index) <= index]:
                del live[name]
        return best

    def _within(self, instruction: Instruction) -> list[Buffer]:
        names: Sequence[str | None] = ()
        if instruction.opcode == "while":
            names = (instruction.attribute("body"),)
        elif instruction.opcode == "call":
            names = (instruction.attribute("to_apply"),)
        elif instruction.opcode == "conditional":
            names = instruction.branches()
        found = [self.of(self.module.computations[name]) for name in names if name]
        return max(found, key=lambda some: sum(one.bytes for one in some), default=[])

    def _owners(
        self, where: Computation, instruction: Instruction, owners: dict[str, list[frozenset[str]]]
    ) -> tuple[list[frozenset[str]], list[Buffer]]:
        """For each array that comes out, whose memory it is in; and the arrays that are new."""
        given = [owners.get(name, []) for name in instruction.operands]
        flat = [one for each in given for one in each]
        if instruction.opcode == "parameter":
            return [frozenset() for _ in instruction.arrays], []
        if instruction.opcode == "get-tuple-element":
            index = int((re.search(r"index=(\d+)", instruction.attributes) or [0, 0])[1])
            source = where.instructions[instruction.operands[0]]
            return _element(source.shape, flat, index), []
        if instruction.opcode in _PASSED_ON:
            if instruction.opcode == "copy-done":
                flat = flat[:1]
            return flat, []
        new = [
            Buffer(a.main_bytes, f"{a.dtype}[{','.join(map(str, a.dims))}]", _source(instruction))
            for a in instruction.arrays
        ]
        own = [frozenset({f"{instruction.name}/{i}"}) if one.bytes else frozenset() for i, one in enumerate(new)]
        for i, operand in self._in_place(where, instruction).items():
            held = owners.get(operand, [])
            if i < len(own) and len(held) == 1:
                own[i], new[i] = held[0], new[i]._replace(bytes=0)
        return own, new

    def _in_place(self, where: Computation, instruction: Instruction) -> dict[int, str]:
        """Operands whose memory an array that comes out takes over, by its number."""
        if instruction.opcode == "dynamic-update-slice":
            return {0: instruction.operands[0]}
        called = instruction.attribute("calls")
        if instruction.opcode != "fusion" or called is None:
            return {}
        inner = self.module.computations[called]
        root = inner.root
        ends = root.operands if root.opcode == "tuple" else (root.name,)
        found = {}
        for i, end in enumerate(ends):
            one = _past(inner, end)
            if one.opcode in ("dynamic-update-slice", "scatter"):
                target = _past(inner, one.operands[0])
                if target.opcode == "parameter":
                    found[i] = instruction.operands[int(target.inner)]
        return found


def _past(inner: Computation, name: str) -> Instruction:
    one = inner.instructions[name]
    while one.opcode == "bitcast":
        one = inner.instructions[one.operands[0]]
    return one


def _element(shape: str, flat: list[frozenset[str]], index: int) -> list[frozenset[str]]:
    """The part of a tuple's arrays that one of its elements is; elements may be tuples."""
    sizes = [len(list(hlo.arrays(one))) for one in hlo.elements(shape)]
    begin = sum(sizes[:index])
    return flat[begin : begin + sizes[index]] if index < len(sizes) else []


def _source(instruction: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return found[1] if found else instruction.name

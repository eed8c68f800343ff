"""What a traced or compiled program does: multiplications, the arrays it holds, what its devices say to each other."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, jaxprs_in_params


def dot_flops(function: Any, *arguments: Any) -> int:
    """Floating-point operations of all matrix products, those in loops as often as they run."""
    return _flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _flops(jaxpr: Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        bodies = list(jaxprs_in_params(equation.params))
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        assert not bodies or equation.primitive.name != "while", "a loop of unknown length"
        total += times * sum(map(_flops, bodies))
    return total


def largest_array(compiled: Any) -> int:
    """Elements of the largest array in a compiled program, in any layout."""
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(int(size) for size in dims.split(",")) for dims in shapes)


class Collective(NamedTuple):
    """A communication between devices; `shapes` of what comes out, and whether a loop repeats it."""

    operation: str
    shapes: tuple[tuple[int, ...], ...]
    in_loop: bool


def collectives(compiled: Any) -> list[Collective]:
    """The communications of a compiled program, each where the text has it."""
    lines = compiled.as_text().splitlines()
    name, homes, uses, bodies = "", [], {}, set()
    for line in lines:
        if opened := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", line):
            name = opened[1]
        called = re.findall(r"(body|condition|calls|to_apply)=%?([\w.\-]+)", line)
        homes.append(name)
        uses.setdefault(name, set()).update(other for _, other in called)
        bodies |= {other for kind, other in called if kind == "body"}
    repeated, left = set(), bodies
    while left:
        repeated |= left
        left = {other for computation in left for other in uses.get(computation, ())} - repeated
    found = []
    for line, home in zip(lines, homes, strict=True):
        matched = re.search(
            r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(", line
        )
        if matched:
            shapes = re.findall(r"\w+\[([\d,]*)\]", matched[1])
            sizes = tuple(tuple(int(n) for n in dims.split(",") if n) for dims in shapes)
            found.append(Collective(matched[2], sizes, home in repeated))
    return found

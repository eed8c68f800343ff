"""What TPU chips can do, and the names of their slices.

Peak rates, memory bandwidth and interconnect are those of Google Cloud's documentation (cloud.google.com/tpu/docs: the
pages v4, v5e, v5p, v6e, tpu7x), per device as JAX counts them: a chip of tpu7x is two. The memory that a program can
use is what the compiler allows (its error message names it); clocks are those that go with the peak rates.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """One device of a kind of TPU.

    Attributes:
        name: as in a topology's name.
        devices: of a chip.
        memory: bytes that a program can use.
        flops: peak bfloat16 operations a second.
        bandwidth: of main memory, bytes a second.
        interconnect: of all links to other chips of the slice, one way, bytes a second.
        network: to other slices, one way, bytes a second; None where it is not published.
        clock: cycles a second.
        dimensions: of a topology's name.
    """

    name: str
    devices: int
    memory: int
    flops: float
    bandwidth: float
    interconnect: float
    network: float | None
    clock: float
    dimensions: int


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 1, int(30.75 * GIB), 275e12, 1228e9, 300e9, None, 1.05e9, 3),
        Chip("v5e", 1, int(15.75 * GIB), 197e12, 819e9, 200e9, 25e9 / 8, 1.5e9, 2),
        Chip("v5p", 1, int(95.73 * GIB), 459e12, 2765e9, 600e9, 50e9 / 8, 1.75e9, 3),
        Chip("v6e", 1, int(31.24 * GIB), 918e12, 1638e9, 400e9, 100e9 / 8, 1.75e9, 2),
        Chip("tpu7x", 2, int(94.74 * GIB), 2307e12 / 2, 7380e9 / 2, 600e9 / 2, 100e9 / 16, 1.9e9, 3),
    )
}


class Topology(NamedTuple):
    """Slices of chips.

    Attributes:
        name: of one slice, e.g. `"v5p:4x4x4"`.
        chip: what it is made of.
        slices: how many of them.
        chips: of one slice.
    """

    name: str
    chip: Chip
    slices: int
    chips: int

    @property
    def devices(self) -> int:
        """Of all slices."""
        return self.slices * self.chips * self.chip.devices


def topology(name: str, slices: int = 1) -> Topology:
    """What a topology's name says.

    Args:
        name: a kind of chip and the sizes of a slice, `v5e:2x4`.
        slices: how many of them.

    Raises:
        ValueError: if the name is not of that form, there is no such chip, or several slices of it would be joined by a
            network of which nothing is known.

    Example:
        >>> topology("v5p:4x4x4").devices, topology("tpu7x:2x2x1", slices=2).devices
        (64, 16)
    """
    found = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name)
    chip = CHIPS.get(found[1]) if found else None
    if found is None or chip is None:
        raise ValueError(f"topology must be like v5e:2x4 or v5p:4x4x4, of {', '.join(CHIPS)}; got {name!r}")
    sizes = [int(size) for size in found[2].split("x")]
    if len(sizes) != chip.dimensions or min(sizes) < 1:
        example = "x".join(["2"] * chip.dimensions)
        raise ValueError(
            f"a slice of {chip.name} has {chip.dimensions} sizes, as in {chip.name}:{example}; got {name!r}"
        )
    if slices < 1:
        raise ValueError(f"slices must be at least 1, got {slices}")
    if slices > 1 and chip.network is None:
        raise ValueError(
            f"slices must be 1 for {chip.name}, since the rate of the network between its slices is not published; "
            f"got {slices}"
        )
    return Topology(name, chip, slices, math.prod(sizes))

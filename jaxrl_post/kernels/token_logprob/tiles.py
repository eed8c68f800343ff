"""How large the tiles of the Mosaic kernels are, by kernel, shape and chip."""

from __future__ import annotations

from typing import NamedTuple

from jaxrl_post.kernels.platform import current_device

LANES, SUBLANES = 128, 8
SLICE = {"forward": 256, "forward_keeping": 512, "d_hidden": 512, "d_unembedding": 512}
"""Vocabulary rows whose logits are made at a time, by what the compiler schedules best."""


class Tiles(NamedTuple):
    """Tokens and vocabulary rows of a grid step, and vocabulary rows of a slice."""

    tokens: int
    vocab: int
    slice: int


# Two things bound a tile: vector memory, and the length of the program, which is one basic block without loops and has
# to be compiled and fetched. Large token tiles come first: the vocabulary is read again for each of them, and below
# 1024 tokens a v6e waits for its memory. In order of preference:
CANDIDATES = (
    *((1024, 1024), (1024, 512), (512, 1024), (1024, 256), (512, 512), (512, 256)),
    *((256, 512), (256, 256), (128, 256), (128, 128)),
)
VMEM_SHARE = 0.9  # of vector memory that a kernel may claim
MAX_BUNDLES = 40_000  # instructions of a grid step, if the matrix unit never waits
FLOAT32_PASSES = 6  # products of bfloat16 parts that make one of float32


class Chip(NamedTuple):
    """What tiles depend on: bytes of vector memory of a core, and floating-point operations per cycle."""

    vmem: int
    flops: int


CHIPS = {
    "TPU v4": Chip(16 * 2**20, 131072),
    "TPU v5 lite": Chip(128 * 2**20, 131072),
    "TPU v5": Chip(64 * 2**20, 131072),
    "TPU v5p": Chip(64 * 2**20, 131072),
    "TPU v6 lite": Chip(128 * 2**20, 524288),
    "TPU7x": Chip(64 * 2**20, 524288),
}


def chip(kind: str | None = None) -> Chip:
    """The chip of that name, by default the one being traced for; of one not known, the least of today's."""
    return CHIPS.get(current_device().kind if kind is None else kind, Chip(64 * 2**20, 131072))


def _footprint(kernel: str, tokens: int, vocab: int, slice_width: int, width: int, itemsize: int) -> int:
    """Bytes of vector memory: operands come in twice, since the next tile's arrive during this one's work."""
    operands = 2 * (tokens + vocab) * width * itemsize
    slices = 2 * tokens * slice_width * 4 + tokens * slice_width * itemsize
    per_token = 10 * tokens * LANES * 4
    sums = {
        "forward": tokens * width * itemsize,
        "forward_keeping": tokens * width * (itemsize + 3 * 4),
        "d_hidden": 3 * tokens * width * 4,
        "d_unembedding": vocab * width * (4 + 2 * itemsize) + slice_width * width * 4,
    }
    return operands + slices + per_token + sums[kernel]


def choose_tiles(kernel: str, num_tokens: int, vocab_size: int, width: int, itemsize: int, chip: Chip) -> Tiles:
    """The first of `CANDIDATES` that fits, cut down to what there is.

    Raises:
        ValueError: if none fits.
    """
    products = (1 if kernel == "forward" else 2) * (FLOAT32_PASSES if itemsize == 4 else 1)
    for tokens, vocab in CANDIDATES:
        tokens = min(tokens, round_up(-(-num_tokens // -(-num_tokens // tokens)), LANES))
        vocab = min(vocab, round_up(vocab_size, 2 * LANES))
        slice_width = min(SLICE[kernel], vocab // 2)
        bundles = 2 * products * tokens * vocab * width // chip.flops
        footprint = _footprint(kernel, tokens, vocab, slice_width, width, itemsize)
        if footprint <= VMEM_SHARE * chip.vmem and bundles <= MAX_BUNDLES:
            return Tiles(tokens, vocab, slice_width)
    raise ValueError(
        f"pallas_tpu has no tile for states of width {width} in {chip.vmem >> 20} MiB of vector memory; "
        "use implementation='chunked'"
    )


def round_up(n: int, multiple: int) -> int:
    """The least multiple that is not below `n`."""
    return -(-n // multiple) * multiple

"""Reading and writing the safetensors format one tensor at a time.

A file is a little-endian length, a JSON header of that length that names each tensor with its dtype, shape and place,
and the bytes. A checkpoint is one such file, or several with an index. Tensors are mapped into memory while they are
looked at and written as they come, so that neither way holds more than one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the limit that the format itself sets


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file.

    Attributes:
        file: that holds it.
        code: of its dtype, as the format writes it: `F32`, `BF16`, `F8_E4M3`, ...
        shape: of the tensor.
        start: its first byte in the file.
        size: number of bytes.
    """

    file: Path
    code: str
    shape: tuple[int, ...]
    start: int
    size: int

    def view(self) -> np.ndarray:
        """The tensor mapped into memory, read as it is looked at; let go of it when done.

        Raises:
            ValueError: if its dtype is none of `DTYPES`.
        """
        if self.code not in DTYPES:
            raise ValueError(f"dtype {self.code} is not supported; there are {', '.join(DTYPES)}")
        dtype = DTYPES[self.code]
        if self.size == 0:
            return np.zeros(self.shape, dtype)
        # A map may begin at whole pages only.
        begin = self.start - self.start % mmap.ALLOCATIONGRANULARITY
        with open(self.file, "rb") as file:
            mapped = mmap.mmap(file.fileno(), self.start - begin + self.size, access=mmap.ACCESS_READ, offset=begin)
        flat = np.frombuffer(mapped, dtype, count=math.prod(self.shape), offset=self.start - begin)
        return flat.reshape(self.shape)


def read_header(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of one file by name.

    Args:
        path: of a safetensors file.

    Returns:
        Where each tensor is; nothing of them is read.

    Raises:
        ValueError: if the file is not of this format, or shorter than its header says.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "x.safetensors"
        >>> write_file(file, [("a", (2,), np.dtype("float32"))], lambda name: np.array([1.0, 2.0], np.float32))
        >>> read_header(file)["a"].view().tolist()
        [1.0, 2.0]
    """
    file = Path(path)
    total = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(_MAX_HEADER, total - 8):
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        found: dict[str, Tensor] = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            shape = tuple(int(n) for n in entry["shape"])
            found[name] = Tensor(file, entry["dtype"], shape, 8 + length + first, last - first)
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} ({total} bytes) is truncated or not a safetensors file: {error}") from error
    end = max((tensor.start + tensor.size for tensor in found.values()), default=0)
    if end > total:
        raise ValueError(f"{file} is truncated: its header speaks of {end} bytes, it has {total}; copy it again")
    for name, tensor in found.items():
        known = DTYPES.get(tensor.code)
        if known is not None and tensor.size != math.prod(tensor.shape) * known.itemsize:
            raise ValueError(f"{file}: {name} has {tensor.size} bytes, which is not {tensor.code} {tensor.shape}")
    return found


def open_checkpoint(directory: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, of all of its files, by name.

    Args:
        directory: with `model.safetensors`, or several files and `model.safetensors.index.json`.

    Returns:
        Where each tensor is; nothing of them is read.

    Raises:
        ValueError: if there are no such files, some that the index names are missing, or a file is damaged.
    """
    root = Path(directory)
    # transformers looks for the single file first too.
    if (root / SINGLE).is_file():
        return read_header(root / SINGLE)
    index = root / INDEX
    if not index.is_file():
        others = sorted(path.name for path in root.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".safetensors"))
        hint = f"; it holds {', '.join(others)}" if others else ""
        raise ValueError(f"{root} has neither {SINGLE} nor {INDEX}{hint}; save the model as safetensors")
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(where.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({error}); copy it again") from error
    if missing := [name for name in files if not (root / name).is_file()]:
        raise ValueError(f"{root} lacks {len(missing)} of {len(files)} files of its index: {', '.join(missing)}")
    found: dict[str, Tensor] = {}
    for name in files:
        found |= read_header(root / name)
    if lost := sorted(set(where) - set(found)):
        raise ValueError(f"{index} names tensors that are in no file: {', '.join(lost)}")
    return found


Spec = tuple[str, tuple[int, ...], np.dtype]


def write_file(path: str | os.PathLike[str], tensors: Sequence[Spec], make: Callable[[str], np.ndarray]) -> None:
    """Write one file, tensor by tensor.

    Args:
        path: of the file.
        tensors: name, shape and dtype of each, in the order in which they are made.
        make: `name -> array`.

    Raises:
        ValueError: if an array is not what was announced, or has a dtype that the format lacks.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it transformers does not read the file
    place = 0
    for name, shape, dtype in tensors:
        if dtype not in _CODES:
            raise ValueError(f"{name} has dtype {dtype}; parameters are written as {', '.join(map(str, _CODES))}")
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers want the bytes aligned
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)))
        stream.write(text)
        for name, shape, dtype in tensors:
            array = make(name)
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{name} should be {dtype} {shape}, got {array.dtype} {array.shape}")
            # As bytes, since bfloat16 has no buffer format of its own.
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())


def write_checkpoint(
    directory: str | os.PathLike[str],
    tensors: Iterable[Spec],
    make: Callable[[str], np.ndarray],
    *,
    max_shard_size: int = 5_000_000_000,
) -> list[str]:
    """Write tensors as one file, or as several with an index.

    Args:
        directory: that exists.
        tensors: name, shape and dtype of each, in the order in which they are made.
        make: `name -> array`, called once for each, in that order.
        max_shard_size: bytes of tensors in a file; a tensor that is larger has a file of its own.

    Returns:
        The names of the files.

    Raises:
        ValueError: as `write_file`, or if `max_shard_size` is not positive.

    Example:
        >>> import tempfile
        >>> ones = np.ones((3,), np.float32)
        >>> specs = [(name, ones.shape, ones.dtype) for name in "ab"]
        >>> write_checkpoint(tempfile.mkdtemp(), specs, lambda name: ones, max_shard_size=12)[:2]
        ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size must be a positive number of bytes, got {max_shard_size}")
    shards: list[list[Spec]] = []
    held = total = 0
    for spec in tensors:
        size = math.prod(spec[1]) * spec[2].itemsize
        if not shards or held + size > max_shard_size:
            shards.append([])
            held = 0
        shards[-1].append(spec)
        held, total = held + size, total + size
    root = Path(directory)
    if len(shards) <= 1:
        write_file(root / SINGLE, shards[0] if shards else [], make)
        return [SINGLE]
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_file(root / name, shard, make)
    where = {spec[0]: name for name, shard in zip(names, shards, strict=True) for spec in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (root / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*names, INDEX]

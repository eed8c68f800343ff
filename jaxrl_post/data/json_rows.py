"""Rows of JSON files: one object a line, or one array of objects."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]
PathLike: TypeAlias = str | os.PathLike[str]

_MARK = b"\xef\xbb\xbf"  # an editor's byte order mark, which is no part of the first object


class JsonlRows:
    r"""The lines of a JSONL file, each read when it is asked for; blank lines do not count.

    The file is read once to find where lines begin: 24 bytes of memory a row.

    Args:
        path: the file, UTF-8.

    Raises:
        ValueError: if the file is missing or has no line.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "sums.jsonl"
        >>> _ = path.write_text('{"a": 1}\n\n{"a": 2}\n')
        >>> rows = JsonlRows(path)
        >>> rows.read(1), rows.where(1).removeprefix(str(path))
        ({'a': 2}, ', line 3')
    """

    def __init__(self, path: PathLike):
        self.path = Path(path)
        self._start, self._size, self._number = array("Q"), array("Q"), array("Q")
        try:
            with open(self.path, "rb") as file:
                start = 0
                for number, line in enumerate(file, start=1):
                    mark = len(_MARK) if number == 1 and line.startswith(_MARK) else 0
                    if line[mark:].strip():
                        self._start.append(start + mark)
                        self._size.append(len(line) - mark)
                        self._number.append(number)
                    start += len(line)
        except OSError as error:
            raise unreadable(self.path, error) from error
        if not self._start:
            raise ValueError(f"data file {self.path} is empty: expected one JSON object per line")

    def __len__(self) -> int:
        return len(self._start)

    def read(self, index: int) -> Row:
        """The object on line `index`."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._start[index])
                line = file.read(self._size[index])
        except OSError as error:
            raise unreadable(self.path, error) from error
        return _parse(line)

    def where(self, index: int) -> str:
        """File and line, counted from 1."""
        return f"{self.path}, line {self._number[index]}"

    def scan(self) -> Iterator[Row | ValueError]:
        """All rows or what is wrong with them."""
        with open(self.path, "rb") as file:
            for start, size in zip(self._start, self._size, strict=True):
                file.seek(start)
                try:
                    yield _parse(file.read(size))
                except ValueError as error:
                    yield error


class JsonArrayRows:
    """The objects of a file that is one JSON array, all in memory: larger data are better kept in lines or Parquet.

    Args:
        path: the file, UTF-8.

    Raises:
        ValueError: if the file is missing, is not an array, or holds nothing.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "sums.json"
        >>> _ = path.write_text('[{"a": 1}, {"a": 2}]')
        >>> rows = JsonArrayRows(path)
        >>> rows.read(1), rows.where(1).removeprefix(str(path))
        ({'a': 2}, ', row 1 (counted from 0)')
    """

    def __init__(self, path: PathLike):
        self.path = Path(path)
        try:
            found = json.loads(self.path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise unreadable(self.path, error) from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"data file {self.path} begins as a JSON array, but cannot be read ({error})") from error
        if not found:
            raise ValueError(f"data file {self.path} is empty: expected an array of objects, or one object per line")
        self._rows = [json.dumps(row).encode() for row in found]  # as text: whoever reads a row has it for himself

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Row:
        """Object `index` of the array."""
        return _parse(self._rows[index])

    def where(self, index: int) -> str:
        """File and row, counted from 0."""
        return f"{self.path}, row {index} (counted from 0)"

    def scan(self) -> Iterator[Row | ValueError]:
        """All rows or what is wrong with them."""
        for row in self._rows:
            try:
                yield _parse(row)
            except ValueError as error:
                yield error


def is_array(path: PathLike) -> bool:
    """Whether a file can be read and begins, but for white space, as a JSON array does."""
    try:
        with open(path, "rb") as file:
            return file.read(1024).removeprefix(_MARK).lstrip().startswith(b"[")
    except OSError:
        return False


def unreadable(path: Path, error: OSError) -> ValueError:
    """The error for a data file that cannot be opened."""
    return ValueError(f"data file {path} cannot be read: {error.strerror or error}; check the path")


def _parse(line: bytes) -> Row:
    try:
        row = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason}, byte {error.start} of the line)") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("not valid JSON (nested too deep)") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object with one key per column, got {type(row).__name__}")
    return row

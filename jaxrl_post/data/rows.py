"""Rows of data files, by number: JSON lines, Parquet, Arrow, and directories that hold them.

Nothing but an index is kept in memory, but of a JSON file that is one array. A JSON line is read when it is asked for,
Arrow files are mapped into memory, and a Parquet file, whose rows cannot be reached one by one, is first copied into
such a file. What the columns mean is not known here.
"""

from __future__ import annotations

import bisect
import glob
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxrl_post.data.json_rows import JsonArrayRows, JsonlRows, PathLike, Row, is_array, unreadable

_JSON = (".jsonl", ".ndjson", ".json")
_ARROW = (".arrow", ".arrows", ".feather", ".ipc")
_PARQUET = (".parquet", ".pq")
_ROWS_AT_A_TIME = 256
# What the hub takes for the name of a split; other names of files say nothing.
_SPLITS = {"train", "training", "test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev"}


class Rows(Protocol):
    """Rows by number; `where` says where row `index` stands, for messages."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Row:
        """Row `index`. Raises ValueError, which does not say where, if it is not an object of columns."""
        ...

    def where(self, index: int) -> str:
        """File and line, or file and row."""
        ...

    def scan(self) -> Iterator[Row | ValueError]:
        """All rows in order, and for each that `read` refuses the error: faster than reading one by one."""
        ...


class ArrowRows:
    """The rows of an Arrow or a Parquet file.

    Arrow's file and stream format are both read, whatever the file's name; compressed ones are unpacked into memory.

    Args:
        path: the file; `.parquet` and `.pq` are Parquet.

    Raises:
        ImportError: if pyarrow is not installed.
        ValueError: if the file is missing, damaged or has no row.

    Example:
        >>> import pyarrow, pyarrow.parquet
        >>> path = f"{tempfile.mkdtemp()}/a.parquet"
        >>> pyarrow.parquet.write_table(pyarrow.table({"prompt": ["1+1=", "1+2="]}), path)
        >>> ArrowRows(path).read(1)
        {'prompt': '1+2='}
    """

    def __init__(self, path: PathLike):
        self.path = Path(path)
        try:
            import pyarrow
        except ImportError as error:
            raise ImportError(f'reading {self.path} needs pyarrow: pip install "jaxrl-post[parquet]"') from error
        try:
            open(self.path, "rb").close()  # pyarrow says less clearly what is wrong
        except OSError as error:
            raise unreadable(self.path, error) from error
        try:
            if self.path.suffix.lower() in _PARQUET:
                with tempfile.TemporaryDirectory(prefix="jaxrl_post_rows_") as directory:
                    # The copy has no name any more when this block ends; the mapping keeps it until the process does.
                    self._batches = _map_arrow(_copy_parquet(self.path, Path(directory) / "rows.arrow"))
            else:
                self._batches = _map_arrow(self.path)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(
                f"data file {self.path} cannot be read ({error}); is it damaged or of another format?"
            ) from error
        self._end = list(itertools.accumulate(batch.num_rows for batch in self._batches))
        if not self._end or not self._end[-1]:
            raise ValueError(f"data file {self.path} is empty: it holds no rows")

    def __len__(self) -> int:
        return self._end[-1]

    def read(self, index: int) -> Row:
        """Row `index`, as Python values."""
        which = bisect.bisect_right(self._end, index)
        batch = self._batches[which]
        return batch.slice(index - self._end[which] + batch.num_rows, 1).to_pylist()[0]

    def where(self, index: int) -> str:
        """File and row, counted from 0 as data frames count."""
        return f"{self.path}, row {index} (counted from 0)"

    def scan(self) -> Iterator[Row | ValueError]:
        """All rows."""
        for batch in self._batches:
            for start in range(0, batch.num_rows, _ROWS_AT_A_TIME):
                yield from batch.slice(start, _ROWS_AT_A_TIME).to_pylist()


class JoinedRows:
    """The rows of several files, one after the other.

    Args:
        parts: at least one.

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "sums.jsonl"
        >>> _ = path.write_text('{"a": 1}')
        >>> rows = JoinedRows([JsonlRows(path), JsonlRows(path)])
        >>> len(rows), rows.read(1)
        (2, {'a': 1})
    """

    def __init__(self, parts: Sequence[Rows]):
        self._parts = list(parts)
        self._end = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._end[-1]

    def _find(self, index: int) -> tuple[Rows, int]:
        which = bisect.bisect_right(self._end, index)
        return self._parts[which], index - (self._end[which - 1] if which else 0)

    def read(self, index: int) -> Row:
        """Row `index` of all."""
        part, inner = self._find(index)
        return part.read(inner)

    def where(self, index: int) -> str:
        """File, and line or row in it."""
        part, inner = self._find(index)
        return part.where(inner)

    def scan(self) -> Iterator[Row | ValueError]:
        """All rows or what is wrong with them."""
        return itertools.chain.from_iterable(part.scan() for part in self._parts)


def open_rows(paths: PathLike | Sequence[PathLike], *, split: str | None = None) -> Rows:
    """The rows of files, patterns and directories, in the order given.

    A directory may be what `datasets` saved (a data set, or a dictionary of splits), or hold files of one kind, beside
    each other or in `data/`, as repositories of data sets do; of those, names like `train-00000-of-00004.parquet` say
    which split a file belongs to.

    Args:
        paths: a path or several; a pattern (`data/part-*.parquet`, `**` for any depth) stands for its files in
            alphabetical order. The suffix tells the format: `.jsonl`, `.ndjson` and `.json` (one object per line;
            `.json` may be one array of objects, which is kept in memory), `.parquet`, `.pq`, `.arrow`, `.arrows`,
            `.feather`, `.ipc`.
        split: which part of a directory with several; needed only there.

    Returns:
        `Rows`.

    Raises:
        ImportError: if pyarrow is needed and not installed.
        ValueError: for a missing, unreadable or empty file, an unknown suffix, a pattern without a match, a directory
            without data, or a split that is not there or is needed.

    Example:
        >>> directory = Path(tempfile.mkdtemp())
        >>> for name in "ab":
        ...     _ = (directory / f"{name}.jsonl").write_text(f'{{"prompt": "{name}"}}')
        >>> [row["prompt"] for row in open_rows(directory / "*.jsonl").scan()]
        ['a', 'b']
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not given:
        raise ValueError("at least one data file is needed, got none")
    parts = [_open_file(file) for path in given for file in _files(path, split)]
    return parts[0] if len(parts) == 1 else JoinedRows(parts)


def _open_file(path: Path) -> Rows:
    suffix = path.suffix.lower()
    if suffix in _JSON:
        return JsonArrayRows(path) if suffix == ".json" and is_array(path) else JsonlRows(path)
    if suffix in (*_PARQUET, *_ARROW):
        return ArrowRows(path)
    raise ValueError(
        f"data file {path} has a suffix that says no known format; known are "
        f"{', '.join((*_JSON, *_PARQUET, *_ARROW))}{' (unpack it first)' if suffix in ('.gz', '.zst', '.xz') else ''}"
    )


def _files(path: PathLike, split: str | None) -> list[Path]:
    text = os.fspath(path)
    if split is not None and not os.path.isdir(text):
        raise ValueError(f"split={split!r} chooses a part of a directory, but {text!r} is none; leave it out")
    if not os.path.exists(text) and any(character in text for character in "*?["):
        found = sorted(file for file in glob.glob(text, recursive=True) if os.path.isfile(file))
        if not found:
            raise ValueError(f"no data file matches {text!r}; check the pattern")
        return [Path(file) for file in found]
    return _directory_files(Path(path), split) if os.path.isdir(text) else [Path(path)]


def _directory_files(directory: Path, split: str | None) -> list[Path]:
    if (directory / "dataset_dict.json").is_file():
        splits = _json_file(directory / "dataset_dict.json").get("splits", [])
        return _directory_files(directory / _choose(split, splits, directory), None)
    if (directory / "state.json").is_file():
        if split is not None:
            raise ValueError(f"split={split!r}, but {directory} holds one data set without splits; leave it out")
        state = _json_file(directory / "state.json")
        files = [directory / file["filename"] for file in state.get("_data_files") or []]
        if state.get("_indices_files") or not files:
            raise ValueError(f"{directory} was saved by a version of datasets that is not read; load and save it again")
        return files
    known = (*_JSON, *_PARQUET, *_ARROW)
    found = [
        file
        for folder in (directory, directory / "data")
        if folder.is_dir()
        for file in sorted(folder.iterdir())
        # dataset_info.json and its like describe the data.
        if file.suffix.lower() in known and file.suffix.lower() != ".json"
    ]
    if not found:
        raise ValueError(
            f"{directory} holds no data: expected what datasets' save_to_disk writes, or files with one of the "
            f"suffixes {', '.join(suffix for suffix in known if suffix != '.json')}"
        )
    names = {file: re.sub(r"-\d+-of-\d+$", "", file.stem) for file in found}
    if split is None and not _SPLITS & set(names.values()):
        return found
    chosen = _choose(split, list(dict.fromkeys(names.values())), directory)
    return [file for file, name in names.items() if name == chosen]


def _choose(split: str | None, splits: list[str], directory: Path) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split in splits:
        return str(split)
    asked = "one must be named" if split is None else f"there is no {split!r}"
    raise ValueError(f"{directory} holds the splits {', '.join(splits) or '(none)'}: {asked}")


def _json_file(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error


def _copy_parquet(path: Path, target: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    with (
        pyarrow.parquet.ParquetFile(path) as file,
        # The stream format lets dictionaries change from batch to batch, as they do between row groups.
        pyarrow.ipc.new_stream(str(target), file.schema_arrow) as writer,
    ):
        for batch in file.iter_batches(batch_size=4 * _ROWS_AT_A_TIME):
            writer.write_batch(batch)
    return target


def _map_arrow(path: Path) -> list[Any]:
    import pyarrow

    mapped = pyarrow.memory_map(str(path))
    is_file = mapped.read(6) == b"ARROW1"
    mapped.seek(0)
    if is_file:
        reader = pyarrow.ipc.open_file(mapped)
        return [_readable(reader.get_batch(i)) for i in range(reader.num_record_batches)]
    return [_readable(batch) for batch in pyarrow.ipc.open_stream(mapped)]


def _readable(batch: Any) -> Any:
    """Times of nanoseconds, which Python's have no room for, cut to microseconds."""
    import pyarrow
    import pyarrow.compute

    for index, field in enumerate(batch.schema):
        if pyarrow.types.is_timestamp(field.type) and field.type.unit == "ns":
            cut = pyarrow.compute.cast(batch.column(index), pyarrow.timestamp("us", field.type.tz), safe=False)
            batch = batch.set_column(index, field.name, cut)
    return batch

"""Problems from data files: which columns, which kind, and what happens to malformed rows.

`rows` finds a row in a file and `schemas` says what it means; here the two become a `Source`.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxrl_post.data.json_rows import JsonlRows, PathLike, Row
from jaxrl_post.data.problems import Problem
from jaxrl_post.data.rows import JoinedRows, Rows, open_rows
from jaxrl_post.data.schemas import RowType, detect, to_problem
from jaxrl_post.data.templates import bare_field, lookup, render

_AS_TEXT = ("prompt", "answer", "chosen", "rejected", "completion")
_REPORTED = 10


class FileSource:
    r"""Problems made of rows that stay in their files; made by `open_source`.

    All rows are looked at once, so that a malformed one shows before training rather than in the middle of it.

    Args:
        rows: rows by number.
        columns: see `open_source`; so are the others.
        kind: see there.
        require: see there.
        lowercase: see there.
        on_bad_row: see there.

    Attributes:
        row_type: what kind of data it is.
        columns: the names of all columns of the problems.
        skipped: number of rows left out as malformed.
        bad_rows: what is wrong with the first ten of them, and where they stand.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "sums.jsonl"
        >>> _ = path.write_text('{"prompt": "1+1="}\n{"prompt": \n')
        >>> source = FileSource(JsonlRows(path), on_bad_row="skip")
        >>> len(source), source.skipped, source.bad_rows[0].removeprefix(str(path))
        (1, 1, ', line 2: not valid JSON (Expecting value, column 12)')
    """

    def __init__(
        self,
        rows: Rows,
        *,
        columns: Mapping[str, str] | None = None,
        kind: str | None = None,
        require: Collection[str] = (),
        lowercase: bool = False,
        on_bad_row: str = "error",
    ):
        if on_bad_row not in ("error", "skip"):
            raise ValueError(f"on_bad_row must be 'error' or 'skip', got {on_bad_row!r}")
        if "prompt_id" in (columns or {}):
            raise ValueError("columns: 'prompt_id' is set by the library; map to another name")
        self._rows = rows
        self._templates = dict(columns or {})
        self._kind = kind
        self._require = tuple(require)
        self._lowercase = lowercase
        self.row_type: RowType | None = None
        self.skipped = 0
        self.bad_rows: list[str] = []
        self._kept = array("Q")
        names: dict[str, None] = {}
        for index, row in enumerate(rows.scan()):
            try:
                if isinstance(row, ValueError):
                    raise row
                names.update(dict.fromkeys(self._problem(row)))
                self._kept.append(index)
            except ValueError as error:
                message = f"{rows.where(index)}: {error}"
                if on_bad_row == "error":
                    raise ValueError(message) from error
                self.skipped += 1
                if len(self.bad_rows) < _REPORTED:
                    self.bad_rows.append(message)
        if not self._kept:
            raise ValueError(f"all {self.skipped} rows are malformed; the first is {self.bad_rows[0]}")
        self.columns: tuple[str, ...] = (*names, "prompt_id")

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < len(self._kept):
            raise IndexError(f"problem {index} of {len(self._kept)}")
        number = self._kept[index]
        try:
            return {**self._problem(self._rows.read(number)), "prompt_id": index}
        except ValueError as error:
            raise ValueError(
                f"{self._rows.where(number)}: {error}; the file was in order when it was opened: has it changed?"
            ) from error

    def _problem(self, row: Row) -> Problem:
        if "prompt_id" in row:
            raise ValueError("the column 'prompt_id' is set by the library; rename it")
        mapped = {**row, **{name: self._mapped(name, template, row) for name, template in self._templates.items()}}
        if mapped.get("prompt") is None and mapped.get("question") is not None and "chosen" in mapped:
            mapped["prompt"] = mapped["question"]  # which the prompt of a pair may be called too
        if self.row_type is None:
            found = detect(mapped, kind=self._kind)
            problem = to_problem(mapped, found.kind)
            self.row_type = found
        else:
            problem = to_problem(mapped, self.row_type.kind)
        if self._lowercase:
            if "prompt_messages" in problem:
                raise ValueError("only text can be lower-cased, but this row holds messages")
            for name in _AS_TEXT:
                if isinstance(problem.get(name), str):
                    problem[name] = problem[name].lower()
        for name in self._require:
            if not isinstance(problem.get(name), str):
                state = "is missing" if problem.get(name) is None else f"is not text but {problem[name]!r:.60}"
                raise ValueError(
                    f"column {name!r} {state}; the columns are {', '.join(row) or 'none'}; make it by a mapping, e.g. "
                    f"{name}: '{{solution}}'"
                )
        return problem

    def _mapped(self, name: str, template: str, row: Row) -> Any:
        field = bare_field(template)
        if field is not None:
            try:
                value = lookup(field, row)
            except (KeyError, IndexError, TypeError, ValueError):
                value = None  # reported below, in full
            is_messages = isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value)
            if value is not None and (name not in _AS_TEXT or is_messages):
                return value
        return render(template, row, name, nulls=False)


def open_source(
    paths: PathLike | Sequence[PathLike],
    *,
    columns: Mapping[str, str] | None = None,
    kind: str | None = None,
    require: Collection[str] = (),
    split: str | None = None,
    lowercase: bool = False,
    on_bad_row: str = "error",
) -> FileSource:
    r"""Problems from JSONL, Parquet and Arrow files and from directories that `datasets` saved.

    Rows stay in the files and are read when they are asked for. What they are is seen by their columns (`detect`):
    prompts, completions, preference pairs, labelled completions or steps, as text or as messages, or verl's rows.

    Args:
        paths: files, patterns and directories, in order; see `open_rows`.
        columns: new columns by name, each a template over a row's columns: `{"prompt": "{question} Think.", "answer":
            "{reward_model.ground_truth}"}`. Lists are joined by commas, or by the text after a colon. A template that
            is one field and nothing else passes on messages, and for all names but the five that are text (`prompt`,
            `answer`, `completion`, `chosen`, `rejected`) any value as it is.
        kind: kind of the rows, where the columns would say another one: `"prompt"` reads preference pairs as prompts.
        require: columns that every problem must have as text, e.g. `("answer",)`.
        split: which part of a directory with several.
        lowercase: lower-case the five columns that are text.
        on_bad_row: `"error"` stops at the first malformed row, `"skip"` leaves such rows out and counts them.

    Returns:
        A `Source`, with `row_type`, `columns`, `skipped` and `bad_rows`.

    Raises:
        ImportError: if a file needs pyarrow and it is not installed.
        ValueError: for files that cannot be opened; for a malformed row, with file and line (Parquet, Arrow: file and
            row); under `"skip"`, if no row is left.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "sums.jsonl"
        >>> _ = path.write_text('{"question": "12+7=", "truth": {"value": 19}}\n')
        >>> source = open_source(path, columns={"prompt": "{question}", "answer": "{truth.value}"})
        >>> source[0]
        {'question': '12+7=', 'truth': {'value': 19}, 'prompt': '12+7=', 'answer': '19', 'prompt_id': 0}
        >>> print(source.row_type)
        prompts (prompt; as text)
    """
    rows = open_rows(paths, split=split)
    return FileSource(rows, columns=columns, kind=kind, require=require, lowercase=lowercase, on_bad_row=on_bad_row)


class JsonlSource(FileSource):
    r"""Problems from JSONL files whatever their suffix, by templates; `open_source` does more.

    Args:
        paths: a file or several, read in order.
        prompt: template over the columns of a line.
        answer: template of the column `answer`; None leaves the line's own column, if it has one.
        chosen: template of the preferred completion; None leaves the line's own column, if it has one.
        rejected: template of the other completion; None leaves the line's own column, if it has one.
        lowercase: lower-case prompt, answer and completions.

    Raises:
        ValueError: names file and line: a missing or empty file, a line that is not a JSON object, a column that a
            template asks for and the line lacks.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "sums.jsonl"
        >>> _ = path.write_text('{"question": "12+7=", "answer": 19}\n')
        >>> JsonlSource(path, prompt="{question}", answer="{answer}")[0]
        {'question': '12+7=', 'answer': '19', 'prompt': '12+7=', 'prompt_id': 0}
    """

    def __init__(
        self,
        paths: PathLike | Sequence[PathLike],
        *,
        prompt: str = "{prompt}",
        answer: str | None = None,
        chosen: str | None = None,
        rejected: str | None = None,
        lowercase: bool = False,
    ):
        files = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        if not files:
            raise ValueError("at least one JSONL file is needed, got none")
        made = {"prompt": prompt, "answer": answer, "chosen": chosen, "rejected": rejected}
        super().__init__(
            JoinedRows([JsonlRows(file) for file in files]),
            columns={name: template for name, template in made.items() if template is not None},
            lowercase=lowercase,
        )

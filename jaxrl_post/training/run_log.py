"""The files of a run directory that grow while it trains: metrics.jsonl, completions.jsonl, TensorBoard, W&B.

A run that is killed at any moment and resumed must leave the lines that an uninterrupted one would have left. So each
line is one write, and whoever resumes from step n first cuts every line after n and a line that was half written.
Checkpoints are not here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from jaxrl_post.models.export import holds_model
from jaxrl_post.training import config as configs
from jaxrl_post.training.config import Config, ConfigError, yaml_text
from jaxrl_post.training.run_files import RunFiles
from jaxrl_post.training.same_run import RunDirError, check_same_run

METRICS_FILE = "metrics.jsonl"
COMPLETIONS_FILE = "completions.jsonl"
CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"
LOCK_FILE = ".lock"


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader, or a kill at any moment, sees the old file or the new one."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        # mkstemp makes files that only their owner may read; a run is shared like any file of the user.
        umask = os.umask(0)
        os.umask(umask)
        os.fchmod(descriptor, 0o666 & ~umask)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def prepare_run_dir(config: Config, files: RunFiles | None = None) -> bool:
    """Make the run directory, hold it against the configuration, and write config.yaml into it.

    A run that is new must not export to a directory that holds a model, because it cannot be its own.

    Args:
        config: the resolved configuration.
        files: where the run's files are; in its `run_dir` if None.

    Returns:
        True if the directory holds a run of this configuration, to be resumed; False if it is new. A run that has
        neither a checkpoint nor a line of metrics has nothing to be resumed: its directory is new, and this
        configuration takes the place of the one that was never used.

    Raises:
        ConfigError: the run is new, and `model.export` holds a model.
        RunDirError: the directory cannot be written, holds another configuration's run, remains of a run without its
            configuration, or a config.yaml that is not a run's.
    """
    files = RunFiles(config.run_dir) if files is None else files
    directory, checkpoints = files.local, files.root / CHECKPOINTS
    path = directory / CONFIG_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        begun = _has_begun(directory, checkpoints)
        if path.exists():
            stored = _read_config(path)
            if begun:
                check_same_run(config.run_dir, stored, config)
        elif begun:
            left = [path.name for path in (epath.Path(directory / METRICS_FILE), checkpoints) if path.exists()]
            raise RunDirError(
                f"run_dir {config.run_dir} holds {' and '.join(left)} but no {CONFIG_FILE}, so that it cannot be told "
                "whose they are; give another run_dir, or move them away"
            )
        if not begun:
            _check_export(config.model.export)
        write_atomically(path, configs.dump(config))
    except OSError as error:
        raise _cannot_write(directory, error) from error
    return begun


@contextlib.contextmanager
def lock_run_dir(run_dir: str | Path) -> Iterator[None]:
    """Hold a run directory, which is made if need be, so that no other process trains in it at the same time.

    The kernel gives the lock back when its holder ends, however it ends, so that a killed run can be resumed at once.

    Args:
        run_dir: the run's directory.

    Raises:
        RunDirError: another process holds it, or the directory cannot be written.

    Example:
        >>> with lock_run_dir(tempfile.mkdtemp()):
        ...     pass  # train
    """
    directory = Path(run_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, directory)
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        raise _cannot_write(directory, error) from error
    try:
        yield
    finally:
        import fcntl

        # The file stays: whoever deleted it could delete one that the next process has locked. The lock is given back
        # by name, because child processes that were forked meanwhile keep the file open.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _lock(descriptor: int, directory: Path) -> None:
    import fcntl  # not on Windows, where everything but training works

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        pid = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
        raise RunDirError(
            f"another process (pid {pid}) is training in {directory}; wait for it, or give another run_dir"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        warnings.warn(
            f"the file system of {directory} has no locks ({error.strerror}): see to it that only one process trains "
            "there",
            RuntimeWarning,
            stacklevel=4,
        )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)


def _cannot_write(directory: Path, error: OSError) -> RunDirError:
    return RunDirError(
        f"run_dir {directory} cannot be written: {error.strerror or error} ({error.filename or directory}); give a "
        "run_dir that you may write to, e.g. run_dir=/tmp/run on the command line"
    )


def _check_export(directory: str | None) -> None:
    if directory is not None and (Path(directory).is_file() or holds_model(directory)):
        why = "is there already, and this run did not write it; choose another directory, or remove it"
        raise ConfigError([f"model.export = {directory!r}: {why}"])


def _has_begun(directory: Path, checkpoints: epath.Path) -> bool:
    """Whether there is anything that a later start of the run would go on from."""
    metrics = directory / METRICS_FILE
    # A checkpoint that is still being written, or was given up, has a longer name than its step.
    saved = checkpoints.is_dir() and any(path.name.isdigit() and path.is_dir() for path in checkpoints.iterdir())
    return saved or (metrics.is_file() and bool(_complete_lines(metrics)))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        stored, _ = yaml_text.read(path.read_text(encoding="utf-8"), str(path))
    except (ConfigError, UnicodeDecodeError) as error:
        raise RunDirError(f"{path} cannot be read ({error}); give another run_dir, or restore the file") from error
    if not isinstance(stored, dict) or not {"run_dir", "training"} <= stored.keys():
        # Somebody's file of another kind, which must not be overwritten.
        raise RunDirError(f"{path} is not the configuration of a run; give another run_dir, or move the file away")
    return stored


def _number(value: Any) -> float | int | str | bool | None:
    """A metric as JSON can hold it: arrays of one element as numbers, NaN and infinities as None."""
    if hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, str | bool | int):
        return value
    value = float(value)
    return value if math.isfinite(value) else None


def _complete_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a JSONL file that are whole, each with what it holds."""
    lines = []
    for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last newline was half written
        try:
            text = line.decode("utf-8")
            row = json.loads(text)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            lines.append((text, row))
    return lines


def _cut(path: Path, last_step: int | None) -> None:
    if not path.exists():
        return
    kept = [text for text, row in _complete_lines(path) if last_step is not None and row["step"] <= last_step]
    write_atomically(path, "".join(text + "\n" for text in kept))


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, oldest first; a line that is half written is left out.

    Args:
        run_dir: the run's directory.

    Raises:
        FileNotFoundError: there is no metrics.jsonl.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found; {run_dir} is not the directory of a run that has started training")
    return [row for _, row in _complete_lines(path)]


class RunLog:
    """Writes what a run measures; one process of a run makes one.

    Args:
        run_dir: the run's directory, which exists.
        resume_from: the last step whose lines are kept; None starts the files anew.
        tensorboard: write event files to `run_dir/tensorboard`.
        wandb: log to Weights & Biases.
        config: what W&B shows as the run's configuration.

    Raises:
        RunDirError: W&B was asked for and is not installed.

    Example:
        >>> directory = tempfile.mkdtemp()
        >>> log = RunLog(directory, resume_from=None, tensorboard=False, wandb=False, config={})
        >>> log.write(1, {"reward": 0.5, "kl": float("nan")})
        >>> log.close()
        >>> read_metrics(directory)
        [{'step': 1, 'kl': None, 'reward': 0.5}]
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        resume_from: int | None,
        tensorboard: bool,
        wandb: bool,
        config: Mapping[str, Any],
    ) -> None:
        directory = Path(run_dir)
        # Asked for first: nothing may be cut by a run that cannot start.
        self._wandb = _start_wandb(directory, config) if wandb else None
        paths = [directory / METRICS_FILE, directory / COMPLETIONS_FILE]
        for path in paths:
            _cut(path, resume_from)
        self._metrics, self._completions = (
            os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666) for path in paths
        )
        self._tensorboard = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            events = directory / "tensorboard"
            purge = None if not events.exists() else 0 if resume_from is None else resume_from + 1
            self._tensorboard = SummaryWriter(str(events), purge_step=purge)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append the metrics of a step; NaN and infinities become null.

        Args:
            step: the training step.
            metrics: by name: a number, text, None, or an array of one element.
        """
        if "step" in metrics:
            raise ValueError("metrics must not hold 'step', which is given beside them; remove or rename it")
        row = {name: _number(metrics[name]) for name in sorted(metrics)}
        _append(self._metrics, {"step": int(step), **row})
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, int(step))
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=int(step))

    def completions(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append sampled completions to completions.jsonl.

        Args:
            step: the training step.
            rows: each with `prompt`, `completion` and `reward`, and whatever else there is to say.
        """
        for row in rows:
            _append(self._completions, {"step": int(step), **{name: _number(row[name]) for name in row}})

    def close(self) -> None:
        """Close all files; a second call does nothing."""
        for descriptor in (self._metrics, self._completions):
            if descriptor >= 0:
                os.close(descriptor)
        self._metrics = self._completions = -1
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NoLog(RunLog):
    """What the processes of a run beside the first write: nothing."""

    def __init__(self) -> None:
        self._metrics = self._completions = -1
        self._tensorboard = self._wandb = None

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write nothing."""

    def completions(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write nothing."""


def _append(descriptor: int, row: Mapping[str, Any]) -> None:
    # One write on a file opened for appending: a kill leaves the line whole, or as the last one without its newline.
    line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")
    written = os.write(descriptor, line)
    if written != len(line):
        raise OSError(f"only {written} of {len(line)} bytes of a line could be written; is the disk full?")


def _start_wandb(directory: Path, config: Mapping[str, Any]) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RunDirError(
            "logging.wandb = true: wandb is not installed; pip install 'jaxrl-post[wandb]', or set it to false"
        ) from error
    # The id is kept so that a resumed run goes on in the same place.
    stored = directory / "wandb_id"
    run_id = stored.read_text().strip() if stored.exists() else wandb.util.generate_id()
    run = wandb.init(project="jaxrl-post", dir=str(directory), config=dict(config), id=run_id, resume="allow")
    write_atomically(stored, run_id + "\n")
    return run

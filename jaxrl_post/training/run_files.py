"""Where the files of a run are: in its directory, or, where that is in a bucket, in a local copy of it.

Nothing can be appended to an object in a bucket. So what grows (metrics, completions, event files) grows in a local
directory and is copied with each checkpoint: a run that is resumed elsewhere goes on from a checkpoint, and cuts what
is later. The checkpoints themselves are written to the bucket directly.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from etils import epath

logger = logging.getLogger(__name__)

COPIED = ("config.yaml", "metrics.jsonl", "completions.jsonl", "wandb_id", "curves.png")
EVENTS = "tensorboard"


class BucketError(ValueError):
    """A bucket that cannot be reached; the message says what to do."""


def in_bucket(path: str | Path) -> bool:
    """Whether a path is the address of a bucket.

    Example:
        >>> in_bucket("gs://mine/run"), in_bucket("runs/a")
        (True, False)
    """
    return "://" in str(path)


class RunFiles:
    """The files of one run, beside its checkpoints.

    Args:
        run_dir: a local directory, or one in a bucket (`gs://bucket/run`).

    Attributes:
        local: where the process that trains reads and writes them.
        root: the directory that was given; checkpoints are in it.

    Raises:
        BucketError: if a package to reach the bucket is not installed.
    """

    def __init__(self, run_dir: str | Path):
        self.root = epath.Path(run_dir)
        self._remote = in_bucket(run_dir)
        if not self._remote:
            self.local = Path(run_dir)
            return
        if str(run_dir).startswith("gs://") and importlib.util.find_spec("gcsfs") is None:
            raise BucketError(f"{run_dir}: gcsfs is not installed; pip install 'jaxrl-post[gcs]'")
        name = hashlib.sha256(str(run_dir).encode()).hexdigest()[:16]
        user = getattr(os, "getuid", int)()  # Windows has no ids, but temporary directories of each user
        self.local = Path(tempfile.gettempdir()) / f"jaxrl_post_runs_{user}" / name

    def pull(self) -> None:
        """Bring the local copy to what the bucket holds. Nothing to do for a local directory.

        Raises:
            BucketError: if the bucket cannot be read.
        """
        if self._remote:
            self.local.mkdir(parents=True, exist_ok=True)
            self._copy(COPIED, self.local)

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """A file of the run, for whoever looks at it; `local` is left alone, where the run may be training.

        Args:
            name: of the file.

        Raises:
            FileNotFoundError: if there is no such file.
            BucketError: if the bucket cannot be read.
        """
        with contextlib.ExitStack() as held:
            directory = self.local
            if self._remote:
                directory = Path(held.enter_context(tempfile.TemporaryDirectory()))
                self._copy([name], directory)
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{self.root} is not the directory of a run: it holds no {name}")
            yield directory / name

    def _copy(self, names: Iterable[str], directory: Path) -> None:
        try:
            for name in names:
                source, target = self.root / name, directory / name
                if source.exists():
                    target.write_bytes(source.read_bytes())
                else:
                    target.unlink(missing_ok=True)
        except Exception as error:  # whatever the bucket's client raises
            raise BucketError(f"{self.root} cannot be read ({type(error).__name__}: {error})") from error

    def push(self) -> None:
        """Bring the bucket to what the local copy holds. A failure is told; the next call makes up for it."""
        if not self._remote:
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            events = self.local / EVENTS
            files = [self.local / name for name in COPIED] + sorted(events.glob("*") if events.is_dir() else ())
            for source in files:
                if source.is_file():
                    target = self.root / source.relative_to(self.local).as_posix()
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(source.read_bytes())
        except Exception as error:  # whatever the bucket's client raises
            logger.warning("metrics could not be copied to %s (%s: %s)", self.root, type(error).__name__, error)

"""Directories of models by what a user names them: their path, or, to be read, an id on the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

HUB = "hf://"
"""What a name may begin with to be an id on the hub, whatever directories there are."""


def is_path(name: str) -> bool:
    """Whether a name can only be meant as a path on this machine, because no id on the hub looks like it.

    Example:
        >>> [is_path(name) for name in ("./model", "~/model", "a/b/c", "model/")]
        [True, True, True, True]
        >>> is_path("owner/name"), is_path("hf://owner/name")
        (False, False)
    """
    if name.startswith(HUB):
        return False
    return name.startswith((".", "~", os.sep)) or name.endswith("/") or name.count("/") > 1


def local_directory(
    path_or_id: str | os.PathLike[str], patterns: Sequence[str], *, revision: str | None = None
) -> Path:
    """The directory of a model, downloaded if it is named by its hub id; `HF_TOKEN` and the hub's cache are respected.

    Args:
        path_or_id: a directory, or an id like `owner/name`, which `hf://owner/name` tells from a directory.
        patterns: of the files that are wanted.
        revision: branch, tag or commit on the hub.

    Returns:
        Where the files are.

    Raises:
        ValueError: if there is no such directory and no such model, it may not be read, there is no network, or a
            revision is given for a directory; each says what to do.

    Example:
        >>> local_directory(".", ["*.json"])
        PosixPath('.')
        >>> local_directory(".", ["*.json"], revision="main")
        Traceback (most recent call last):
            ...
        ValueError: revision 'main' does not apply: . is a directory; leave it out
    """
    text = str(path_or_id)
    if text.startswith(HUB):
        return _downloaded(text.removeprefix(HUB), patterns, revision)
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"revision {revision!r} does not apply: {text} is a directory; leave it out")
        return path
    if is_path(text) or path.exists():
        raise ValueError(f"{text}: no such directory; give a model's directory or a hub id like 'owner/name'")
    return _downloaded(text, patterns, revision)


def writable_directory(path: str | os.PathLike[str]) -> Path:
    """The directory that a model is to be written to.

    Args:
        path: of a directory on this machine.

    Raises:
        ValueError: if it is the address of a bucket or of the hub, which would be taken for a directory's name.

    Example:
        >>> writable_directory("out/model")
        PosixPath('out/model')
        >>> writable_directory("gs://mine/model")
        Traceback (most recent call last):
            ...
        ValueError: gs://mine/model: models are written to local directories; give one, and copy it there afterwards
    """
    if "://" in str(path):
        raise ValueError(f"{path}: models are written to local directories; give one, and copy it there afterwards")
    return Path(path)


def _downloaded(name: str, patterns: Sequence[str], revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:
        raise ValueError(f"no directory {name!r} is here, and from the hub {_why(name, revision, error)}") from error


def _why(name: str, revision: str | None, error: Exception) -> str:
    """What went wrong on the hub, and what the user can do about it."""
    from huggingface_hub import errors

    lines = str(error).strip().splitlines()
    reason = f" ({lines[0].strip()})" if lines else f" ({type(error).__name__})"
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is given to those alone who accepted its terms; do so on its page, and set HF_TOKEN{reason}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no model of that id may be read; correct it, or set HF_TOKEN if it is private{reason}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {revision!r}; give a branch, tag or commit of it{reason}"
    if isinstance(error, OSError):
        return (
            f"nothing can be read now; where there is a network run `hf download {name} --local-dir DIR` and give DIR, "
            f"and unset HF_HUB_OFFLINE if it is set{reason}"
        )
    return f"it could not be read{reason}"

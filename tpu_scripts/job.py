"""What travels to the workers: the files, what to install, the command of the run, and the secrets beside them."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shlex
import tarfile
from pathlib import Path

from pod_file import Pod, PodFileError

REQUIREMENTS, COMMAND = ".pod/requirements.txt", ".pod/command.sh"
_LEFT_OUT = {"__pycache__", ".git", ".venv"}


def command(pod: Pod) -> str:
    """The script that every worker runs. What the pod file says reaches the program as it is written there."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in pod.env.items()]
    train = shlex.join(["jaxrl-post", "train", pod.config, *pod.overrides])
    return "\n".join(["# Written by pod.py: the run, the same on every worker.", *exports, f"exec {train}", ""])


def archive(pod: Pod) -> tuple[bytes, str]:
    """Pack the job.

    Args:
        pod: whose `files`, `install` and command to pack.

    Returns:
        A gzipped tar file, equal for equal contents, and its SHA-256 in hexadecimal digits.
    """
    packed = io.BytesIO()
    # No file name, no time: the digest tells whether workers have this job already.
    zipped = gzip.GzipFile(filename="", fileobj=packed, mode="wb", mtime=0)
    with zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        for name, text in ((REQUIREMENTS, "\n".join(pod.install) + "\n"), (COMMAND, command(pod))):
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
        for name in sorted(pod.files):
            tar.add(pod.root / name, arcname=name, filter=_plain)
    return packed.getvalue(), hashlib.sha256(packed.getvalue()).hexdigest()


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if Path(entry.name).name in _LEFT_OUT:
        return None
    entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = 0, 0, 0, "", ""
    return entry


def unpack(packed: bytes, directory: Path) -> None:
    """Write a job's files into a directory."""
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as tar:
        tar.extractall(directory, filter="data")


def secrets(pod: Pod, quote: bool) -> str:
    """The variables that `secrets` names, with their values from this environment.

    Args:
        pod: the pod.
        quote: as lines for a shell; else as `NAME=value` lines that xpk puts into YAML as they are.

    Returns:
        The contents of a file that nobody else may read.

    Raises:
        PodFileError: a variable is not set, or xpk would garble its value.
    """
    lines = []
    for name in pod.secrets:
        value = os.environ.get(name)
        if value is None:
            raise PodFileError(f"run.secrets names {name}, which is not set; export it, or remove it from the pod file")
        if not quote and set(value) & set('"\\\n$'):
            raise PodFileError(
                f"the value of {name} holds a quote, a backslash, a dollar or a line end, which xpk garbles"
            )
        lines.append(f"{name}={shlex.quote(value) if quote else value}\n")
    return "".join(lines)


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, from its first byte on."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)

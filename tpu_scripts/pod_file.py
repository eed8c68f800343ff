"""The pod file: what it may hold, what is checked before anything is paid for, and Google's names for its chips."""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
from pathlib import Path
from typing import Any, NamedTuple


class Generation(NamedTuple):
    """How Google Cloud names one generation of chips."""

    dimensions: int  # of a slice's topology
    prefix: str  # of accelerator types
    cores: int  # TensorCores a chip, which accelerator types of three-dimensional slices count
    runtime: str  # software version of Cloud TPU VMs; none where there are no such VMs


# Cloud TPU documentation, "TPU software versions" and the page of each generation; tpu7x is offered through GKE only.
GENERATIONS = {
    "v4": Generation(3, "v4", 2, "tpu-ubuntu2204-base"),
    "v5e": Generation(2, "v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": Generation(3, "v5p", 2, "v2-alpha-tpuv5"),
    "v6e": Generation(2, "v6e", 1, "v2-alpha-tpuv6e"),
    "tpu7x": Generation(3, "tpu7x", 2, ""),
}
CAPACITIES = ("spot", "reserved", "on-demand")
BACKENDS = ("vm", "gke")


class PodFileError(ValueError):
    """A mistake in a pod file, with the key, what was found and what is expected."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pod:
    """One pod and the run on it, as its file describes them; pod.toml explains every key."""

    root: Path  # directory of the pod file, to which its paths are relative
    name: str
    project: str
    zone: str
    topology: str
    config: str
    overrides: list[str]
    files: list[str]
    install: list[str]
    backend: str = "vm"
    slices: int = 1
    capacity: str = "spot"
    reservation: str = ""
    service_account: str = ""
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    secrets: list[str] = dataclasses.field(default_factory=list)
    runtime_version: str = ""
    create_flags: list[str] = dataclasses.field(default_factory=list)
    ssh_flags: list[str] = dataclasses.field(default_factory=list)
    cluster: str = ""
    image: str = "python:3.12"
    max_restarts: int = 50
    cluster_flags: list[str] = dataclasses.field(default_factory=list)
    workload_flags: list[str] = dataclasses.field(default_factory=list)

    @property
    def generation(self) -> Generation:
        """The chips' generation."""
        return GENERATIONS[self.topology.partition(":")[0]]

    @property
    def shape(self) -> str:
        """Chips along each axis of a slice, as in "4x4"."""
        return self.topology.partition(":")[2]

    @property
    def own_cluster(self) -> bool:
        """Whether the GKE cluster is the pod's own, to be made and deleted with it."""
        return not self.cluster

    @property
    def cluster_name(self) -> str:
        """Name of the GKE cluster."""
        return self.cluster or self.name

    @property
    def chips(self) -> int:
        """Chips of all slices together."""
        return self.slices * math.prod(map(int, self.shape.split("x")))

    @property
    def nodes(self) -> list[str]:
        """Names of the Cloud TPU nodes, one a slice."""
        return [self.name] if self.slices == 1 else [f"{self.name}-{index}" for index in range(self.slices)]


TABLES = {
    "run": ("config", "overrides", "files", "install", "env", "secrets"),
    "vm": ("runtime_version", "create_flags", "ssh_flags"),
    "gke": ("cluster", "image", "max_restarts", "cluster_flags", "workload_flags"),
}


def load(path: str | Path) -> Pod:
    """Read and check a pod file.

    Args:
        path: the TOML file.

    Returns:
        What it describes, every value checked.

    Raises:
        PodFileError: a key is unknown, missing, of the wrong type or makes no sense beside another one.
    """
    try:
        data = tomllib.loads(Path(path).read_text())
    except tomllib.TOMLDecodeError as error:
        raise PodFileError(f"{path} is not TOML: {error}") from None
    values = {key: value for key, value in data.items() if key not in TABLES}
    _known(values, [name for name in _FIELDS if not any(name in keys for keys in TABLES.values())], "")
    for table, keys in TABLES.items():
        inner = data.get(table, {})
        if not isinstance(inner, dict):
            raise PodFileError(f"{table} must be a table, got {inner!r}")
        _known(inner, keys, f"{table}.")
        values |= inner
    other = {"vm": "gke", "gke": "vm"}.get(values.get("backend", "vm"))
    if other and data.get(other):
        raise PodFileError(f"the table {other} means nothing with backend = {values.get('backend', 'vm')!r}; remove it")
    for name, field in _FIELDS.items():
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise PodFileError(f"{_where(name)} is missing; pod.toml shows an example")
    for name, value in values.items():
        _typed(name, value)
    pod = Pod(root=Path(path).resolve().parent, **values)
    _check(pod)
    return pod


_FIELDS = {field.name: field for field in dataclasses.fields(Pod) if field.name != "root"}
_TYPES = {"str": str, "int": int, "list[str]": list, "dict[str, str]": dict}


def _known(values: dict[str, Any], keys: Any, table: str) -> None:
    for key in values:
        if key not in keys:
            raise PodFileError(f"{table}{key} is unknown; there are {', '.join(table + name for name in keys)}")


def _where(name: str) -> str:
    return next((f"{table}.{name}" for table, keys in TABLES.items() if name in keys), name)


def _typed(name: str, value: Any) -> None:
    wanted = str(_FIELDS[name].type)
    right = isinstance(value, _TYPES[wanted]) and not isinstance(value, bool)
    if right and isinstance(value, list | dict):
        right = all(isinstance(item, str) for item in (value.values() if isinstance(value, dict) else value))
    if not right:
        raise PodFileError(f"{_where(name)} must be of type {wanted}, got {value!r}")


def _check(pod: Pod) -> None:
    for name, known in (("backend", BACKENDS), ("capacity", CAPACITIES)):
        if getattr(pod, name) not in known:
            raise PodFileError(f"{name} must be one of {', '.join(known)}, got {getattr(pod, name)!r}")
    for name in ("name", "cluster"):
        # xpk takes 40 characters at most; nodes of several slices add a number.
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,34}[a-z0-9])?", getattr(pod, name) or "x"):
            raise PodFileError(
                f"{_where(name)} must be 1 to 36 lower-case letters, digits and dashes, the first a letter, "
                f"the last no dash, got {getattr(pod, name)!r}"
            )
    if not re.fullmatch(r"[a-z]+-[a-z]+[0-9]+-[a-z]", pod.zone):
        raise PodFileError(f"zone must be a zone such as us-west4-a, got {pod.zone!r}")
    generation, _, shape = pod.topology.partition(":")
    if generation not in GENERATIONS:
        known = ", ".join(GENERATIONS)
        raise PodFileError(f"topology must begin with one of {known}, as in v5e:4x4, got {pod.topology!r}")
    dimensions = GENERATIONS[generation].dimensions
    if not re.fullmatch("x".join(["[1-9][0-9]*"] * dimensions), shape):
        example = {2: "4x4", 3: "2x2x4"}[dimensions]
        raise PodFileError(f"a topology of {generation} is written as {generation}:{example}, got {pod.topology!r}")
    if pod.slices < 1:
        raise PodFileError(f"slices must be at least 1, got {pod.slices}")
    if pod.backend == "vm" and not pod.generation.runtime:
        raise PodFileError(f"{generation} is offered through GKE only; set backend = 'gke'")
    if pod.backend == "gke" and (pod.capacity == "reserved") != bool(pod.reservation):
        raise PodFileError("on gke, capacity = 'reserved' and reservation = 'NAME' go together")
    if pod.backend == "vm" and pod.reservation:
        raise PodFileError("reservation means nothing on Cloud TPU VMs, which take any of the project's; remove it")
    if pod.backend == "gke" and pod.service_account:
        raise PodFileError("service_account means nothing on gke; name it in gke.cluster_flags")
    if pod.cluster and pod.cluster_flags:
        raise PodFileError("gke.cluster names a cluster that is there already, so gke.cluster_flags mean nothing")
    if pod.max_restarts < 0:
        raise PodFileError(f"gke.max_restarts must be at least 0, got {pod.max_restarts}")
    for name in (*pod.env, *pod.secrets):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise PodFileError(f"run.env and run.secrets hold names of environment variables, got {name!r}")
    if not any(override.startswith("run_dir=gs://") for override in pod.overrides):
        raise PodFileError(
            "run.overrides must hold 'run_dir=gs://BUCKET/NAME': the disks of workers are gone when they are preempted"
        )
    for name in pod.files:
        path = pod.root / name
        if not path.exists():
            raise PodFileError(f"run.files names {name!r}, which is not in {pod.root}")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise PodFileError(f"run.files must lie below {pod.root}, got {name!r}; move the pod file")
    if not any(Path(pod.config).is_relative_to(name) for name in pod.files) or not (pod.root / pod.config).is_file():
        raise PodFileError(f"run.config must be a file that run.files holds, got {pod.config!r}")

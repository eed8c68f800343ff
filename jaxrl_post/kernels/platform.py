"""Which device a program is being built for: it decides which kernels can run, also when compiling ahead of time."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax


class Device(NamedTuple):
    """What the program being traced will run on.

    Attributes:
        platform: `"cpu"`, `"gpu"` or `"tpu"`.
        kind: the maker's name of the chip, e.g. `"TPU v5 lite"`.
    """

    platform: str
    kind: str


def current_device() -> Device:
    """The device of the ambient mesh (`jax.set_mesh`), else the default device.

    A mesh over a described topology (`jax.experimental.topologies`) counts, so that a program compiled for a TPU on a
    machine without one is traced with the kernels it will run there.

    Example:
        >>> current_device().platform in {"cpu", "gpu", "tpu"}
        True
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return Device(described.platform or jax.default_backend(), described.device_kind)
    chosen: Any = getattr(jax.config, "jax_default_device", None)
    device = chosen if isinstance(chosen, jax.Device) else jax.devices(chosen)[0]
    return Device(device.platform, device.device_kind)

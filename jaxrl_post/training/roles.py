"""Roles: the models that a method reads, where their parameters come from, and how frozen ones follow others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxrl_post.types import Array, Params


@dataclasses.dataclass(frozen=True)
class Role:
    """How a role gets its parameters.

    Attributes:
        source: the role whose parameters it starts from.
        every: steps between refreshes from `source`; 0 for never.
        mix: at a refresh, `mix * source + (1 - mix) * own`: 1.0 copies, less is TR-DPO's soft update, and with
            `every=1` an exponential moving average.
    """

    source: str = "policy"
    every: int = 0
    mix: float = 1.0


Refresh: TypeAlias = Callable[[dict[str, Params], Array], dict[str, Params]]
"""`(params by role, step) -> params by role`."""


def make_refresh(roles: Mapping[str, Role]) -> Refresh | None:
    """A function for `make_step(refresh=...)`; None if no role is ever refreshed.

    Example:
        >>> refresh = make_refresh({"reference": Role(every=2, mix=0.5)})
        >>> params = {"policy": jnp.ones(()), "reference": jnp.zeros(())}
        >>> [float(refresh(params, jnp.asarray(step))["reference"]) for step in (1, 2)]
        [0.0, 0.5]

    Reference:
        Learn Your Reference Model for Real Good Alignment (TR-DPO), arXiv 2404.09656.
    """
    moving = {name: role for name, role in roles.items() if role.every}
    if not moving:
        return None

    def refresh(params: dict[str, Params], step: Array) -> dict[str, Params]:
        new = dict(params)
        for name, role in moving.items():
            due = step % role.every == 0
            new[name] = jax.tree.map(
                lambda own, source, due=due, mix=role.mix: jnp.where(due, mix * source + (1 - mix) * own, own).astype(
                    own.dtype
                ),
                params[name],
                params[role.source],
            )
        return new

    return refresh

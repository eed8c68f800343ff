"""The state of a run on the device, and how it is made and laid out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_post import mesh as mesh_lib
from jaxrl_post.training.optimizers import by_trained_role, parted
from jaxrl_post.types import Array, Method, Params, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
        step: int32 scalar, steps taken.
        params: parameters by role.
        opt_state: Optax state by trained role.
        method_state: the method's own state.
        curriculum_state: the curriculum's own state.
        key: a typed key, never changed: each step folds `step` into it.
    """

    step: Array
    params: dict[str, Params]
    opt_state: dict[str, PyTree]
    method_state: PyTree
    curriculum_state: PyTree
    key: Array

    def replace(self, **changes: Any) -> TrainState:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def init(
    params: Mapping[str, Params],
    method: Method,
    optimizer: optax.GradientTransformation | Mapping[str, optax.GradientTransformation],
    key: Array,
    *,
    rollouts: PyTree = None,
    num_prompts: int = 0,
    curriculum_state: PyTree = (),
    step: int = 0,
    trainable: Mapping[str, PyTree] | None = None,
    borrows: Mapping[str, str] | None = None,
    mesh: Mesh | None = None,
    axes: Mapping[str, PyTree] | None = None,
) -> TrainState:
    """The state before the first step.

    Args:
        params: parameters by role, at least those that the method trains or reads.
        method: from `methods`.
        optimizer: an Optax transformation, used for each trained role, or one for each of them by role.
        key: `jax.random.key(seed)`.
        rollouts: `Rollouts` of `jax.ShapeDtypeStruct`s, for methods that keep a state of the batch's shape.
        num_prompts: size of the data set, for methods that keep a state per prompt.
        curriculum_state: from `Curriculum.init`.
        step: the number of the last step taken before.
        trainable: as `make_step` is given it.
        borrows: as `make_step` is given it; the roles that borrow have no parameters.
        mesh: where the state lies; one device if None.
        axes: logical axes by role (`Policy.axes()`); a role that is missing is replicated.

    Returns:
        A `TrainState`. The arrays of `params` and of the method's first state are copied, so that a donated state never
        invalidates the caller's.

    Raises:
        ValueError: if a role that the method reads is missing.
    """
    trainable = trainable or {}
    if missing := sorted(method.roles - set(borrows or {}) - set(params)):
        raise ValueError(f"the method needs parameters for {sorted(method.roles)}; {missing} are missing from params")
    optimizers = by_trained_role(optimizer, method)
    state = TrainState(
        step=jnp.asarray(step, jnp.int32),
        params={role: jax.tree.map(lambda x: jnp.array(x, copy=True), tree) for role, tree in params.items()},
        opt_state={},
        method_state=jax.tree.map(lambda x: jnp.array(x, copy=True), method.init(rollouts, num_prompts)),
        curriculum_state=curriculum_state,
        key=jnp.copy(key),
    )
    if mesh is None:
        moving = {role: parted(state.params[role], trainable.get(role))[0] for role in optimizers}
        return state.replace(opt_state={role: one.init(moving[role]) for role, one in optimizers.items()})
    layout = state_shardings(state, method, optimizers, mesh, axes or {}, trainable)
    placed = state.replace(
        **{
            name: mesh_lib.place(getattr(state, name), getattr(layout, name))
            for name in ("step", "params", "method_state", "curriculum_state", "key")
        }
    )
    opt_state = {
        role: jax.jit(optimizers[role].init, out_shardings=layout.opt_state[role])(
            parted(placed.params[role], trainable.get(role))[0]
        )
        for role in sorted(method.trains)
    }
    return placed.replace(opt_state=opt_state)


def state_shardings(
    state: TrainState,
    method: Method,
    optimizer: optax.GradientTransformation | Mapping[str, optax.GradientTransformation],
    mesh: Mesh,
    axes: Mapping[str, PyTree],
    trainable: Mapping[str, PyTree] | None = None,
) -> TrainState:
    """A `TrainState` of `NamedSharding`s: optimiser moments lie as their parameters do, all else is replicated."""
    replicated: Any = NamedSharding(mesh, PartitionSpec())  # in the place of an array
    optimizers = by_trained_role(optimizer, method)
    params = {role: mesh_lib.shardings(tree, axes.get(role), mesh) for role, tree in state.params.items()}
    opt_state = {}
    for role in sorted(method.trains):
        moving, _ = parted(state.params[role], (trainable or {}).get(role))
        shapes = jax.eval_shape(optimizers[role].init, moving)
        opt_state[role] = optax.tree_utils.tree_map_params(
            optimizers[role],
            lambda _, sharding: sharding,
            shapes,
            parted(params[role], (trainable or {}).get(role))[0],
            transform_non_params=lambda _: replicated,
        )
    return TrainState(
        step=replicated,
        params=params,
        opt_state=opt_state,
        method_state=jax.tree.map(lambda _: replicated, state.method_state),
        curriculum_state=jax.tree.map(lambda _: replicated, state.curriculum_state),
        key=replicated,
    )

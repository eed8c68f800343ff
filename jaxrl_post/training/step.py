"""The train step: a method's update, or those of a chain's stages in their order. One jitted function.

What is trained on is not sampled or rewarded here, and nothing is logged. How one update is made is in `update`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_post import mesh as mesh_lib
from jaxrl_post.training.optimizers import by_trained_role
from jaxrl_post.training.router import RouterLoss
from jaxrl_post.training.state import TrainState
from jaxrl_post.training.update import Metrics, Trained, Update, make_update
from jaxrl_post.types import Array, Method, Params, PyTree, Rollouts, Score

Step = Callable[[TrainState, Rollouts], tuple[TrainState, Metrics]]


def make_step(
    scores: Mapping[str, Score] | Score,
    method: Method,
    optimizer: optax.GradientTransformation | Mapping[str, optax.GradientTransformation],
    *,
    micro_batches: int = 1,
    epochs: int = 1,
    refresh: Callable[[dict[str, Params], Array], dict[str, Params]] | None = None,
    trainable: Mapping[str, PyTree] | None = None,
    borrows: Mapping[str, str] | None = None,
    router_losses: Mapping[str, RouterLoss] | None = None,
    mesh: Mesh | None = None,
) -> Step:
    """A jitted `step(state, rollouts) -> (state, metrics)` with a donated state.

    Each role's stats are computed at the start of the step where the targets or a frozen role need them; targets are
    computed once and held over the epochs; denominators are those of the whole batch, so that micro-batching and the
    mesh's shape change neither the loss nor the gradient. An update whose gradient or loss is not finite is skipped and
    shows as `nonfinite_updates`; one whose terms are masked everywhere is skipped and shows as `empty_updates`. The
    stages of a chain make their updates one after the other, each from the parameters that the one before left. The
    state that goes in is donated: go on with the one that comes out.

    Args:
        scores: a `Score` for each role that the method reads, or one for all of them.
        method: from `methods`.
        optimizer: an Optax transformation, applied to each trained role's gradient, or one for each of them by role.
        micro_batches: pieces that the batch is cut into for the forward and backward pass; must divide the number of
            units: the method's, or groups where a score shares their prompts.
        epochs: updates made on the same batch.
        refresh: `(params by role, step) -> params by role`, applied after the update: how frozen roles follow others.
        trainable: by trained role, a tree of bools like its parameters: those that are False get no gradient, no update
            and no optimiser state (`models.trainable` for adapters). All are trained of a role that is not named. The
            same as `training.init` was given.
        borrows: roles that read the parameters of another role, by a score of their own: `{"reference": "policy"}`,
            with the score of the model without adapters, is a reference without a copy.
        router_losses: by trained role, whose model must have experts, a load-balancing term; see `training.RouterLoss`.
            It counts the tokens of all valid sequences, prompts among them.
        mesh: where state and batch lie; without one, wherever the state's arrays are.

    Returns:
        The step. Its metrics are scalars: `loss`, `loss/<term>`, `grad_norm` (over all trained roles, before any
        clipping by the optimiser), `nonfinite_updates`, `empty_updates`, `updates` (made to the policy, or to the role
        that got most), `sampling/sampling_logp_difference/mean|max` (nats, between what the sampler recorded and what
        training computes, in the first epoch), `gradient_weight/<term>` where a method combines gradients, and what
        `method.metrics` gives. With `router_losses`, `loss/router` (of a critic `loss/critic_router`) and
        `router/load_max`, the largest share of tokens that an expert of any layer gets, by the even share (of each
        sequence, and the mean of that, where the loss is over sequences). Of a probe, `probe/<name>/tokens` (read with
        it), `probe/<name>/cost` (places that its forward pass has, by those of the batch) and `probe/<name>/valid`
        (share of its texts). Of a chain, names that several stages have are `<stage>/<name>`; `loss` and the counts are
        then also there as sums, `grad_norm` as the root of the sum of squares.

    Raises:
        ValueError: if a role has no score, or a router loss does not apply; at the first call, if the micro-batches do
            not divide the batch, or the rollouts lack what the method wants.

    Example:
        >>> from jaxrl_post import data, methods, models, training
        >>> policy = models.decoder(vocab_size=8, width=8, layers=1, heads=2)
        >>> method, optimizer = methods.sft(), optax.sgd(0.1)
        >>> state = training.init({"policy": policy.init(jax.random.key(0))}, method, optimizer, jax.random.key(1))
        >>> step = make_step(models.score(policy), method, optimizer)
        >>> batch = data.to_rollouts([[2, 3]], [[[4, 5]]], length=4)
        >>> losses_seen = []
        >>> for _ in range(3):
        ...     state, metrics = step(state, batch)
        ...     losses_seen.append(float(metrics["loss"]))
        >>> losses_seen == sorted(losses_seen, reverse=True)
        True
    """
    by_role = dict(scores) if isinstance(scores, Mapping) else dict.fromkeys(method.roles, scores)
    if missing := sorted(method.roles - set(by_role)):
        raise ValueError(f"the method reads stats of {sorted(method.roles)}; no score was given for {missing}")
    if micro_batches < 1 or epochs < 1:
        raise ValueError(f"micro_batches and epochs must be at least 1, got {micro_batches} and {epochs}")
    if trained := sorted(method.trains & set(borrows or {})):
        raise ValueError(f"a role that is trained cannot borrow its parameters, but {trained} is to")
    if others := sorted(set(router_losses or {}) - method.trains):
        raise ValueError(f"router_losses are for roles that are trained, {sorted(method.trains)}, got {others}")
    stages, optimizers = stages_of(method), by_trained_role(optimizer, method)

    def place(rollouts: Rollouts) -> Rollouts:
        if mesh is None:
            return rollouts
        return jax.lax.with_sharding_constraint(rollouts, mesh_lib.rollout_shardings(rollouts, mesh))

    updates: dict[str, Update] = {}
    untouched = True  # the policy is still the one that sampled
    for name, stage in stages.items():
        updates[name] = make_update(
            by_role,
            stage,
            optimizers,
            micro_batches=micro_batches,
            epochs=epochs,
            trainable=trainable,
            borrows=borrows,
            compare_sampler=untouched and stage.learns_from == "rollouts" and stage.batch is None,
            place=place,
            router_losses=router_losses,
        )
        untouched &= "policy" not in stage.trains

    def step(state: TrainState, rollouts: Rollouts) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        params, opt_state, metrics = state.params, state.opt_state, {}
        method_state = dict(state.method_state) if method.stages else {"": state.method_state}
        for index, (name, update) in enumerate(updates.items()):
            given = Trained(params, opt_state, method_state[name])
            stage_key = key if index == 0 else jax.random.fold_in(key, index)
            (params, opt_state, method_state[name]), metrics[name] = update(given, rollouts, stage_key)
        taken = state.step + 1
        if refresh is not None:
            params = refresh(params, taken)
        new_state = state.replace(
            step=taken,
            params=params,
            opt_state=opt_state,
            method_state=method_state if method.stages else method_state[""],
        )
        made = updates_made(stages, metrics, epochs)
        return new_state, joined(metrics) | {"updates": made}

    if mesh is None:
        return jax.jit(step, donate_argnums=0)

    return OnMesh(step, mesh)


class OnMesh:
    """A step whose state and batch lie on a mesh; it can be called or, as jitted functions can, lowered.

    Args:
        step: not jitted.
        mesh: whose devices need not be there to lower it.
    """

    def __init__(self, step: Step, mesh: Mesh):
        self._step, self._mesh = step, mesh
        self._jitted: Any = None

    def __call__(self, state: TrainState, rollouts: Rollouts) -> tuple[TrainState, Metrics]:
        """Make the step."""
        jitted, layout = self._on(state, rollouts)
        with jax.set_mesh(self._mesh):
            return jitted(state, jax.device_put(rollouts, layout))

    def lower(self, state: TrainState, rollouts: Rollouts) -> Any:
        """The step for arrays, or `jax.ShapeDtypeStruct`s with shardings, of these shapes: `.compile()` follows."""
        jitted, layout = self._on(state, rollouts)
        placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), rollouts, layout)
        with jax.set_mesh(self._mesh):
            return jitted.lower(state, placed)

    def _on(self, state: TrainState, rollouts: Rollouts) -> tuple[Any, Rollouts]:
        layout = mesh_lib.rollout_shardings(rollouts, self._mesh)
        if self._jitted is None:
            state_layout = jax.tree.map(lambda x: x.sharding, state)
            replicated = NamedSharding(self._mesh, PartitionSpec())
            self._jitted = jax.jit(
                self._step,
                donate_argnums=0,
                in_shardings=(state_layout, layout),
                out_shardings=(state_layout, replicated),
            )
        return self._jitted, layout


def stages_of(method: Method) -> Mapping[str, Method]:
    """The methods that one step runs, by name: a chain's stages, or the method alone."""
    return method.stages or {"": method}


def most_updates(method: Method) -> int:
    """Updates per epoch of a step that the most often trained role gets: how fast schedules go.

    Example:
        >>> from jaxrl_post import methods
        >>> most_updates(methods.grpo())
        1
    """
    return max(Counter(role for stage in stages_of(method).values() for role in stage.trains).values())


def updates_made(stages: Mapping[str, Method], metrics: Mapping[str, Metrics], epochs: int) -> Array:
    """How many updates the policy got in a step, or, where none trains it, the role that got most."""
    by_role: dict[str, Array] = {}
    for name, stage in stages.items():
        made = epochs - metrics[name]["nonfinite_updates"] - metrics[name]["empty_updates"]
        for role in stage.trains:
            by_role[role] = by_role.get(role, jnp.zeros((), made.dtype)) + made
    return by_role["policy"] if "policy" in by_role else jnp.max(jnp.stack(list(by_role.values())))


def joined(by_stage: Mapping[str, Metrics]) -> Metrics:
    """The metrics of all stages under names that differ.

    Example:
        >>> stage = {"grad_norm": jnp.asarray(3.0), "loss": jnp.asarray(1.0)}
        >>> counts = {"nonfinite_updates": jnp.asarray(0), "empty_updates": jnp.asarray(0)}
        >>> both = joined({"a": stage | counts, "b": stage | counts | {"kl": jnp.asarray(0.5)}})
        >>> sorted(name for name in both if "updates" not in name)
        ['a/grad_norm', 'a/loss', 'b/grad_norm', 'b/loss', 'grad_norm', 'kl', 'loss']
    """
    if len(by_stage) == 1:
        return dict(*by_stage.values())
    shared = Counter(name for metrics in by_stage.values() for name in metrics)
    result = {
        f"{stage}/{name}" if shared[name] > 1 else name: value
        for stage, metrics in by_stage.items()
        for name, value in metrics.items()
    }
    for name in ("loss", "nonfinite_updates", "empty_updates"):
        result[name] = sum(metrics[name] for metrics in by_stage.values())  # type: ignore[assignment]
    norms = jnp.stack([metrics["grad_norm"] for metrics in by_stage.values()])
    return result | {"grad_norm": jnp.linalg.norm(norms)}

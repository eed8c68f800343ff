"""The train step: score, compute targets, differentiate the terms over micro-batches, update. One jitted function.

What is trained on is not sampled or rewarded here, and nothing is logged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_post import losses
from jaxrl_post import mesh as mesh_lib
from jaxrl_post.training.splitting import split, unsplit_rows
from jaxrl_post.training.state import TrainState
from jaxrl_post.types import Array, Method, Metric, Params, PyTree, Rollouts, Score, Targets, Term, TokenStats

Metrics = dict[str, Array]
Step = Callable[[TrainState, Rollouts], tuple[TrainState, Metrics]]


def make_step(
    scores: Mapping[str, Score] | Score,
    method: Method,
    optimizer: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
    epochs: int = 1,
    refresh: Callable[[dict[str, Params], Array], dict[str, Params]] | None = None,
    mesh: Mesh | None = None,
) -> Step:
    """A jitted `step(state, rollouts) -> (state, metrics)` with a donated state.

    Each role's stats are computed at the start of the step where the targets or a frozen role need them; targets are
    computed once and held over the epochs; denominators are those of the whole batch, so that micro-batching and the
    mesh's shape change neither the loss nor the gradient. An update whose gradient or loss is not finite is skipped and
    shows as `nonfinite_updates`. The state that goes in is donated: go on with the one that comes out.

    Args:
        scores: a `Score` for each role that the method reads, or one for all of them.
        method: from `methods`.
        optimizer: an Optax transformation, applied to each trained role's gradient.
        micro_batches: pieces that the batch is cut into for the forward and backward pass; must divide the number of
            units.
        epochs: updates made on the same batch.
        refresh: `(params by role, step) -> params by role`, applied after the update: how frozen roles follow others.
        mesh: where state and batch lie; without one, wherever the state's arrays are.

    Returns:
        The step. Its metrics are scalars: `loss`, `loss/<term>`, `grad_norm` (over all trained roles, before any
        clipping by the optimiser), `nonfinite_updates`, `sampling/sampling_logp_difference/mean|max` (nats, between
        what the sampler recorded and what training computes, in the first epoch), and what `method.metrics` gives.

    Raises:
        ValueError: if a role has no score; at the first call, if the micro-batches do not divide the batch.

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
    by_role = dict(scores) if isinstance(scores, Mapping) else dict.fromkeys(method.needs, scores)
    if missing := sorted(set(method.needs) - set(by_role)):
        raise ValueError(f"the method reads stats of {sorted(method.needs)}; no score was given for {missing}")
    if micro_batches < 1 or epochs < 1:
        raise ValueError(f"micro_batches and epochs must be at least 1, got {micro_batches} and {epochs}")
    if method.probes is not None:
        raise ValueError("methods with probes are not supported by this step yet")

    def scored(role: str, params: Params, rollouts: Rollouts, key: Array) -> TokenStats:
        stats = by_role[role](params, rollouts, method.needs[role], key)
        if missing := sorted(field for field in method.needs[role] if getattr(stats, field, None) is None):
            raise ValueError(f"the method reads {missing} of the role {role!r}, which its score did not give")
        return stats

    def score_all(role: str, params: Params, rollouts: Rollouts, key: Array) -> TokenStats:
        """Stats of the whole batch, without gradient, one micro-batch at a time."""
        if micro_batches == 1:
            return jax.lax.stop_gradient(scored(role, params, rollouts, key))
        pieces, _ = split(rollouts, (), micro_batches, method.unit)
        group = 1 if method.unit in ("token", "sequence") else rollouts.group_size
        stats = jax.lax.map(lambda piece: scored(role, params, piece, key), pieces)
        return jax.lax.stop_gradient(jax.tree.map(lambda x: unsplit_rows(x, group), stats))

    def batch_loss(
        trained: dict[str, Params],
        piece: tuple[Rollouts, tuple[Targets, dict[str, TokenStats]]],
        denominators: dict[str, Array],
        key: Array,
    ) -> tuple[Array, dict[str, Metric]]:
        rollouts, (targets, frozen_stats) = piece
        stats = dict(frozen_stats)
        for role, params in trained.items():
            stats[role] = scored(role, params, rollouts, key)
        terms = method.loss(stats, rollouts, targets)
        total = jnp.zeros(())
        metrics: dict[str, Metric] = {}
        for name, term in terms.items():
            value = losses.aggregate(
                term.value, term.mask, term.mode, horizon=term.horizon, denominator=denominators[name]
            )
            total = total + term.weight * value
            metrics[f"loss/{name}"] = Metric.sum(value)
        metrics["loss"] = Metric.sum(total)
        if method.metrics is not None:
            metrics |= method.metrics(jax.lax.stop_gradient(stats), rollouts, targets)
        if method.learns_from == "rollouts" and "policy" in stats and stats["policy"].logp is not None:
            sampled = rollouts.valid_mask * (rollouts.version >= 0)
            difference = jnp.abs(stats["policy"].logp - rollouts.logp)
            metrics["sampling/sampling_logp_difference/mean"] = Metric.mean(difference, sampled)
            metrics["sampling/sampling_logp_difference/max"] = Metric.max(difference, sampled)
        return total, jax.lax.stop_gradient(metrics)

    def gradient(
        trained: dict[str, Params],
        rollouts: Rollouts,
        targets: Targets,
        frozen_stats: dict[str, TokenStats],
        denominators: dict[str, Array],
        key: Array,
    ) -> tuple[PyTree, dict[str, Metric]]:
        """The gradient of the whole batch's loss and its metrics, summed over micro-batches."""
        differentiate = jax.grad(batch_loss, has_aux=True)
        if micro_batches == 1:
            return differentiate(trained, (rollouts, (targets, frozen_stats)), denominators, key)
        pieces = split(rollouts, (targets, frozen_stats), micro_batches, method.unit)

        def accumulate(total: PyTree, piece) -> tuple[PyTree, dict[str, Metric]]:
            gradients, metrics = differentiate(trained, piece, denominators, key)
            return jax.tree.map(jnp.add, total, gradients), metrics

        zeros = jax.tree.map(jnp.zeros_like, trained)
        total, metrics = jax.lax.scan(accumulate, zeros, pieces)
        return total, {name: metric.merge() for name, metric in metrics.items()}

    def step(state: TrainState, rollouts: Rollouts) -> tuple[TrainState, Metrics]:
        score_key, target_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        # Stats that neither targets nor frozen roles use are dead code, which the compiler removes.
        start = {role: score_all(role, state.params[role], rollouts, score_key) for role in sorted(method.needs)}
        targets, method_state = method.targets(state.method_state, rollouts, start, target_key)
        targets = jax.lax.stop_gradient(targets)
        frozen = {role: stats for role, stats in start.items() if role not in method.trains}
        denominators = {
            name: losses.denominator(term.mask, term.mode, horizon=term.horizon)
            for name, term in checked(method.loss(start, rollouts, targets), rollouts, micro_batches, method).items()
        }

        def epoch(carry, _):
            trained, opt_state = carry
            gradients, metrics = gradient(trained, rollouts, targets, frozen, denominators, score_key)
            norm = optax.tree.norm(gradients)
            finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"].result())
            metrics["grad_norm"] = Metric.mean(norm[None])
            metrics["nonfinite_updates"] = Metric.sum(~finite)
            new_trained, new_opt_state = {}, {}
            for role, params in trained.items():
                updates, new_opt_state[role] = optimizer.update(gradients[role], opt_state[role], params)
                new_trained[role] = optax.apply_updates(params, updates)
            keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)  # noqa: E731
            return (keep(new_trained, trained), keep(new_opt_state, opt_state)), metrics

        carry = ({role: state.params[role] for role in sorted(method.trains)}, state.opt_state)
        if epochs == 1:
            (trained, opt_state), metrics = epoch(carry, None)
        else:
            (trained, opt_state), stacked = jax.lax.scan(epoch, carry, None, length=epochs)
            metrics = {
                name: jax.tree.map(lambda x: x[0], metric)
                if name.startswith("sampling/")
                else over_epochs(name, metric)
                for name, metric in stacked.items()
            }
        params = state.params | trained
        taken = state.step + 1
        if refresh is not None:
            params = refresh(params, taken)
        new_state = state.replace(step=taken, params=params, opt_state=opt_state, method_state=method_state)
        return new_state, {name: metric.result() for name, metric in metrics.items()}

    def over_epochs(name: str, metric: Metric) -> Metric:
        merged = metric.merge()
        # A loss is a sum over micro-batches but a mean over epochs.
        return Metric(merged.value / epochs, merged.weight, "sum") if name.split("/")[0] == "loss" else merged

    if mesh is None:
        return jax.jit(step, donate_argnums=0)

    jitted: Step | None = None

    def on_mesh(state: TrainState, rollouts: Rollouts) -> tuple[TrainState, Metrics]:
        nonlocal jitted
        layout = mesh_lib.rollout_shardings(rollouts, mesh)
        if jitted is None:
            state_layout = jax.tree.map(lambda x: x.sharding, state)
            replicated = NamedSharding(mesh, PartitionSpec())
            jitted = jax.jit(
                step, donate_argnums=0, in_shardings=(state_layout, layout), out_shardings=(state_layout, replicated)
            )
        with jax.set_mesh(mesh):
            return jitted(state, jax.device_put(rollouts, layout))

    return on_mesh


def checked(terms: dict[str, Term], rollouts: Rollouts, micro_batches: int, method: Method) -> dict[str, Term]:
    """The terms, if they are what a method may return.

    Raises:
        ValueError: if there is none, one is not a `Term`, its mask has not its value's shape, or it has a number per
            prompt where micro-batches may tear groups apart.
    """
    if not terms:
        raise ValueError("the method's loss returned no terms")
    for name, term in terms.items():
        if not isinstance(term, Term):
            raise ValueError(f"term {name!r} is a {type(term).__name__}; return Term(value, mask, mode), not reduced")
        if term.value.shape != term.mask.shape:
            raise ValueError(
                f"term {name!r}: value has shape {term.value.shape} and mask {term.mask.shape}; losses are not reduced "
                "by the method, give one number per token, sequence or prompt"
            )
        if micro_batches > 1 and method.unit in ("token", "sequence") and term.value.shape[0] != rollouts.batch_size:
            raise ValueError(
                f"term {name!r} has {term.value.shape[0]} rows for {rollouts.batch_size} sequences: it compares the "
                "sequences of a group, which micro-batches would tear apart; give the method unit='group'"
            )
    return terms

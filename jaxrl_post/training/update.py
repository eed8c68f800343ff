"""One method's update on one batch: score, compute targets, differentiate the terms over micro-batches, step.

The order of several methods, refreshed roles, compilation and placement are in `step`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrl_post import losses
from jaxrl_post.training.method_checks import check_probes, check_terms, check_wants
from jaxrl_post.training.optimizers import parted, whole
from jaxrl_post.training.router import FIELDS, RouterLoss, batch_shares, router_term
from jaxrl_post.training.splitting import coarsest, split, unsplit_rows
from jaxrl_post.types import (
    PROBE,
    Array,
    Method,
    Metric,
    Params,
    PyTree,
    Rollouts,
    Score,
    Targets,
    Term,
    TokenStats,
)

Metrics = dict[str, Array]


class Trained(NamedTuple):
    """What an update changes.

    Attributes:
        params: parameters by role, frozen roles among them.
        opt_state: optimiser state by trained role.
        method_state: the method's own state.
    """

    params: dict[str, Params]
    opt_state: dict[str, PyTree]
    method_state: PyTree


Update = Callable[[Trained, Rollouts, Array], tuple[Trained, Metrics]]


def make_update(
    scores: Mapping[str, Score],
    method: Method,
    optimizers: Mapping[str, optax.GradientTransformation],
    *,
    micro_batches: int,
    epochs: int,
    compare_sampler: bool,
    trainable: Mapping[str, PyTree] | None = None,
    borrows: Mapping[str, str] | None = None,
    place: Callable[[Rollouts], Rollouts] = lambda rollouts: rollouts,
    router_losses: Mapping[str, RouterLoss] | None = None,
) -> Update:
    """A function `(trained, rollouts, key) -> (trained, metrics)`; see `make_step` for what it does.

    Args:
        scores: a `Score` for each role that the method reads.
        method: not a chain.
        optimizers: by trained role.
        micro_batches: pieces that the batch is cut into.
        epochs: updates made on the batch.
        compare_sampler: whether the policy is the one that sampled the rollouts, so that log-probs can be compared.
        trainable: by trained role, which of its parameters are trained, as bools; all where a role is not named.
        borrows: roles whose scores read the parameters of another role.
        place: lays out rollouts that do not come from outside.
        router_losses: by trained role, a term for its experts; that of another stage's role is passed over.

    Raises:
        ValueError: when traced, if the method, its scores and the rollouts do not fit together.
    """

    trainable, borrows = trainable or {}, borrows or {}
    balanced = {role: loss.checked() for role, loss in (router_losses or {}).items() if role in method.trains}
    if balanced and method.combine is not None:
        raise ValueError("a router loss cannot be added to a method that weighs its terms' gradients itself")

    # A score may want more kept together than the method does, to save work.
    wanted: list[Any] = [getattr(scores.get(role), "unit", "token") for role in method.roles]
    method = method._replace(unit=coarsest(method.unit, *wanted))

    def scored(
        role: str, params: Params, rollouts: Rollouts, key: Array, name: str | None = None, noise: bool = False
    ) -> TokenStats:
        """Stats of a role; without `noise` (dropout), which belongs into what is differentiated alone."""
        fields, score = method.needs[name or role], scores[role]
        if name is None and role in balanced:
            fields = fields | FIELDS
        stats = (score if noise else getattr(score, "still", score))(params, rollouts, fields, key)
        if missing := sorted(field for field in fields if getattr(stats, field, None) is None):
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

    def probe_all(params: dict[str, Params], rollouts: Rollouts, key: Array) -> tuple[dict[str, TokenStats], Metrics]:
        """Stats of the method's probes, and what they cost; those of one role and shape share a forward pass."""
        probes = {} if method.probes is None else dict(method.probes(rollouts))
        check_probes(method, probes)
        alike: dict[Any, list[str]] = {}
        for name, (texts, role) in probes.items():
            shapes = tuple(x.shape[1:] for x in jax.tree.leaves(texts))
            alike.setdefault((role, method.needs[PROBE + name], jax.tree.structure(texts), shapes), []).append(name)
        found, metrics = {}, {}
        most = max(rollouts.batch_size // micro_batches, 1)
        for (role, *_), names in alike.items():
            run = functools.partial(scored, role, params[role], key=key, name=PROBE + names[0])
            parts = [probes[name][0] for name in names]
            together = parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
            stats = jax.lax.stop_gradient(in_pieces(run, place(jax.lax.stop_gradient(together)), most))
            ends = list(itertools.accumulate(part.batch_size for part in parts))
            for name, texts, end in zip(names, parts, ends, strict=True):
                rows = slice(end - texts.batch_size, end)
                found[PROBE + name] = jax.tree.map(lambda x, rows=rows: x[rows], stats)
                metrics[f"{PROBE}{name}/tokens"] = jnp.sum(jnp.where(texts.valid, texts.length, 0))
                metrics[f"{PROBE}{name}/cost"] = jnp.asarray(texts.tokens.size / rollouts.tokens.size)
                metrics[f"{PROBE}{name}/valid"] = jnp.mean(texts.valid.astype(jnp.float32))
        return found, metrics

    def router_terms(
        stats: dict[str, TokenStats], rollouts: Rollouts, shares: dict[str, Array]
    ) -> tuple[dict[str, Term], dict[str, Metric]]:
        """The terms of roles' experts and their metrics, by name; the policy's is `router`."""
        terms, metrics = {}, {}
        for role, loss in balanced.items():
            name = "router" if role == "policy" else f"{role}_router"
            terms[name], metrics[f"{name}/load_max"] = router_term(loss, stats[role], rollouts, shares[role])
        return terms, metrics

    def reduced_terms(
        rounded: dict[str, Params],
        trained: dict[str, Params],
        still: dict[str, Params],
        piece: tuple[Rollouts, tuple[Targets, dict[str, TokenStats]]],
        denominators: dict[str, Array],
        shares: dict[str, Array],
        key: Array,
    ) -> tuple[Array, dict[str, Metric]]:
        """The weighted terms `[N]` of a micro-batch, and its metrics."""
        rollouts, (targets, frozen_stats) = piece
        stats = dict(frozen_stats)
        for role, params in rounded.items():
            late = getattr(scores[role], "round_late", lambda params, cast: cast)
            both = late(whole(trained[role], still[role]), whole(params, still[role]))
            stats[role] = scored(role, both, rollouts, key, noise=True)
        balance, metrics = router_terms(stats, rollouts, shares)
        values = []
        for name, term in (method.loss(stats, rollouts, targets) | balance).items():
            value = losses.aggregate(
                term.value, term.mask, term.mode, horizon=term.horizon, denominator=denominators[name]
            )
            values.append(term.weight * value)
            metrics[f"loss/{name}"] = Metric.sum(value)
        if method.metrics is not None:
            metrics |= method.metrics(jax.lax.stop_gradient(stats), rollouts, targets)
        if compare_sampler and "policy" in stats and stats["policy"].logp is not None:
            sampled = rollouts.valid_mask * (rollouts.version >= 0)
            difference = jnp.abs(stats["policy"].logp - rollouts.logp)
            metrics["sampling/sampling_logp_difference/mean"] = Metric.mean(difference, sampled)
            metrics["sampling/sampling_logp_difference/max"] = Metric.max(difference, sampled)
        return jnp.stack(values), jax.lax.stop_gradient(metrics)

    def differentiate(rounded: dict[str, Params], *inputs) -> tuple[PyTree, Array, dict[str, Metric]]:
        """The gradient (of each term, along a leading axis, if they are to be combined), the terms, the metrics."""
        if method.combine is None:

            def total(rounded):
                values, metrics = reduced_terms(rounded, *inputs)
                return jnp.sum(values), (values, metrics)

            gradients, (values, metrics) = jax.grad(total, has_aux=True)(rounded)
            return gradients, values, metrics
        values, pull, metrics = jax.vjp(lambda rounded: reduced_terms(rounded, *inputs), rounded, has_aux=True)
        each = [pull(row)[0] for row in jnp.eye(values.shape[0], dtype=values.dtype)]
        return jax.tree.map(lambda *x: jnp.stack(x), *each), values, metrics

    def gradient(
        trained: dict[str, Params],
        still: dict[str, Params],
        rollouts: Rollouts,
        targets: Targets,
        frozen_stats: dict[str, TokenStats],
        denominators: dict[str, Array],
        shares: dict[str, Array],
        key: Array,
    ) -> tuple[PyTree, Array, dict[str, Metric]]:
        """`differentiate` of the whole batch: sums over micro-batches."""
        # With respect to what the model multiplies with: of rounded parameters a gradient has the same numbers, and
        # takes as little room as they do.
        rounded = {role: getattr(scores[role], "cast", lambda params: params)(x) for role, x in trained.items()}

        def widened(x: Array, param: Array) -> Array:
            return x.astype(param.dtype)

        if micro_batches == 1:
            everything = (rollouts, (targets, frozen_stats))
            gradients, values, metrics = differentiate(rounded, trained, still, everything, denominators, shares, key)
            return jax.tree.map(widened, gradients, trained), values, metrics
        pieces = split(rollouts, (targets, frozen_stats), micro_batches, method.unit)
        copies = () if method.combine is None else (len(denominators),)
        zeros = jax.tree.map(lambda x: jnp.zeros((*copies, *x.shape), x.dtype), trained)

        def accumulate(total: PyTree, piece) -> tuple[PyTree, tuple[Array, dict[str, Metric]]]:
            gradients, values, metrics = differentiate(rounded, trained, still, piece, denominators, shares, key)
            # Without a barrier XLA adds the embedding's gradient row by row into the sum, and its TPU compiler then
            # fails on a mesh (in the pass that moves sums over devices out of loops).
            gradients = jax.lax.optimization_barrier(gradients)
            return jax.tree.map(lambda total, x: total + widened(x, total), total, gradients), (values, metrics)

        total, (values, metrics) = jax.lax.scan(accumulate, zeros, pieces)
        return total, jnp.sum(values, axis=0), {name: metric.merge() for name, metric in metrics.items()}

    def combined(gradients: PyTree, values: Array, state: PyTree, names: tuple[str, ...]):
        """The one gradient to follow, the loss that it belongs to, the terms' weights by name, and the new state."""
        if method.combine is None:
            return gradients, jnp.sum(values), {}, state
        weights, state = method.combine(state, gram(gradients), names)
        if jnp.shape(weights) != (len(names),):
            raise ValueError(f"combine must return a weight for each of {names}, got shape {jnp.shape(weights)}")
        weights = jax.lax.stop_gradient(weights)
        metrics = {f"gradient_weight/{name}": Metric.mean(weights[i : i + 1]) for i, name in enumerate(names)}
        one = jax.tree.map(lambda x: jnp.tensordot(weights.astype(x.dtype), x, axes=1), gradients)
        return one, jnp.sum(weights * values), metrics, state

    def update(given: Trained, rollouts: Rollouts, key: Array) -> tuple[Trained, Metrics]:
        score_key, target_key = jax.random.split(key)
        method_state = given.method_state
        if method.batch is not None:
            chosen, method_state = method.batch(method_state, rollouts)
            rollouts = place(jax.lax.stop_gradient(chosen))
        check_wants(method, rollouts)
        # Stats that neither targets nor frozen roles use are dead code, which the compiler removes.
        read = {role: given.params[borrows.get(role, role)] for role in sorted(method.roles)}
        start = {role: score_all(role, params, rollouts, score_key) for role, params in read.items()}
        probed, probe_metrics = probe_all(read, rollouts, score_key)
        targets, method_state = method.targets(method_state, rollouts, start | probed, target_key)
        targets = jax.lax.stop_gradient(targets)
        frozen = {role: stats for role, stats in start.items() if role not in method.trains}
        terms = method.loss(start, rollouts, targets)
        check_terms(terms, rollouts, micro_batches, method)
        shares = {role: batch_shares(start[role], rollouts) for role in balanced}
        named = terms | router_terms(start, rollouts, shares)[0]
        denominators = {
            name: losses.denominator(term.mask, term.mode, horizon=term.horizon) for name, term in named.items()
        }
        anything = jnp.any(jnp.stack([jnp.any(term.mask != 0) for term in terms.values()]))

        def epoch(carry, _):
            trained, opt_state, method_state = carry
            gradients, values, metrics = gradient(
                trained, still, rollouts, targets, frozen, denominators, shares, score_key
            )
            gradients, loss, weights, new_method_state = combined(gradients, values, method_state, tuple(terms))
            norm = optax.tree.norm(gradients)
            finite = jnp.isfinite(norm) & jnp.isfinite(loss)
            metrics |= weights
            metrics["loss"] = Metric.sum(jax.lax.stop_gradient(loss))
            metrics["grad_norm"] = Metric.mean(norm[None])
            metrics["nonfinite_updates"] = Metric.sum(~finite)
            metrics["empty_updates"] = Metric.sum(finite & ~anything)
            new_trained, new_opt_state = {}, {}
            for role, params in trained.items():
                updates, new_opt_state[role] = optimizers[role].update(gradients[role], opt_state[role], params)
                new_trained[role] = optax.apply_updates(params, updates)
            new = (new_trained, new_opt_state, new_method_state)
            return jax.tree.map(lambda n, o: jnp.where(finite & anything, n, o), new, carry), metrics

        roles = sorted(method.trains)
        parts = {role: parted(given.params[role], trainable.get(role)) for role in roles}
        still = {role: part[1] for role, part in parts.items()}
        carry = (
            {role: part[0] for role, part in parts.items()},
            {role: given.opt_state[role] for role in roles},
            method_state,
        )
        if epochs == 1:
            carry, metrics = epoch(carry, None)
        else:
            carry, stacked = jax.lax.scan(epoch, carry, None, length=epochs)
            metrics = {name: over_epochs(name, metric) for name, metric in stacked.items()}
        trained, opt_state, method_state = carry
        trained = {role: whole(params, still[role]) for role, params in trained.items()}
        return (
            Trained(given.params | trained, given.opt_state | opt_state, method_state),
            {name: metric.result() for name, metric in metrics.items()} | probe_metrics,
        )

    def over_epochs(name: str, metric: Metric) -> Metric:
        if name.startswith("sampling/"):
            return jax.tree.map(lambda x: x[0], metric)
        merged = metric.merge()
        # A loss is a sum over micro-batches but a mean over epochs.
        return Metric(merged.value / epochs, merged.weight, "sum") if name.split("/")[0] == "loss" else merged

    return update


def in_pieces(run: Callable[[Rollouts], TokenStats], rollouts: Rollouts, rows: int) -> TokenStats:
    """Stats of all rollouts, of no more than about so many rows at a time; groups stay together.

    Args:
        run: `rollouts -> stats`.
        rollouts: any number of groups.
        rows: most rows of a piece, if a group has no more.
    """
    prompts, group = rollouts.num_prompts, rollouts.group_size
    pieces = next(
        n for n in range(1, prompts + 1) if prompts % n == 0 and (prompts // n * group <= rows or n == prompts)
    )
    if pieces == 1:
        return run(rollouts)
    cut, _ = split(rollouts, (), pieces, "group")
    return jax.tree.map(lambda x: unsplit_rows(x, group), jax.lax.map(run, cut))


def gram(gradients: PyTree) -> Array:
    r"""Inner products of gradients, $\langle g_i, g_j \rangle$ summed over all parameters.

    Args:
        gradients: a pytree whose leaves have a leading axis of `N`.

    Returns:
        `[N, N]` float32 or wider.

    Example:
        >>> gram({"w": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "b": jnp.array([1.0, 1.0])}).tolist()
        [[2.0, 1.0], [1.0, 5.0]]
    """

    def products(x: Array) -> Array:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        axes = tuple(range(1, x.ndim))
        return jnp.tensordot(x, x, axes=(axes, axes), precision=jax.lax.Precision.HIGHEST)

    return sum(products(x) for x in jax.tree.leaves(gradients))  # type: ignore[return-value]

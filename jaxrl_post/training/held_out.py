"""The loss of a method on held-out completions or pairs that the data gives."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_post import data, losses
from jaxrl_post.training.given import given_rollouts
from jaxrl_post.training.problem_setup import given_columns
from jaxrl_post.training.setup import Setup, Stage
from jaxrl_post.training.shares import make_share
from jaxrl_post.types import Method, Metric, Params, PyTree, Rollouts, Score


def measured_problems(setup: Setup, stage: Stage) -> list[data.Problem]:
    """The held-out problems that a stage's loss can be measured on; none of a stage that has no such loss.

    Args:
        setup: the run's parts.
        stage: one of its stages.
    """
    method = stage.method
    by_itself = not (method.stages or method.batch or method.probes or method.wants)
    return setup.problems.held_out_given if by_itself and stage is setup.stages[-1] else []


class HeldOutLoss:
    """`eval/loss`, and the method's own metrics, on given completions that are not trained on.

    The loss is the sum of the method's weighted terms, without that which balances experts. A method that cannot be
    measured without a step (a chain, one that makes its batch, reads probes or wants columns) has none, nor has the
    warm start.

    Args:
        setup: the run's parts.
        stage: whose method it is.
    """

    def __init__(self, setup: Setup, stage: Stage):
        self._setup, self._stage = setup, stage
        self._problems = measured_problems(setup, stage)

    def __call__(self, params: Mapping[str, Params], method_state: PyTree) -> dict[str, float]:
        """The metrics, as those of training with `eval/` before them; empty if nothing is held out.

        Args:
            params: by role.
            method_state: of the method.
        """
        if not self._problems:
            return {}
        stage, problems = self._stage, self._problems
        size = max(1, stage.batch_size // stage.micro_batches)  # as it is spread over the mesh in training
        parts = []
        for start in range(0, len(problems), size):
            rollouts = self._rollouts(problems[start : start + size], size)
            with jax.set_mesh(self._setup.mesh):
                parts.append(self._measure(params, method_state, rollouts))
        merged = jax.tree.map(lambda *x: np.stack([np.asarray(part) for part in x]), *parts)
        found = jax.tree.map(lambda metric: metric.merge().result(), merged, is_leaf=lambda x: isinstance(x, Metric))
        every = {f"loss/{name}": value for name, value in found["terms"].items()} if len(found["terms"]) > 1 else {}
        every = {"loss": sum(found["terms"].values()), **every, **found["metrics"]}
        return {f"eval/{name}": float(value) for name, value in every.items()}

    def _rollouts(self, problems: list[data.Problem], size: int) -> Rollouts:
        """The problems' completions, with copies that do not count in the place of those that are missing."""
        setup, share = self._setup, make_share(size, self._setup.mesh)
        names = given_columns(self._stage.kind, setup.problems.train)
        rollouts = given_rollouts(setup, self._stage, problems + problems[:1] * (size - len(problems)), names, share)
        real = share.place(share.held < len(problems))
        return rollouts.replace(valid=rollouts.valid & real[:, None])

    @functools.cached_property
    def _measure(self) -> Any:
        setup, stage = self._setup, self._stage
        measure = functools.partial(
            held_out_metrics, stage.method, setup.scores(stage), borrows=setup.borrows(stage), key=jax.random.key(0)
        )
        return jax.jit(measure, out_shardings=NamedSharding(setup.mesh, PartitionSpec()))


def held_out_metrics(
    method: Method,
    scores: Mapping[str, Score],
    params: Mapping[str, Params],
    method_state: PyTree,
    rollouts: Rollouts,
    *,
    borrows: Mapping[str, str],
    key: jax.Array,
) -> dict[str, dict[str, Metric]]:
    """The terms of a method's loss, weighted, and its metrics; of several batches they can be merged.

    Args:
        method: not a chain.
        scores: by role, used without dropout.
        params: by role.
        method_state: of the method, as it is left.
        rollouts: what is measured.
        borrows: roles that read the parameters of another role.
        key: for targets that are random.
    """
    stats = {}
    for role in sorted(method.roles):
        score = scores[role]
        score = getattr(score, "still", score)
        stats[role] = score(params[borrows.get(role, role)], rollouts, method.needs[role], key)
    targets, _ = method.targets(method_state, rollouts, stats, key)
    terms = {}
    for name, term in method.loss(stats, rollouts, targets).items():
        value = losses.aggregate(term.value, term.mask, term.mode, horizon=term.horizon)
        count = losses.denominator(term.mask, term.mode, horizon=term.horizon)
        count = jnp.where(jnp.any(term.mask != 0), count, 0.0)
        terms[name] = Metric(term.weight * value * count, count, "mean")
    metrics = {} if method.metrics is None else dict(method.metrics(stats, rollouts, targets))
    return {"terms": terms, "metrics": metrics}

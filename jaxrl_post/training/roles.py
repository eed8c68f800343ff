"""Roles: the models that a method reads, where their parameters come from, and how frozen ones follow others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxrl_post.types import Array, Params


@dataclasses.dataclass(frozen=True)
class Role:
    """How a role gets its parameters.

    Attributes:
        sources: whose parameters it starts from: another role, or the directory of another run, whose newest
            checkpoint's policy is meant; of several the `soup`.
        weights: of the sources; None for their mean.
        every: steps between refreshes from the sources, which must be roles then; 0 for never.
        mix: at a refresh, `mix * source + (1 - mix) * own`: 1.0 copies, less is TR-DPO's soft update, and with
            `every=1` an exponential moving average.
    """

    sources: tuple[str, ...] = ("policy",)
    weights: tuple[float, ...] | None = None
    every: int = 0
    mix: float = 1.0


Refresh: TypeAlias = Callable[[dict[str, Params], Array], dict[str, Params]]
"""`(params by role, step) -> params by role`."""


def soup(params_list: Sequence[Params], weights: Sequence[float] | None = None) -> Params:
    r"""The weighted average of models of one shape, parameter by parameter.

    $$\theta = \sum_i w_i \theta_i$$

    Models that were tuned from one base lie in one basin of the loss, in which their average often does better than any
    of them. Weights are not normalised: those that add up to 1 interpolate, or extrapolate where some are negative.
    Where a weight is 1 and all others are 0, the result is that model to the bit.

    Args:
        params_list: pytrees of the same structure, shapes and dtypes.
        weights: one number for each; None for their mean, `1 / n`.

    Returns:
        A pytree like each of them. Sums are taken in float32 or wider; integer leaves, as those of quantized weights,
        must agree and are kept.

    Raises:
        ValueError: for an empty list, another number of weights, weights that are not finite, or models that differ in
            structure, shapes or dtypes (the message names the first parameter that does), or, where these are known
            already, in integers.

    Example:
        >>> soup([{"a": jnp.array([0.0, 2.0])}, {"a": jnp.array([2.0, 4.0])}], [0.5, 0.5])["a"].tolist()
        [1.0, 3.0]

    References:
        Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference
        time, arXiv 2203.05482; SALSA: Soup-based Alignment Learning for Stronger Adaptation in RLHF, arXiv 2411.01798.
    """
    count = len(params_list)
    if not count:
        raise ValueError("soup averages models; got an empty list")
    given = [1.0 / count] * count if weights is None else [float(weight) for weight in weights]
    if len(given) != count:
        raise ValueError(f"soup needs a weight for each of {count} models, got {len(given)} weights")
    if not all(math.isfinite(weight) for weight in given):
        raise ValueError(f"weights must be finite, got {given}")
    for index, other in enumerate(params_list[1:], 1):
        check_same_shapes(params_list[0], other, "the first model", f"model {index + 1}")
    used = [(weight, params) for weight, params in zip(given, params_list, strict=True) if weight != 0.0]
    if not used:
        return jax.tree.map(jnp.zeros_like, params_list[0])

    def average(path: Any, first: Array, *leaves: Array) -> Array:
        if not jnp.issubdtype(first.dtype, jnp.inexact):
            known = not any(isinstance(leaf, Tracer) for leaf in (first, *leaves))
            if known and not all(jnp.array_equal(first, leaf) for leaf in leaves):
                raise ValueError(
                    f"the models have other integers at {jax.tree_util.keystr(path)}, which cannot be averaged: "
                    "quantized models mix where they are adapters on one base"
                )
            return first
        wide = jnp.promote_types(first.dtype, jnp.float32)
        terms = [leaf.astype(wide) * weight for (weight, _), leaf in zip(used, (first, *leaves), strict=True)]
        return sum(terms[1:], terms[0]).astype(first.dtype)

    return jax.tree_util.tree_map_with_path(average, *(params for _, params in used))


def check_same_shapes(one: Params, other: Params, one_name: str, other_name: str) -> None:
    """Raise ValueError unless two models agree in structure, shapes and dtypes; arrays may be abstract.

    Example:
        >>> check_same_shapes({"w": jnp.zeros(2)}, {"w": jnp.zeros(3)}, "the policy", "runs/big")
        Traceback (most recent call last):
            ...
        ValueError: the policy and runs/big differ at ['w']: float32[2] and float32[3]; only models of one shape mix
    """
    left, right = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (one, other)
    )
    describe = lambda leaf: "nothing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"  # noqa: E731
    for path in [*left, *(path for path in right if path not in left)]:
        a, b = describe(left.get(path)), describe(right.get(path))
        if a != b:
            raise ValueError(f"{one_name} and {other_name} differ at {path}: {a} and {b}; only models of one shape mix")


def role_params(
    roles: Mapping[str, Role],
    params: Mapping[str, Params],
    load: Callable[[str], Params],
    adapt: Callable[[str, Params], Params] = lambda role, source: source,
) -> dict[str, Params]:
    """The parameters of every role, given those of some.

    Args:
        roles: those that are still to get parameters.
        params: by role, at least `policy`.
        load: the parameters of the policy of the run in a directory.
        adapt: `(role, parameters of its sources) -> parameters`, for roles whose model has more than the policy.

    Returns:
        The parameters of all roles.

    Raises:
        ValueError: if roles take their parameters from each other.

    Example:
        >>> roles = {"reference": Role(("policy", "runs/other"), (0.75, 0.25))}
        >>> made = role_params(roles, {"policy": jnp.zeros(())}, load=lambda run: jnp.ones(()))
        >>> float(made["reference"])
        0.25
    """
    known, waiting = dict(params), sorted(set(roles) - set(params))
    every = {*known, *waiting}
    while waiting:
        ready = [r for r in waiting if all(source in known or source not in every for source in roles[r].sources)]
        if not ready:
            raise ValueError(f"roles: {waiting} take their parameters from each other; begin with policy")
        for name in ready:
            role = roles[name]
            sources = [known[source] if source in known else load(source) for source in role.sources]
            mixed = sources[0] if len(sources) == 1 and role.weights is None else soup(sources, role.weights)
            known[name] = adapt(name, mixed)
            waiting.remove(name)
    return known


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
            sources = [params[source] for source in role.sources]
            source = sources[0] if len(sources) == 1 and role.weights is None else soup(sources, role.weights)

            def renewed(own: Array, source: Array, due: Array = due, mix: float = role.mix) -> Array:
                # Integers are of quantized weights under adapters, the same in both.
                mixed = mix * source + (1 - mix) * own if jnp.issubdtype(own.dtype, jnp.inexact) else source
                return jnp.where(due, mixed, own).astype(own.dtype)

            new[name] = jax.tree.map(renewed, params[name], source)
        return new

    return refresh

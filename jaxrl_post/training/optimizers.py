"""What is optimised and by what: the Optax chain and schedule of a configuration, roles, and parts of parameters."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import optax
from jax.typing import DTypeLike

from jaxrl_post.types import Method, Params, PyTree


def by_trained_role(
    optimizer: optax.GradientTransformation | Mapping[str, optax.GradientTransformation], method: Method
) -> dict[str, optax.GradientTransformation]:
    """The optimiser of each role that a method trains.

    Args:
        optimizer: one for all of them, or one for each by role.
        method: the method.

    Raises:
        ValueError: if a trained role has none.

    Example:
        >>> from jaxrl_post import methods
        >>> slow, fast = optax.sgd(0.1), optax.sgd(1.0)
        >>> by_trained_role({"policy": slow, "critic": fast}, methods.ppo())["critic"] is fast
        True
    """
    if not isinstance(optimizer, Mapping):
        return dict.fromkeys(sorted(method.trains), optimizer)
    if missing := sorted(method.trains - set(optimizer)):
        raise ValueError(f"the method trains {sorted(method.trains)}; no optimizer was given for {missing}")
    return {role: optimizer[role] for role in sorted(method.trains)}


def parted(params: Params, trainable: PyTree | None) -> tuple[Params, Params]:
    """The parameters that are trained and the others, each with None in the place of what is in the other.

    Example:
        >>> parted({"a": 1, "b": 2}, {"a": True, "b": False})
        ({'a': 1, 'b': None}, {'a': None, 'b': 2})
    """
    if trainable is None:
        return params, jax.tree.map(lambda _: None, params)
    first, second = (
        jax.tree.map(lambda x, moves, want=want: x if bool(moves) is want else None, params, trainable)
        for want in (True, False)
    )
    return first, second


def whole(trained: Params, still: Params) -> Params:
    """What `parted` took apart."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, still, is_leaf=lambda x: x is None)


def make_schedule(
    *,
    learning_rate: float,
    schedule: str = "constant",
    warmup_steps: int = 0,
    steps: int = 1,
    end_fraction: float = 0.1,
) -> optax.Schedule:
    """A linear warm-up to the peak, then a constant or decaying learning rate.

    Args:
        learning_rate: peak learning rate.
        schedule: `"constant" | "cosine" | "linear"`, after the warm-up.
        warmup_steps: updates over which the rate grows to its peak; the first of them already moves the parameters.
        steps: updates in all, of which the last is number `steps - 1`.
        end_fraction: rate that a decay comes to behind the last of them, as a fraction of the peak.

    Returns:
        `update number (from 0) -> learning rate`.

    Raises:
        ValueError: for an unknown schedule.

    Example:
        >>> rate = make_schedule(learning_rate=1.0, schedule="linear", warmup_steps=3, steps=13, end_fraction=0.0)
        >>> [round(float(rate(i)), 3) for i in (0, 1, 3, 8, 13)]
        [0.25, 0.5, 1.0, 0.5, 0.0]
    """
    decay_steps = max(1, steps - warmup_steps)
    if schedule == "constant":
        rate = optax.constant_schedule(learning_rate)
    elif schedule == "cosine":
        rate = optax.cosine_decay_schedule(learning_rate, decay_steps, alpha=end_fraction)
    elif schedule == "linear":
        rate = optax.linear_schedule(learning_rate, learning_rate * end_fraction, decay_steps)
    else:
        raise ValueError(f"unknown schedule {schedule!r}; there are constant, cosine and linear")
    if not warmup_steps:
        return rate
    warmup = optax.linear_schedule(learning_rate / (warmup_steps + 1), learning_rate, warmup_steps)
    return optax.join_schedules([warmup, rate], [warmup_steps])


def make_optimizer(
    learning_rate: float | optax.Schedule,
    *,
    name: str = "adamw",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Clip by global norm, then the named optimiser.

    Args:
        learning_rate: a number, or a schedule.
        name: `"adamw" | "adam" | "sgd"`.
        b1: Adam's decay of the first moment; the momentum of `"sgd"`.
        b2: Adam's decay of the second moment.
        eps: Adam's epsilon.
        weight_decay: decoupled weight decay, `"adamw"` only.
        max_grad_norm: global norm that gradients are scaled down to; None for no clipping.
        mu_dtype: what the mean of gradients (the momentum of `"sgd"`) is kept in; None for that of the parameters. In
            bfloat16 Adam takes a quarter less memory beside float32 parameters. The mean of squares stays as wide as
            the parameters: at `b2=0.999` it moves by less than bfloat16 can hold.

    Returns:
        A gradient transformation.

    Raises:
        ValueError: for an unknown name, or `weight_decay` or `mu_dtype` with an optimiser that has none of it.

    Example:
        >>> import jax.numpy as jnp
        >>> optimizer = make_optimizer(0.5, name="sgd", b1=0.0, max_grad_norm=None)
        >>> params = jnp.ones(2)
        >>> updates, _ = optimizer.update(jnp.ones(2), optimizer.init(params), params)
        >>> updates.tolist()
        [-0.5, -0.5]
    """
    if weight_decay and name != "adamw":
        raise ValueError(f"weight_decay={weight_decay} does not apply to {name!r}; use name='adamw' or weight_decay=0")
    if mu_dtype is not None and name == "sgd" and not b1:
        raise ValueError(f"mu_dtype={mu_dtype} does not apply to 'sgd' with b1=0, which keeps no momentum")
    if name == "adamw":
        rule = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mu_dtype=mu_dtype)
    elif name == "adam":
        rule = optax.adam(learning_rate, b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype)
    elif name == "sgd":
        rule = optax.sgd(learning_rate, momentum=b1 or None, accumulator_dtype=mu_dtype)
    else:
        raise ValueError(f"unknown optimizer {name!r}; there are adamw, adam and sgd")
    return rule if max_grad_norm is None else optax.chain(optax.clip_by_global_norm(max_grad_norm), rule)

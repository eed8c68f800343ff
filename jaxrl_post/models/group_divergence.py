"""How much the next-token distributions of a group's completions differ, place by place.

What is made of the numbers, e.g. weights of tokens, is in `jaxrl_post.losses`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array

DivergenceForm: TypeAlias = Literal["jensen_shannon", "log_mean"]

GROUP_FIELDS: dict[str, DivergenceForm] = {
    "group_divergence": "jensen_shannon",
    "group_log_divergence": "log_mean",
}
"""Fields of `TokenStats` that compare the completions of a group, and the form of each."""

_IMPOSSIBLE = -1e4  # nats: stands for a log-prob of -inf, whose difference from another -inf would be NaN


def group_divergence(
    logp: Array,
    mask: Array,
    valid: Array | None = None,
    *,
    form: DivergenceForm = "jensen_shannon",
    limit: float = 11.0,
) -> Array:
    r"""How much the next-token distributions of a group's completions differ at the same place.

    `"jensen_shannon"`, the divergence of $G$ distributions from their mean, in $[0, \log G]$:

    $$D_t = \frac1G \sum_i \sum_v p_{i,t,v} \log \frac{p_{i,t,v}}{\bar p_{t,v}}, \qquad
    \bar p_t = \frac1G \sum_i p_{i,t}$$

    `"log_mean"`, what the authors of TW-GRPO run: the mean is one of log-probs, and every token of the vocabulary
    counts alike, so that it is no divergence of distributions and the vocabulary's tail weighs most:

    $$D_t = \frac1G \sum_i \sum_v (e^{d} - d - 1), \qquad
    d = \mathrm{clip}\Big(\frac1G \sum_j \log p_{j,t,v} - \log p_{i,t,v},\, -c,\, c\Big)$$

    A completion that has ended counts as the uniform distribution, in both.

    Args:
        logp: `[P, G, T, V]` float, nats; log-probs of all tokens at each place of the completions, which all begin at
            place 0.
        mask: `[P, G, T]`, nonzero where the completion has a token.
        valid: `[P, G]` bool, False where the completion does not count at all; None for all.
        form: see above.
        limit: $c$ of `"log_mean"`, nats.

    Returns:
        `[P, T]`, float32 or wider, not negative, without gradient. Exactly 0 where all distributions are the same to
        the bit, for a group of one, and where no completion has a token.

    Raises:
        ValueError: if `form` is unknown or shapes do not fit.

    Example:
        >>> p = jnp.array([[0.5, 0.5], [0.9, 0.1]])
        >>> two = jnp.log(jnp.stack([p, jnp.array([[0.5, 0.5], [0.1, 0.9]])]))[None]
        >>> [round(d, 4) for d in group_divergence(two, jnp.ones((1, 2, 2)))[0].tolist()]
        [0.0, 0.3681]

    Reference: Reinforcing Video Reasoning with Focused Thinking (arXiv 2505.24718).
    """
    if form not in get_args(DivergenceForm):
        raise ValueError(f"form must be one of {', '.join(get_args(DivergenceForm))}, got {form!r}")
    logp, present = jax.lax.stop_gradient(masked.as_float(logp)), jnp.asarray(mask) != 0
    masked.check_axes("logp", logp, "[P, G, T, V]", "one distribution for each place of each completion")
    masked.check_like("mask", present, "logp without V", logp[..., 0])
    counts = jnp.ones(present.shape[:2], bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", counts, "mask without T", present[..., 0])
    uniform = -jnp.log(jnp.asarray(logp.shape[-1], logp.dtype))
    present &= counts[:, :, None]
    logp = jnp.where(present[..., None], jnp.maximum(logp, _IMPOSSIBLE), uniform)
    member = counts[:, :, None, None]
    if form == "log_mean":
        difference = jnp.clip(masked.mean(logp, member, 1, keepdims=True) - logp, -limit, limit)
        each = jnp.sum(jnp.expm1(difference) - difference, axis=-1)
    else:
        # Relative to the largest, so that equal distributions give exactly 0.
        largest = masked.max(logp, member, 1, keepdims=True)
        mean = largest + jnp.log(masked.mean(jnp.exp(logp - largest), member, 1, keepdims=True))
        each = jnp.sum(jnp.exp(logp) * (logp - jnp.where(jnp.isfinite(mean), mean, 0.0)), axis=-1)
    found = jnp.maximum(masked.mean(each, counts[:, :, None], 1), 0.0)
    return jnp.where(jnp.any(present, axis=1), found, 0.0)


def group_fields(
    log_probs: Callable[[Array], Array],
    mask: Array,
    valid: Array,
    fields: Collection[str],
    *,
    max_chosen: int | None = None,
) -> dict[str, Array]:
    """The fields of `GROUP_FIELDS` of given tokens, from one place of the completions at a time.

    The places of a completion are its chosen tokens in their order, so that tool output does not shift them, and no
    array of `[B, T, V]` comes to be.

    Args:
        log_probs: `t[B] -> [B, V]`: log-probs of all tokens at position `t[b]` of row `b`.
        mask: `[B, T]`, nonzero where the policy chose the token.
        valid: `[P, G]` bool, False takes the row out of its group.
        fields: names of `GROUP_FIELDS`.
        max_chosen: bound on the chosen tokens of a row; those beyond get NaN. None for `T`.

    Returns:
        For each name `[B, T]`: the group's number at every chosen token of a valid row, 0 elsewhere.

    Example:
        >>> table = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1], [0.1, 0.9]]))
        >>> rows = jnp.array([[0, 0, 1], [0, 0, 2]])  # of the table, by row and position
        >>> of = lambda t: table[jnp.take_along_axis(rows, t[:, None], 1)[:, 0]]
        >>> mask, valid = jnp.array([[0, 1, 1], [0, 1, 1]]), jnp.ones((1, 2), bool)
        >>> found = group_fields(of, mask, valid, {"group_divergence"})["group_divergence"]
        >>> [round(d, 4) for d in found[0].tolist()]
        [0.0, 0.0, 0.3681]
    """
    chosen = jnp.asarray(mask) != 0
    rows, length = chosen.shape
    bound = length if max_chosen is None else min(max_chosen, length)
    order = jnp.argsort(~chosen, axis=1, stable=True)[:, :bound]
    count = jnp.sum(chosen, axis=1)

    def one_place(number: Array, position: Array) -> dict[str, Array]:
        logp = jax.lax.stop_gradient(log_probs(position)).reshape(*valid.shape, 1, -1)
        here = (number < count).reshape(*valid.shape, 1)
        return {name: group_divergence(logp, here, valid, form=GROUP_FIELDS[name])[:, 0] for name in fields}

    by_place = jax.lax.map(lambda x: one_place(*x), (jnp.arange(bound), order.T))
    place = jnp.cumsum(chosen, axis=1) - 1
    group = jnp.repeat(jnp.arange(valid.shape[0]), valid.shape[1])[:, None]
    there = chosen & valid.reshape(rows, 1).astype(bool)

    def spread(field: Array) -> Array:
        values = jnp.where(place < bound, field[jnp.clip(place, 0, bound - 1), group], jnp.nan)
        return jnp.where(there, values, 0.0)

    return {name: spread(field) for name, field in by_place.items()}

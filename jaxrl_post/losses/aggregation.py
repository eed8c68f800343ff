"""The one place where a loss becomes a scalar, and the denominators that make it independent of micro-batches.

A loss over a batch is a sum over rows divided by a number that depends on the whole batch's mask. Give that number
(`denominator` of the whole mask) to `aggregate` of each part, and the parts add up to the whole.
"""

from __future__ import annotations

from typing import get_args

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import AggregationMode, Array


def _check(mask: Array, mode: AggregationMode, horizon: int | None) -> None:
    if mode not in get_args(AggregationMode):
        raise ValueError(f"mode must be one of {', '.join(get_args(AggregationMode))}, got {mode!r}")
    if mode == "seq_mean_token_sum_norm":
        if horizon is None or horizon <= 0:
            raise ValueError(
                f"mode 'seq_mean_token_sum_norm' needs horizon, a fixed length above 0, got {horizon}; "
                "give e.g. horizon=max_new_tokens"
            )
    elif horizon is not None:
        raise ValueError(f"horizon does not apply to mode {mode!r}, got {horizon}; leave it out")
    masked.check_axes("mask", mask, "[B, T] or [B]")


def _as_rows(x: Array) -> Array:
    return x[:, None] if x.ndim == 1 else x


def denominator(mask: Array, mode: AggregationMode, *, horizon: int | None = None) -> Array:
    r"""What `aggregate` divides by: tokens, or sequences that have any token (times the horizon).

    | mode | denominator |
    |---|---|
    | `token_mean` | $\sum_{it} m_{it}$ |
    | `seq_mean_token_sum`, `seq_mean_token_mean` | $N = \lvert \{i : \exists t\; m_{it} \neq 0\} \rvert$ |
    | `seq_mean_token_sum_norm` | $N \cdot \mathrm{horizon}$ |

    Args:
        mask: `[B, T]`, or `[B]` for one number per sequence or prompt; 1 where the loss counts.
        mode: how the loss is reduced.
        horizon: tokens; the fixed length of `seq_mean_token_sum_norm`, and of no other mode.

    Returns:
        Scalar, float32 or wider, safe to divide by: 1 (times the horizon) where the mask is empty.

    Raises:
        ValueError: if the mode is unknown, the horizon is missing or does not apply, or the mask's rank is wrong.

    Example:
        >>> mask = jnp.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
        >>> float(denominator(mask, "token_mean")), float(denominator(mask, "seq_mean_token_mean"))
        (4.0, 2.0)
    """
    mask = masked.as_float(mask)
    _check(mask, mode, horizon)
    rows = _as_rows(mask)
    counted = rows if mode == "token_mean" else jnp.any(rows != 0, axis=1).astype(rows.dtype)
    count = jnp.sum(counted)
    safe = jnp.where(count == 0, 1.0, count)
    return safe if horizon is None else safe * horizon


def aggregate(
    value: Array,
    mask: Array,
    mode: AggregationMode,
    *,
    horizon: int | None = None,
    denominator: Array | float | None = None,
) -> Array:
    r"""Reduce a loss to a scalar.

    | mode | formula | used by |
    |---|---|---|
    | `token_mean` | $\sum_{it} m \ell / \sum_{it} m$ | DAPO, PPO: every token weighs the same |
    | `seq_mean_token_mean` | $\frac1N \sum_i (\sum_t m \ell / \sum_t m)$ | GRPO, GSPO: every sequence weighs the same |
    | `seq_mean_token_sum` | $\frac1N \sum_i \sum_t m \ell$ | REINFORCE, DPO: the sequence's log-prob |
    | `seq_mean_token_sum_norm` | $\frac1{N H} \sum_i \sum_t m \ell$ | Dr. GRPO: a fixed horizon $H$ |

    $N$ counts the sequences that have any unmasked token: rows without one do not dilute the mean. One number per
    sequence (`[B]`) is a token axis of length one, on which the first three modes coincide.

    Other reductions are these with another denominator: the sum over tokens is `token_mean` with `denominator=1`, a
    fixed constant is `token_mean` with that constant, a mean that counts empty sequences is `seq_mean_token_mean` with
    `denominator=B` (the number of rows), and a mean per micro-batch is what leaving `denominator` out gives for a part.
    Sequences weighted by their length (LUSPO) are `seq_mean_token_sum` of a loss that is the same for all tokens of a
    sequence.

    Args:
        value: `[B, T]`, or `[B]` for one number per sequence or prompt. Masked elements may hold anything, and get a
            gradient of 0. What they were made of must be finite all the same, since 0 times infinity is no number: put
            0 in the padding of advantages and log-probs.
        mask: `value`'s shape; 1 where it counts. Fractions weigh.
        mode: one of the four above.
        horizon: tokens; the fixed length of `seq_mean_token_sum_norm`, and of no other mode.
        denominator: scalar, `denominator(whole_mask, mode, horizon=horizon)` of the batch of which these rows are a
            part; None if they are the whole. Then the sum over the parts is the loss of the whole, whatever the split.

    Returns:
        Scalar, float32 or wider; 0 with zero gradient where the mask is empty.

    Raises:
        ValueError: if shapes differ, the mode is unknown, or the horizon is missing or does not apply.

    Example:
        >>> value, mask = jnp.array([[1.0, 2.0, 3.0], [5.0, 0.0, 0.0]]), jnp.array([[1, 1, 1], [1, 0, 0]])
        >>> float(aggregate(value, mask, "token_mean")), float(aggregate(value, mask, "seq_mean_token_mean"))
        (2.75, 3.5)

    Reference: Understanding R1-Zero-Like Training: A Critical Perspective (arXiv 2503.20783) for the fixed horizon;
    DAPO: An Open-Source LLM Reinforcement Learning System at Scale (arXiv 2503.14476) for the token mean.
    """
    value, mask = masked.as_float(value), masked.as_float(mask)
    _check(mask, mode, horizon)
    masked.check_like("mask", mask, "value", value)
    if denominator is None:
        denominator = _denominator(mask, mode, horizon=horizon)
    rows, weights = _as_rows(value), _as_rows(mask)
    reduce_tokens = masked.mean if mode == "seq_mean_token_mean" else masked.sum
    return jnp.sum(reduce_tokens(rows, weights, axis=1)) / denominator


_denominator = denominator  # `aggregate` has an argument of that name

"""CPL: preferences between stretches of behaviour, by how much each would regret what it did."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.preference import check_beta
from jaxrl_post.types import Array


def segment_logp(logp: Array, mask: Array, *, gamma: float = 1.0) -> Array:
    r"""Discounted log-likelihood of what was done, $\sum_t \gamma^t \log\pi(a_t | s_t)$ over the actions of the mask.

    Args:
        logp: `[B, T]` float, nats; log-prob of each action, or its ratio to a reference.
        mask: `[B, T]`, nonzero at actions; time counts these alone.
        gamma: $\gamma$, discount per action, in [0, 1].

    Returns:
        `[B]`, float32 or wider; 0 of an empty mask.

    Raises:
        ValueError: if the arrays are not `[B, T]` of one shape, or `gamma` is outside [0, 1].

    Example:
        >>> segment_logp(jnp.array([[-1.0, -9.0, -4.0]]), jnp.array([[1, 0, 1]]), gamma=0.5).tolist()
        [-3.0]

    Reference: Contrastive Preference Learning: Learning from Human Feedback without RL (arXiv 2310.13639), equation 5,
    whose experiments take $\gamma = 1$.
    """
    if isinstance(gamma, float | int) and not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
    logp, mask = masked.as_float(logp), jnp.asarray(mask)
    masked.check_axes("logp", logp, "[B, T]")
    masked.check_like("mask", mask, "logp", logp)
    there = mask != 0
    place = jnp.cumsum(there, axis=1) - 1
    return jnp.sum(jnp.where(there, gamma ** jnp.maximum(place, 0) * logp, 0.0), axis=1)


def cpl(
    first_logp: Array,
    second_logp: Array,
    *,
    beta: float = 0.1,
    bias: float = 0.5,
    first_better: float | Array = 1.0,
) -> Array:
    r"""Contrastive preference learning: of two segments the better one regrets less, and its regret is its likelihood.

    $$\ell = -p \log\sigma(\beta (\ell_1 - \lambda \ell_2)) - (1 - p) \log\sigma(\beta (\ell_2 - \lambda \ell_1))$$

    In a world of maximum entropy the optimal advantage is $\beta \log\pi^*$, so that the policy is learned with neither
    a reward nor a value. Of one step, with ratios to a reference and $\lambda = 1$, it is `dpo`.

    Args:
        first_logp: `[B]` float, nats; `segment_logp` of the first segment. With ratios to a reference it is the form
            with a KL.
        second_logp: `[B]` float, nats; of the second.
        beta: temperature of the entropy, above 0 ($\alpha$ of the paper).
        bias: $\lambda$ in (0, 1]: below 1 it costs something to lose the likelihood of both segments, which holds the
            policy to actions that were seen.
        first_better: $p$, the probability that the first one is preferred, a number or `[B]`.

    Returns:
        `[B]`, float32 or wider.

    Raises:
        ValueError: if the inputs are not `[B]` of one length, `beta` is not above 0, or `bias` is outside (0, 1].

    Example:
        >>> round(float(cpl(jnp.array([-10.0]), jnp.array([-12.0]), beta=0.1, bias=0.5)[0]), 6)
        0.913015

    Reference: Contrastive Preference Learning: Learning from Human Feedback without RL (arXiv 2310.13639), equation 7.
    """
    check_beta(beta)
    _check_bias(bias)
    first, second = masked.as_float(first_logp), masked.as_float(second_logp)
    masked.check_axes("first_logp", first, "[B]", "sum log-probs over the actions with segment_logp")
    masked.check_like("second_logp", second, "first_logp", first)
    loss = -first_better * jax.nn.log_sigmoid(beta * (first - bias * second))
    if isinstance(first_better, float | int) and first_better == 1:
        return loss
    return loss - (1 - first_better) * jax.nn.log_sigmoid(beta * (second - bias * first))


def cpl_ranked(
    logp: Array, scores: Array, valid: Array | None = None, *, beta: float = 0.1, bias: float = 0.5
) -> Array:
    r"""`cpl` over all pairs of a batch whose segments have scores: each pair, the higher score against the lower.

    $$L = \mathrm{mean}_{s_i > s_j} -\log\sigma(\beta (\ell_i - \lambda \ell_j))$$

    Args:
        logp: `[B]` float, nats; as in `cpl`.
        scores: `[B]` float; segments with equal ones are not compared.
        valid: `[B]` bool, False where a segment does not count; None for all.
        beta: as in `cpl`.
        bias: as in `cpl`.

    Returns:
        A scalar; 0 where no pair can be compared. The pairs take memory `B * B`.

    Raises:
        ValueError: as in `cpl`.

    Example:
        >>> round(float(cpl_ranked(jnp.array([-12.0, -10.0]), jnp.array([0.0, 1.0]))), 6)
        0.913015

    Reference: Contrastive Preference Learning: Learning from Human Feedback without RL (arXiv 2310.13639).
    """
    check_beta(beta)
    _check_bias(bias)
    logp, scores = masked.as_float(logp), jax.lax.stop_gradient(masked.as_float(scores))
    masked.check_axes("logp", logp, "[B]", "sum log-probs over the actions with segment_logp")
    masked.check_like("scores", scores, "logp", logp)
    there = jnp.ones(logp.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", there, "logp", logp)
    logp = jnp.where(there, logp, 0.0)
    pairs = (scores[:, None] > scores[None, :]) & there[:, None] & there[None, :]
    loss = -jax.nn.log_sigmoid(beta * (logp[:, None] - bias * logp[None, :]))
    return masked.mean(loss, pairs.astype(loss.dtype))


def _check_bias(bias: float) -> None:
    if isinstance(bias, float | int) and not 0 < bias <= 1:
        raise ValueError(f"bias must be in (0, 1], got {bias}; 1 compares the segments alone")

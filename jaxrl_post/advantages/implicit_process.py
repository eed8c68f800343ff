"""PRIME: the rewards of tokens that a model of outcomes implies, next to the outcome itself."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.advantages.group import rloo
from jaxrl_post.advantages.layout import check_groups_fit, check_rewards, is_last
from jaxrl_post.types import Array


def _to_go(x: Array) -> Array:
    """Sums from each token to the end, `[B, T]`."""
    return jnp.cumsum(x[:, ::-1], axis=1)[:, ::-1]


def prime(
    process_rewards: Array,
    outcome: Array,
    mask: Array,
    valid: Array | None = None,
    *,
    process_weight: float = 1.0,
    outcome_weight: float = 1.0,
    whiten: bool = True,
) -> Array:
    r"""PRIME's advantage of tokens, from implicit process rewards and outcomes, each with its leave-one-out baseline.

    $$A_{i,t} = w_p \sum_{s \geq t} \Big(\frac{K r_{i,s} - \sum_j \bar r_j}{K - 1}\Big)
    + w_o \Big(R_i - \frac{1}{K - 1} \sum_{j \neq i} R_j\Big)$$

    then whitened over the batch; $\bar r_j$ is the mean over the tokens of answer $j$. This is the released code's
    baseline of tokens. That of the paper, $r_{i,s} - \mathrm{mean}_{j \neq i}\, \bar r_j$, has the same mean over an
    answer's tokens and leaves the differences between them a factor $(K - 1) / K$ smaller.

    Args:
        process_rewards: `[B, T]` float: $r$, see `losses.implicit_reward`; `B = P * G`, prompt-major.
        outcome: `[P, G]` float: $R$.
        mask: `[B, T]`, nonzero where the policy chose the token.
        valid: `[P, G]` bool, False where the answer does not count; None for all. $K$ counts the valid ones, for
            $\bar r$ those with tokens.
        process_weight: $w_p$; one of the released recipes has 5.
        outcome_weight: $w_o$.
        whiten: False leaves the sums as they are.

    Returns:
        `[B, T]`, float32 or wider; 0 where the mask is and where not valid. A group of one has no baseline and gets 0
        before whitening, and so has an answer without tokens.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> rewards = jnp.array([[0.3, 0.1], [0.0, 0.0]])
        >>> found = prime(rewards, jnp.array([[1.0, 0.0]]), jnp.ones((2, 2)), whiten=False)
        >>> [[round(a, 4) for a in row] for row in found.tolist()]
        [[1.4, 1.0], [-1.4, -1.2]]

    Reference: Process Reinforcement through Implicit Rewards (arXiv 2502.01456).
    """
    outcome, valid = check_rewards(outcome, valid)
    process, acts = masked.as_float(process_rewards), jnp.asarray(mask) != 0
    check_groups_fit("outcome", outcome, acts)
    masked.check_like("process_rewards", process, "mask", acts)
    acts = acts & valid.reshape(-1, 1)
    process = jnp.where(acts, process, 0.0)

    there = jnp.any(acts, axis=1).reshape(outcome.shape)
    count = jnp.sum(there, axis=1, keepdims=True).astype(process.dtype)
    means = jnp.where(there, masked.mean(process, acts, 1).reshape(outcome.shape), 0.0)
    others = jnp.maximum(count - 1, 1)
    total = jnp.sum(means, axis=1, keepdims=True)

    def of_rows(x: Array) -> Array:
        return jnp.broadcast_to(x, outcome.shape).reshape(-1, 1)

    centered = (of_rows(count) * process - of_rows(total)) / of_rows(others)
    centered = jnp.where(acts & of_rows(count > 1), centered, 0.0)

    on_last = jnp.where(is_last(acts), rloo(outcome, valid).reshape(-1, 1), 0.0)
    returns = jnp.where(acts, _to_go(process_weight * centered + outcome_weight * on_last), 0.0)
    return masked.whiten(returns, acts) if whiten else returns


def prime_norm(process_rewards: Array, mask: Array) -> Array:
    r"""Token rewards divided by the largest sum to the end that any token of the batch has.

    $$r_t / \max_{i, t} \Big|\sum_{s \geq t} r_{i,s}\Big|$$

    Args:
        process_rewards: `[B, T]` float.
        mask: `[B, T]`, nonzero where the token counts.

    Returns:
        `[B, T]`, float32 or wider; 0 where the mask is, and everywhere if all sums are 0.

    Raises:
        ValueError: if the arrays are not `[B, T]` of one shape.

    Example:
        >>> prime_norm(jnp.array([[1.0, -3.0, 1.0]]), jnp.ones((1, 3))).tolist()
        [[0.5, -1.5, 0.5]]

    Reference: Process Reinforcement through Implicit Rewards (arXiv 2502.01456).
    """
    process, acts = masked.as_float(process_rewards), jnp.asarray(mask) != 0
    masked.check_axes("process_rewards", process, "[B, T]")
    masked.check_like("mask", acts, "process_rewards", process)
    process = jnp.where(acts, process, 0.0)
    largest = masked.max(jnp.abs(_to_go(process)), acts)
    return jnp.where(largest > 0, process / jnp.where(largest > 0, largest, 1.0), 0.0)

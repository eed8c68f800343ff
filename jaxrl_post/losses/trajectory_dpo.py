"""Preferences between the trajectories of a group, by their outcomes, for a reward model that is a policy.

Pairs are built in static shape: a `[P, G, G]` array says which trajectory is better than which.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.consistency import check_positive, prepare_group
from jaxrl_post.types import Array

Pairs: TypeAlias = Literal["all", "extremes"]

_RANKS = (1, 2)  # the two axes of G


def preference_pairs(
    rewards: Array, valid: Array | None = None, *, pairs: Pairs = "all", min_gap: float = 1e-6
) -> Array:
    r"""Which trajectory of a group is better than which: 1 at `[p, i, j]` where $r_i - r_j > $ `min_gap`.

    Args:
        rewards: `[P, G]` float, outcomes.
        valid: `[P, G]` bool, False where the trajectory does not count; None for all.
        pairs: `"all"` ordered pairs, or `"extremes"`: the best of the group with its worst, the first of each where
            there are several.
        min_gap: outcomes that differ by no more are equal and make no pair, in units of the reward.

    Returns:
        `[P, G, G]` bool; all False for a group with equal outcomes, or with fewer than two valid trajectories.

    Raises:
        ValueError: if `rewards` is not `[P, G]`, `valid` has another shape, `pairs` is unknown, or `min_gap` is
            negative.

    Example:
        >>> rewards = jnp.array([[1.0, 0.0, 0.0]])
        >>> preference_pairs(rewards).astype(int).tolist()
        [[[0, 1, 1], [0, 0, 0], [0, 0, 0]]]
        >>> preference_pairs(rewards, pairs="extremes").astype(int).tolist()
        [[[0, 1, 0], [0, 0, 0], [0, 0, 0]]]

    Reference: Online Process Reward Leanring for Agentic Reinforcement Learning (arXiv 2509.19199).
    """
    if pairs not in get_args(Pairs):
        raise ValueError(f'pairs must be "all" or "extremes", got {pairs!r}')
    if isinstance(min_gap, float | int) and min_gap < 0:
        raise ValueError(f"min_gap must be at least 0, got {min_gap}; below it equal outcomes would make a pair")
    rewards, known, _ = prepare_group(rewards, valid)
    better = (rewards[:, :, None] - rewards[:, None, :] > min_gap) & known[:, :, None] & known[:, None, :]
    if pairs == "extremes":
        size = rewards.shape[1]
        best = jax.nn.one_hot(jnp.argmax(jnp.where(known, rewards, -jnp.inf), axis=1), size, dtype=bool)
        worst = jax.nn.one_hot(jnp.argmin(jnp.where(known, rewards, jnp.inf), axis=1), size, dtype=bool)
        better &= best[:, :, None] & worst[:, None, :]
    return better


def trajectory_dpo(
    logp: Array,
    ref_logp: Array,
    rewards: Array,
    valid: Array | None = None,
    *,
    beta: float = 0.05,
    pairs: Pairs = "all",
    steps: Array | None = None,
) -> Array:
    r"""DPO between better and worse trajectories of a prompt, mean over its pairs.

    $$\ell = -\mathrm{mean}_{(i, j):\, r_i > r_j} \log\sigma(m_i - m_j), \qquad
    m_i = \beta \sum_t (\log\pi_\phi - \log\pi_{old})_{i,t}$$

    The log-ratio of a part of the trajectory is then what that part earned: $m_i$ is the sum of the rewards of its
    steps. A reward that depends on a state's potential only through its ends, $r + \Phi(s') - \Phi(s)$, has the same
    loss for trajectories that begin and end alike.

    Args:
        logp: `[P, G]` float, nats; log-prob of the trajectory under the trained reward model, summed over its trained
            tokens.
        ref_logp: `[P, G]` float, nats; the same under the policy that sampled (the current one, not the first). A
            constant.
        rewards: `[P, G]` float, outcomes, which rank the trajectories. A constant.
        valid: `[P, G]` bool, False where the trajectory does not count; None for all.
        beta: $\beta$, above 0.
        pairs: of `preference_pairs`.
        steps: `[P, G]` number of steps by which $m$ is divided, so that long trajectories do not have larger margins;
            None for the sum, as the paper writes it (its reference code takes the mean).

    Returns:
        `[P]`, float32 or wider: the loss of each prompt; 0 with zero gradient where it has no pair.

    Raises:
        ValueError: if the arrays are not `[P, G]` of one shape, `beta` is not above 0, or `pairs` is unknown.

    Example:
        >>> loss = trajectory_dpo(jnp.array([[0.6, 0.0]]), jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]), beta=1.0)
        >>> round(float(loss[0]), 6)
        0.437488

    Reference: Online Process Reward Leanring for Agentic Reinforcement Learning (arXiv 2509.19199).
    """
    check_positive("beta", beta)
    logp, known, (ref_logp, rewards) = prepare_group(logp, valid, ref_logp=ref_logp, rewards=rewards)
    margin = beta * (logp - ref_logp)
    if steps is not None:
        steps = masked.as_float(steps)
        masked.check_like("steps", steps, "logp", logp)
        margin = margin / jnp.maximum(steps, 1)
    better = preference_pairs(rewards, known, pairs=pairs)
    loss = -jax.nn.log_sigmoid(margin[:, :, None] - margin[:, None, :])
    return masked.mean(loss, better, _RANKS)

"""A reward model's score measured against those of reference answers, so that there is little to win by extremes."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.rewards.novelty import RunningMoments
from jaxrl_post.types import Array

ReferenceShape: TypeAlias = Literal["sigmoid", "slow", "tanh", "log_sigmoid", "centered"]
RunningShape: TypeAlias = Literal["meanstd", "clip"]


def preference_as_reward(
    reward: Array, references: Array, *, shape: ReferenceShape = "sigmoid", scale: float = 1.0
) -> Array:
    r"""How likely an answer is to be preferred to reference answers, $\frac{1}{M} \sum_m \sigma(k (r - r_m))$.

    | shape | reward | |
    | --- | --- | --- |
    | `sigmoid` | $\mathrm{mean}_m\, \sigma(k (r - r_m))$ | PAR: bounded, steep at first |
    | `slow` | $\mathrm{mean}_m\, \sigma(3 (k (r - r_m) - 3))$ | bounded, slow at first |
    | `tanh` | $\mathrm{mean}_m \tanh(k (r - r_m))$ | bounded |
    | `log_sigmoid` | $\log\sigma(k (r - q))$, $q = \bar r_m + 1.0364\, (\mathrm{std}\, r_m + 10^{-5})$ | LSC |
    | `centered` | $k (r - \bar r_m)$ | unbounded |

    Args:
        reward: any shape, float.
        references: that shape and `M` more in the last axis, scores of reference answers to the same prompt by the same
            model; NaN where there is none.
        shape: see the table.
        scale: $k$, per unit of the reward.

    Returns:
        The shape of `reward`, float32 or wider; NaN without any reference.

    Raises:
        ValueError: if the shapes do not fit, for an unknown shape, or if `scale` is not above 0.

    Example:
        >>> round(float(preference_as_reward(jnp.float32(2.0), jnp.array([0.0, 1.0, 2.0]))), 5)
        0.70395

    Reference: Reward Shaping to Mitigate Reward Hacking in RLHF (arXiv 2502.18770).
    """
    if shape not in get_args(ReferenceShape):
        raise ValueError(f"shape must be one of {', '.join(get_args(ReferenceShape))}, got {shape!r}")
    if isinstance(scale, float | int) and not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}")
    reward, references = masked.as_float(reward), masked.as_float(references)
    if references.ndim != reward.ndim + 1 or references.shape[:-1] != reward.shape or not references.shape[-1]:
        raise ValueError(
            f"references must be {(*reward.shape, 'M')}, as reward is {reward.shape}, got {references.shape}"
        )
    there = ~jnp.isnan(references)
    references = jnp.where(there, references, 0.0)
    lead = scale * (reward[..., None] - references)
    if shape == "log_sigmoid":
        spread = masked.std(references, there, -1, ddof=0) + 1e-5
        found = jax.nn.log_sigmoid(scale * (reward - masked.mean(references, there, -1) - 1.0364 * spread))
    else:
        functions = {
            "sigmoid": jax.nn.sigmoid,
            "slow": lambda x: jax.nn.sigmoid(3 * (x - 3)),
            "tanh": jnp.tanh,
            "centered": lambda x: x,
        }
        found = masked.mean(functions[shape](lead), there, -1)
    return jnp.where(jnp.any(there, axis=-1), found, jnp.nan)


def running_scale(reward: Array, moments: RunningMoments, *, shape: RunningShape = "meanstd") -> Array:
    r"""A reward scaled, or clipped, by the mean and deviation of all rewards so far.

    $$\frac{r - \mu}{\sigma}, \qquad \mathrm{clip}(r, \mu - \sigma, \mu + \sigma)$$

    Args:
        reward: any shape, float.
        moments: of the rewards so far, these among them; a deviation of 0 counts as 1.
        shape: `"meanstd"` or `"clip"`.

    Returns:
        The shape of `reward`, float32 or wider.

    Raises:
        ValueError: for an unknown shape.

    Example:
        >>> rewards = jnp.array([1.0, 3.0, 5.0])
        >>> moments = RunningMoments.zero().include(rewards)
        >>> [round(float(r), 4) for r in running_scale(rewards, moments, shape="clip")]
        [1.367, 3.0, 4.633]

    Reference: Reward Shaping to Mitigate Reward Hacking in RLHF (arXiv 2502.18770), which compares with both.
    """
    if shape not in get_args(RunningShape):
        raise ValueError(f"shape must be one of {', '.join(get_args(RunningShape))}, got {shape!r}")
    reward, std = masked.as_float(reward), moments.std
    if shape == "clip":
        return jnp.clip(reward, moments.mean - std, moments.mean + std)
    return (reward - moments.mean) / jnp.where(std > 0, std, 1.0)

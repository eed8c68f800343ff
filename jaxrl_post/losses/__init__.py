"""What to minimise: losses with one number per token, sequence or prompt, and the one function that reduces them."""

from jaxrl_post.losses.aggregation import aggregate, denominator
from jaxrl_post.losses.kl import KLEstimator, adaptive_kl_coefficient, kl
from jaxrl_post.losses.policy import (
    clipped_high,
    clipped_low,
    clipped_region,
    importance_ratio,
    log_ratio,
    ppo,
    reinforce,
)
from jaxrl_post.losses.preference import dpo, implicit_reward
from jaxrl_post.losses.supervised import nll
from jaxrl_post.losses.value import value, value_clip_fraction

__all__ = [
    "KLEstimator",
    "adaptive_kl_coefficient",
    "aggregate",
    "clipped_high",
    "clipped_low",
    "clipped_region",
    "denominator",
    "dpo",
    "implicit_reward",
    "importance_ratio",
    "kl",
    "log_ratio",
    "nll",
    "ppo",
    "reinforce",
    "value",
    "value_clip_fraction",
]

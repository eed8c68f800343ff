"""How much credit each sequence or token gets: pure functions from rewards to advantages."""

from jaxrl_post.advantages.agents import dr_mas, gigpo, hierarchical_grpo, rae
from jaxrl_post.advantages.beta_normalization import bnpo
from jaxrl_post.advantages.group import (
    dr_grpo,
    gpg,
    grpo,
    maxrl,
    mc_grpo,
    opo,
    pass_at_k,
    reinforce,
    remax,
    rloo,
)
from jaxrl_post.advantages.improvement import attribution, improvement_signal
from jaxrl_post.advantages.keyed import grpo_by_key, second_moment_factor
from jaxrl_post.advantages.layout import as_groups, from_turns, is_last, on_last_token, per_token, to_turns
from jaxrl_post.advantages.multi_objective import gdpo, log_tamed
from jaxrl_post.advantages.prompt_level import answer_entropy, copo_weight, global_advantage, uniform_weight
from jaxrl_post.advantages.risk import mixed_value_at_risk, riskpo, update_quantiles
from jaxrl_post.advantages.selection import effective_positive_share, red_drop, signed, within_sigma
from jaxrl_post.advantages.temporal import (
    decoupled_gae,
    gae,
    length_adaptive_lam,
    opd,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
)
from jaxrl_post.advantages.token_baseline import otb

__all__ = [
    "answer_entropy",
    "as_groups",
    "attribution",
    "bnpo",
    "copo_weight",
    "decoupled_gae",
    "dr_grpo",
    "dr_mas",
    "effective_positive_share",
    "from_turns",
    "gae",
    "gdpo",
    "gigpo",
    "global_advantage",
    "gpg",
    "grpo",
    "grpo_by_key",
    "hierarchical_grpo",
    "improvement_signal",
    "is_last",
    "length_adaptive_lam",
    "log_tamed",
    "maxrl",
    "mc_grpo",
    "mixed_value_at_risk",
    "on_last_token",
    "opd",
    "opo",
    "otb",
    "pass_at_k",
    "per_token",
    "rae",
    "red_drop",
    "reinforce",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "riskpo",
    "rloo",
    "second_moment_factor",
    "signed",
    "to_turns",
    "uniform_weight",
    "update_quantiles",
    "within_sigma",
]

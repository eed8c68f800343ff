"""How much credit each sequence or token gets: pure functions from rewards to advantages."""

from jaxrl_post.advantages.agents import dr_mas, gigpo, hierarchical_grpo, rae
from jaxrl_post.advantages.asymmetric import dads_kl_weight, stcr_factor
from jaxrl_post.advantages.beta_normalization import bnpo
from jaxrl_post.advantages.collaborative import agent_weights, comam, ndcg
from jaxrl_post.advantages.distillation import FailedBy, failed, opd
from jaxrl_post.advantages.entropy_bonus import egpo
from jaxrl_post.advantages.games import exploitability, nash_md_step
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
from jaxrl_post.advantages.group_likelihood import jepo
from jaxrl_post.advantages.implicit_process import prime, prime_norm
from jaxrl_post.advantages.improvement import attribution, improvement_signal
from jaxrl_post.advantages.keyed import grpo_by_key, mean_by_key, rloo_by_key, second_moment_factor
from jaxrl_post.advantages.layout import as_groups, from_turns, is_last, on_last_token, per_token, to_turns
from jaxrl_post.advantages.multi_objective import gdpo, log_tamed
from jaxrl_post.advantages.progress import answer_belief, belief_gain, igpo, turn_rewards, with_progress
from jaxrl_post.advantages.prompt_level import answer_entropy, copo_weight, global_advantage, uniform_weight
from jaxrl_post.advantages.risk import mixed_value_at_risk, riskpo, update_quantiles
from jaxrl_post.advantages.selection import effective_positive_share, red_drop, signed, within_sigma
from jaxrl_post.advantages.step_groups import prompt_of, random_blocks, srgpo, two_level
from jaxrl_post.advantages.steps import (
    segment_by_delimiter,
    segment_by_entropy,
    segment_by_length,
    step_end,
    step_exists,
    step_returns,
    step_sum,
)
from jaxrl_post.advantages.subgroups import hbpo
from jaxrl_post.advantages.temporal import (
    decoupled_gae,
    gae,
    length_adaptive_lam,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
)
from jaxrl_post.advantages.token_baseline import otb
from jaxrl_post.advantages.trajectory_graph import history_keys, salt, step_fingerprints
from jaxrl_post.advantages.unit_tests import unit_test_weights, verpo
from jaxrl_post.advantages.win_rate import order_wins, win_rate

__all__ = [
    "FailedBy",
    "agent_weights",
    "answer_belief",
    "answer_entropy",
    "as_groups",
    "attribution",
    "belief_gain",
    "bnpo",
    "comam",
    "copo_weight",
    "dads_kl_weight",
    "decoupled_gae",
    "dr_grpo",
    "dr_mas",
    "effective_positive_share",
    "egpo",
    "exploitability",
    "failed",
    "from_turns",
    "gae",
    "gdpo",
    "gigpo",
    "global_advantage",
    "gpg",
    "grpo",
    "grpo_by_key",
    "hbpo",
    "hierarchical_grpo",
    "history_keys",
    "igpo",
    "improvement_signal",
    "is_last",
    "jepo",
    "length_adaptive_lam",
    "log_tamed",
    "maxrl",
    "mc_grpo",
    "mean_by_key",
    "mixed_value_at_risk",
    "nash_md_step",
    "ndcg",
    "on_last_token",
    "opd",
    "opo",
    "order_wins",
    "otb",
    "pass_at_k",
    "per_token",
    "prime",
    "prime_norm",
    "prompt_of",
    "rae",
    "random_blocks",
    "red_drop",
    "reinforce",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "riskpo",
    "rloo",
    "rloo_by_key",
    "salt",
    "second_moment_factor",
    "segment_by_delimiter",
    "segment_by_entropy",
    "segment_by_length",
    "signed",
    "srgpo",
    "stcr_factor",
    "step_end",
    "step_exists",
    "step_fingerprints",
    "step_returns",
    "step_sum",
    "to_turns",
    "turn_rewards",
    "two_level",
    "uniform_weight",
    "unit_test_weights",
    "update_quantiles",
    "verpo",
    "win_rate",
    "with_progress",
    "within_sigma",
]

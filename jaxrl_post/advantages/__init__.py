"""How much credit each sequence or token gets: pure functions from rewards to advantages."""

from jaxrl_post.advantages.group import dr_grpo, gpg, grpo, mc_grpo, opo, pass_at_k, reinforce, remax, rloo
from jaxrl_post.advantages.layout import as_groups, on_last_token, per_token
from jaxrl_post.advantages.temporal import gae, reinforce_plus_plus, reinforce_plus_plus_baseline

__all__ = [
    "as_groups",
    "dr_grpo",
    "gae",
    "gpg",
    "grpo",
    "mc_grpo",
    "on_last_token",
    "opo",
    "pass_at_k",
    "per_token",
    "reinforce",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "rloo",
]

"""Methods by name: each function returns a `Method`, as `optax.adamw(...)` returns a transformation."""

from jaxrl_post.methods.actor_critic import ppo
from jaxrl_post.methods.credit import Advantage, Credit, Signals
from jaxrl_post.methods.policy_gradient import grpo, mc_grpo, policy_gradient, reinforce
from jaxrl_post.methods.preference import dpo
from jaxrl_post.methods.records import Record, catalog
from jaxrl_post.methods.supervised import sft
from jaxrl_post.types import Method

__all__ = [
    "Advantage",
    "Credit",
    "Method",
    "Record",
    "Signals",
    "catalog",
    "dpo",
    "grpo",
    "mc_grpo",
    "policy_gradient",
    "ppo",
    "reinforce",
    "sft",
]

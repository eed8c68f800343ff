"""Methods by name: each function returns a `Method`, as `optax.adamw(...)` returns a transformation."""

from jaxrl_post.methods.actor_critic import ppo
from jaxrl_post.methods.policy_gradient import clipped_policy_gradient, grpo, mc_grpo, reinforce
from jaxrl_post.methods.preference import dpo
from jaxrl_post.methods.supervised import sft
from jaxrl_post.types import Method

__all__ = ["Method", "clipped_policy_gradient", "dpo", "grpo", "mc_grpo", "ppo", "reinforce", "sft"]

"""Decision processes small enough for tables: values over a horizon, and rewards that are designed for a learner."""

from jaxrl_post.control.instability import principal_direction, shared_instability, state_gradients
from jaxrl_post.control.reward_design import (
    adaptive_informativeness,
    choose_subgoals,
    design_reward,
    explors_bonus,
    explors_gradient,
    informativeness,
)
from jaxrl_post.control.soft import clone, policy_cliff, soft_policy
from jaxrl_post.control.tables import action_gaps, action_values, best_policy

__all__ = [
    "action_gaps",
    "action_values",
    "adaptive_informativeness",
    "best_policy",
    "choose_subgoals",
    "clone",
    "design_reward",
    "explors_bonus",
    "explors_gradient",
    "informativeness",
    "policy_cliff",
    "principal_direction",
    "shared_instability",
    "soft_policy",
    "state_gradients",
]

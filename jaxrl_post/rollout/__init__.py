"""How sequences are sampled from a policy, on the device, in one program."""

from jaxrl_post.rollout.exits import Exits, draw_exits, exit_prompts, generate_exits, thought_length
from jaxrl_post.rollout.generate import Prompts, generate
from jaxrl_post.rollout.groups import BUDGET, EXIT, join_columns, merge_groups
from jaxrl_post.sampling import SamplingParams

__all__ = [
    "BUDGET",
    "EXIT",
    "Exits",
    "Prompts",
    "SamplingParams",
    "draw_exits",
    "exit_prompts",
    "generate",
    "generate_exits",
    "join_columns",
    "merge_groups",
    "thought_length",
]

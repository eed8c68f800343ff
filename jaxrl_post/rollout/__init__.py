"""How sequences are sampled from a policy: on the device in one program, in turns with an environment, at a server."""

from jaxrl_post.rollout import environments
from jaxrl_post.rollout.beams import BEAM_SCORE, beam_search, best_of_n
from jaxrl_post.rollout.exits import Exits, draw_exits, exit_prompts, generate_exits, thought_length
from jaxrl_post.rollout.generate import Prompts, generate
from jaxrl_post.rollout.groups import BUDGET, EXIT, join_columns, merge_groups
from jaxrl_post.rollout.host import host_turns
from jaxrl_post.rollout.host_environment import HostEnvironment, Step
from jaxrl_post.rollout.host_tools import parse_tool_calls, tool_environment
from jaxrl_post.rollout.resume import begin, resume
from jaxrl_post.rollout.served import Server, ServerError, check_server, recompute_logp, served, update_weights
from jaxrl_post.rollout.turns import generate_turns
from jaxrl_post.rollout.verifiers_environment import VerifiersEnvironment
from jaxrl_post.sampling import SamplingParams

__all__ = [
    "BEAM_SCORE",
    "BUDGET",
    "EXIT",
    "Exits",
    "HostEnvironment",
    "Prompts",
    "SamplingParams",
    "Server",
    "ServerError",
    "Step",
    "VerifiersEnvironment",
    "beam_search",
    "begin",
    "best_of_n",
    "check_server",
    "draw_exits",
    "environments",
    "exit_prompts",
    "generate",
    "generate_exits",
    "generate_turns",
    "host_turns",
    "join_columns",
    "merge_groups",
    "parse_tool_calls",
    "recompute_logp",
    "resume",
    "served",
    "thought_length",
    "tool_environment",
    "update_weights",
]

"""How sequences are sampled from a policy, on the device, in one program."""

from jaxrl_post.rollout.generate import Prompts, generate
from jaxrl_post.sampling import SamplingParams

__all__ = ["Prompts", "SamplingParams", "generate"]

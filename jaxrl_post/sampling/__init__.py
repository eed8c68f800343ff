"""How one action is chosen from logits: transformations of logits, the draw itself, and what is recorded of it."""

from jaxrl_post.sampling.draw import row_keys, sample
from jaxrl_post.sampling.statistics import alternatives, token_statistics
from jaxrl_post.sampling.stop_strings import StopStrings, stop_strings
from jaxrl_post.sampling.transforms import SamplingParams, SamplingState, is_truncating, needs_state, transform

__all__ = [
    "SamplingParams",
    "SamplingState",
    "StopStrings",
    "alternatives",
    "is_truncating",
    "needs_state",
    "row_keys",
    "sample",
    "stop_strings",
    "token_statistics",
    "transform",
]

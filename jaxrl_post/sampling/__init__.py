"""How one action is chosen from logits: transformations of logits and the draw itself."""

from jaxrl_post.sampling.draw import row_keys, sample
from jaxrl_post.sampling.transforms import SamplingParams, SamplingState, is_truncating, needs_state, transform

__all__ = ["SamplingParams", "SamplingState", "is_truncating", "needs_state", "row_keys", "sample", "transform"]

"""How one action is chosen from logits: transformations of logits and the draw itself."""

from jaxrl_post.sampling.draw import row_keys, sample
from jaxrl_post.sampling.transforms import SamplingParams, is_truncating, transform

__all__ = ["SamplingParams", "is_truncating", "row_keys", "sample", "transform"]

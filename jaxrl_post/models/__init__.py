"""Language models: a scanned decoder, adapters for models written elsewhere, and scoring."""

from jaxrl_post.models.adapters import from_apply, from_linen, from_nnx
from jaxrl_post.models.decoder import decoder
from jaxrl_post.models.layers import KVCache
from jaxrl_post.models.recompute import RecomputeCache, recompute_cache
from jaxrl_post.models.scoring import logits, score

__all__ = [
    "KVCache",
    "RecomputeCache",
    "decoder",
    "from_apply",
    "from_linen",
    "from_nnx",
    "logits",
    "recompute_cache",
    "score",
]

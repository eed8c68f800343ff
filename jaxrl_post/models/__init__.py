"""Language models: a scanned decoder, adapters for models written elsewhere, and scoring."""

from jaxrl_post.models.adapters import from_apply, from_linen, from_nnx
from jaxrl_post.models.cache import KVCache
from jaxrl_post.models.cache_kinds import SharedCache, WindowedCache, cache_bytes, release, share_prompts
from jaxrl_post.models.decoder import decoder
from jaxrl_post.models.export import save_pretrained, to_config
from jaxrl_post.models.families import decoder_keywords
from jaxrl_post.models.group_divergence import group_divergence, group_fields
from jaxrl_post.models.lora import Lora, merge_adapters, split_adapters, trainable
from jaxrl_post.models.mixture import geometric_mixture
from jaxrl_post.models.paged_cache import PagedCache, page_width
from jaxrl_post.models.peft import (
    adapter_base,
    adapter_directory,
    check_targets,
    load_adapters,
    read_adapter_config,
    save_adapters,
)
from jaxrl_post.models.pretrained import Pretrained, check_vocabulary, from_config, from_pretrained, read_config
from jaxrl_post.models.quantize import Quantized, dequantize, quantize
from jaxrl_post.models.recompute import RecomputeCache, recompute_cache
from jaxrl_post.models.rope import Rope
from jaxrl_post.models.scoring import logits, score

__all__ = [
    "KVCache",
    "Lora",
    "PagedCache",
    "Pretrained",
    "Quantized",
    "RecomputeCache",
    "Rope",
    "SharedCache",
    "WindowedCache",
    "adapter_base",
    "adapter_directory",
    "cache_bytes",
    "check_targets",
    "check_vocabulary",
    "decoder",
    "decoder_keywords",
    "dequantize",
    "from_apply",
    "from_config",
    "from_linen",
    "from_nnx",
    "from_pretrained",
    "geometric_mixture",
    "group_divergence",
    "group_fields",
    "load_adapters",
    "logits",
    "merge_adapters",
    "page_width",
    "quantize",
    "read_adapter_config",
    "read_config",
    "recompute_cache",
    "release",
    "save_adapters",
    "save_pretrained",
    "score",
    "share_prompts",
    "split_adapters",
    "to_config",
    "trainable",
]

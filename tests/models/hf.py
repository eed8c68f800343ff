"""Tiny random models of `transformers`, and what they say of given tokens."""

import functools
import os

import numpy as np

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

SIZES = {"vocab_size": 37, "hidden_size": 24, "intermediate_size": 20, "pad_token_id": None, "bos_token_id": 1}

# Two of each family. Heads are not `hidden_size / num_attention_heads` wide, layers are odd in number, keys and values
# have one head, some, or as many as queries; contexts and windows are shorter than the sequences.
CONFIGS = {
    "llama": {
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_act": "gelu",
        "max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    },
    "llama-dynamic": {
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 8,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0},
    },
    "mistral": {
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 5,
        "head_dim": 8,
    },
    "mistral-linear": {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 14,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    },
    "qwen2": {
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen2-yarn": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    },
    "qwen3": {
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 14,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "qwen3-yarn": {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8,
            "beta_fast": 2.0,
            "beta_slow": 0.5,
            "mscale": 0.8,
            "mscale_all_dim": 0.3,
            "truncate": False,
        },
    },
    "qwen3_moe": {
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
    },
    "qwen3_moe-window": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 10,
        "norm_topk_prob": False,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 7,
    },
    "gemma2": {
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "query_pre_attn_scalar": 17,
        "sliding_window": 5,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 2.0,
    },
    "gemma2-full": {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attention_bias": True,
        "layer_types": ["full_attention", "full_attention"],
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "tie_word_embeddings": False,
    },
    "gemma3_text": {
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "query_pre_attn_scalar": 13,
        "sliding_window": 5,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "gemma3_text-yarn": {
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 9,
        "final_logit_softcapping": 2.0,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 1e3,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "attention_factor": 1.3,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
    "olmo2": {
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "olmo2-linear": {
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e3, "factor": 2.5},
    },
    "phi3": {
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "sliding_window": 5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "phi3-longrope": {
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "original_max_position_embeddings": 8,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e3,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.2, 1.5],
            "long_factor": [1.0, 2.0, 4.5],
        },
    },
}
# What the row is long decides these: they are decoded within the context that they were trained with.
BY_LENGTH = ("llama-dynamic", "phi3-longrope")


def randomize(model, seed=0):
    """Every parameter far from its initial value: all of them then show in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and "norm" in name
            parameter.copy_(parameter + 0.2 * noise if is_norm else 0.25 * noise)
    return model.eval()


@functools.cache
def config(name):
    return AutoConfig.for_model(name.split("-")[0], **(SIZES | CONFIGS[name]))


@functools.cache
def model(name):
    return randomize(
        AutoModelForCausalLM.from_config(config(name), attn_implementation="eager", experts_implementation="eager")
    )


@functools.cache
def with_images():
    """A Gemma 3 that sees images too."""
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    text = SIZES | CONFIGS["gemma3_text"]
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, eos_token_id=5)
    return randomize(transformers.Gemma3ForConditionalGeneration(config))


def run(model, tokens):
    """Logits and last hidden states of one sequence, which is alone and whole."""
    rotary = model.model.rotary_emb
    if rotary.rope_type == "dynamic":
        # It would keep the frequencies of the longest sequence that it saw before.
        model.model.rotary_emb = type(rotary)(model.config)
    with torch.no_grad():
        out = model(torch.tensor(np.asarray(tokens))[None].long(), output_hidden_states=True, use_cache=False)
    return out.logits[0].float().numpy(), out.hidden_states[-1][0].float().numpy()

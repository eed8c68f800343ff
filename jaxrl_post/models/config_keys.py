"""Which keys of a Hugging Face `config.json` are known to make no difference, and what becomes of unknown ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Keys that do not change what a model computes from tokens: bookkeeping, initialization, dropout (which is off here),
# settings of generation, which come from generation_config.json and the sampling options.
HARMLESS = _names(
    """
    architectures auto_map model_type dtype torch_dtype transformers_version transformers.js_config name_or_path
    unsloth_version unsloth_fixed unsloth_tiled_mlp tokenizer_class language prefix finetuning_task
    task_specific_params problem_type torchscript use_bfloat16
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id decoder_start_token_id
    initializer_range initializer_factor attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop
    classifier_dropout classifier_dropout_prob pretraining_tp use_cache cache_implementation attn_implementation
    flash_attn_version return_dict return_dict_in_generate output_attentions output_hidden_states output_scores
    output_router_logits router_aux_loss_coef chunk_size_feed_forward is_decoder is_llama_config
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences
    bad_words_ids begin_suppress_tokens suppress_tokens exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id remove_invalid_values
    """
)

# Of the wrapper of a model that also sees images; only its `text_config` is used.
MULTIMODAL = _names(
    """
    vision_config mm_tokens_per_image boi_token_index eoi_token_index image_token_index image_token_id boi_token_id
    eoi_token_id
    """
)


def is_off(value: Any) -> bool:
    """Whether a key with this value asks for nothing."""
    return value is None or value is False or value == 0 or (isinstance(value, str | list | dict) and not value)


def check_keys(config: Mapping[str, Any], known: frozenset[str], ignore: Iterable[str]) -> None:
    """Raise ValueError that names all keys that are neither known nor off.

    Args:
        config: a `config.json`.
        known: keys that are read.
        ignore: keys that the user knows to make no difference.
    """
    known = known | HARMLESS | frozenset(ignore)
    unknown = sorted(
        name for name, value in config.items() if name not in known and not name.startswith("_") and not is_off(value)
    )
    if unknown:
        raise ValueError(
            f"config.json asks for {', '.join(f'{name}: {_short(config[name])}' for name in unknown)}, which is not "
            f"supported for model_type {config.get('model_type')}; if it makes no difference to what the model "
            f"computes, pass ignore={unknown!r}"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

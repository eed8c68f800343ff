"""What a Hugging Face `config.json` says, in keywords of `decoder`: one entry per `model_type`.

A family is an entry of `FAMILIES`, not a class of models. What a configuration asks for and the decoder lacks is
refused by its name, and so is a key that is not known here, unless it is off (null, false, 0, empty): a model that is
approximated in silence is worse than one that does not load. How parameters are named is in `weight_names.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias

from jaxrl_post.models.config_keys import MULTIMODAL, check_keys
from jaxrl_post.models.config_rope import ropes

Config: TypeAlias = Mapping[str, Any]
Head = Literal["causal_lm", "sequence_classification", "token_classification"]


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

# Keys that every family reads, with what holds where a config.json leaves them out.
COMMON = {
    "vocab_size": None,
    "hidden_size": None,
    "intermediate_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": None,
    "original_max_position_embeddings": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": None,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": None,
    "num_labels": None,
    "id2label": None,
    "label2id": None,
}
NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclasses.dataclass(frozen=True)
class Family:
    """How the models of one `model_type` are decoders.

    Attributes:
        prefix: of the names of their classes, `Qwen3` of `Qwen3ForCausalLM`.
        keywords: `config -> keywords of decoder` beyond those that all families share.
        defaults: keys beyond the common ones that `keywords` reads, and other values of common ones, with what holds
            where a config.json leaves them out.
        sequence_prefix: the same as `prefix` for `...ForSequenceClassification`, where that is named otherwise.
        classifies_tokens: whether there is a `...ForTokenClassification`.
        fused: whether query, key and value are one matrix, and gate and up of the MLP another.
        experts: whether there are experts in the place of MLPs.
    """

    prefix: str
    keywords: Callable[[Config], dict[str, Any]]
    defaults: Mapping[str, Any]
    sequence_prefix: str | None = None
    classifies_tokens: bool = True
    fused: bool = False
    experts: bool = False


def _windows(c: Config, window: int | None, types: Iterable[str]) -> dict[str, Any]:
    """`window` and `local_layers` of a configuration that names the type of each layer."""
    types = list(types)
    if unknown := sorted(set(types) - {"full_attention", "sliding_attention"}):
        raise ValueError(f"layer_types: {', '.join(unknown)} is not supported, only full_attention, sliding_attention")
    if len(types) != c["num_hidden_layers"]:
        raise ValueError(f"layer_types names {len(types)} layers, but num_hidden_layers is {c['num_hidden_layers']}")
    local = [kind == "sliding_attention" for kind in types]
    if not any(local):
        return {}
    if window is None:
        raise ValueError("layer_types names layers with sliding_attention, but no sliding_window is in effect")
    return {"window": window, "local_layers": tuple(local)}


def _everywhere(window: int | None) -> dict[str, Any]:
    return {} if window is None else {"window": window}


def _all_biases(c: Config) -> dict[str, Any]:
    return {"attention_bias": "all" if c["attention_bias"] else "none"}


def _qwen_windows(c: Config) -> dict[str, Any]:
    window, layers = c["sliding_window"] if c["use_sliding_window"] else None, c["num_hidden_layers"]
    types = c["layer_types"]
    if types is None:
        first = c["max_window_layers"] if window is not None else layers
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return _windows(c, window, types)


def _qwen3_moe(c: Config) -> dict[str, Any]:
    if c["mlp_only_layers"]:
        raise ValueError(f"mlp_only_layers: {c['mlp_only_layers']} is not supported, all layers must have experts")
    if c["decoder_sparse_step"] != 1:
        raise ValueError(f"decoder_sparse_step: {c['decoder_sparse_step']} is not supported, only 1")
    if c["use_sliding_window"] and c["max_window_layers"]:
        raise ValueError(
            "use_sliding_window with max_window_layers is not supported for qwen3_moe: transformers and other systems "
            "disagree on which layers slide"
        )
    window = c["sliding_window"] if c["use_sliding_window"] else None
    experts = c["num_local_experts"] if c["num_experts"] is None else c["num_experts"]
    if not experts:
        raise ValueError("num_experts must be given, and above 0, for qwen3_moe")
    return {
        "qk_norm": "head",
        "mlp_width": c["moe_intermediate_size"],
        "experts": experts,
        "experts_per_token": c["num_experts_per_tok"],
        "normalize_experts": bool(c["norm_topk_prob"]),
        **_everywhere(window),
        **_all_biases(c),
    }


def _gemma(c: Config, pattern: int) -> dict[str, Any]:
    layers, types = c["num_hidden_layers"], c["layer_types"]
    if types is None:
        types = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
    return {
        "norms": "both",
        "norm_offset": 1.0,
        "embedding_scale": c["hidden_size"] ** 0.5,
        "attention_scale": c["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": c["attn_logit_softcapping"],
        "softcap": c["final_logit_softcapping"],
        **_windows(c, c["sliding_window"], types),
        **_all_biases(c),
    }


def _gemma3(c: Config) -> dict[str, Any]:
    if c["attn_logit_softcapping"] is not None:
        raise ValueError("attn_logit_softcapping is not supported for gemma3_text, which transformers ignores there")
    return {**_gemma(c, c["sliding_window_pattern"]), "qk_norm": "head"}


def _phi3(c: Config) -> dict[str, Any]:
    for name in ("full_attn_mod", "interpolate_factor"):
        if c[name] != 1:
            raise ValueError(f"{name}: {c[name]} is not supported, only 1")
    return _everywhere(c["sliding_window"])


_QWEN = {
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "hidden_act": "silu",
}
_GEMMA = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_act": None,  # of older files; transformers reads hidden_activation alone
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "Llama",
        lambda c: {**_all_biases(c), "mlp_bias": bool(c["mlp_bias"])},
        {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Family(
        "Mistral",
        lambda c: _everywhere(c["sliding_window"]),
        {"hidden_act": "silu", "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family("Qwen2", lambda c: {**_qwen_windows(c), "attention_bias": "qkv"}, _QWEN),
    "qwen3": Family(
        "Qwen3",
        lambda c: {**_qwen_windows(c), **_all_biases(c), "qk_norm": "head"},
        {**_QWEN, "head_dim": 128, "attention_bias": False},
    ),
    "qwen3_moe": Family(
        "Qwen3Moe",
        _qwen3_moe,
        {
            "hidden_act": "silu",
            "num_key_value_heads": 4,
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": None,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
            "moe_intermediate_size": 768,
            "num_experts": None,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
        experts=True,
    ),
    "gemma2": Family(
        "Gemma2",
        lambda c: _gemma(c, 2),
        {
            **_GEMMA,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
            "sliding_window_size": None,  # which some files have beside sliding_window; transformers does not read it
        },
    ),
    "gemma3_text": Family(
        "Gemma3",
        _gemma3,
        {
            **_GEMMA,
            # The text part of a model with images is stored as what differs from these.
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "max_position_embeddings": 131072,
            "rope_local_base_freq": 10000.0,
            "sliding_window_pattern": 6,
        },
        sequence_prefix="Gemma3Text",
        classifies_tokens=False,
    ),
    "olmo2": Family(
        "Olmo2",
        lambda c: {**_all_biases(c), "norms": "post", "qk_norm": "full"},
        {"hidden_act": "silu", "rms_norm_eps": 1e-5, "attention_bias": False},
        classifies_tokens=False,
    ),
    "phi3": Family(
        "Phi3",
        _phi3,
        {
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "full_attn_mod": 1,
            "interpolate_factor": 1,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
        fused=True,
    ),
}


def text_config(config: Config) -> dict[str, Any]:
    """The part of a configuration that describes the language model.

    Args:
        config: a `config.json`.

    Returns:
        The same, or for a model that also sees images (`gemma3`) its `text_config` with the outer ids of tokens.

    Raises:
        ValueError: if the `model_type` is missing or no family here.

    Example:
        >>> text_config({"model_type": "gemma3", "text_config": {"hidden_size": 8}, "eos_token_id": 1})
        {'hidden_size': 8, 'model_type': 'gemma3_text', 'eos_token_id': 1}
    """
    kind = config.get("model_type")
    if kind == "gemma3":
        ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
        check_keys({k: v for k, v in config.items() if k != "text_config"}, MULTIMODAL | {"tie_word_embeddings"}, ())
        return {**config.get("text_config", {}), "model_type": "gemma3_text", **ids}
    if kind not in FAMILIES:
        raise ValueError(
            f"model_type {kind!r} is not supported; there are {', '.join(FAMILIES)}, and gemma3 without its images"
        )
    return dict(config)


def decoder_keywords(config: Config, *, ignore: Iterable[str] = ()) -> dict[str, Any]:
    """The keywords of `models.decoder` that make the model of a Hugging Face configuration.

    Args:
        config: a `config.json`, with `rope_parameters` as transformers 5 writes it or `rope_theta` and `rope_scaling`
            as before.
        ignore: keys, of it or of its rope settings, that make no difference though they are not known here.

    Returns:
        Keywords: sizes and options, without dtypes, `remat` and `value_head`.

    Raises:
        ValueError: names what is not supported (a rope type, an activation, a type of layer, ...), keys that are
            missing, and all keys that are neither known here nor off.

    Example:
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
        >>> config = dict(model_type="qwen2", num_attention_heads=4, num_key_value_heads=2, rope_theta=1e6, **sizes)
        >>> keywords = decoder_keywords(config)
        >>> keywords["attention_bias"], keywords["kv_heads"], keywords["rope"].base
        ('qkv', 2, 1000000.0)
    """
    c = text_config(config)
    family = FAMILIES[c["model_type"]]
    check_keys(c, frozenset(COMMON) | frozenset(family.defaults), ignore)
    c = with_defaults(c)
    if missing := [name for name in NEEDED if c[name] is None]:
        raise ValueError(f"config.json of a {c['model_type']} must give {', '.join(missing)}")
    heads = c["num_attention_heads"]
    head_dim = c["head_dim"]
    if head_dim is None:
        head_dim = c["hidden_size"] // heads
    act = c["hidden_activation"] if "hidden_activation" in c else c["hidden_act"]
    if act not in ACTIVATIONS:
        raise ValueError(f"activation {act!r} is not supported; there are {', '.join(ACTIVATIONS)}")
    rope, local_rope = ropes(c, ignore)
    return {
        "vocab_size": c["vocab_size"],
        "width": c["hidden_size"],
        "layers": c["num_hidden_layers"],
        "heads": heads,
        "kv_heads": heads if c["num_key_value_heads"] is None else c["num_key_value_heads"],
        "head_dim": head_dim,
        "mlp_width": c["intermediate_size"],
        "norm_eps": c["rms_norm_eps"],
        "activation": ACTIVATIONS[act],
        "tied": bool(c["tie_word_embeddings"]),
        "rope": rope,
        **({} if local_rope is None else {"local_rope": local_rope}),
        **family.keywords(c),
    }


def with_defaults(config: Config) -> dict[str, Any]:
    """A text configuration with what holds where its family's configurations leave a key out."""
    return {**COMMON, **FAMILIES[config["model_type"]].defaults, **config}


def head_of(config: Config) -> tuple[Head, int]:
    """Which head a configuration names, and how many numbers it gives.

    Args:
        config: a `config.json`.

    Returns:
        `("causal_lm", 0)`, or one of the two classifications with the number of labels.

    Raises:
        ValueError: for another kind of model, or a classification with more than two labels.

    Example:
        >>> head_of({"architectures": ["Qwen3ForTokenClassification"], "id2label": {"0": "REWARD"}})
        ('token_classification', 1)
    """
    names = config.get("architectures") or ["ForCausalLM"]
    for suffix, head in (
        ("ForCausalLM", "causal_lm"),
        ("ForConditionalGeneration", "causal_lm"),
        ("Model", "causal_lm"),
        ("ForSequenceClassification", "sequence_classification"),
        ("ForTokenClassification", "token_classification"),
    ):
        if names[0].endswith(suffix) and not names[0].endswith("RewardModel"):
            if head == "causal_lm":
                return head, 0
            labels = config.get("id2label")
            count = len(labels) if labels else config.get("num_labels") or 2
            if count > 2:
                raise ValueError(
                    f"{names[0]} with {count} labels is not supported: a value is one number per token, from 1 label, "
                    "or from 2 as the log-odds of the second"
                )
            return head, count  # type: ignore[return-value]
    raise ValueError(
        f"architecture {names[0]} is not supported; a causal language model, a ...ForSequenceClassification or a "
        "...ForTokenClassification is"
    )

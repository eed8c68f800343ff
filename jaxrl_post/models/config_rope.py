"""The rotary positions of a Hugging Face `config.json`, in its new layout (`rope_parameters`) and the one before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxrl_post.models.config_keys import is_off
from jaxrl_post.models.rope import Rope

_ROPE_KEYS = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
    *("low_freq_factor", "high_freq_factor"),
    *("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    *("short_factor", "long_factor"),
}


def ropes(c: Mapping[str, Any], ignore: Iterable[str] = ()) -> tuple[Rope, Rope | None]:
    """The rotary positions of a configuration, and those of its local layers where they differ.

    Args:
        c: a `config.json` with the defaults of its family.
        ignore: keys that are known to make no difference.

    Raises:
        ValueError: for a rope type that is not supported, unknown settings or missing ones.
    """
    known = _ROPE_KEYS | set(ignore)
    # transformers prefers the old key where a file has both.
    given = c["rope_scaling"] or c["rope_parameters"] or {}
    if c["model_type"] == "gemma3_text":
        nested = dict(c["rope_parameters"] or {})
        if nested and not set(nested) <= {"full_attention", "sliding_attention"}:
            raise ValueError("rope_parameters of a gemma3_text must be given for full_attention and sliding_attention")
        everywhere = {**(nested.get("full_attention") or {}), **(c["rope_scaling"] or {})}
        theta = 1_000_000.0 if c["rope_theta"] is None else c["rope_theta"]
        nearby = nested.get("sliding_attention") or {}
        return _rope(c, everywhere, theta, known), _rope(c, nearby, c["rope_local_base_freq"], known)
    return _rope(c, given, 10000.0 if c["rope_theta"] is None else c["rope_theta"], known), None


def _rope(c: Mapping[str, Any], given: Mapping[str, Any], theta: float, known: set[str]) -> Rope:
    if unknown := sorted(name for name, value in given.items() if name not in known and not is_off(value)):
        raise ValueError(
            f"rope_parameters (or rope_scaling): {', '.join(unknown)} is not supported; if it makes no "
            f"difference to what the model computes, pass ignore={unknown!r}"
        )
    kind = given.get("rope_type", given.get("type")) or "default"
    if c["model_type"] == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # earlier names of the same
    supported = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
    if kind not in supported:
        raise ValueError(f"rope type {kind!r} is not supported; there are {', '.join(supported)}")
    fraction = given.get("partial_rotary_factor")
    fraction = c["partial_rotary_factor"] if fraction is None else fraction
    fraction = 1.0 if fraction is None else float(fraction)
    if fraction != 1.0 and c["model_type"] != "phi3":
        raise ValueError(f"partial_rotary_factor: {fraction} is not supported for {c['model_type']}, only for phi3")
    base = given.get("rope_theta")
    options: dict[str, Any] = {"base": float(theta if base is None else base), "fraction": fraction}
    if kind == "default":
        return Rope(**options)

    longest = c["max_position_embeddings"]
    original = c["original_max_position_embeddings"] or given.get("original_max_position_embeddings") or longest
    if kind == "dynamic":
        original = longest
    if kind != "linear":
        options["original_length"] = _number(kind, "max_position_embeddings", original)
    factor = given.get("factor")
    if kind in ("yarn", "longrope") and factor is None:
        factor = _number(kind, "max_position_embeddings", longest) / options["original_length"]
    options["factor"] = float(_number(kind, "factor", factor))
    wanted = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
        "longrope": ("short_factor", "long_factor", "attention_factor"),
    }.get(kind, ())
    for name in wanted:
        value = given.get(name)
        if kind == "llama3" or name in ("short_factor", "long_factor"):
            value = _number(kind, name, value)
        if value is not None:
            options[name] = tuple(map(float, value)) if isinstance(value, list | tuple) else value
    return Rope(kind=kind, **options)


def _number(kind: str, name: str, value: Any) -> Any:
    if value is None:
        raise ValueError(f"rope type {kind!r} needs {name}, which config.json does not give")
    return value

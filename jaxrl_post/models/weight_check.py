"""Whether a checkpoint has the tensors that its configuration calls for, and no others."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxrl_post.models.families import FAMILIES, head_of, text_config
from jaxrl_post.models.lora import is_adapter
from jaxrl_post.models.safetensors_io import DTYPES, Tensor
from jaxrl_post.models.weight_names import UNUSED_SUFFIXES, Place, places
from jaxrl_post.models.weight_names import Path as ParamPath

_IMAGE_PARTS = ("vision_tower.", "multi_modal_projector.")


def placed(
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    leaves: Mapping[ParamPath, Any],
    tensors: Mapping[str, Tensor],
) -> dict[ParamPath, Place]:
    """Where each parameter is among the tensors of a checkpoint, all of which are accounted for.

    Args:
        directory: that the checkpoint was found in, for messages.
        config: its `config.json`.
        leaves: of the parameters by path, with shapes; adapters among them are left out.
        tensors: of the checkpoint by name.

    Returns:
        Places by path; parameters that this kind of checkpoint has no tensor for are left out.

    Raises:
        ValueError: names all tensors that are missing, too many, of another shape or of a dtype that is not read.
    """
    ends = [name for name in tensors if name.endswith("embed_tokens.weight")]
    prefix = ends[0].removesuffix("embed_tokens.weight") if len(ends) == 1 else "model."
    # Of a model with images the language model is a part, with a name of its own in front, earlier or later.
    unembedding = "language_model.lm_head.weight" if prefix == "language_model.model." else "lm_head.weight"
    head, labels = head_of(config)
    found = places(
        {path: leaf.shape for path, leaf in leaves.items() if not is_adapter(path)},
        fused=FAMILIES[text_config(config)["model_type"]].fused,
        joined_experts=any(name.endswith("mlp.experts.gate_up_proj") for name in tensors),
        prefix=prefix,
        unembedding=unembedding,
        head=head,
        labels=labels,
    )
    wanted = {name: place.shape for place in found.values() for _, name in place.tensors()}
    problems = []
    if missing := [name for name in wanted if name not in tensors]:
        problems.append(f"{len(missing)} missing: {'; '.join(_grouped(missing))}")
    wrong = [
        f"{name} is {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if wrong:
        problems.append(f"{len(wrong)} of a shape that does not fit config.json: {'; '.join(wrong)}")
    if odd := [name for name in wanted if name in tensors and tensors[name].code not in DTYPES]:
        codes = sorted({tensors[name].code for name in odd})
        problems.append(
            f"{len(odd)} of dtype {', '.join(codes)}, which are not read (only {', '.join(DTYPES)}; a quantized model "
            f"has to be dequantized first): {'; '.join(_grouped(odd))}"
        )
    extra = [name for name in tensors if name not in wanted and not name.endswith(UNUSED_SUFFIXES)]
    if config.get("model_type") == "gemma3":
        extra = [name for name in extra if not any(part in name for part in _IMAGE_PARTS)]
    if unembedding in extra and (head != "causal_lm" or _same(tensors, unembedding, f"{prefix}embed_tokens.weight")):
        extra.remove(unembedding)
    if extra:
        problems.append(f"{len(extra)} that config.json does not speak of: {'; '.join(_grouped(extra))}")
    if problems:
        raise ValueError(f"the tensors of {directory} are not those of its config.json. {'. '.join(problems)}")
    return found


def _same(tensors: Mapping[str, Tensor], one: str, other: str) -> bool:
    """Whether a tied unembedding that was stored all the same is the embedding."""
    a, b = tensors[one], tensors.get(other)
    if b is None or (a.code, a.shape) != (b.code, b.shape) or a.code not in DTYPES:
        return False
    rows = range(0, a.shape[0], 4096)
    return all(np.array_equal(a.view()[i : i + 4096], b.view()[i : i + 4096]) for i in rows)


def _grouped(names: Iterable[str]) -> Iterator[str]:
    """Names that differ in their numbers alone as one, with the numbers: `layers.{0-2,5}.mlp.up_proj.weight`."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "*", name), []).append(tuple(re.findall(r"\d+", name)))
    for pattern, numbers in groups.items():
        columns = [_ranges(sorted({int(n) for n in column})) for column in zip(*numbers, strict=True)]
        pieces = pattern.split("*")
        yield pieces[0] + "".join(f"{column}{piece}" for column, piece in zip(columns, pieces[1:], strict=True))


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"

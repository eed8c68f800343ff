"""A model as an Orbax checkpoint: `config.json` and the tokenizer's files as in a Hugging Face directory, and `params`.

Orbax stores shards as they lie on devices and restores them onto any mesh.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxrl_post.models.hub import writable_directory
from jaxrl_post.types import Params

PARAMS = "params"


def is_orbax(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory is one that `save_orbax` wrote."""
    return (Path(directory) / PARAMS).is_dir() and (Path(directory) / "config.json").is_file()


def save_orbax(directory: str | os.PathLike[str], params: Params, config: Mapping[str, Any]) -> None:
    """Write parameters and what describes them.

    Args:
        directory: to write, on this machine; made if it is not there.
        params: of a decoder.
        config: the `config.json` of the model that they come from.

    Raises:
        ValueError: if the directory is an address, or holds a model already.

    Example:
        >>> import tempfile
        >>> from jaxrl_post import models
        >>> policy = models.decoder(vocab_size=8, width=8, layers=1, heads=2)
        >>> params, directory = policy.init(jax.random.key(0)), tempfile.mkdtemp()
        >>> save_orbax(directory, params, {"model_type": "llama"})
        >>> again = restore_orbax(directory, jax.eval_shape(policy.init, jax.random.key(0)))
        >>> bool((again["embedding"] == params["embedding"]).all())
        True
    """
    import orbax.checkpoint as ocp

    target = writable_directory(directory).absolute()
    if (target / PARAMS).exists():
        raise ValueError(f"{target} holds a model already; choose another directory")
    target.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(target / PARAMS, params)
    if jax.process_index() == 0:
        (target / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")


def restore_orbax(directory: str | os.PathLike[str], shapes: Params) -> Params:
    """Read what `save_orbax` wrote.

    Args:
        directory: that was written.
        shapes: `jax.ShapeDtypeStruct`s of the parameters, with the shardings that they are to have.

    Raises:
        ValueError: if the parameters there are others.
    """
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        try:
            return checkpointer.restore(Path(directory).absolute() / PARAMS, shapes)
        except (ValueError, KeyError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"the parameters of {directory} are not those of its config.json: {first}") from error

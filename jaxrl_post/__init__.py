"""jaxrl_post: post-training of language models and other generative policies as pure JAX functions."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxrl_post import (
        advantages,
        control,
        curation,
        data,
        diffusion,
        kernels,
        losses,
        masked,
        mesh,
        methods,
        models,
        rewards,
        rollout,
        sampling,
        training,
        types,
    )

__all__ = [
    "advantages",
    "control",
    "curation",
    "data",
    "diffusion",
    "kernels",
    "losses",
    "masked",
    "mesh",
    "methods",
    "models",
    "rewards",
    "rollout",
    "sampling",
    "training",
    "types",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Submodules are imported on first use, so that `import jaxrl_post` stays quick.
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

"""Whether two configurations are those of one run: what may change when it is resumed, and what may not."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from typing import Any

from jaxrl_post.training import config as configs
from jaxrl_post.training.config import Config, ConfigWarning

HARMLESS_KEYS = (
    "run_dir",  # a run that was moved is still that run
    "mesh",  # nor does it matter where it is computed
    "rollout.mesh",
    "rollout.slots",
    "rollout.cache_pages",
    *(f"rollout.server.{name}" for name in ("url", "api_key", "timeout", "concurrency", "retries")),
    "training.micro_batches",
    "training.steps",  # unless the step size decays over them
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.log_completions_every",
    "training.max_nonfinite_steps",
    "training.max_empty_steps",
    "logging",
    # Not eval.problems: prompts that are held out are left out of training.
    "eval.every",
    "eval.samples",
    "eval.k",
    "eval.correct_at",
)
"""Keys, or sections, that may change when a run is resumed: how long it trains, what is measured and written."""


class RunDirError(ValueError):
    """A run directory that cannot be used; the message says why and what to do."""


def check_same_run(run_dir: str, stored: dict[str, Any], config: Config) -> None:
    """Raise RunDirError unless `config` may go on with the run whose configuration is `stored`.

    Args:
        run_dir: where it is.
        stored: as `config.yaml` holds it.
        config: what it is to be resumed with.
    """
    advice = (
        "give another run_dir, or the configuration of this run, to resume it; to go on from its weights in another "
        f"way, `jaxrl-post convert {run_dir} DIR` and start a new run with model.path=DIR"
    )
    with contextlib.suppress(ValueError), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConfigWarning)  # whoever resumes has changed it, or was warned already
        # Fills in keys that this version of the library added since the run was started.
        stored = configs.to_dict(configs.from_dict(stored, check_files=False))
    old, new = _flat(stored), _flat(configs.to_dict(config))
    absent = "(not set)"
    optimizers = [config.training.optimizer, *(role.optimizer for role in config.roles.values())]
    schedules = [optimizer.schedule for optimizer in optimizers if optimizer is not None]
    schedule = next((name for name in schedules if name != "constant"), None)
    lines = []
    for key in sorted(old.keys() | new.keys()):
        there, here = old.get(key, absent), new.get(key, absent)
        if there == here:
            continue
        why = ""
        if key == "training.steps" and schedule is not None:
            why = f" (the {schedule} schedule of the step size depends on it)"
        elif any(key == harmless or key.startswith(harmless + ".") for harmless in HARMLESS_KEYS):
            continue
        lines.append(f"\n  - {key}: {there!r} there, {here!r} here{why}")
    if lines:
        raise RunDirError(f"run_dir {run_dir} holds the run of another configuration:{''.join(lines)}\n{advice}")


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        items = value.items()
    elif isinstance(value, list) and value:
        items = enumerate(value)
    else:
        return {path: value}
    result: dict[str, Any] = {}
    for key, item in items:
        result.update(_flat(item, f"{path}.{key}" if path else str(key)))
    return result

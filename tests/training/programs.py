"""Runs of one process share the programs that they agree on, which are then traced and compiled once.

What is shared is functions and shapes alone: policies, environments in JAX, train steps. What holds numbers is made
anew by every run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from jaxrl_post.training import config as configs
from jaxrl_post.training import model_setup, stages
from jaxrl_post.training import setup as setups
from jaxrl_post.training.reward_setup import reward_components

_KEPT: dict[Any, Any] = {}

OTHERS = ("run_dir", "seed", "logging", "rewards", "on_reward_error", "eval", "model")
"""Sections of a configuration on which no step depends, but for the names of rewards; of the model, policies tell."""

OTHER_KEYS = {
    "data": {"files", "eval_files"},
    "training": {
        "checkpoint_every",
        "keep_checkpoints",
        "log_completions_every",
        "max_empty_steps",
        "max_nonfinite_steps",
    },
}
OF_ANOTHER_STAGE = {"warm_start": ("method", "roles", "rollout", "curriculum", "training")}


def share(patch: pytest.MonkeyPatch) -> None:
    """Have runs share their programs until the patch is undone."""
    make_policy, make_turns = model_setup._policy, setups.make_turns
    step, sampled_shapes = setups.Setup.step, setups.Setup.sampled_shapes

    def policy(model, tokenizer, source, **options):
        values = {name: x for name, x in dataclasses.asdict(model).items() if name not in ("path", "export", "lora")}
        given = None if source is None else (source.config, source.params["embedding"].shape)
        key = json.dumps([values, tokenizer.vocab_size, given, repr(options)], sort_keys=True)
        return _kept(key, lambda: make_policy(model, tokenizer, source, **options))

    def turns(config, tokenizer):
        if config.data.environment is None:  # one in Python has a state
            return make_turns(config, tokenizer)
        data, rollout = dataclasses.asdict(config.data), dataclasses.asdict(config.rollout)
        return _kept(json.dumps([data, rollout], sort_keys=True), lambda: make_turns(config, tokenizer))

    patch.setattr(model_setup, "_policy", policy)
    patch.setattr(setups, "make_turns", turns)
    patch.setattr(
        setups.Setup, "step", lambda self, stage: _kept(("step", *_key(self, stage.name)), lambda: step(self, stage))
    )
    patch.setattr(
        setups.Setup,
        "sampled_shapes",
        lambda self, count: _kept(("shapes", count, *_key(self, "")), lambda: sampled_shapes(self, count)),
    )


def _kept(key: Any, make: Callable[[], Any]) -> Any:
    if key not in _KEPT:
        _KEPT[key] = make()
    return _KEPT[key]


def _key(setup: setups.Setup, stage: str) -> tuple[Any, ...]:
    """All that the step of a stage may depend on: what the configuration says, but for what is known not to matter."""
    values = {name: x for name, x in configs.to_dict(setup.config).items() if name not in OTHERS}
    for section, names in OTHER_KEYS.items():
        values[section] = {name: x for name, x in values[section].items() if name not in names}
    section = "warm_start" if stage == "warm_start" else "training"
    if values[section]["optimizer"]["schedule"] == "constant":
        values[section] = {name: x for name, x in values[section].items() if name != "steps"}
    for other in OF_ANOTHER_STAGE.get(stage, ("warm_start",)):
        del values[other]
    made = setup.models.policy, setup.models.base, setup.models.critic, setup.mesh, stages.make_method
    rewards = tuple(reward_components(setup.config))
    model = setup.config.model  # whose adapters and router loss a step reads too
    return stage, json.dumps(values, sort_keys=True), repr((model.lora, model.router_loss)), rewards, *made

"""The stages of a run: which method is trained for how long, and with which optimiser."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optax

from jaxrl_post import methods
from jaxrl_post.methods.credit import MAKERS
from jaxrl_post.training.config import Config, ConfigError, OptimizerConfig
from jaxrl_post.training.config.methods_check import find_method
from jaxrl_post.training.optimizers import make_optimizer, make_schedule
from jaxrl_post.training.reward_setup import reward_components
from jaxrl_post.training.roles import Role
from jaxrl_post.training.step import most_updates
from jaxrl_post.types import LearnsFrom, Method


@dataclasses.dataclass(frozen=True)
class Stage:
    """One method trained for a number of steps.

    Attributes:
        name: of the stage, `warm_start` or the method's.
        kind: what a batch is made of: `rollouts` are sampled, `completions` and `pairs` are given by the data.
        method: the method.
        optimizer: its optimiser, or those of the trained roles.
        schedule: the optimiser's learning rate by update.
        steps: most steps of the stage.
        batch_size: prompts that a step draws from the data.
        epochs: updates per batch.
        micro_batches: pieces a batch is cut into.
        roles: models beside the policy.
        until: greedy accuracy on the validation problems that ends the stage, or None.
        check_every: steps between looks at it.
    """

    name: str
    kind: LearnsFrom
    method: Method
    optimizer: optax.GradientTransformation | Mapping[str, optax.GradientTransformation]
    schedule: optax.Schedule
    steps: int
    batch_size: int
    epochs: int = 1
    micro_batches: int = 1
    roles: Mapping[str, Role] = dataclasses.field(default_factory=dict)
    until: float | None = None
    check_every: int = 1


def make_method(config: Config) -> Method:
    """The method that the configuration names, with its keywords.

    One that puts the reward's components together itself does so by the weights that `rewards` gives them, unless it is
    given others.

    Raises:
        ConfigError: if its components count alike (`decompose`), and their weights are not all 1.
    """
    function, keywords = find_method(config.method.name), dict(config.method.keywords)
    weights = dict(zip(reward_components(config), (option.weight for option in config.rewards), strict=True))
    if all(weight == 1 for weight in weights.values()):
        return function(**keywords)
    if _weighs_components(function):
        return function(**{**keywords, "weights": keywords.get("weights") or weights})
    advantage = keywords.get("advantage")
    chosen = {"name": advantage} if isinstance(advantage, str) else advantage
    if isinstance(chosen, Mapping) and _weighs_components(MAKERS.get(str(chosen.get("name")))):
        keywords["advantage"] = {**chosen, "weights": chosen.get("weights") or weights}
    elif keywords.get("decompose") or (isinstance(chosen, Mapping) and chosen.get("decompose")):
        raise ConfigError(["rewards: with decompose each component counts alike; leave out weight, or decompose"])
    return function(**keywords)


def _weighs_components(function: Callable[..., Any] | None) -> bool:
    """Whether a method, or an advantage, takes weights of the reward's components by their names."""
    if function is None:
        return False
    weights = inspect.signature(function).parameters.get("weights")
    return weights is not None and str(weights.annotation).startswith("Mapping")


def make_stages(config: Config) -> list[Stage]:
    """The supervised stage, if there is one, and the method's."""
    stages = []
    if (warm := config.warm_start) is not None:
        optimizer, schedule = _optimizer(warm.optimizer, warm.steps)
        stages.append(
            Stage(
                name="warm_start",
                kind="completions",
                method=methods.sft(),
                optimizer=optimizer,
                schedule=schedule,
                steps=warm.steps,
                batch_size=warm.batch_size,
                until=warm.until,
                check_every=warm.check_every or 1,
            )
        )
    training, method = config.training, make_method(config)
    updates = training.steps * training.epochs * most_updates(method)
    optimizer, schedule = _optimizer(training.optimizer, updates)
    own = {
        role: _optimizer(options.optimizer, updates)[0]
        for role, options in config.roles.items()
        if options.optimizer is not None
    }
    stages.append(
        Stage(
            name=config.method.name.rpartition(":")[2],
            kind=method.learns_from,
            method=method,
            optimizer={**dict.fromkeys(method.trains, optimizer), **own} if own else optimizer,
            schedule=schedule,
            steps=training.steps,
            batch_size=config.rollout.prompts * config.curriculum.oversample
            if method.learns_from == "rollouts"
            else training.batch_size,
            epochs=training.epochs,
            micro_batches=training.micro_batches,
            roles={
                role: Role(option.sources, option.weights, option.every or 0, option.mix)
                for role, option in config.roles.items()
            },
        )
    )
    return stages


def _optimizer(options: OptimizerConfig, updates: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    schedule = make_schedule(
        learning_rate=options.learning_rate,
        schedule=options.schedule,
        warmup_steps=options.warmup_steps,
        steps=updates,
        end_fraction=options.end_fraction,
    )
    optimizer = make_optimizer(
        schedule,
        name=options.name,
        b1=options.b1,
        b2=options.b2,
        eps=options.eps,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        mu_dtype=options.mu_dtype,
    )
    return optimizer, schedule

"""From the configuration's `model` to policies: with adapters or without, with a value head, on few bits."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax

from jaxrl_post import models
from jaxrl_post.training.config import ModelConfig
from jaxrl_post.types import Array, Params, Policy, PyTree

_NOT_SIZES = ("path", "lora", "quantize")


class Models(NamedTuple):
    """The forms that a run needs of its model.

    Attributes:
        policy: what is trained and sampled from.
        critic: the same with a value head.
        base: the policy without its adapters, which reads the policy's parameters; the policy itself if it has none.
    """

    policy: Policy
    critic: Policy
    base: Policy


def make_models(model: ModelConfig, vocab_size: int) -> Models:
    """The models that the configuration describes.

    Args:
        model: the section of the configuration.
        vocab_size: of the tokenizer.
    """
    sizes = {name: value for name, value in dataclasses.asdict(model).items() if name not in _NOT_SIZES}
    lora = None if model.lora is None else models.Lora(**dataclasses.asdict(model.lora))

    def made(lora: models.Lora | None, value_head: bool = False) -> Policy:
        policy = models.decoder(vocab_size=vocab_size, lora=lora, value_head=value_head, **sizes)
        if model.quantize == "none":
            return policy

        def init(key: Array) -> Params:
            return models.quantize(policy.init(key), kind=model.quantize)  # type: ignore[arg-type]

        return policy._replace(init=init)

    policy = made(lora)
    return Models(policy, made(lora, value_head=True), policy if lora is None else made(None))


def trainable(model: ModelConfig, policy: Policy, key: Array) -> PyTree | None:
    """Which of a model's parameters are trained; None for all."""
    return None if model.lora is None else models.trainable(jax.eval_shape(policy.init, key))

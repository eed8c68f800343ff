"""The conventions of other systems, so that their numbers can be reproduced; not their mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from jaxrl_post.methods import checks

Preset: TypeAlias = Literal["trl", "verl"]


class PresetValues(NamedTuple):
    """What a preset sets where the user says nothing.

    Attributes:
        options: of `policy_gradient`.
        advantages: keywords by name of advantage.
        losses: keywords by name of loss.
    """

    options: Mapping[str, Any] = {}
    advantages: Mapping[str, Mapping[str, Any]] = {}
    losses: Mapping[str, Mapping[str, Any]] = {}


PRESETS: Mapping[str, PresetValues] = {
    # GRPOConfig: beta 0, loss_type "dapo" (mean over all tokens), scale_rewards "group" with 1e-4 added to the std.
    "trl": PresetValues(
        options={"beta": 0.0, "aggregation": "token_mean"},
        advantages={"grpo": {"eps": 1e-4}},
    ),
    # ppo_trainer.yaml: token-mean, dual clip at 3, no KL in the loss unless asked for.
    "verl": PresetValues(
        options={"beta": 0.0, "aggregation": "token_mean"},
        losses={"ppo": {"dual_clip": 3.0}},
    ),
}


def preset_values(name: Preset | None) -> PresetValues:
    """What the preset of that name sets; nothing for None.

    Raises:
        ValueError: if there is no such preset.

    Example:
        >>> preset_values("verl").losses["ppo"]
        {'dual_clip': 3.0}
    """
    if name is None:
        return PresetValues()
    checks.one_of("preset", name, Preset)
    return PRESETS[name]

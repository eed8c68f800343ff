"""The conventions of other systems, so that their numbers can be reproduced; not their mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from jaxrl_post.methods import checks

Preset: TypeAlias = Literal["trl", "verl"]


class PresetValues(NamedTuple):
    """What a preset sets where the user says nothing.

    Attributes:
        options: of `policy_gradient`; they go over the defaults of a method.
        in_reward: the same, where the KL is taken from the reward (`kl_in="reward"`).
        advantages: keywords by name of advantage.
        losses: keywords by name of loss.
    """

    options: Mapping[str, Any] = {}
    in_reward: Mapping[str, Any] = {}
    advantages: Mapping[str, Mapping[str, Any]] = {}
    losses: Mapping[str, Mapping[str, Any]] = {}


# Both start from no KL and the mean over all tokens, the defaults of `policy_gradient`; what a method is named for
# (LUSPO's sum over tokens, RLOO's KL in the reward) stays. Sizes of clips are the user's: what a number means is a
# convention, the number is not.
PRESETS: Mapping[str, PresetValues] = {
    # TRL 1.16.0: GRPOConfig and GRPOTrainer. The trained model scores the completions before the step; the KL is k3
    # times the importance ratio (use_bias_correction_kl); 1e-4 is added to standard deviations; CISPO's epsilon_high is
    # the largest weight itself (5.0, which its documentation names: unset it would be 0.2).
    "trl": PresetValues(
        options={"old_logp": "recompute", "kl_estimator": "k3_weighted"},
        in_reward={"kl_estimator": "k1"},
        advantages={"grpo": {"eps": 1e-4}, "gdpo": {"eps": 1e-4}},
        losses={"cispo": {"clip_high": 5.0, "cap": "ratio"}},
    ),
    # verl 0.9.1: ppo_trainer.yaml, actor.yaml and core_algos. The actor scores the responses before the step; the KL is
    # low_var_kl; PPO has a dual clip at 3 always; pass@k divides by the standard deviation; CISPO bounds its weight on
    # both sides; DRO squares the log-ratio of each token.
    "verl": PresetValues(
        options={"old_logp": "recompute", "kl_estimator": "k3"},
        in_reward={"kl_estimator": "k1"},
        advantages={"gdpo": {"by_token": True, "eps": 1e-6}, "pass_at_k": {"normalize_std": True}},
        losses={"cispo": {"clip_low": 0.2, "clip_high": 0.2}, "dro": {"level": "token"}, "ppo": {"dual_clip": 3.0}},
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


def preset_options(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of `policy_gradient` that a preset sets, if `options` name one.

    Args:
        options: `preset` and `kl_in` are read.

    Raises:
        ValueError: if there is no such preset.

    Example:
        >>> [preset_options({"preset": "trl", "kl_in": kl_in})["kl_estimator"] for kl_in in ("loss", "reward")]
        ['k3_weighted', 'k1']
    """
    values = preset_values(options.get("preset"))
    return {**values.options, **values.in_reward} if options.get("kl_in") == "reward" else values.options

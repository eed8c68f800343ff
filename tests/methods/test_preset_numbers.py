"""Whole methods with `preset="trl"` and `preset="verl"`: from rewards to value and gradient of the loss, to 1e-9."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses, methods
from jaxrl_post.methods.presets import PRESETS
from jaxrl_post.types import Rollouts, TokenStats
from tests.methods.peer_fixtures import GROUP, PROMPTS, assert_close, both, case, drawn, named, once_for_all, stored


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def after_prompt(x):
    """A column for one token of prompt."""
    return jnp.pad(jnp.asarray(x), ((0, 0), (1, 0)))


def rollouts(x, reward, components, valid):
    mask = after_prompt(x["mask"])
    rows, steps = mask.shape
    return Rollouts(
        tokens=jnp.zeros((rows, steps), jnp.int32),
        mask=mask,
        logp=after_prompt(x["sampler"]),
        step=jnp.zeros((rows, steps), jnp.int32),
        version=jnp.zeros((rows, steps), jnp.int32),
        reward=reward,
        rewards=components,
        valid=jnp.asarray(valid),
        length=jnp.full((PROMPTS, GROUP), steps, jnp.int32),
        finish=jnp.ones((PROMPTS, GROUP), jnp.int8),
        id=jnp.arange(rows, dtype=jnp.uint32).reshape(PROMPTS, GROUP),
        prompt_id=jnp.arange(PROMPTS),
    )


def value_and_grad(method, x, given):
    """Of the loss that the train step makes of a method's terms, with respect to the log-probs of the policy."""
    entropy = after_prompt(x["entropy"])
    start = {name: TokenStats(logp=after_prompt(x[of])) for name, of in (("policy", "old"), ("reference", "ref"))}
    start["policy"] = start["policy"].replace(entropy=entropy)
    start = {role: stats for role, stats in start.items() if role in method.needs}
    state = method.init(given, PROMPTS)
    targets, _ = method.targets(state, given, start, jax.random.key(0))

    def loss(logp):
        stats = {**start, "policy": start["policy"].replace(logp=logp)}
        terms = method.loss(stats, given, targets).values()
        return sum(t.weight * losses.aggregate(t.value, t.mask, t.mode, horizon=t.horizon) for t in terms)

    value, grad = jax.value_and_grad(loss)(after_prompt(x["logp"]))
    return value, grad[:, 1:]


def trl(**options):
    return methods.policy_gradient(preset="trl", **options)


# name: (method, whether a row without tokens counts in TRL's denominator)
TRL = {
    "defaults": (lambda: methods.grpo(preset="trl"), False),
    "grpo_beta": (lambda: methods.grpo(preset="trl", beta=0.04, aggregation="seq_mean_token_mean"), True),
    "batch_std": (
        lambda: trl(advantage={"name": "grpo", "std_level": "batch"}, loss={"name": "ppo", "clip_high": 0.28}),
        False,
    ),
    "dr_grpo": (lambda: methods.dr_grpo(preset="trl", horizon=20), True),
    "sequence": (lambda: methods.gspo(preset="trl", clip_low=0.03, clip_high=0.03), True),
    "cispo": (lambda: trl(loss="cispo"), False),
    "sapo": (lambda: methods.sapo(preset="trl"), True),
    "vespo": (lambda: methods.vespo(preset="trl"), False),
    "delta": (lambda: methods.grpo(preset="trl", dual_clip=1.5), False),
    "normalize_then_sum": (
        lambda: methods.gdpo(preset="trl", weights={"first": 1.0, "second": 0.5}),
        False,
    ),
    "top_entropy": (lambda: methods.grpo(preset="trl", top_entropy=0.2), False),
    "entropy_bonus": (lambda: methods.grpo(preset="trl", entropy_weight=0.01), False),
    "vllm": (lambda: methods.grpo(preset="trl", correction="mis"), False),
    "vllm_token": (lambda: methods.grpo(preset="trl", correction={"name": "tis", "high": 3.0}), False),
}


def trl_rollouts(x):
    first, second = jnp.asarray(x["rewards"]), jnp.asarray(x["second_rewards"]).at[0, 1].set(jnp.nan)
    total = first + jnp.where(jnp.isnan(second), 0.0, 0.5 * second)
    return rollouts(x, total, {"first": first, "second": second}, jnp.ones((PROMPTS, GROUP), bool))


@once_for_all
def ours_as_trl(x):
    found = {name: value_and_grad(make(), x, trl_rollouts(x)) for name, (make, _) in TRL.items()}
    opsm = methods.grpo(preset="trl", off_policy_threshold=0.02)
    # Without an inference engine, TRL's sampler is the policy at the start of the step.
    return {**found, "opsm": value_and_grad(opsm, x, trl_rollouts({**x, "sampler": x["old"]}))}


@both
@named([*TRL, "opsm"])
def test_methods_with_the_preset_trl_are_trls(name, number):
    value, grad = ours_as_trl(number)[name]
    counts_empty_rows = name in TRL and TRL[name][1]
    share = np.mean(case(number)["mask"].any(axis=1)) if counts_empty_rows else 1.0
    assert_close(share * value, stored("trl")[f"{number}/whole/{name}/value"])
    assert_close(share * grad, stored("trl")[f"{number}/whole/{name}/grad"])
    assert np.any(grad != 0)
    plain_value, plain_grad = ours_as_trl(number)["defaults"]
    if name != "defaults":
        assert abs(value - plain_value) > 1e-6 or np.any(np.abs(grad - plain_grad) > 1e-6)


VERL = {
    "plain": lambda: methods.grpo(preset="verl"),
    "entropy_and_kl": lambda: methods.grpo(preset="verl", entropy_weight=0.01, beta=0.05),
    "k2": lambda: methods.grpo(preset="verl", beta=0.1, kl_estimator="k2"),
}


def verl_rollouts(x):
    several = x["valid"] & (x["valid"].sum(1, keepdims=True) > 1)
    return rollouts(x, jnp.asarray(x["rewards"]), {}, several)


@once_for_all
def ours_as_verl(x):
    return {name: value_and_grad(make(), x, verl_rollouts(x)) for name, make in VERL.items()}


@both
@named(VERL)
def test_methods_with_the_preset_verl_are_verls(name, number):
    value, grad = ours_as_verl(number)[name]
    assert_close(value, stored("verl")[f"{number}/actor/{name}/value"])
    assert_close(grad, stored("verl")[f"{number}/actor/{name}/grad"])
    assert np.any(grad != 0)


@once_for_all
def ours_otherwise(x):
    """Each convention of the presets left out, and what the user said against them."""
    said = {"old_logp": "rollout", "kl_estimator": "k2", "dual_clip": None, "beta": 0.04, "normalize_std": False}
    mine = methods.grpo(aggregation="token_mean", **said)
    return {
        "verl without dual clip": value_and_grad(methods.grpo(preset="verl", dual_clip=None), x, verl_rollouts(x)),
        "trl with verl's eps": value_and_grad(trl(advantage={"name": "grpo", "eps": 1e-6}), x, trl_rollouts(x)),
        "user": value_and_grad(mine, x, trl_rollouts(x)),
        **{p: value_and_grad(methods.grpo(preset=p, **said), x, trl_rollouts(x)) for p in PRESETS},
    }


@both
def test_leaving_a_convention_out_shows(number):
    without, of_verl = ours_otherwise(number)["verl without dual clip"][0], ours_as_verl(number)["plain"][0]
    assert abs(without - of_verl) > 1e-4
    with_other, of_trl = ours_otherwise(number)["trl with verl's eps"][0], ours_as_trl(number)["defaults"][0]
    assert abs(with_other - of_trl) > 1e-6


@both
@pytest.mark.parametrize("preset", list(PRESETS))
def test_what_the_user_says_goes_over_a_preset(preset, number):
    for found, expected in zip(ours_otherwise(number)[preset], ours_otherwise(number)["user"], strict=True):
        assert_close(found, expected)


def test_a_preset_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match=r"preset.*trl, verl"):
        methods.grpo(preset="nemo")


@both
def test_the_stored_numbers_name_their_releases_and_their_inputs_are_those_of_the_script(number):
    assert [str(stored(system)["version"]) for system in ("trl", "verl")] == ["1.16.0", "0.9.1"]
    for name, array in drawn.inputs(number).items():
        assert_close(stored("inputs")[f"{number}/{name}"], array)

"""Functions give the numbers of the released TRL, value and gradient, in float64 to 1e-9.

TRL's unscorable rows (`valid` is False) have advantage 0 but stay in its denominators, and its means over sequences
count rows without tokens; both are carried over by hand here (`loss_mask`, `rows_share`).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages, losses, masked
from jaxrl_post.advantages.multi_objective import gdpo
from jaxrl_post.losses import sequence_ratio, surrogates
from tests.methods.peer_fixtures import (
    GROUP,
    PROMPTS,
    aggregated,
    assert_close,
    both,
    case,
    named,
    once_for_all,
    stored,
)

WEIGHTS = (1.0, 0.5)
MAX_COMPLETION_LENGTH = 20


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def component_rewards(x):
    """`[P, G, 2]`: what the two reward functions said, NaN where they said nothing."""
    both_rewards = jnp.stack([x["rewards"], x["second_rewards"]], axis=2)
    both_rewards = jnp.where(x["valid"][..., None], both_rewards, jnp.nan)
    return both_rewards.at[0, 1, 1].set(jnp.nan)


def rewards(x):
    """`[P, G]`: the weighted sum of those that said something."""
    return jnp.nansum(component_rewards(x) * jnp.array(WEIGHTS), axis=2)


TRL_ADVANTAGES = {
    "scale_group": lambda x: advantages.grpo(rewards(x), x["valid"], eps=1e-4),
    "scale_batch": lambda x: advantages.grpo(rewards(x), x["valid"], eps=1e-4, std_level="batch"),
    "scale_none": lambda x: advantages.grpo(rewards(x), x["valid"], normalize_std=False),
}


@both
@named(TRL_ADVANTAGES)
def test_advantages_are_trls(name, number):
    found = TRL_ADVANTAGES[name](case(number))
    expected = stored("trl")[f"{number}/advantage/{name}"].reshape(PROMPTS, GROUP)
    assert_close(found, expected)
    assert not np.any(expected[-1]), "the only scorable row of a group has advantage 0"


@both
def test_gdpo_is_trls_normalize_then_sum_where_every_group_has_more_than_one_scorable_row(number):
    x = case(number)
    valid = np.array(x["valid"])
    found = np.asarray(gdpo(component_rewards(x), valid, weights=jnp.array(WEIGHTS), eps=1e-4))
    theirs = stored("trl")[f"{number}/advantage/normalize_then_sum"].reshape(PROMPTS, GROUP)
    # TRL's batch statistics count the group of one as a sum of 0; ours leave it out. Undone, they agree.
    sums = np.asarray(gdpo(component_rewards(x), valid, weights=jnp.array(WEIGHTS), eps=1e-4, normalize_batch=False))
    with_it = np.append(sums[:-1], 0.0)
    assert_close(theirs[:-1], (sums[:-1] - with_it.mean()) / (with_it.std(ddof=1) + 1e-4))
    without = sums[:-1].reshape(-1)
    assert_close(found[:-1], (sums[:-1] - without.mean()) / (without.std(ddof=1) + 1e-4))


def token_ppo(**options):
    return lambda logp, x, a: losses.ppo(logp, x["old"], a, **options)


def sequence_ppo(**options):
    return lambda logp, x, a: sequence_ratio.gspo(logp, x["old"], a, x["mask"], **options)


def times(loss, factor):
    return lambda logp, x, a: loss(logp, x, a) * factor(logp, x, a)


def weights(**options):
    return lambda logp, x, a: losses.importance_weights(x["old"], x["sampler"], x["mask"], **options)


def opsm(old):
    return lambda logp, x, a: losses.off_policy_sequence_mask(logp, x[old], a, x["mask"], threshold=0.02)


def top_entropy(fraction):
    return lambda logp, x, a: losses.top_entropy_mask(x["entropy"], x["mask"], fraction=fraction)


def sequence_sapo(logp, x, a):
    ratio = sequence_ratio.sequence_log_ratio(logp, x["old"], x["mask"])
    per_sequence = surrogates.sapo(ratio, jnp.zeros_like(ratio), masked.mean(a, x["mask"], 1))
    return jnp.broadcast_to(per_sequence[:, None], a.shape)


def k3(logp, x):
    return losses.kl(logp, x["ref"], "k3")


def k3_weighted(logp, x):
    return losses.kl(logp, x["ref"], "k3_weighted", old_logp=x["old"])


def k3_weighted_by_sequence(logp, x):
    return jnp.exp(sequence_ratio.sequence_log_ratio(logp, x["old"], x["mask"]))[:, None] * k3(logp, x)


def vespo_with_truncated_ratios(logp, x, a):
    ratio = losses.importance_weights(x["old"], x["sampler"], x["mask"], high=1.5)
    old = x["old"] - jnp.log(jnp.where(x["mask"] != 0, ratio, 1.0))
    return sequence_ratio.vespo(logp, old, a, x["mask"])


MEAN, BY_SEQUENCE = "seq_mean_token_mean", "seq_mean_token_sum"
NARROW = {"clip_low": 0.03, "clip_high": 0.03}
VESPO_SHAPES = {"k_pos": 1.5, "lambda_pos": 1.0, "k_neg": 2.5, "lambda_neg": 1.2}
# name: (surrogate, aggregation, weight of the KL and the KL)
TRL_LOSSES = {
    "grpo": (token_ppo(), MEAN),
    "bnpo": (token_ppo(), "token_mean"),
    "dr_grpo": (token_ppo(), "seq_mean_token_sum_norm"),
    "dapo": (token_ppo(), "token_mean"),
    "luspo": (token_ppo(), BY_SEQUENCE),
    "sapo": (lambda logp, x, a: surrogates.sapo(logp, x["old"], a), MEAN),
    "vespo": (lambda logp, x, a: sequence_ratio.vespo(logp, x["old"], a, x["mask"]), "token_mean"),
    "grpo_sequence": (sequence_ppo(**NARROW), MEAN),
    "dapo_sequence": (sequence_ppo(**NARROW), "token_mean"),
    "luspo_sequence": (sequence_ppo(**NARROW), BY_SEQUENCE),
    "sapo_sequence": (sequence_sapo, MEAN),
    "two_bounds": (token_ppo(clip_low=0.1, clip_high=0.28), "token_mean"),
    "delta": (token_ppo(dual_clip=1.5), "token_mean"),
    **{
        name: (
            lambda logp, x, a, high=high: surrogates.cispo(logp, x["old"], a, clip_high=high, cap="ratio"),
            "token_mean",
        )
        for name, high in (("cispo_high", 5.0), ("cispo_one", 1.1))
    },
    "sapo_temperatures": (lambda logp, x, a: surrogates.sapo(logp, x["old"], a, tau_pos=0.8, tau_neg=1.6), MEAN),
    "vespo_shapes": (
        lambda logp, x, a: sequence_ratio.vespo(logp, x["old"], a, x["mask"], **VESPO_SHAPES),
        "token_mean",
    ),
    "beta": (token_ppo(), "token_mean", 0.05, k3_weighted),
    "beta_plain": (token_ppo(), "token_mean", 0.05, k3),
    "beta_grpo": (token_ppo(), MEAN, 0.04, k3),
    "beta_sequence": (sequence_ppo(**NARROW), MEAN, 0.05, k3_weighted_by_sequence),
    "beta_luspo": (sequence_ppo(clip_low=0.2, clip_high=0.2), BY_SEQUENCE, 0.05, k3_weighted_by_sequence),
    "opsm": (times(token_ppo(), opsm("old")), "token_mean"),
    "top_entropy": (times(token_ppo(), top_entropy(0.2)), "token_mean"),
    "vllm_token_truncate": (times(token_ppo(), weights(high=1.5)), "token_mean"),
    "vllm_token_mask": (times(token_ppo(), weights(high=1.5, outside="zero")), "token_mean"),
    "vllm_sequence_truncate": (times(token_ppo(), weights(level="sequence", high=1.5)), "token_mean"),
    "vllm_sequence_mask": (times(token_ppo(), weights(level="sequence", high=1.5, outside="zero")), "token_mean"),
    "vllm_everything": (
        times(
            times(times(token_ppo(), opsm("sampler")), top_entropy(0.5)),
            weights(low=0.7, high=1.4, outside="zero"),
        ),
        "token_mean",
        0.05,
        k3_weighted,
    ),
    "vllm_vespo_token_truncate": (vespo_with_truncated_ratios, "token_mean"),
    "gmpo": (lambda logp, x, a: sequence_ratio.gmpo(logp, x["old"], a, x["mask"]), MEAN),
    "gmpo_beta": (lambda logp, x, a: sequence_ratio.gmpo(logp, x["old"], a, x["mask"]), MEAN, 0.05, k3),
}


@once_for_all
def our_losses(x):
    mask = x["mask"]
    per_row = TRL_ADVANTAGES["scale_group"](x)
    a = advantages.per_token(per_row, mask)
    rows_share = jnp.mean(jnp.any(mask != 0, axis=1).astype(mask.dtype))
    found = {}
    for name, (surrogate, mode, *kl) in TRL_LOSSES.items():
        horizon = MAX_COMPLETION_LENGTH if mode == "seq_mean_token_sum_norm" else None
        share = 1.0 if mode == "token_mean" else rows_share

        def per_token(logp, surrogate=surrogate, kl=kl):
            value = surrogate(logp, x, a)
            return value + kl[0] * kl[1](logp, x) if kl else value

        value, grad = jax.value_and_grad(aggregated(per_token, mask, mode, horizon))(x["logp"])
        found[name] = share * value, share * grad
    # The geometric mean of no ratios is 1 there: a row without tokens adds a constant, its advantage.
    constant = jnp.mean(jnp.where(jnp.any(mask != 0, axis=1), 0.0, per_row.reshape(-1)))
    found |= {name: (found[name][0] - constant, found[name][1]) for name in ("gmpo", "gmpo_beta")}
    value, grad = found["dapo"]
    bonus = masked.mean(x["entropy"], mask)
    found["entropy_bonus"] = value - 0.01 * bonus, grad
    top = losses.top_entropy_mask(x["entropy"], mask, fraction=0.4)
    per_token = aggregated(lambda logp: token_ppo()(logp, x, a) * top, mask)
    value, grad = jax.value_and_grad(per_token)(x["logp"])
    found["entropy_bonus_of_top"] = value - 0.01 * masked.mean(x["entropy"], mask * top), grad
    return found


@both
@named([*TRL_LOSSES, "entropy_bonus", "entropy_bonus_of_top"])
def test_losses_are_trls(name, number):
    value, grad = our_losses(number)[name]
    assert_close(value, stored("trl")[f"{number}/loss/{name}/value"])
    assert_close(grad, stored("trl")[f"{number}/loss/{name}/grad"])
    assert np.any(grad != 0)


TRL_CORRECTIONS = {
    "vllm_token_truncate": {"high": 1.5},
    "vllm_token_mask": {"high": 1.5, "outside": "zero"},
    "vllm_sequence_truncate": {"level": "sequence", "high": 1.5},
    "vllm_sequence_mask": {"level": "sequence", "high": 1.5, "outside": "zero"},
    "vllm_everything": {"low": 0.7, "high": 1.4, "outside": "zero"},
}


@both
@named(TRL_CORRECTIONS)
def test_importance_weights_are_trls(name, number):
    x = case(number)
    found = losses.importance_weights(x["old"], x["sampler"], x["mask"], **TRL_CORRECTIONS[name])
    assert_close(found, stored("trl")[f"{number}/correction/{name}"] * x["mask"])


@once_for_all
def our_rloo(x):
    mask, valid = x["rloo_mask"], x["valid"]
    penalty = masked.sum(x["old"] - x["ref"], mask, axis=1).reshape(PROMPTS, GROUP)
    plain = advantages.rloo(rewards(x), valid)
    compared = (valid & (jnp.sum(valid, 1, keepdims=True) > 1)).astype(plain.dtype)
    scale = masked.std(plain, compared) + 1e-4
    per_row = {
        "plain": plain,
        "beta": advantages.rloo(rewards(x) - 0.05 * penalty, valid),
        "normalized": masked.center(plain, compared) / scale,
    }
    found = {}
    for name, advantage in per_row.items():
        a = advantages.per_token(advantage, mask)

        def per_token(logp, a=a):
            return sequence_ratio.gspo(logp, x["old"], a, mask, clip_low=0.2, clip_high=0.2, normalize_length=False)

        found[name] = advantage, *jax.value_and_grad(aggregated(per_token, mask, MEAN))(x["logp"])
    return found


@both
@pytest.mark.parametrize("name", ["plain", "beta", "normalized"])
def test_rloo_is_trls(name, number):
    advantage, value, grad = our_rloo(number)[name]
    prefix = f"{number}/rloo/{name}"
    assert_close(advantage.reshape(-1), stored("trl")[f"{prefix}/advantages"])
    assert_close(value, stored("trl")[f"{prefix}/value"])
    assert_close(grad, stored("trl")[f"{prefix}/grad"])

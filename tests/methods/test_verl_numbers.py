"""Functions give the numbers of the released verl, value and gradient, in float64 to 1e-9.

Where verl adds 1e-8 to a count, the effect is carried over by hand (`verl_count`); where the two differ on purpose, the
test says so and asserts the difference. Clip-Cov and KL-Cov are compared in `tests/losses/test_covariance.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages, losses, masked
from jaxrl_post.advantages.multi_objective import gdpo
from jaxrl_post.advantages.token_baseline import otb
from jaxrl_post.losses import importance_weights, off_policy, rejection_mask, sequence_ratio, surrogates
from tests.methods.peer_fixtures import (
    GROUP,
    PROMPTS,
    STEPS,
    aggregated,
    assert_close,
    both,
    case,
    named,
    once_for_all,
    stored,
    valid_mask,
)


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def paired(x):
    """Valid rows of groups with more than one."""
    return x["valid"] & (x["valid"].sum(1, keepdims=True) > 1)


def group_advantage(function, valid=None):
    def on_tokens(x, mask):
        used = x["valid"] if valid is None else valid(x)
        return advantages.per_token(function(x, used), mask * used.reshape(-1, 1))

    return on_tokens


VERL_ADVANTAGES = {
    "grpo": group_advantage(lambda x, v: advantages.grpo(x["rewards"], v)),
    "grpo_no_std": group_advantage(lambda x, v: advantages.grpo(x["rewards"], v, normalize_std=False)),
    "rloo": group_advantage(lambda x, v: advantages.rloo(x["rewards"], v)),
    "rloo_vectorized": group_advantage(lambda x, v: advantages.rloo(x["rewards"], v)),
    "opo": group_advantage(lambda x, v: advantages.opo(x["rewards"], x["mask"].sum(1).reshape(PROMPTS, GROUP), v)),
    "gpg": group_advantage(lambda x, v: advantages.gpg(x["rewards"], v)),
    "remax": group_advantage(lambda x, v: advantages.remax(x["rewards"], x["greedy_rewards"], v)),
    "grpo_passk": group_advantage(lambda x, v: advantages.pass_at_k(x["rewards"], v, normalize_std=True), paired),
    "grpo_passk_no_std": group_advantage(lambda x, v: advantages.pass_at_k(x["rewards"], v), paired),
    "gdpo": lambda x, mask: masked.whiten(
        advantages.per_token(gdpo(x["rewards"][..., None], paired(x), normalize_batch=False, eps=1e-6), mask),
        mask * paired(x).reshape(-1, 1),
    ),
    "reinforce_plus_plus_baseline": lambda x, mask: advantages.reinforce_plus_plus_baseline(
        x["rewards"], mask, paired(x)
    ),
    "reinforce_plus_plus": lambda x, mask: advantages.reinforce_plus_plus(x["dense"], mask),
    "reinforce_plus_plus_discounted": lambda x, mask: advantages.reinforce_plus_plus(x["dense"], mask, gamma=0.9),
    **{
        f"otb{'_tail' if tail else ''}{'_weights' if weights else ''}": (
            lambda x, mask, tail=tail, weights=weights: otb(
                x["dense"],
                mask,
                x["old"],
                x["sum_p_squared"],
                group_size=GROUP,
                ratio=jnp.minimum(jnp.exp(x["old"] - x["sampler"]), 2.0) if weights else None,
                handle_zero_tail=tail,
            )
        )
        for tail in (True, False)
        for weights in (True, False)
    },
}
# verl leaves the raw score (or return) of a group of one; ours has no baseline to compare with and gives 0.
KEEPS_RAW_SCORE = {"grpo", "grpo_no_std", "rloo", "opo", "gpg"} | {k for k in VERL_ADVANTAGES if k.startswith("otb")}


# At tool tokens the reward to come is not masked, only the baseline is.
NOT_ZERO_OUTSIDE = {"remax"}


@once_for_all
def our_advantages(x):
    return {name: advantage(x, valid_mask(x)) for name, advantage in VERL_ADVANTAGES.items()}


@both
@named(VERL_ADVANTAGES)
def test_advantages_are_verls(name, number):
    x, expected = case(number), stored("verl")[f"{number}/advantage/{name}"]
    assert np.any(expected * (1 - valid_mask(x)) != 0) == (name in NOT_ZERO_OUTSIDE)
    rows = (x["valid"].sum(1) > 1).repeat(GROUP) if name in KEEPS_RAW_SCORE else slice(None)
    expected = expected * valid_mask(x)
    assert_close(our_advantages(number)[name][rows], expected[rows])
    assert np.any(expected[rows] != 0)


@both
@named(sorted(KEEPS_RAW_SCORE))
def test_a_group_of_one_has_advantage_0_where_verl_keeps_its_raw_score(name, number):
    x = case(number)
    row = GROUP * (PROMPTS - 1)
    raw = x["dense"] if name.startswith("otb") else x["outcome"]
    to_go = np.cumsum((raw * x["mask"])[row, ::-1])[::-1] * x["mask"][row]
    theirs = stored("verl")[f"{number}/advantage/{name}"][row]
    scale = len(x["valid"][x["valid"]]) / np.sum(x["rewards"][x["valid"]] != 0) if name == "gpg" else 1.0
    expected = to_go * scale if name.startswith("otb") else x["rewards"].reshape(-1)[row] * scale * x["mask"][row]
    np.testing.assert_allclose(theirs, expected, rtol=2e-6)  # grpo divides by 1 + 1e-6
    assert np.any(theirs != 0)
    assert not np.any(our_advantages(number)[name][row])


GAE = {"gae": {"gamma": 1.0, "lam": 1.0}, "gae_discounted": {"gamma": 0.97, "lam": 0.9}}


@once_for_all
def our_gae(x):
    return {name: advantages.gae(x["dense"], x["values"], valid_mask(x), **GAE[name]) for name in GAE}


@both
@named(GAE)
def test_gae_is_verls_inside_the_mask_and_zero_outside_where_verls_is_not(name, number):
    numbers, mask = stored("verl"), valid_mask(case(number))
    found, returns = our_gae(number)[name]
    theirs, their_returns = (numbers[f"{number}/advantage/{name}{part}"] for part in ("", "_returns"))
    assert_close(found, theirs * mask)
    assert_close(returns, their_returns * mask)
    assert np.any(theirs * (1 - mask) != 0)


MODES = {
    "token-mean": ("token_mean", None),
    "seq-mean-token-sum": ("seq_mean_token_sum", None),
    "seq-mean-token-mean": ("seq_mean_token_mean", None),
    "seq-mean-token-sum-norm": ("seq_mean_token_sum_norm", STEPS),
}


def verl_count(mask):
    """Factor of a mean over tokens that is divided by `L + 1e-8`."""
    length = mask.sum(1, keepdims=True)
    return length / (length + 1e-8)


def ppo(**options):
    return lambda logp, x, a, mask: losses.ppo(logp, x["old"], a, **options)


# name: (loss of (logp, case, advantages, mask), advantages, aggregation)
VERL_LOSSES = {
    **{f"vanilla_{theirs}": (ppo(dual_clip=3.0), "token_advantages", theirs) for theirs in MODES},
    "vanilla_clips": (ppo(clip_low=0.1, clip_high=0.28, dual_clip=1.5), "advantages", "token-mean"),
    "vanilla_weights": (
        lambda logp, x, a, mask: (
            ppo(dual_clip=3.0)(logp, x, a, mask) * importance_weights(x["old"], x["sampler"], mask, high=2.0)
        ),
        "token_advantages",
        "token-mean",
    ),
    "dppo_tv": (
        lambda logp, x, a, mask: surrogates.dppo(
            logp, x["old"], a, divergence="tv", delta_low=0.1, delta_high=0.15, max_ratio=2.0
        ),
        "token_advantages",
        "token-mean",
    ),
    "dppo_kl": (
        lambda logp, x, a, mask: surrogates.dppo(
            logp, x["old"], a, divergence="kl", delta_low=0.03, delta_high=0.05, max_ratio=2.0
        ),
        "token_advantages",
        "token-mean",
    ),
    **{
        name: (
            lambda logp, x, a, mask: sequence_ratio.gspo(logp, x["old"], a, mask, clip_low=0.03, clip_high=0.04),
            kind,
            "seq-mean-token-mean",
        )
        for name, kind in (("gspo", "advantages"), ("gspo_token_advantages", "token_advantages"))
    },
    "geo_mean": (
        lambda logp, x, a, mask: sequence_ratio.gmpo(logp, x["old"], a, mask, clip_low=0.4, clip_high=0.4),
        "advantages",
        "seq-mean-token-mean",
    ),
    "sapo": (
        lambda logp, x, a, mask: surrogates.sapo(logp, x["old"], a),
        "token_advantages",
        "seq-mean-token-mean",
    ),
    "cispo": (
        lambda logp, x, a, mask: surrogates.cispo(logp, x["old"], a, clip_low=0.2, clip_high=0.28),
        "token_advantages",
        "token-mean",
    ),
    "dro": (
        lambda logp, x, a, mask: off_policy.dro(logp, x["old"], a, mask, beta=0.3, level="token"),
        "token_advantages",
        "token-mean",
    ),
    "gpg": (lambda logp, x, a, mask: losses.reinforce(logp, a), "token_advantages", "token-mean"),
    # Without its log-probs recomputed, verl's old ones are the sampler's.
    "bypass_reinforce": (
        lambda logp, x, a, mask: (
            losses.reinforce(logp, a) * importance_weights(jax.lax.stop_gradient(logp), x["old"], mask, high=1.5)
        ),
        "token_advantages",
        "token-mean",
    ),
}


def bypass_mask(x):
    # verl's k1 is minus the log of the ratio that it rejects by: its bounds are those of the inverse ratio.
    return rejection_mask(x["logp"], x["old"], valid_mask(x), low=1 / 1.6, high=1 / 0.6)


@once_for_all
def our_losses(x):
    mask, at = valid_mask(x), x["logp"]
    found = {}
    for name, (per_token, kind, aggregation) in VERL_LOSSES.items():
        mode, horizon = MODES[aggregation]
        factor = verl_count(mask) if mode == "seq_mean_token_mean" else 1.0
        value = aggregated(lambda logp: factor * per_token(logp, x, x[kind], mask), mask, mode, horizon)  # noqa: B023
        found[name] = jax.value_and_grad(value)(at)
    for name in ("k1", "abs", "k2", "k3", "k1+", "k3+", "abs+"):
        value = aggregated(lambda logp: losses.kl(logp, x["ref"], name), mask)  # noqa: B023
        found[f"kl_{name}"] = jax.value_and_grad(value)(at)

    def vanilla(logp):
        return losses.ppo(logp, x["old"], x["token_advantages"], dual_clip=3.0)

    horizon = aggregated(vanilla, mask, "seq_mean_token_sum_norm", 40)
    found["vanilla_horizon"] = jax.value_and_grad(horizon)(at)
    found["bypass_ppo"] = jax.value_and_grad(aggregated(vanilla, bypass_mask(x)))(at)
    value, grad = found["vanilla_token-mean"]
    found["vanilla_token-sum"] = value * mask.sum(), grad * mask.sum()
    # verl's plain mean over rows counts a row without tokens, ours does not.
    value, grad = found["geo_mean"]
    share = jnp.any(mask != 0, axis=1).sum() / x["valid"].sum()
    found["geo_mean"] = value * share, grad * share
    return found


@both
@named(
    [
        *VERL_LOSSES,
        *(f"kl_{name}" for name in ("k1", "abs", "k2", "k3", "k1+", "k3+", "abs+")),
        *("vanilla_token-sum", "vanilla_horizon", "bypass_ppo"),
    ]
)
def test_losses_are_verls(name, number):
    value, grad = our_losses(number)[name]
    assert_close(value, stored("verl")[f"{number}/loss/{name}/value"])
    assert_close(grad, stored("verl")[f"{number}/loss/{name}/grad"])
    assert np.any(grad != 0)


@both
def test_rejected_tokens_leave_the_denominator_as_in_verls_bypass_mode(number):
    x = case(number)
    kept = bypass_mask(x)
    assert 0 < kept.sum() < valid_mask(x).sum()
    per_token = losses.ppo(x["logp"], x["old"], x["token_advantages"], dual_clip=3.0)
    assert_close(jnp.sum(per_token * kept) / kept.sum(), stored("verl")[f"{number}/loss/bypass_ppo/value"])


@once_for_all
def our_value_losses(x):
    found = {}
    for clip in (0.5, 0.2):
        per_token = functools.partial(losses.value, returns=x["returns"], old_values=x["values"], clip=clip)
        value, grad = jax.value_and_grad(aggregated(per_token, valid_mask(x)))(x["new_values"])
        acts = losses.value_clip_fraction(x["new_values"], x["returns"], x["values"], clip=clip)
        found[clip] = value, grad, masked.mean(acts, valid_mask(x))
    return found


@both
@pytest.mark.parametrize("clip", [0.5, 0.2])
def test_the_value_loss_is_verls(clip, number):
    numbers, prefix = stored("verl"), f"{number}/value_loss/{clip}"
    value, grad, clipped = our_value_losses(number)[clip]
    assert_close(value, numbers[f"{prefix}/value"])
    assert_close(grad, numbers[f"{prefix}/grad"])
    assert_close(clipped, numbers[f"{prefix}/clip_fraction"], rtol=1e-6)  # theirs is of float32


def test_the_adaptive_kl_controller_is_verls():
    coefficient, found = 0.1, []
    for kl, samples in ((0.2, 64), (0.05, 64), (0.055, 10), (0.0, 128), (-1.0, 128)):
        coefficient = losses.adaptive_kl_coefficient(
            jnp.asarray(coefficient), kl, target=0.05, horizon=1000, samples=samples
        )
        found.append(float(coefficient))
    assert_close(found, stored("verl")["adaptive_kl/coefficients"])


VERL_WEIGHTS = {
    "token_tis": {"high": 1.5},
    "token_icepop": {"low": 0.7, "high": 1.4, "outside": "zero"},
    "token_tis_normalized": {"high": 1.5, "batch_normalize": True},
    "sequence_tis": {"level": "sequence", "high": 1.5},
    "sequence_icepop": {"level": "sequence", "low": 0.7, "high": 1.4, "outside": "zero"},
    "sequence_tis_normalized": {"level": "sequence", "high": 1.5, "batch_normalize": True},
    "tis_and_two_rejections": {"high": 1.5},
}


def inverse(low, high):
    return {"low": 1 / high, "high": 1 / low}


VERL_REJECTIONS = {
    "token_k1": inverse(0.8, 1.3),
    "token_k2": {"statistic": "k2", "high": 0.02},
    "token_k3": {"statistic": "k3", "high": 0.02},
    "seq_sum_k1": {"reduce": "seq_sum", **inverse(0.8, 1.3)},
    "seq_sum_k2": {"reduce": "seq_sum", "statistic": "k2", "high": 0.2},
    "seq_sum_k3": {"reduce": "seq_sum", "statistic": "k3", "high": 0.2},
    "seq_mean_k1": {"reduce": "seq_mean", **inverse(0.95, 1.04)},
    "seq_mean_k2": {"reduce": "seq_mean", "statistic": "k2", "high": 0.02},
    "seq_mean_k3": {"reduce": "seq_mean", "statistic": "k3", "high": 0.02},
    "seq_max_k2": {"reduce": "seq_max", "statistic": "k2", "high": 0.2},
    "seq_max_k3": {"reduce": "seq_max", "statistic": "k3", "high": 0.2},
}


@once_for_all
def our_corrections(x):
    given = x["old"], x["sampler"], valid_mask(x)
    weights = {name: importance_weights(*given, **options) for name, options in VERL_WEIGHTS.items()}
    kept = {f"{name}/mask": rejection_mask(*given, **options) for name, options in VERL_REJECTIONS.items()}
    metrics = {name: metric.result() for name, metric in losses.mismatch_metrics(*given).items()}
    return weights | kept | metrics


@both
@named(VERL_WEIGHTS)
def test_importance_weights_are_verls(name, number):
    found = our_corrections(number)[name]
    # Normalized, they are divided by a mean over the count plus 1e-8.
    assert_close(found, stored("verl")[f"{number}/correction/{name}/weights"], atol=2e-9 if "norm" in name else 1e-9)


@both
@named(VERL_REJECTIONS)
def test_rejection_masks_are_verls(name, number):
    found = our_corrections(number)[f"{name}/mask"]
    np.testing.assert_array_equal(found, stored("verl")[f"{number}/correction/{name}/mask"])
    assert 0 < found.sum() < valid_mask(case(number)).sum()


@both
def test_several_rejections_are_verls_with_commas(number):
    x = case(number)
    found = rejection_mask(x["old"], x["sampler"], valid_mask(x), **inverse(0.6, 1.6))
    other = rejection_mask(x["old"], x["sampler"], valid_mask(x), reduce="seq_mean", statistic="k3", high=0.04)
    np.testing.assert_array_equal(found * other, stored("verl")[f"{number}/correction/tis_and_two_rejections/mask"])


VERL_DIAGNOSTICS = {
    "kl": "sampling/kl_k1",
    "k3_kl": "sampling/kl_k3",
    "chi2_token": "sampling/chi2_token",
    "chi2_seq": "sampling/chi2_sequence",
    "ppl_ratio": "sampling/perplexity_ratio",
}


@both
@named(VERL_DIAGNOSTICS)
def test_mismatch_metrics_are_verls(name, number):
    x = case(number)
    found = our_corrections(number)[VERL_DIAGNOSTICS[name]]
    expected = stored("verl")[f"{number}/diagnostic/{name}"]
    if number == 1 and name in ("chi2_seq", "ppl_ratio"):  # rows without tokens count as chi2 0 and ratio 1 there
        there = np.any(valid_mask(x) != 0, axis=1).sum()
        absent = x["valid"].sum() - there
        expected = (expected * (there + absent) - absent * (name == "ppl_ratio")) / there
    assert_close(found, expected)

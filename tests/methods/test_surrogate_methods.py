"""What the named methods on other surrogates and of off-policy REINFORCE put together."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses, methods
from jaxrl_post.types import TokenStats
from tests.advantages.compiled import all_compiled, compiled
from tests.claims import lab

losses = all_compiled(losses)

REWARDS = np.array([1.0, 0.0, 1.0, 0.5, 0.25, 0.0, 0.0, 1.0])
TASK = lab.Task(2, 2, 3, lab.by_sequence(REWARDS))


def _rollouts(noise=0.0):
    rollouts = compiled(lab.sample)(TASK, TASK.params(), jax.random.key(0), 6)
    return rollouts.replace(logp=rollouts.logp + noise * jax.random.normal(jax.random.key(1), rollouts.logp.shape))


def _loss(method, rollouts, logp):
    """The weighted sum of a method's reduced terms where the trained policy's log-probs are `logp`."""

    def run(rollouts, logp):
        start = {"policy": TokenStats(logp=rollouts.logp)}
        targets, _ = method.targets(method.init(rollouts, 2), rollouts, start, jax.random.key(2))
        terms = method.loss({"policy": TokenStats(logp=logp)}, rollouts, targets).values()
        return sum(t.weight * losses.aggregate(t.value, t.mask, t.mode, horizon=t.horizon) for t in terms), targets

    return jax.jit(run)(rollouts, logp)


def test_the_soft_punishment_of_dapo_lowers_the_reward_of_answers_near_the_limit():
    rollouts = _rollouts()
    short = rollouts.mask.at[:3, 2:].set(0.0)  # three answers of one token, the others have three
    rollouts = rollouts.replace(mask=short, reward=jnp.ones((2, 6)))
    method = methods.dapo(max_length=4, overlong_buffer=2)
    _, targets = _loss(method, rollouts, rollouts.logp)
    # Equal rewards but for -0.5 of those with three tokens: only the first prompt has both.
    np.testing.assert_allclose(np.sign(targets.advantages[:, 1]), [1] * 3 + [-1] * 3 + [0] * 6)
    _, plain = _loss(methods.dapo(), rollouts, rollouts.logp)
    assert not plain.advantages.any()


@pytest.mark.parametrize("made", [methods.grpo, methods.decoupled_ppo])
def test_what_stands_at_masked_tokens_reaches_no_gradient(made):
    rollouts = _rollouts()
    rollouts = rollouts.replace(mask=rollouts.mask.at[:5, 2:].set(0.0))
    missing = rollouts.replace(logp=jnp.where(rollouts.mask == 0, jnp.nan, rollouts.logp))
    method = made(beta=0.0)
    one, other = (jax.grad(lambda p, r=r: _loss(method, r, p)[0])(0.9 * rollouts.logp) for r in (rollouts, missing))
    np.testing.assert_array_equal(one, other)
    assert other.any()


@pytest.mark.parametrize("preset", [None, "trl", "verl"])
def test_tokens_that_m2po_leaves_out_stay_in_the_denominator(preset):
    rollouts = _rollouts()
    moved = rollouts.logp.at[0, 1].add(3.0)
    method = methods.m2po(preset=preset)
    start = {"policy": TokenStats(logp=moved)}
    targets, _ = compiled(method.targets)(method.init(rollouts, 2), rollouts, start, jax.random.key(2))
    assert float(targets.advantages[0, 1]) == 0.0
    assert float(targets.mask[0, 1]) == 1.0
    assert np.count_nonzero(targets.advantages) == np.count_nonzero(targets.mask) - 1


def test_decoupled_ppo_on_fresh_rollouts_is_the_loss_of_grpo():
    rollouts = _rollouts()
    logp = rollouts.logp + 0.3 * jax.random.normal(jax.random.key(3), rollouts.logp.shape)
    one, _ = _loss(methods.decoupled_ppo(), rollouts, logp)
    other, _ = _loss(methods.grpo(beta=0.0, aggregation="token_mean"), rollouts, logp)
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_luspo_is_gspo_with_sequences_weighted_by_their_tokens():
    rollouts = _rollouts()
    rollouts = rollouts.replace(mask=rollouts.mask.at[:5, 2:].set(0.0))
    logp = rollouts.logp + 0.3 * jax.random.normal(jax.random.key(3), rollouts.logp.shape)
    value, targets = _loss(methods.luspo(), rollouts, logp)
    bounds = {"clip_low": 2e-3, "clip_high": 2.5e-3}
    of_sequence = losses.gspo(logp, rollouts.logp, targets.advantages, targets.mask, **bounds)[:, 1]
    np.testing.assert_allclose(value, np.mean(of_sequence * targets.mask.sum(axis=1)), rtol=1e-6)


def test_the_denominator_of_nsr_counts_wrong_answers_alone():
    rollouts = _rollouts()
    value, targets = _loss(methods.nsr(), rollouts, rollouts.logp)
    wrong = np.repeat(np.asarray(rollouts.reward).reshape(-1) < 0.5, 4).reshape(-1, 4) * np.asarray(rollouts.mask)
    np.testing.assert_array_equal(targets.mask, wrong)
    np.testing.assert_allclose(value, 1.0)  # -A r with A = -1, r = 1
    right, targets = _loss(methods.nsr(sign="positive"), rollouts, rollouts.logp)
    np.testing.assert_array_equal(targets.mask, np.asarray(rollouts.mask) - wrong)
    np.testing.assert_allclose(right, -1.0)


def test_rec_with_drop_leaves_no_more_failures_than_successes():
    rollouts = _rollouts().replace(reward=jnp.array([[1.0, 0, 0, 0, 0, 0], [1.0, 1, 1, 1, 0, 0]]))
    _, targets = _loss(methods.rec(drop=True), rollouts, rollouts.logp)
    kept = np.asarray(targets.mask)[:, 1].reshape(2, 6)
    assert kept.sum(axis=1).tolist() == [2, 6]


def test_topr_takes_its_baseline_from_the_rewards():
    rollouts = _rollouts()
    _, targets = _loss(methods.topr(baseline=0.5), rollouts, rollouts.logp)
    np.testing.assert_allclose(targets.advantages[:, 1], rollouts.reward.reshape(-1) - 0.5)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("gspo", {"clip_low": 2.0}, "clip_low must be between 0 and 1"),
        ("luspo", {"clip_high": -1.0}, "clip_high must be at least 0"),
        ("gmpo", {"clip_low": -0.4}, "clip_low must be at least 0"),
        ("cispo", {"cap": "value"}, "cap must be one of"),
        ("cispo", {"cap": "ratio", "clip_high": 0.2}, "clip_high must be at least 1"),
        ("sapo", {"tau_neg": 0.0}, "tau_neg must be above 0"),
        ("vespo", {"k_neg": -1.0}, "k_neg must be at least 0"),
        ("dppo", {"divergence": "js"}, "divergence must be one of"),
        ("dppo", {"max_ratio": 0.5}, "max_ratio must be at least 1"),
        ("dapo", {"max_length": 10}, "overlong_buffer needs max_length"),
        ("dapo", {"max_length": 10, "overlong_buffer": 20}, "overlong_buffer must be between 1 and 10"),
        ("decoupled_ppo", {"correction": "tis"}, "correction does not apply: decoupled_ppo weighs by the ratio"),
        ("decoupled_ppo", {"correction": ["rejection", "mis"]}, "correction does not apply"),
        ("dapo", {"kl_in": "reward"}, "kl_in='reward' does not apply: there is no KL without beta"),
        ("grpo", {"kl_horizon": 5.0}, "kl_horizon=5.0 does not apply to kl_target=None"),
        ("decoupled_ppo", {"old_logp": "rollout"}, "old_logp of decoupled_ppo is 'recompute', got 'rollout'"),
        ("m2po", {"threshold": 0.0}, "threshold must be above 0"),
        ("m2po", {"old_logp": "recompute"}, "old_logp of m2po is 'rollout'"),
        ("dro", {"beta_ratio": 0.0}, "beta_ratio must be above 0"),
        ("dro", {"level": "batch"}, "level must be one of"),
        ("topr", {"level": "batch"}, "level must be one of"),
        ("rec", {"clip": "both"}, "clip must be one of"),
        ("rec", {"penalty": "k2"}, "penalty must be one of"),
        ("rec", {"temperature": 0.0}, "temperature must be above 0"),
        ("nsr", {"sign": "wrong"}, "sign must be one of"),
        ("nsr", {"positive_weight": -0.1}, "positive_weight must be at least 0"),
        ("stable_reinforce", {"max_ratio": 1.0}, "max_ratio must be above 1"),
        ("stable_reinforce", {"sigma": 0.0}, "sigma must be above 0"),
        ("stable_reinforce", {"dual_clip": 3.0}, "policy_gradient has no keyword 'dual_clip'"),
    ],
)
def test_keywords_without_meaning_are_refused_where_the_method_is_made(method, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(methods, method)(**options)


@pytest.mark.parametrize("name", ["gspo", "cispo", "gmpo", "rec"])
def test_clip_fractions_of_tokens_are_not_reported_where_another_ratio_is_clipped(name):
    rollouts = _rollouts()
    method = getattr(methods, name)()
    _, targets = _loss(method, rollouts, rollouts.logp)
    assert method.metrics is not None
    assert "clip_ratio/low_mean" not in method.metrics({"policy": TokenStats(logp=rollouts.logp)}, rollouts, targets)


def test_every_surrogate_of_the_table_is_called_by_the_names_of_its_arguments():
    from jaxrl_post.methods.surrogate import LOSSES, READ

    for function in LOSSES.values():
        parameters = inspect.signature(function).parameters.values()
        positional = {p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD}
        assert positional <= set(READ)

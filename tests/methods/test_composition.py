"""What the methods' targets and terms are on rollouts that can be worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import data, methods
from jaxrl_post.types import TokenStats
from tests.advantages.compiled import compiled
from tests.methods import tabular


def rollouts(rewards, valid=None):
    """One prompt `[2]` with completions of lengths 1, 2, ... and the given rewards."""
    count = len(rewards)
    completions = [[[3] * (1 + index) for index in range(count)]]
    batch = data.to_rollouts([[2]], completions, length=1 + count, rewards=np.array([rewards], np.float32))
    if valid is not None:
        batch = batch.replace(valid=jnp.array([valid]))
    return jax.tree.map(jnp.asarray, batch)


def targets(method, batch, **stats):
    every = {role: TokenStats(logp=jnp.zeros(batch.tokens.shape)) for role in method.needs}
    return compiled(method.targets)(method.init(batch, 1), batch, every | stats, jax.random.key(0))[0]


def test_grpo_gives_each_token_its_sequence_s_standardised_reward():
    # rewards 1, 3: mean 2, unbiased standard deviation sqrt(2)
    made = targets(methods.grpo(), rollouts([1.0, 3.0]))
    a = 1 / np.sqrt(2)
    np.testing.assert_allclose(made.advantages, [[0, -a, 0], [0, a, a]], rtol=1e-5)
    np.testing.assert_array_equal(made.mask, [[0, 1, 0], [0, 1, 1]])


def test_an_invalid_sequence_leaves_statistics_loss_and_denominator():
    batch = rollouts([1.0, 3.0, 100.0], valid=[True, True, False])
    made = targets(methods.grpo(), batch)
    a = 1 / np.sqrt(2)
    np.testing.assert_allclose(made.advantages[:, 1], [-a, a, 0], rtol=1e-5)
    np.testing.assert_array_equal(made.mask.sum(1), [1, 2, 0])


def test_mc_grpo_drops_one_rollout_that_attains_the_median():
    # The table's example: rewards .2, .9, .5: median .5, deviation .3 + .001.
    made = targets(methods.mc_grpo(), rollouts([0.2, 0.9, 0.5]))
    np.testing.assert_allclose(made.advantages[:2, 1], [-0.996678, 1.328904], rtol=1e-5)
    np.testing.assert_array_equal(made.mask.sum(1), [1, 2, 0])


def test_ppo_puts_reward_on_the_last_token_and_takes_the_kl_from_it():
    batch = rollouts([1.0])  # one sequence of one completion token
    method = methods.ppo(beta=0.5, whiten=False)
    reference = TokenStats(logp=jnp.full(batch.tokens.shape, -2.0))
    critic = TokenStats(value=jnp.full(batch.tokens.shape, 0.25))
    made = targets(method, batch.replace(logp=jnp.array([[0.0, -1.0]])), reference=reference, critic=critic)
    # reward 1 - 0.5 * (-1 - -2) = 0.5; advantage 0.5 - 0.25
    np.testing.assert_allclose(made.returns, [[0.0, 0.5]], atol=1e-6)
    np.testing.assert_allclose(made.advantages, [[0.0, 0.25]], atol=1e-6)


def test_a_kl_term_is_there_only_if_it_counts():
    assert set(methods.grpo(beta=0.0).needs) == {"policy"}
    method = methods.grpo(beta=0.1)
    batch = rollouts([1.0, 3.0])
    stats = {
        "policy": TokenStats(logp=jnp.full(batch.tokens.shape, -1.0)),
        "reference": TokenStats(logp=jnp.full(batch.tokens.shape, -1.5)),
    }
    terms = method.loss(stats, batch, targets(method, batch))
    assert set(terms) == {"policy", "kl"}
    assert terms["kl"].weight == 0.1
    x = -1.5 - -1.0
    np.testing.assert_allclose(terms["kl"].value, np.full(batch.tokens.shape, np.exp(x) - x - 1), rtol=1e-5)


def test_old_logp_is_the_sampler_s_or_the_recomputed_one():
    batch = rollouts([1.0, 3.0])
    batch = batch.replace(logp=jnp.full(batch.tokens.shape, -0.5))
    assert float(targets(methods.grpo(), batch).old_logp[0, 1]) == -0.5
    assert float(targets(methods.grpo(old_logp="recompute"), batch).old_logp[0, 1]) == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: methods.reinforce(baseline="loo"), "baseline must be one of none, leave_one_out, got 'loo'"),
        (lambda: methods.grpo(old_logp="x"), "old_logp must be one of rollout, recompute"),
        (lambda: methods.grpo(clip_low=1.5), "clip_low must be between 0 and 1, got 1.5"),
        (lambda: methods.grpo(horizon=5), "horizon=5 does not apply"),
        (lambda: methods.sft(aggregation="seq_mean_token_sum_norm"), "divides by horizon"),
        (lambda: methods.mc_grpo(kl_estimator="k9"), "kl_estimator must be one of k1, k2, k3, abs"),
        (lambda: methods.ppo(gamma=2), "gamma must be between 0 and 1"),
        (lambda: methods.dpo(beta=0.0), "beta must be above 0, got 0.0"),
    ],
)
def test_a_keyword_without_meaning_is_an_error_where_the_method_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_dpo_refuses_groups_that_are_not_pairs():
    with pytest.raises(ValueError, match="group of two, got groups of 3"):
        tabular.one_step(methods.dpo(), rollouts([1.0, 2.0, 3.0]))


def test_an_alias_takes_a_presets_keywords_and_what_the_user_says_goes_over_them():
    def slope(method, ratio):
        def value(batch):
            stats = {"policy": TokenStats(logp=batch.logp + np.log(ratio))}
            targets, _ = method.targets(method.init(batch, 1), batch, {"policy": TokenStats(logp=batch.logp)}, None)
            return method.loss(stats, batch, targets)["policy"].value

        return jax.jit(value)(tabular.batch())

    by_name = methods.policy_gradient(loss="cispo", preset="trl")
    np.testing.assert_array_equal(slope(methods.cispo(preset="trl"), 7.0), slope(by_name, 7.0))
    assert np.any(np.asarray(slope(methods.cispo(preset="trl", clip_high=6.0), 7.0)) != np.asarray(slope(by_name, 7.0)))
    for alias, name in ((methods.dro, "loss"), (methods.pass_at_k, "advantage")):
        plain = methods.policy_gradient(
            advantage="dr_grpo" if name == "loss" else "pass_at_k",
            loss={"name": "dro", "beta": 1.0} if name == "loss" else "ppo",
            aggregation="seq_mean_token_sum" if name == "loss" else "token_mean",
            preset="verl",
        )
        np.testing.assert_array_equal(slope(alias(preset="verl"), 1.5), slope(plain, 1.5))

"""PIPO: what is remembered, when the second update is made, and what it is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_post import methods
from jaxrl_post.methods.improvement import pipo, policy_improvement
from jaxrl_post.types import TokenStats
from tests.advantages.compiled import compiled
from tests.methods import tabular


def batch(mean, seed):
    """Rollouts whose mean reward over valid rows is `mean`."""
    made = tabular.batch(seed)
    reward = made.reward - jnp.sum(made.reward * made.valid) / jnp.sum(made.valid) + mean
    return made.replace(reward=reward)


def assert_same(left, right, tolerance=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance), left, right)


def run(method, means, optimizer):
    state = tabular.start(method, optimizer)
    step = tabular.make_step(method, optimizer)
    for seed, mean in enumerate(means):
        state, metrics = step(state, batch(mean, seed))
    return state, metrics


MEANS = [0.40, 0.42, 0.44, 0.46]


def test_until_the_window_is_full_it_is_grpo():
    optimizer = optax.adam(1e-2)
    found, metrics = run(pipo(window=4), MEANS, optimizer)
    plain, _ = run(methods.grpo(), MEANS, optimizer)
    assert_same(found.params, plain.params)
    assert float(metrics["empty_updates"]) == 1
    assert float(metrics["updates"]) == 1
    np.testing.assert_allclose(found.method_state["improvement"].means, MEANS, rtol=1e-5)


def test_an_improvement_reinforces_the_batch_before_with_the_table_s_signal():
    """The second update alone, against the clipped surrogate of hand-made advantages on that batch."""
    optimizer = optax.sgd(1.0)
    method = policy_improvement(window=4, aggregation="seq_mean_token_mean")
    found, metrics = run(method, [*MEANS, 0.47], optimizer)
    assert float(metrics["updates"]) == 1
    before = batch(MEANS[-1], 3)
    a = np.asarray(before.reward, np.float64)
    valid = np.asarray(before.valid)
    a = np.where(valid, a - np.array([row[keep].mean() for row, keep in zip(a, valid, strict=True)])[:, None], 0.0)
    a = a / (np.abs(a).sum(1) / valid.sum(1))[:, None]  # the standard deviation cancels

    def given(s):
        return jnp.asarray(a * 1.549193, jnp.float32)

    expected = methods.policy_gradient(advantage=given, aggregation="seq_mean_token_mean")
    state = tabular.start(expected, optimizer)
    state, _ = tabular.make_step(expected, optimizer)(state, before)
    assert_same(found.params, state.params, 2e-5)
    moved = jax.tree.map(lambda p, q: float(jnp.max(jnp.abs(p - q))), found.params, tabular.params_for(method))
    assert max(jax.tree.leaves(moved)) > 1e-4


def test_a_decline_takes_back_a_tenth_and_with_penalty_zero_nothing():
    optimizer = optax.sgd(1.0)
    initial = tabular.params_for(policy_improvement())

    def change(penalty, last):
        state, _ = run(policy_improvement(window=4, penalty=penalty), [*MEANS, last], optimizer)
        return jax.tree.map(lambda p, q: p - q, state.params, initial)

    # At means .40 and .46 the signals are opposite; to first order so are the updates.
    down, up = change(1.0, 0.40), change(1.0, 0.46)
    assert_same(down, jax.tree.map(lambda x: -x, up), 1e-3)
    tenth = change(0.1, 0.40)
    assert_same(jax.tree.map(lambda x: 10 * x, tenth), down, 2e-3)
    assert_same(change(0.0, 0.40), jax.tree.map(jnp.zeros_like, initial), 0.0)


def test_a_batch_without_valid_sequences_is_not_a_mean_reward_of_zero():
    method = policy_improvement(window=2)
    state = tabular.start(method)
    nothing = batch(5.0, 0)
    nothing = nothing.replace(valid=jnp.zeros_like(nothing.valid))
    _, after = method.batch(state.method_state, nothing)
    assert int(after.count) == 0
    assert after.means.tolist() == [0.0, 0.0]


def test_a_preset_leaves_the_policy_that_sampled_the_batch_before():
    found = []
    for preset in (None, "trl"):
        method = policy_improvement(window=2, preset=preset)
        rollouts = batch(0.4, 0).replace(extras={"improvement": jnp.ones(tabular.PROMPTS)})
        moved = {"policy": TokenStats(logp=rollouts.logp - 0.5)}
        memory = tabular.start(method).method_state
        targets, _ = compiled(method.targets)(memory, rollouts, moved, jax.random.key(0))
        found.append(targets.old_logp)
        np.testing.assert_array_equal(targets.old_logp, rollouts.logp)
    np.testing.assert_array_equal(*found)


def test_keywords_without_meaning_are_errors():
    with pytest.raises(ValueError, match="window must be at least 2"):
        pipo(window=1)
    with pytest.raises(ValueError, match="penalty must be at least 0"):
        pipo(penalty=-0.5)
    with pytest.raises(ValueError, match="beta does not apply to the second update"):
        policy_improvement(beta=0.1)
    with pytest.raises(ValueError, match="the shapes of the rollouts"):
        pipo().init(None, 4)
    with pytest.raises(ValueError, match=r"advantage must give \[P, G\]"):
        run(pipo(advantage="reinforce_plus_plus", window=2), MEANS, optax.sgd(1.0))

"""Truncated PPO on responses that can be worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import data, methods
from jaxrl_post.types import FINISH_LENGTH, FINISH_NONE, FINISH_STOP, TokenStats
from tests.advantages.compiled import compiled
from tests.methods import tabular


def windows(finish, versions, reward=1.0):
    """Two responses of three tokens to prompts of one, the second ended in the newest window; the table's values."""
    batch = data.to_rollouts([[2], [2]], [[[3, 4, 5]], [[3, 4, 5]]], length=5)
    batch = jax.tree.map(jnp.asarray, batch)
    version = jnp.array([[-1, *versions, -1], [-1, 7, 7, 7, -1]], jnp.int32)
    return batch.replace(
        reward=jnp.array([[reward], [1.0]]), finish=jnp.array([[finish], [FINISH_STOP]], jnp.int8), version=version
    )


VALUES = jnp.array([[9.0, 0.5, 0.6, 0.4, 9.0]] * 2)


def targets(batch, **options):
    method = methods.t_ppo(whiten=False, **options)
    stats = {"policy": TokenStats(logp=batch.logp), "critic": TokenStats(value=VALUES)}
    return method, compiled(method.targets)(method.init(batch, 1), batch, stats, jax.random.key(0))[0]


@pytest.mark.parametrize(("lam", "expected"), [(1.0, [-0.1, -0.2, 0.0]), (0.95, [-0.09, -0.2, 0.0])])
def test_a_running_response_ends_with_its_last_value_and_its_reward_is_not_read(lam, expected):
    _, made = targets(windows(FINISH_NONE, (7, 7, 7)), lam=lam)
    np.testing.assert_allclose(made.advantages[0], [0, *expected, 0], atol=1e-6)
    if lam == 1.0:
        np.testing.assert_allclose(made.advantages[1], [0, 0.5, 0.4, 0.6, 0], atol=1e-6)


def test_a_response_at_the_limit_has_ended():
    _, made = targets(windows(FINISH_LENGTH, (7, 7, 7)), lam=1.0)
    np.testing.assert_allclose(made.advantages[0], [0, 0.5, 0.4, 0.6, 0], atol=1e-6)


def test_the_policy_learns_from_the_newest_window_and_the_critic_from_what_has_ended():
    batch = windows(FINISH_NONE, (5, 6, 7))
    method, made = targets(batch, lam=1.0)
    np.testing.assert_array_equal(made.mask, [[0, 0, 0, 1, 0], [0, 1, 1, 1, 0]])
    np.testing.assert_array_equal(made.advantages[0, :3], 0)
    stats = {"policy": TokenStats(logp=batch.logp), "critic": TokenStats(value=VALUES)}
    terms = method.loss(stats, batch, made)
    np.testing.assert_array_equal(terms["policy"].mask, made.mask)
    np.testing.assert_array_equal(terms["value"].mask, [[0] * 5, [0, 1, 1, 1, 0]])
    # Half the squared distance to the whole return, which is 1 at every token, whatever lambda the policy has.
    np.testing.assert_allclose(terms["value"].value[1, 1:4], [0.125, 0.08, 0.18], atol=1e-6)
    ended = batch.replace(finish=jnp.full((2, 1), FINISH_STOP, jnp.int8))
    _, made = targets(ended, lam=0.3)
    np.testing.assert_allclose(made.returns[:, 1:4], 1.0, atol=1e-6)
    np.testing.assert_array_equal(made.extras["finished"][0], [0, 1, 1, 1, 0])


def test_one_window_for_all_is_ppo_with_a_monte_carlo_critic():
    batch = tabular.batch()
    batch = batch.replace(finish=jnp.maximum(batch.finish, FINISH_STOP))
    options = {"clip_high": 0.28, "lam": 1.0, "value_clip": None}
    expected, metrics = tabular.one_step(methods.ppo(**options), batch)
    state, found = tabular.one_step(methods.t_ppo(**options), batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, expected.params)
    np.testing.assert_allclose(found["loss"], metrics["loss"], atol=1e-6)


def test_a_batch_in_which_nothing_has_ended_trains_the_policy_alone():
    batch = tabular.batch()
    batch = batch.replace(finish=jnp.full_like(batch.finish, FINISH_NONE))
    method = methods.t_ppo()
    stats = {
        "policy": TokenStats(logp=batch.logp),
        "critic": TokenStats(value=jax.random.normal(jax.random.key(3), batch.mask.shape)),
    }
    made, _ = compiled(method.targets)((), batch, stats, jax.random.key(0))
    assert float(jnp.sum(method.loss(stats, batch, made)["value"].mask)) == 0
    assert float(jnp.sum(jnp.abs(made.advantages))) > 0
    before = jax.tree.map(jnp.copy, tabular.params_for(method)["critic"])
    state, metrics = tabular.one_step(method, batch)
    assert np.isfinite(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, state.params["critic"], before)


@pytest.mark.parametrize("made", [methods.ppo, methods.t_ppo])
def test_what_stands_at_masked_tokens_stops_no_update(made):
    batch = tabular.batch()
    batch = batch.replace(mask=batch.mask.at[::2, -1].set(0.0))
    missing = batch.replace(logp=jnp.where(batch.mask == 0, jnp.nan, batch.logp))
    (one, _), (other, _) = (tabular.one_step(made(), given) for given in (batch, missing))
    jax.tree.map(np.testing.assert_array_equal, other.params, one.params)


def test_keywords_without_meaning_are_refused():
    with pytest.raises(ValueError, match="lam must be between 0 and 1"):
        methods.t_ppo(lam=1.5)
    with pytest.raises(ValueError, match="horizon"):
        methods.t_ppo(horizon=4)

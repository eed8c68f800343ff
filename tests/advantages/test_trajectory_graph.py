import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages
from tests.advantages.compiled import all_compiled

advantages = all_compiled(advantages)

SALT = jax.jit(advantages.salt, static_argnames="history")
MEAN = jax.jit(advantages.mean_by_key)


def _random(seed, prompts=2, group=5, steps=6):
    rng = np.random.default_rng(seed)
    shape = (prompts, group, steps)
    exists = np.arange(steps) < rng.integers(0, steps + 1, (prompts, group, 1))
    state, action = rng.integers(-1, 2, shape), rng.integers(0, 2, shape)
    return rng.normal(size=shape[:2]), state, action, exists, rng.random(shape[:2]) < 0.8


def _loop(whole, state, action, exists, valid, history):
    expected = np.zeros(state.shape)
    for p in range(len(whole)):
        edges = {}

        def key(g, k, p=p):
            past = range(max(k - history + 1, 0), k + 1)
            return tuple((state[p, g, j], action[p, g, j]) for j in past)

        for g in np.flatnonzero(valid[p]):
            for k in np.flatnonzero(exists[p, g]):
                edges.setdefault(key(g, k), set()).add(g)
        for g in np.flatnonzero(valid[p]):
            for k in np.flatnonzero(exists[p, g]):
                expected[p, g, k] = np.mean([whole[p, other] for other in edges[key(g, k)]])
    return expected


@pytest.mark.parametrize("history", [1, 2, 3])
def test_merged_advantages_agree_with_a_graph_built_of_sets(history):
    for seed in range(3):
        given = _random(seed)
        np.testing.assert_allclose(SALT(*given, history=history), _loop(*given, history), atol=1e-6)


def test_the_tables_numbers():
    # All share the first step, 0 and 1 the second, 2 and 3 took others.
    whole = advantages.grpo(jnp.array([[1.0, 0.0, 0.0, 1.0]]), ddof=0, eps=0.0)
    np.testing.assert_allclose(whole, [[1, -1, -1, 1]], rtol=1e-6)
    action = jnp.array([[[1, 2], [1, 2], [1, 3], [1, 4]]])
    given = SALT(whole, jnp.zeros_like(action), action, jnp.ones(action.shape))
    np.testing.assert_allclose(given[0], [[0, 0], [0, 0], [0, -1], [0, 1]], atol=1e-6)


def test_a_step_that_all_share_is_neutral_and_a_group_that_shares_nothing_is_as_grpo_left_it():
    whole, state, action, _, _ = _random(5)
    whole = advantages.grpo(whole)
    one = np.ones(state.shape)
    shared = SALT(whole, 0 * state, 0 * action, one)
    np.testing.assert_allclose(shared, 0, atol=1e-6)
    own = np.arange(state.size).reshape(state.shape)
    np.testing.assert_allclose(SALT(whole, own, action, one), np.broadcast_to(whole[:, :, None], own.shape), atol=1e-6)


def test_a_trajectory_in_a_loop_counts_once_for_the_step_it_repeats():
    whole, exists = jnp.array([[3.0, 0.0]]), jnp.array([[[1, 1, 1], [1, 0, 0]]])
    same = jnp.zeros((1, 2, 3), int)
    np.testing.assert_allclose(SALT(whole, same, same, exists), [[[1.5, 1.5, 1.5], [1.5, 0, 0]]])


def test_longer_histories_merge_less():
    state, action = jnp.array([[[1, 3], [2, 3]]]), jnp.array([[[5, 6], [5, 6]]])
    whole, one = jnp.array([[1.0, -1.0]]), jnp.ones((1, 2, 2))
    np.testing.assert_allclose(SALT(whole, state, action, one)[0], [[1, 0], [-1, 0]])
    np.testing.assert_allclose(SALT(whole, state, action, one, history=2)[0], [[1, 1], [-1, -1]])


def test_order_padding_and_invalid_trajectories_change_nothing():
    whole, state, action, exists, valid = _random(7)
    given = SALT(whole, state, action, exists, valid, history=2)
    order = np.array([3, 1, 4, 0, 2])
    moved = SALT(*(x[:, order] for x in (whole, state, action, exists, valid)), history=2)
    np.testing.assert_allclose(moved, given[:, order], atol=1e-6)
    pad = ((0, 0), (0, 0), (0, 2))
    junk = [np.pad(x, pad, constant_values=7) for x in (state, action)]
    padded = SALT(whole, *junk, np.pad(exists, pad), valid, history=2)
    np.testing.assert_allclose(padded[:, :, :6], given, atol=1e-6)
    spoiled = SALT(np.where(valid, whole, np.nan), state, action, exists, valid, history=2)
    np.testing.assert_allclose(spoiled, given, atol=1e-6)


def test_merging_by_state_and_action_leaves_the_gradient_of_a_policy_of_the_state_alone():
    # Equal steps have equal gradients, so that moving credit between them moves nothing.
    whole, state, action, exists, valid = _random(8)
    ones = jnp.asarray(exists & valid[:, :, None])

    def surrogate(logits, credit):
        log_p = jax.nn.log_softmax(logits)[jnp.arange(2)[:, None, None], state, action]
        return jnp.sum(ones * credit * log_p)

    once = np.ones((2, 5, 6), bool)  # no state is met twice by one trajectory
    state = state + 10 * np.arange(6) + once
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 60, 2)))
    slope = jax.jit(jax.grad(surrogate))
    merged = slope(logits, SALT(whole, state, action, exists, valid))
    plain = slope(logits, jnp.where(ones, jnp.asarray(whole)[:, :, None], 0.0))
    np.testing.assert_allclose(merged, plain, atol=1e-5)


def test_a_mean_by_key_equals_a_float64_loop_and_equal_numbers_keep_their_value():
    rng = np.random.default_rng(0)
    x, key, visit, valid = rng.normal(size=40), rng.integers(0, 4, 40), rng.integers(0, 3, 40), rng.random(40) < 0.7
    expected, once = np.zeros(40), np.zeros(40)
    for i in np.flatnonzero(valid):
        group = (key == key[i]) & valid
        expected[i] = x[group].mean()
        once[i] = np.mean([x[group & (visit == v)].mean() for v in set(visit[group])])
    np.testing.assert_allclose(MEAN(x, key, valid), expected, atol=1e-6)
    np.testing.assert_allclose(MEAN(x, key, valid, once_per=visit), once, atol=1e-6)
    same = MEAN(np.full(7, 0.1, np.float32), np.zeros(7, int))
    assert (np.asarray(same) == np.float32(0.1)).all()


def test_fingerprints_tell_tokens_apart_and_know_equal_ones_wherever_they_stand():
    tokens = jnp.array([[9, 1, 2, 7, 3, 4, 0], [9, 1, 2, 3, 4, 5, 0], [9, 2, 1, 7, 3, 4, 0]])
    mask = jnp.array([[0, 1, 1, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 1, 1, 0]])
    step = jnp.array([[-1, 0, 0, -1, 1, 1, -1], [-1, 0, 0, 1, 1, 2, -1], [-1, 0, 0, -1, 1, 1, -1]])
    actions, prefixes = (np.asarray(x) for x in advantages.step_fingerprints(tokens, step, mask, num_steps=3))
    assert actions[0, 0] == actions[1, 0] != actions[2, 0]  # order matters
    assert actions[0, 1] == actions[1, 1] == actions[2, 1]  # a tool's token before it does not
    assert (actions[[0, 2], 2] == 0).all()
    assert (prefixes[:, 0] == prefixes[0, 0]).all()
    assert len({prefixes[0, 1], prefixes[1, 1], prefixes[2, 1]}) == 3  # what came before, tools included


def test_fingerprints_of_many_different_steps_do_not_collide():
    digits = np.array(np.unravel_index(np.arange(4**6), (4,) * 6)).T
    step = np.zeros(digits.shape, int)
    found = advantages.step_fingerprints(digits, step, step == 0, num_steps=1)
    assert len(np.unique(found[0])) == 4**6


def test_gradients_are_finite_and_half_precision_is_raised():
    same = jnp.zeros((1, 2, 2), int)
    for exists in (0 * same, same + 1):
        gradient = jax.jit(jax.grad(lambda x, e: jnp.sum(advantages.salt(x, same, same, e))))(jnp.ones((1, 2)), exists)
        assert bool(jnp.isfinite(gradient).all())
    assert advantages.salt(jnp.ones((1, 2), jnp.bfloat16), same, same, same).dtype == jnp.float32


def test_impossible_arguments_are_refused():
    whole, same = jnp.ones((1, 2)), jnp.zeros((1, 2, 3), int)
    salt = functools.partial(advantages.salt, whole)
    with pytest.raises(ValueError, match="history must be at least 1"):
        salt(same, same, same, history=0)
    with pytest.raises(ValueError, match=r"exists must be \[P, G, S\] with \[P, G\] = \(1, 2\), got shape \(1, 3, 2\)"):
        salt(same, same, jnp.ones((1, 3, 2)))
    with pytest.raises(ValueError, match="array 1 of what must have the shape of exists"):
        salt(same, same[:, :, :2], same)
    with pytest.raises(ValueError, match="at least one array"):
        advantages.history_keys([], same)
    with pytest.raises(ValueError, match="tokens must be integers"):
        advantages.step_fingerprints(jnp.zeros((1, 2)), jnp.zeros((1, 2), int), jnp.ones((1, 2)), num_steps=1)

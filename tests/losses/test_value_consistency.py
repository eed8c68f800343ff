import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.losses import value_consistency as vc
from tests.advantages.compiled import all_compiled

vc = all_compiled(vc)


def test_rover_gives_hand_worked_numbers():
    # Q = .2, centred reward .5, next value -.1: (.2 - .4)^2.
    ones, mean = jnp.ones((1, 2)), jnp.array([[-2.0, -2.1]])
    target = vc.rover_target(jnp.full((1, 2), 0.5), mean, jnp.full((1, 2), -2.0), ones)
    np.testing.assert_allclose(target, [[0.4, 0.5]], rtol=1e-6)
    loss = vc.rover(jnp.array([[-0.8, -1.0]]), -ones, target)
    np.testing.assert_allclose(loss, [[0.04, 0.25]], rtol=1e-5)


def test_rover_targets_are_the_values_of_the_uniform_policy_on_a_tree():
    # A tree of depth 3: Q_u(node, action) = reward at a leaf, else the mean over the child's actions.
    depth, leaves = 3, np.random.default_rng(0).choice([0.0, 1.0], 8)
    q = {(): None}
    for level in reversed(range(depth)):
        for prefix in itertools.product((0, 1), repeat=level):
            children = [(*prefix, a) for a in (0, 1)]
            if level == depth - 1:
                q[prefix] = np.array([leaves[int("".join(map(str, c)), 2)] for c in children])
            else:
                q[prefix] = np.array([q[c].mean() for c in children])
    paths = list(itertools.product((0, 1), repeat=depth))
    # The policy whose log-ratios are Q / rho; a masked token (a tool's answer) lies between the second and the third.
    rho, place = 0.5, [1, 2, 4]
    mask, mean, old, rewards, expected = (np.zeros((8, 5)) for _ in range(5))
    for row, path in enumerate(paths):
        for t, at in enumerate(place):
            mask[row, at], old[row, at] = 1, -1.0 - t
            mean[row, at] = old[row, at] + q[path[:t]].mean() / rho
            expected[row, at] = q[path[:t]][path[t]]
        rewards[row, place[-1]] = leaves[row]
    mean[mask == 0] = np.nan
    given = jax.jit(lambda *x: vc.rover_target(*x, rho=rho))(rewards, mean, old, mask)
    np.testing.assert_allclose(given, expected, atol=1e-6)
    without = vc.rover_target(rewards, mean, old, mask, rho=rho, next_value=False)
    np.testing.assert_allclose(without, rewards, atol=1e-6)


def test_two_levels_have_the_values_of_the_table():
    # Leaves [1, 0, 0, 0]: Q(root, L) = .5, Q(root, R) = 0, Q(L, L) = 1.
    mask, old = jnp.ones((3, 2)), jnp.zeros((3, 2))
    rewards = jnp.array([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])  # LL, LR, RL
    mean = jnp.array([[0.25, 0.5], [0.25, 0.5], [0.25, 0.0]])
    np.testing.assert_allclose(vc.rover_target(rewards, mean, old, mask), [[0.5, 1], [0.5, 0], [0, 0]])


def test_rover_regresses_the_trained_policy_alone():
    rng = np.random.default_rng(1)
    logp, old, target = (rng.normal(size=(3, 4)) for _ in range(3))
    with jax.enable_x64(True):
        gradients = jax.jit(jax.grad(lambda *x: vc.rover(*x, rho=0.7).sum(), argnums=(0, 1, 2)))(logp, old, target)
        np.testing.assert_allclose(gradients[0], 1.4 * (0.7 * (logp - old) - target), rtol=1e-9)
        assert not np.asarray(gradients[1]).any()
        assert not np.asarray(gradients[2]).any()
        through = jax.jit(jax.grad(lambda m: vc.rover_target(target, m, old, np.ones((3, 4))).sum()))(logp)
        assert not np.asarray(through).any()


def test_the_clip_of_rover_stops_only_what_moves_further_out():
    # Ratio 1.5 or 0.5 against a bound of 0.2; the target further out, between, and on the other side.
    logp = jnp.log(jnp.array([[1.5, 1.5, 1.5, 0.5, 0.5, 1.1]]))
    target = jnp.array([[1.0, 0.3, -1.0, -1.0, 0.5, 1.0]])
    gradient = jax.jit(jax.grad(lambda x: vc.rover(x, jnp.zeros((1, 6)), target, clip_eps=0.2).sum()))(logp)
    expected = np.where([[False, True, True, False, True, True]], 2 * (np.asarray(logp) - target), 0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def _soft_loop(logp, value, rewards, mask):
    single, multi = np.zeros_like(logp), np.zeros_like(logp)
    for b in range(len(logp)):
        at = np.flatnonzero(mask[b])
        for k, t in enumerate(at):
            following = value[b, at[k + 1]] if k + 1 < len(at) else 0
            single[b, t] = (logp[b, t] - (rewards[b, t] + following - value[b, t])) ** 2
            rest = at[k:]
            multi[b, t] = (logp[b, rest].sum() - (rewards[b, rest].sum() - value[b, t])) ** 2
    return single, multi


def test_path_consistency_agrees_with_a_float64_loop_and_passes_over_masked_tokens():
    rng = np.random.default_rng(2)
    logp, value, rewards = (rng.normal(size=(4, 6)) for _ in range(3))
    mask = rng.random((4, 6)) < 0.6
    mask[3] = False
    given = [np.where(mask, x, np.nan) for x in (logp, value, rewards)]
    for loss, expected in zip(
        (vc.soft_q_single_step, vc.soft_q_multi_step), _soft_loop(logp, value, rewards, mask), strict=True
    ):
        with jax.enable_x64(True):
            np.testing.assert_allclose(loss(*given, mask), expected, rtol=1e-9, atol=1e-12)
        gradients = jax.jit(jax.grad(lambda *x, loss=loss: loss(*x, mask).sum(), argnums=(0, 1)))(
            *(x.astype(np.float32) for x in given)
        )
        assert np.all(np.isfinite(gradients[0]))
        assert not np.asarray(gradients[0])[~mask].any()
        assert not np.asarray(gradients[1]).any()
        assert loss(*(jnp.asarray(x, jnp.bfloat16) for x in given), mask).dtype == jnp.float32


def test_one_token_of_two_has_loss_one():
    # Logits [0, 0], a = 0, r = 1, V = ln 2: A = -.69315, target .30685.
    logp, value, one = jnp.log(jnp.array([[0.5]])), jnp.log(jnp.array([[2.0]])), jnp.ones((1, 1))
    np.testing.assert_allclose(vc.soft_q_single_step(logp, value, one, one), [[1.0]], rtol=1e-6)
    np.testing.assert_allclose(vc.soft_q_multi_step(logp, value, one, one), [[1.0]], rtol=1e-6)


def test_the_soft_optimal_policy_has_no_loss_on_any_path():
    # Sequences of two tokens out of three with rewards r: pi(y) = exp(r(y)) / Z, V_1 = log sum exp r.
    r = np.random.default_rng(3).normal(size=(3, 3))
    v2 = np.log(np.exp(r).sum(1))
    v1 = np.log(np.exp(v2).sum())
    rows = list(itertools.product(range(3), repeat=2))
    logp = np.array([[v2[a] - v1, r[a, b] - v2[a]] for a, b in rows])
    value = np.array([[v1, v2[a]] for a, _ in rows])
    rewards = np.array([[0.0, r[a, b]] for a, b in rows])
    for loss in (vc.soft_q_single_step, vc.soft_q_multi_step):
        np.testing.assert_allclose(loss(logp, value, rewards, np.ones((9, 2))), np.zeros((9, 2)), atol=1e-10)


def test_vmap_equals_single_calls_and_wrong_arguments_are_named():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(2, 3, 4))
    mask = np.ones((3, 4))
    stacked = jax.vmap(lambda v: vc.soft_q_multi_step(v, v, v, mask))(jnp.asarray(x))
    np.testing.assert_allclose(stacked[1], vc.soft_q_multi_step(x[1], x[1], x[1], mask), rtol=1e-5)
    with pytest.raises(ValueError, match="target_value must have the shape of mask"):
        vc.soft_q_single_step(x[0], x[0, :1], x[0], mask)
    with pytest.raises(ValueError, match=r"mask must be \[B, T\]"):
        vc.rover_target(x[0], x[0], x[0], mask[0])
    with pytest.raises(ValueError, match="clip_eps must be in"):
        vc.rover(x[0], x[0], x[0], clip_eps=1.5)
    with pytest.raises(ValueError, match="target must have the shape of logp"):
        vc.rover(x[0], x[0], x[0, :1])

"""Progress under a prover: closed forms, a small tree gone through by hand, and what makes a prover good."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import rewards
from tests.rewards.compiled import compiled

bok_value, prover_advantage = compiled(rewards.bok_value), compiled(rewards.prover_advantage)
effective_reward, beam_score = compiled(rewards.effective_reward), compiled(rewards.beam_score)
prover_quality = compiled(rewards.prover_quality)


def test_best_of_four_gives_the_papers_numbers():
    np.testing.assert_allclose(bok_value(jnp.array([0.1, 0.2])), [0.3439, 0.5904], atol=1e-6)
    np.testing.assert_allclose(prover_advantage(jnp.array([[0.1, 0.2]])), [[0.2465]], atol=1e-6)
    found = effective_reward(jnp.array([0.2]), prover_advantage(jnp.array([0.1, 0.2])), alpha=5.0)
    np.testing.assert_allclose(found, [1.4325], atol=1e-5)


def test_the_best_of_k_succeeds_as_often_as_k_tries_do():
    for k in (1, 2, 3):
        tries = np.array(list(itertools.product([0, 1], repeat=k)))
        p = np.where(tries, 0.3, 0.7).prod(axis=1)
        np.testing.assert_allclose(bok_value(0.3, k=k), p[tries.any(axis=1)].sum(), rtol=1e-6)


def test_rates_outside_of_0_and_1_are_clipped_and_missing_ones_gain_nothing():
    np.testing.assert_array_equal(bok_value(jnp.array([-0.5, 1.5])), [0, 1])
    found = prover_advantage(jnp.array([[0.1, jnp.nan, 0.2], [0.1, jnp.inf, 0.2]]))
    np.testing.assert_allclose(found, [[0, 0.2465]] * 2, atol=1e-6)
    known = jnp.array([[1, 0, 1]])
    np.testing.assert_allclose(prover_advantage(jnp.array([[0.1, 0.9, 0.2]]), known), [[0, 0.2465]], atol=1e-6)
    np.testing.assert_allclose(prover_advantage(jnp.array([0.1, 0.9, 0.2]), k=1), [0.8, -0.7], atol=1e-6)


def test_progress_is_constant_to_the_gradient_and_keeps_wide_types():
    q = jnp.array([[0.0, 1.0, 0.5]])
    assert not jnp.any(jax.jit(jax.grad(lambda q: jnp.sum(prover_advantage(q))))(q))
    assert bool(jnp.all(jnp.isfinite(jax.jit(jax.grad(lambda q: jnp.sum(bok_value(q))))(q))))
    assert bok_value(q.astype(jnp.bfloat16)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert prover_advantage(jnp.asarray([0.1, 0.2], jnp.float64)).dtype == jnp.float64


def test_beams_are_ranked_by_rate_and_progress_of_their_last_step():
    q = jnp.array([[0.1, 0.2, 0.7], [0.1, 0.2, 0.7], [0.3, 0.9, 0.9], [0.1, 0.1, 0.1]])
    known = jnp.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]])
    second = 0.7 + 0.5 * (0.8**4 - 0.3**4)
    found = beam_score(q, known)
    np.testing.assert_allclose(found, [0.2 + 0.5 * 0.2465, second, 0.3, 0], atol=1e-5)
    # A step that only keeps a good position ranks below one that improves a less good one.
    kept, made = beam_score(jnp.array([[0.5, 0.5], [0.1, 0.45]]))
    assert float(made) > float(kept)


def tree(rng, depth=3):
    """A policy in a binary tree, and its success rate in every node; at the leaves that is the outcome, 0 or 1."""
    p = [rng.dirichlet([1, 1], 2**level) for level in range(depth)]
    return p, rates(p, rng.integers(0, 2, 2**depth).astype(float))


def rates(p, outcome):
    q = [outcome]
    for rows in reversed(p):
        q.insert(0, (rows * q[0].reshape(-1, 2)).sum(axis=1))
    return q


def visits(p):
    """How often each inner node is visited, level by level."""
    found = [np.ones(1)]
    for rows in p[:-1]:
        found.append((found[-1][:, None] * rows).reshape(-1))
    return found


def logit_gradients(p, weight):
    """Exact policy gradient of each inner node's logits for `weight[level][child]` on the step into that child."""
    result = []
    for rows, often, w in zip(p, visits(p), weight, strict=True):
        w = w.reshape(-1, 2)
        result.append((often[:, None] * rows * (w - (rows * w).sum(axis=1, keepdims=True))).reshape(-1))
    return np.concatenate(result)


def steps(values, k):
    """Progress of the step into each node below the root, level by level."""
    return [
        np.asarray(prover_advantage(np.stack([np.repeat(above, 2), below], axis=1), k=k))[:, 0]
        for above, below in itertools.pairwise(values)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_progress_under_the_policy_itself_only_scales_its_expected_gradient(seed):
    p, q = tree(np.random.default_rng(seed))
    outcome = logit_gradients(p, q[1:])
    own = logit_gradients(p, [a + 3.0 * g for a, g in zip(q[1:], steps(q, 1), strict=True)])
    np.testing.assert_allclose(own, 4.0 * outcome, atol=1e-5)
    other = logit_gradients(p, [a + 3.0 * g for a, g in zip(q[1:], steps(q, 4), strict=True)])
    turned = other / np.linalg.norm(other) - outcome / np.linalg.norm(outcome)
    assert np.linalg.norm(turned) > 1e-3  # best-of-4 weighs the steps differently


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("alpha", [0.5, 5.0])
def test_progress_summed_along_a_path_does_not_change_which_paths_are_best(k, alpha):
    # A potential: at the end every prover's rate is the outcome itself, so that the rewards of a path add up to
    # (1 + alpha) r - alpha V(root), whatever the prover thinks on the way.
    for seed in range(8):
        rng = np.random.default_rng(seed)
        _, q = tree(rng, depth=4)
        another, _ = tree(rng, depth=4)
        prover = rates(another, q[-1])
        paths = np.arange(2**4)
        total = q[-1] + alpha * sum(g[paths >> (4 - level)] for level, g in enumerate(steps(prover, k), 1))
        root = 1 - (1 - prover[0][0]) ** k
        np.testing.assert_allclose(total, (1 + alpha) * q[-1] - alpha * root, atol=1e-5)
        np.testing.assert_array_equal(total >= total.max() - 1e-4, q[-1] == q[-1].max())


def test_paying_a_step_for_its_own_progress_keeps_the_order_of_steps_for_best_of_k_but_not_for_any_prover():
    # The weight of a step's log-prob is no return. Best-of-K is increasing in the rate of the policy, another prover
    # need not be: then the weights of some state prefer the step that is worse for the policy.
    kept = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        _, q = tree(rng)
        another, _ = tree(rng)
        for prover, k in ((q, 4), (rates(another, q[-1]), 1)):
            pairs = [np.sign(np.diff(x.reshape(-1, 2))) for x in q[1:]]
            weights = [x + 5.0 * g for x, g in zip(q[1:], steps(prover, k), strict=True)]
            agree = [p * np.sign(np.diff(w.reshape(-1, 2))) >= 0 for p, w in zip(pairs, weights, strict=True)]
            kept.append((k, all(x.all() for x in agree)))
    assert all(same for k, same in kept if k == 4)
    assert not all(same for k, same in kept if k == 1)


def test_a_prover_is_good_if_it_tells_steps_apart_and_agrees():
    probs = jnp.array([[0.5, 0.5], [0.25, 0.75]])
    a_pi = jnp.array([[0.2, -0.2], [0.3, -0.1]])
    # State 0: variance 0.01, agreement 0.02; state 1: variance 0.0075, agreement 0.015.
    a_mu = jnp.array([[0.1, -0.1], [0.15, -0.05]])
    np.testing.assert_allclose(prover_quality(a_mu, a_pi, probs), (0.03 + 0.0225) / 2, rtol=1e-5)
    np.testing.assert_allclose(prover_quality(a_mu, a_pi, probs, jnp.array([3.0, 1.0])), (0.09 + 0.0225) / 4, rtol=1e-5)
    # One that finds all steps alike is worth nothing, one that disagrees less than one that agrees.
    assert float(prover_quality(jnp.zeros((2, 2)), a_pi, probs)) == 0
    assert float(prover_quality(-a_mu, a_pi, probs)) < float(prover_quality(a_mu, a_pi, probs))


def test_best_of_some_tells_steps_of_a_weak_policy_apart_better_than_itself_and_than_best_of_very_many():
    q = jnp.array([[0.02, 0.1]])
    probs = jnp.array([[0.5, 0.5]])

    def advantage(k):
        value = bok_value(q, k=k)
        return value - jnp.sum(probs * value, axis=1, keepdims=True)

    quality = {k: float(prover_quality(advantage(k), advantage(1), probs)) for k in (1, 8, 1000)}
    assert quality[8] > quality[1]
    assert quality[8] > quality[1000]


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="k must be at least 1"):
        bok_value(jnp.zeros(2), k=0)
    with pytest.raises(ValueError, match="a_mu must have the shape of q_pi"):
        effective_reward(jnp.zeros(2), jnp.zeros(3))
    with pytest.raises(ValueError, match=r"q must be \[N, H\+1\]"):
        beam_score(jnp.zeros(3))
    with pytest.raises(ValueError, match="probs must have the shape of a_mu"):
        prover_quality(jnp.zeros((2, 2)), jnp.zeros((2, 2)), jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="weights must have the shape of a column of a_mu"):
        prover_quality(jnp.zeros((2, 2)), jnp.zeros((2, 2)), jnp.zeros((2, 2)), jnp.ones(3))

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages

comam, ndcg, agent_weights = (jax.jit(f) for f in (advantages.comam, advantages.ndcg, advantages.agent_weights))


def ndcg_by_loop(scores, relevance):
    def gain(order):
        return sum(relevance[i] / np.log2(place + 2) for place, i in enumerate(order))

    best = gain(np.argsort(-relevance, kind="stable"))
    return gain(np.argsort(-scores, kind="stable")) / best if best > 0 else 0.0


def test_ndcg_gives_the_closed_form_numbers():
    # DCG = 1 / log2(3) + 1 / 2 = 1.130930, at best 1 + 1 / log2(3) = 1.630930.
    found = ndcg(jnp.array([[0.9, 0.5, 0.1], [0.1, 0.5, 0.9]]), jnp.array([[0.0, 1.0, 1.0]] * 2))
    np.testing.assert_allclose(found, [0.69343, 1.0], rtol=1e-5)


def test_ndcg_agrees_with_a_float64_loop_with_ties_in_their_order():
    rng = np.random.default_rng(0)
    scores, relevance = rng.integers(0, 4, (50, 8)) / 4, rng.integers(0, 3, (50, 8)).astype(float)
    expected = [ndcg_by_loop(s, r) for s, r in zip(scores, relevance, strict=True)]
    np.testing.assert_allclose(ndcg(jnp.asarray(scores), jnp.asarray(relevance)), expected, rtol=1e-5)


def test_ndcg_without_relevance_is_zero_and_invalid_members_are_as_if_not_there():
    assert float(ndcg(jnp.array([3.0, 1.0]), jnp.zeros(2))) == 0
    scores, relevance = jnp.array([0.9, 0.5, 0.1]), jnp.array([0.0, 1.0, 1.0])
    padded = ndcg(
        jnp.array([9.0, 0.9, jnp.nan, 0.5, 0.1]),
        jnp.array([5.0, 0.0, jnp.nan, 1.0, 1.0]),
        jnp.array([False, True, False, True, True]),
    )
    np.testing.assert_allclose(padded, ndcg(scores, relevance), rtol=1e-6)


def test_weights_of_three_agents_are_the_closed_form_ones():
    local = jnp.array([[[0.9, 0.5, 0.1]], [[0.0, 1.0, 2.0]], [[0.0, 2.0, 1.0]]])
    found = agent_weights(local, jnp.array([[0.0, 1.0, 1.0]]))
    np.testing.assert_allclose(found[:, 0], [0.26900, 0.36550, 0.36550], rtol=2e-5)


def test_without_a_success_all_agents_have_the_same_weight():
    local = jnp.asarray(np.random.default_rng(0).random((4, 2, 5)))
    np.testing.assert_allclose(agent_weights(local, jnp.zeros((2, 5))), np.full((4, 2), 0.25), rtol=1e-6)


def test_of_a_group_with_negative_rewards_the_least_is_of_no_relevance_and_others_are_as_before():
    local = jnp.array([[[0.9, 0.5, 0.1, 0.7]], [[0.0, 1.0, 2.0, 9.0]]])
    rewards, valid = jnp.array([[-1.0, 0.0, 1.0, -7.0]]), jnp.array([[True, True, True, False]])
    # Relevance 0, 1, 2 of the valid ones; the best DCG is 2 + 1 / log2(3).
    best = 2 + 1 / np.log2(3)
    value = np.array([(1 / np.log2(3) + 2 / 2) / best, 1.0])
    np.testing.assert_allclose(
        agent_weights(local, rewards, valid)[:, 0], np.exp(value) / np.exp(value).sum(), rtol=1e-5
    )
    all_negative = agent_weights(local, rewards - 10, valid)
    np.testing.assert_allclose(all_negative, agent_weights(local, rewards, valid), rtol=1e-6)
    # A share of a constant is one: advantages follow from the rewards as they are.
    np.testing.assert_allclose(comam(5 * local, rewards - 10, valid), comam(5 * local, rewards, valid), atol=1e-5)
    positive = jnp.array([[1.0, 3.0, 2.0, -7.0]])
    value = [ndcg_by_loop(np.asarray(x[0, :3]), np.array([1.0, 3.0, 2.0])) for x in local]
    np.testing.assert_allclose(
        agent_weights(local, positive, valid)[:, 0], np.exp(value) / np.exp(value).sum(), rtol=1e-5
    )


def test_comam_is_grpo_of_each_agents_own_reward_and_its_share():
    rng = np.random.default_rng(1)
    local, rewards = rng.random((3, 4, 6)), rng.integers(0, 2, (4, 6)).astype(float)
    valid = rng.random((4, 6)) < 0.8
    expected = np.zeros_like(local)
    for p in range(4):
        who = np.flatnonzero(valid[p])
        values = np.array([ndcg_by_loop(local[n, p, who], rewards[p, who]) for n in range(3)])
        weights = np.exp(values) / np.exp(values).sum()
        for n in range(3):
            final = local[n, p, who] + weights[n] * rewards[p, who]
            expected[n, p, who] = (final - final.mean()) / (final.std(ddof=1) + 1e-6)
    found = comam(jnp.asarray(local, jnp.float32), jnp.asarray(rewards, jnp.float32), jnp.asarray(valid))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    ("local", "rewards"),
    [
        (np.ones((2, 1, 1)), np.ones((1, 1))),
        (np.ones((2, 1, 2)), np.ones((1, 2))),
        (np.zeros((2, 2, 4)), np.zeros((2, 4))),
    ],
    ids=["single", "equal", "zero"],
)
def test_groups_without_differences_give_zero(local, rewards, dtype):
    found = comam(jnp.asarray(local, dtype), jnp.asarray(rewards, dtype))
    assert found.dtype == jnp.float32
    assert np.all(np.asarray(found) == 0)


def test_nothing_valid_gives_zero_with_a_finite_gradient():
    nothing = jnp.zeros((1, 3), bool)
    value, gradient = jax.value_and_grad(lambda x: comam(x, jnp.array([[1.0, 0.0, 1.0]]), nothing).sum())(
        jnp.ones((2, 1, 3))
    )
    assert float(value) == 0
    assert np.all(np.isfinite(gradient))


def test_jit_vmap_and_float64():
    rng = np.random.default_rng(2)
    local, rewards = rng.random((5, 2, 3, 4)), rng.integers(0, 2, (5, 3, 4)).astype(float)
    both = jax.vmap(comam)(jnp.asarray(local), jnp.asarray(rewards))
    one = jnp.stack([comam(jnp.asarray(x), jnp.asarray(r)) for x, r in zip(local, rewards, strict=True)])
    np.testing.assert_allclose(both, one, rtol=1e-4, atol=1e-5)
    with jax.enable_x64(True):
        assert comam(local[0], rewards[0]).dtype == jnp.float64


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"local must be \[N, P, G\], one \[P, G\] = \[1, 2\]"):
        comam(jnp.ones((1, 2)), jnp.ones((1, 2)))
    with pytest.raises(ValueError, match=r"at least one agent, got shape \(0, 1, 2\)"):
        comam(jnp.ones((0, 1, 2)), jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="relevance must have the shape of scores"):
        ndcg(jnp.ones(2), jnp.ones(3))

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.rewards import novelty
from jaxrl_post.rewards.novelty import RunningMoments, combine_bonuses, count_bonus, noveld_bonus, rnd_bonus
from tests.rewards.compiled import compiled

elliptical_bonus, fingerprint = compiled(novelty.elliptical_bonus), compiled(novelty.fingerprint)
elliptical_bonus_of_group = compiled(novelty.elliptical_bonus_of_group)
token_embedding = compiled(novelty.token_embedding)


def _slow_ellipses(phi, done, ridge):
    """Bonuses by inverting the matrix anew at every step."""
    found, matrix = [], ridge * np.eye(phi.shape[1])
    for x, last in zip(phi, done, strict=True):
        found.append(x @ np.linalg.inv(matrix) @ x)
        matrix = ridge * np.eye(phi.shape[1]) if last else matrix + np.outer(x, x)
    return np.array(found)


def test_the_second_visit_to_a_direction_earns_a_tenth_and_a_new_direction_everything():
    found = elliptical_bonus(jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), ridge=0.1)
    np.testing.assert_allclose(found, [10.0, 0.9090909, 10.0], rtol=1e-5)


def test_the_rank_one_update_is_the_inverse_of_every_step_over_several_episodes():
    rng = np.random.default_rng(0)
    phi, done = rng.normal(size=(30, 6)), rng.random(30) < 0.15
    with jax.enable_x64(True):
        found = np.asarray(elliptical_bonus(phi, done))
    np.testing.assert_allclose(found, _slow_ellipses(phi, done, 0.1), rtol=1e-9)
    np.testing.assert_allclose(elliptical_bonus(phi, done), found, rtol=2e-3)  # in float32


def test_in_a_group_each_member_is_held_against_all_others():
    rng = np.random.default_rng(1)
    phi, mask = rng.normal(size=(3, 5, 4)), rng.random((3, 5)) < 0.8
    with jax.enable_x64(True):
        found = np.asarray(elliptical_bonus_of_group(phi, mask))
    for p in range(3):
        for g in range(5):
            others = [phi[p, j] for j in range(5) if j != g and mask[p, j]]
            matrix = 0.1 * np.eye(4) + sum(np.outer(x, x) for x in others)
            expected = phi[p, g] @ np.linalg.inv(matrix) @ phi[p, g] * mask[p, g]
            np.testing.assert_allclose(found[p, g], expected, rtol=1e-9, atol=1e-12)


def test_a_group_of_one_earns_all_equal_members_earn_the_same_and_no_gradient_flows():
    single = elliptical_bonus_of_group(jnp.array([[[1.0, 0.0]]]))
    np.testing.assert_allclose(single, [[10.0]], rtol=1e-5)
    assert elliptical_bonus_of_group(jnp.zeros((1, 3, 2))).tolist() == [[0.0] * 3]
    assert elliptical_bonus_of_group(jnp.ones((1, 2, 2)), jnp.zeros((1, 2))).tolist() == [[0.0, 0.0]]
    gradient = jax.jit(jax.grad(lambda x: elliptical_bonus_of_group(x).sum() + elliptical_bonus(x[0]).sum()))(
        jnp.ones((1, 2, 2))
    )
    assert not np.any(np.asarray(gradient))
    assert elliptical_bonus(jnp.ones((2, 2), jnp.bfloat16)).dtype == jnp.float32


def test_counts_pay_by_their_root_or_for_the_first_visit_only():
    np.testing.assert_allclose(count_bonus(jnp.array([0, 1, 4, 100])), [0, 1, 0.5, 0.1], rtol=1e-6)
    assert count_bonus(jnp.array([0, 1, 4]), first_only=True).tolist() == [0, 1, 0]


def test_a_random_networks_error_is_a_norm_and_a_square_and_noveld_pays_the_gain():
    target, prediction = jnp.array([[3.0, 4.0], [1.0, 1.0]]), jnp.array([[0.0, 0.0], [1.0, 1.0]])
    np.testing.assert_allclose(rnd_bonus(target, prediction), [5, 0])
    np.testing.assert_allclose(rnd_bonus(target, prediction, squared=True), [25, 0])
    gradient = jax.jit(jax.grad(lambda y: rnd_bonus(target, y).sum()))(prediction)
    np.testing.assert_allclose(gradient, [[-0.6, -0.8], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(noveld_bonus(jnp.array([1.0, 0.1]), jnp.array([0.5, 5.0])), [0.95, 0])
    np.testing.assert_allclose(noveld_bonus(jnp.array([1.0]), jnp.array([0.5]), c=0.0), [1])


def test_bonuses_multiply_or_add():
    a, b = jnp.array([2.0, 0.0]), jnp.array([3.0, 5.0])
    np.testing.assert_allclose(combine_bonuses(a, b), [6, 0])
    np.testing.assert_allclose(combine_bonuses(a, b, mode="sum", weight=0.1), [2.3, 0.5], rtol=1e-6)


def test_running_moments_are_those_of_all_numbers_at_once():
    rng = np.random.default_rng(2)
    batches, masks = 1e3 + rng.normal(size=(4, 3, 5)), rng.random((4, 3, 5)) < 0.7
    masks[1] = False
    moments = RunningMoments.zero()
    for x, mask in zip(batches, masks, strict=True):
        moments = jax.jit(RunningMoments.include)(moments, jnp.asarray(np.where(mask, x, np.nan)), mask)
    seen = batches[masks]
    np.testing.assert_allclose(moments.count, seen.size)
    np.testing.assert_allclose(moments.mean, seen.mean(), rtol=1e-6)
    np.testing.assert_allclose(moments.std, seen.std(), rtol=1e-3)
    assert float(RunningMoments.zero().std) == 0
    equal = RunningMoments.zero().include(jnp.full(3, 0.7)).include(jnp.full(2, 0.7))
    assert float(equal.std) < 1e-6


def test_fingerprints_know_tokens_and_their_order_and_nothing_else():
    tokens = jnp.array([[5, 7, 9, 9], [9, 5, 7, 9], [7, 5, 9, 9], [5, 7, 9, 9], [9, 9, 9, 9]])
    mask = jnp.array([[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]])
    found = np.asarray(fingerprint(tokens, mask))
    assert found[0] == found[1]
    assert len(set(found[[0, 2, 3, 4]].tolist())) == 4
    many = np.asarray(fingerprint(jnp.arange(40_000).reshape(-1, 4) % 211, jnp.ones((10_000, 4))))
    assert len(set(many.tolist())) >= 211 - 1  # 211 different rows (4 and 211 have no common factor)
    assert len(set(many.tolist())) <= 211


def test_hashed_embeddings_approximate_the_cosine_of_counts():
    rng = np.random.default_rng(3)
    tokens, mask = rng.integers(0, 2000, (40, 100)), np.ones((40, 100))
    tokens[20:, :50] = tokens[:20, :50]  # pairs of rows that share half of their tokens
    counts = np.stack([np.bincount(row, minlength=2000) for row in tokens]).astype(float)
    counts /= np.linalg.norm(counts, axis=1, keepdims=True)
    found = np.asarray(token_embedding(tokens, mask, size=256))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    off = ~np.eye(40, dtype=bool)
    difference = (found @ found.T - counts @ counts.T)[off]
    assert abs(difference.mean()) < 0.02
    assert difference.std() < 1.5 / 16  # the root of the size
    assert not np.any(np.asarray(token_embedding(tokens, mask * 0)))


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="ridge must be above 0"):
        elliptical_bonus(jnp.ones((2, 2)), ridge=0.0)
    with pytest.raises(ValueError, match=r"phi must be \[P, G, D\]"):
        elliptical_bonus_of_group(jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="done must have the shape of a column of phi"):
        elliptical_bonus(jnp.ones((2, 3)), jnp.ones(3))
    with pytest.raises(ValueError, match='mode must be "product" or "sum"'):
        combine_bonuses(jnp.ones(2), jnp.ones(2), mode="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight=0\.5 does not apply to a product"):
        combine_bonuses(jnp.ones(2), jnp.ones(2), weight=0.5)
    with pytest.raises(ValueError, match="size must be at least 1"):
        token_embedding(jnp.ones((1, 2), int), jnp.ones((1, 2)), size=0)

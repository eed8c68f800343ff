import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.rewards import similarity
from jaxrl_post.rewards.similarity import matching_reward
from tests.rewards.compiled import compiled

greedy_matching = compiled(similarity.greedy_matching)


def test_one_token_against_two_gives_hand_worked_numbers():
    given = greedy_matching(jnp.array([[[3.0, 0.0]]]), jnp.array([[[1.0, 0.0], [0.0, 2.0]]]))
    np.testing.assert_allclose(jnp.stack(given)[:, 0], [1, 0.5, 2 / 3], rtol=1e-6)


def test_matching_agrees_with_a_loop_and_never_reads_masked_tokens():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 4, 3)), rng.normal(size=(5, 6, 3))
    x_mask, y_mask = rng.random((5, 4)) < 0.6, rng.random((5, 6)) < 0.6
    x_mask[0], y_mask[1] = False, False
    x_mask[2:, 0], y_mask[2:, 0] = True, True
    x, y = np.where(x_mask[..., None], x, np.nan), np.where(y_mask[..., None], y, np.nan)
    with jax.enable_x64(True):
        given = greedy_matching(x, y, x_mask, y_mask)
    for b in range(5):
        ours, theirs = x[b, x_mask[b]], y[b, y_mask[b]]
        if not len(ours) or not len(theirs):
            assert not any(float(score[b]) for score in given)
            continue
        cosine = ours @ theirs.T / np.linalg.norm(ours, axis=1)[:, None] / np.linalg.norm(theirs, axis=1)
        p, r = cosine.max(1).mean(), cosine.max(0).mean()
        expected = p, r, 2 * p * r / (p + r) if p + r > 0 else 0
        np.testing.assert_allclose([score[b] for score in given], expected, rtol=1e-9)


def test_a_text_matches_itself_in_any_order_and_opposite_texts_not_at_all():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 5, 8)), jnp.bfloat16)
    same = greedy_matching(x, x[:, ::-1])
    assert same.f1.dtype == jnp.float32
    np.testing.assert_allclose(same.f1, [1], rtol=1e-5)
    one = jnp.ones((1, 1, 2))
    assert float(greedy_matching(one, -one).f1[0]) == 0


def test_zero_embeddings_have_finite_gradients():
    gradient = jax.jit(jax.grad(lambda x: greedy_matching(x, jnp.ones((1, 2, 3))).f1.sum()))(jnp.zeros((1, 2, 3)))
    assert np.all(np.isfinite(gradient))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="x and y must agree in B and D"):
        greedy_matching(jnp.ones((1, 2, 3)), jnp.ones((1, 2, 4)))
    with pytest.raises(ValueError, match="y_mask must have the shape"):
        greedy_matching(jnp.ones((1, 2, 3)), jnp.ones((1, 2, 3)), y_mask=jnp.ones((1, 3)))


def test_texts_are_rewarded_for_synonyms_and_none_without_an_answer():
    meaning = {"big": [1.0, 0.0], "large": [0.8, 0.6], "cat": [0.0, 1.0]}
    reward = matching_reward(lambda text: np.array([meaning[word] for word in text.split()]).reshape(-1, 2))
    answers = ["big", "big cat", "cat", None, "cat"]
    given = reward([""] * 5, ["large", "cat big", "cat", "cat", ""], answer=answers, other=[1] * 5)
    np.testing.assert_allclose(given[:3], [0.8, 1, 1], rtol=1e-6)
    assert given[3:] == [None, 0.0]

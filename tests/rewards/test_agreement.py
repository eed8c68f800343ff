"""Rewards without labels, against the papers' numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages, rewards

ANSWERS = jnp.array([[7, 7, 8, 9]])


def test_shares_and_entropy_are_the_papers():
    assert rewards.answer_share(ANSWERS).tolist() == [[0.5, 0.5, 0.25, 0.25]]
    np.testing.assert_allclose(rewards.semantic_entropy(ANSWERS), [1.039721], rtol=1e-6)
    unread = jnp.array([[7, 7, -1, -1]])
    assert rewards.answer_share(unread).tolist() == [[0.5, 0.5, 0.0, 0.0]]
    np.testing.assert_allclose(rewards.semantic_entropy(unread), [1.039721], rtol=1e-6)
    valid = jnp.array([[1, 1, 1, 0]])
    np.testing.assert_allclose(rewards.answer_share(ANSWERS, valid), [[2 / 3, 2 / 3, 1 / 3, 0]], rtol=1e-6)


def test_groups_in_which_none_or_all_agree_teach_nothing():
    answers = jnp.array([[7, 7, 8, 9], [1, 2, 3, 4], [5, 5, 5, 5], [-1, -1, -1, -1]])
    found = jax.jit(rewards.empo_reward)(answers)
    np.testing.assert_allclose(found, [[0.5, 0.5, 0.25, 0.25], [0] * 4, [1] * 4, [0] * 4])
    assert rewards.empo_reward(answers, high=1.0).tolist()[0] == [0.0] * 4
    assert rewards.empo_reward(answers, low=1.1, high=2.0).tolist()[0] == [0.0] * 4
    assert rewards.empo_reward(answers, low=0.5).tolist()[2] == [0.0] * 4


def test_the_entropy_term_changes_no_advantage_of_the_group():
    with_entropy = rewards.empo_reward(ANSWERS, alpha=0.75, high=2.0)
    np.testing.assert_allclose(with_entropy, [[-0.27979, -0.27979, -0.52979, -0.52979]], atol=1e-5)
    found, plain = (advantages.grpo(x, ddof=0, eps=0.0) for x in (with_entropy, rewards.answer_share(ANSWERS)))
    np.testing.assert_allclose(found, [[1, 1, -1, -1]], atol=1e-5)
    np.testing.assert_allclose(found, plain, atol=1e-5)
    with pytest.raises(ValueError, match="alpha"):
        rewards.empo_reward(ANSWERS, alpha=-1.0)


def test_the_majority_is_the_first_of_the_most_frequent():
    answers = jnp.array([[3, 3, 5, 7], [4, 9, 9, 4], [-1, -1, -1, 2], [-1, -1, -1, -1]])
    assert rewards.majority(answers).tolist() == [3, 4, 2, -1]
    assert rewards.majority(answers, jnp.array([[0, 0, 1, 1]] * 4)).tolist() == [5, 9, 2, -1]


def test_each_side_is_labelled_by_the_other():
    one, two = rewards.co_reward(jnp.array([[3, 3, 5, 7]]), jnp.array([[5, 5, 3, 5]]))
    assert (one.tolist(), two.tolist()) == ([[0, 0, 1, 0]], [[0, 0, 1, 0]])
    one, two = rewards.co_reward(jnp.array([[-1, -1, -1]]), jnp.array([[5, -1]]))
    assert float(one.sum() + two.sum()) == 0
    with pytest.raises(ValueError, match="other"):
        rewards.co_reward(jnp.ones((1, 2), int), jnp.ones((2, 2), int))


def test_paraphrases_are_compared_with_each_other_alone():
    pairs = jnp.array([[1.0, 0.8, 0.2], [0.8, 1.0, 0.4], [0.2, 0.4, 1.0]])[:, None, :, None]
    np.testing.assert_allclose(rewards.paraphrase_consistency(pairs)[:, 0], [0.5, 0.6, 0.3], rtol=1e-6)
    assert rewards.paraphrase_consistency(jnp.ones((1, 3, 1, 3))).tolist() == [[0, 0, 0]]
    rng = np.random.default_rng(0)
    similarity = jnp.asarray(rng.random((3, 2, 3, 2)), jnp.float32)
    exact = rewards.paraphrase_consistency(similarity)
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = jax.vmap(lambda key: rewards.paraphrase_consistency(similarity, key, count=2))(keys)
    np.testing.assert_allclose(jnp.mean(drawn, axis=0), exact, atol=0.02)
    with pytest.raises(ValueError, match="both or neither"):
        rewards.paraphrase_consistency(similarity, count=2)
    with pytest.raises(ValueError, match="similarity"):
        rewards.paraphrase_consistency(similarity[:, :, :2])


def test_texts_are_compared_by_what_a_pattern_finds_in_them():
    texts = ["so <a>4</a>", "<a>5</a> no, <a> 4 </a>", "<a>Six</a>", "none", "<a>six</a>", "<a></a>"]
    pattern = "<a>(.*?)</a>"
    found = rewards.agreement(["?"] * 6, texts, pattern=pattern)
    np.testing.assert_allclose(found, [2 / 6, 2 / 6, 2 / 6, 0, 2 / 6, 0])
    found = rewards.agreement(["?"] * 6, texts, pattern=pattern, vote="majority")
    assert found == [1, 1, 0, 0, 0, 0]
    assert rewards.agreement(["a", "a", "b"], ["1", "2", "1"]) == [0.0, 0.0, 1.0]
    assert rewards.agreement(["a", "a", "b"], ["1", "2", "1"], gate=False) == [0.5, 0.5, 1.0]
    for options in ({"vote": "none"}, {"pattern": "<a>"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            rewards.agreement(["?"], ["x"], **options)


def test_texts_agree_with_the_arrays():
    rng = np.random.default_rng(1)
    numbers = rng.integers(0, 4, (5, 6))
    prompts, texts = np.repeat(np.arange(5), 6).astype(str).tolist(), numbers.reshape(-1).astype(str).tolist()
    np.testing.assert_allclose(rewards.agreement(prompts, texts), rewards.empo_reward(jnp.asarray(numbers)).reshape(-1))
    voted = rewards.agreement(prompts, texts, vote="majority")
    label = rewards.majority(jnp.asarray(numbers))
    np.testing.assert_allclose(voted, (numbers == np.asarray(label)[:, None]).reshape(-1))


def test_wordings_of_a_question_label_each_other():
    prompts = ["a"] * 4 + ["a'"] * 4 + ["b"]
    texts = ["3", "3", "5", "7", "5", "5", "3", "5", "9"]
    question = [1] * 8 + [2]
    assert rewards.cross_agreement(prompts, texts, question) == [0, 0, 1, 0, 0, 0, 1, 0, None]
    found = rewards.similarity_across(["a", "a'", "a''", "b"], ["in Paris", "Paris", "Rome", "x"], [1, 1, 1, 2])
    assert found == [pytest.approx(1 / 3), pytest.approx(1 / 3), 0.0, None]

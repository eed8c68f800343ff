"""Critiques as scores of words and tokens, case by case."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import rewards


def test_words_within_spans_are_scored():
    assert rewards.span_scores("the cat sat badly", ["cat sat"], ["badly"]) == [0, 1, 1, -1]
    assert rewards.span_scores("so so good", ["so"], []) == [1, 1, 0]
    assert rewards.span_scores("a plan", ["a plan"], ["plan"]) == [1, -1]
    assert rewards.span_scores("anything", [" ", ""], ["absent entirely"]) == [0]
    assert rewards.span_scores("", ["x"], ["y"]) == []


def test_what_is_not_found_is_stood_for_by_what_is_most_like_it():
    text = "First, we compute the sum of all numbers."
    assert rewards.span_scores(text, ["computing the sum"], []) == [0, 0, 1, 1, 1, 0, 0, 0]
    assert rewards.span_scores(text, ["computing the sum"], [], similar=1.1) == [0] * 8


def test_tokens_belong_to_the_word_they_begin_in():
    text = "the cat  sat"
    offsets = [(0, 3), (3, 5), (5, 7), (7, 8), (8, 12), (12, 12)]
    assert rewards.word_of_token(text, offsets) == [0, 1, 1, -1, 2, -1]


def test_scores_fade_with_the_distance_from_the_first():
    scores = jnp.zeros((2, 60)).at[0, 5:].set(1.0)
    found = rewards.span_decay(scores, middle=20.0)
    np.testing.assert_allclose(found[0, jnp.array([15, 31, 45])], [0.99995, 0.5, 0.00247], atol=1e-5)
    assert float(jnp.abs(found[0, :5]).sum() + jnp.abs(found[1]).sum()) == 0
    with pytest.raises(ValueError, match="scores"):
        rewards.span_decay(scores[0], middle=1.0)

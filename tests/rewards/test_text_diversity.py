"""Statistics of how varied a text is, against numbers that were computed by hand."""

import pytest

from jaxrl_post import rewards


def test_the_papers_statistics_of_two_short_sentences():
    found = rewards.token_diversity(["abac", "ab"])
    wanted = {
        "type_token": 0.5,
        "entropy": 0.920620,
        "sentence_length": 1 / 3,
        "adjacent": 1 / 3,
        "yule": 1 / (1 + 2222.222),
        "distinct_2": 0.8,
    }
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("sentences", [[], [[]], ["a"], ["aaaa"]])
def test_one_word_is_not_varied(sentences):
    assert set(rewards.token_diversity(sentences).values()) == {0.0}


def test_a_text_is_cut_into_sentences_and_words():
    found = rewards.text_diversity("The cat sat. The Cat sat!\nWas it so?")
    assert found["type_token"] == pytest.approx(6 / 9)
    assert found["adjacent"] == pytest.approx(0.5)
    assert found["sentence_kind"] == pytest.approx(0.792481, rel=1e-5)
    assert 0 < found["function_words"] < 1
    assert len(found) == 8


@pytest.mark.parametrize("text", ["", "...", "one", "?!", "a b c d e f g " * 200])
def test_any_text_has_statistics_between_0_and_1(text):
    assert all(0 <= value <= 1 for value in rewards.text_diversity(text).values())
    assert rewards.diversity([""], [text])[0] == pytest.approx(sum(rewards.text_diversity(text).values()) / 8)

"""F1 of words."""

import pytest

from jaxrl_post.rewards import word_f1


def of(completion, answer, **options):
    return word_f1([""], [completion], answer=[answer], **options)[0]


def test_f1_counts_shared_words_without_case_punctuation_or_order():
    assert of("Barack  Obama!", "obama, barack") == 1.0
    # Two of three words are right, two of four are found.
    assert of("the red fox", "quick red fox jumps") == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert of("nothing", "else") == 0.0
    assert of("", "else") == 0.0
    assert of("3.5", 3.5) == 1.0


def test_saying_a_word_more_often_does_not_pay():
    assert of("paris paris paris", "paris") == pytest.approx(0.5)
    assert of("new york new york", "new york") == pytest.approx(2 / 3)


def test_the_best_of_several_answers_counts_and_none_is_not_scored():
    assert of("NYC", ["New York", "nyc"]) == 1.0
    assert of("NYC", None) is None
    assert of("NYC", []) is None


def test_only_the_last_match_of_the_pattern_is_compared_and_no_match_has_the_penalty():
    pattern = "<answer>(.*?)</answer>"
    text = "<answer>Rome</answer> or rather <answer>\nParis</answer>, in France"
    assert of(text, "Paris", pattern=pattern) == 1.0
    assert of("Paris", "Paris", pattern=pattern, penalty=-2.0) == -2.0
    assert of("Paris", None, pattern=pattern, penalty=-2.0) is None
    with pytest.raises(ValueError, match="pattern must have exactly one group"):
        of("x", "x", pattern="<answer>.*</answer>")

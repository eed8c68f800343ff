import numpy as np
import pytest

from jaxrl_post import data

OPTIONS = ["red", "green", "blue", "white"]


def test_the_old_answer_becomes_the_only_wrong_option():
    for seed in range(20):
        keep = 1 + seed % 3
        made = data.invert_question(OPTIONS, 2, keep, np.random.default_rng(seed))
        assert len(made.options) == len(set(made.options)) == keep + 1
        assert set(made.options) <= set(OPTIONS)
        assert [option for i, option in enumerate(made.options) if i not in made.answers] == ["blue"]
        assert made.answers == sorted(made.answers)


def test_every_kept_set_and_every_order_comes_up():
    seen = {tuple(data.invert_question(OPTIONS, 0, 2, np.random.default_rng(seed)).options) for seed in range(400)}
    assert len(seen) == 3 * 6  # three pairs of the others, six orders each


def test_what_cannot_be_inverted_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="answer must be the index of one of 4 options, got 4"):
        data.invert_question(OPTIONS, 4, 1, rng)
    with pytest.raises(ValueError, match="keep must be between 1 and the 3 other options, got 4"):
        data.invert_question(OPTIONS, 0, 4, rng)
    with pytest.raises(ValueError, match="keep must be between 1 and the 0 other options"):
        data.invert_question(["only"], 0, 1, rng)


@pytest.mark.parametrize(
    ("question", "negated"),
    [
        ("What did she take?", "What didn't she take?"),
        ("Is it red?", "Isn't it red?"),
        ("Which of the cups is red?", None),  # the verb is too far in for the rule to be safe
        ("Who won?", None),
    ],
)
def test_a_question_is_negated_at_its_first_auxiliary_verb(question, negated):
    assert data.negate_question(question) == negated

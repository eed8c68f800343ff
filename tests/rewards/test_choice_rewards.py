import itertools
from collections import Counter

import pytest

from jaxrl_post import rewards


@pytest.mark.parametrize(
    ("chosen", "right", "expected"),
    [
        ("A", "AC", 0.5),
        ("AC", "AC", 1.0),
        ("AB", "AC", 0.0),  # a wrong one among them
        ("", "AC", 0.0),
        ("ABCD", "AC", 0.0),
        ("", "", 1.0),
        ("A", "", 0.0),
    ],
)
def test_a_choice_earns_its_share_of_the_right_options_unless_a_wrong_one_is_in_it(chosen, right, expected):
    assert rewards.partial_choice_reward(chosen, right) == expected


def test_groups_whose_rewards_are_all_equal_are_rarer_than_with_all_or_nothing():
    # Eight answers that tick each of four options with probability 1/2, exactly: 0.19 against 0.60.
    ticked = ["".join(c) for n in range(5) for c in itertools.combinations("ABCD", n)]
    shares = [rewards.partial_choice_reward(chosen, "AC") for chosen in ticked]
    partial, strict = (Counter(x) for x in (shares, [share == 1 for share in shares]))
    equal_partial, equal_strict = (sum((n / 16) ** 8 for n in x.values()) for x in (partial, strict))
    assert equal_partial == pytest.approx((13 / 16) ** 8 + (2 / 16) ** 8 + (1 / 16) ** 8)
    assert equal_strict == pytest.approx((15 / 16) ** 8 + (1 / 16) ** 8)
    assert equal_partial < equal_strict / 3


def test_choices_are_read_from_the_last_marked_answer_or_the_whole_text():
    completions = ["<answer>B</answer> no, <answer>a; C</answer>", "a c", "<ANSWER>\nA\n</ANSWER>", "no idea", "C"]
    found = rewards.partial_choice([""] * 5, completions, answer=["A,C", "A, C", ("a", "c"), "A", None])
    assert found == [1.0, 1.0, 0.5, 0.0, None]
    assert rewards.partial_choice([""], ["In <answer> tags: <answer>B</answer>" + "<answer>" * 100_000], ["B"]) == [1.0]


@pytest.mark.parametrize(
    ("found", "expected", "alpha", "reward"),
    [
        ({1, 2, 9}, {1, 2, 3, 4}, 0.8, 0.48),  # 0.8 * 2 / 4 + 0.2 * 2 / 5
        ({1, 2, 9}, {1, 2, 3, 4}, 0.2, 0.42),
        ({1, 2}, {1, 2}, 0.8, 1.0),
        (set(), {1}, 0.8, 0.0),
        ({3}, {1}, 0.8, 0.0),
        (set(), set(), 0.8, 1.0),
        ({1}, set(), 0.8, 0.0),
    ],
)
def test_a_set_is_rewarded_for_its_recall_and_for_what_both_have_in_common(found, expected, alpha, reward):
    assert rewards.set_overlap(found, expected, alpha=alpha) == pytest.approx(reward)


def test_a_weight_outside_of_zero_and_one_is_refused():
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 1.5"):
        rewards.set_overlap({1}, {1}, alpha=1.5)

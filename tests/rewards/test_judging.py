"""A judge of pairs as a reward function."""

import pytest

from jaxrl_post import rewards
from jaxrl_post.training import config as configs
from jaxrl_post.training.reward_setup import make_rewards
from tests.training.configurations import make


def test_each_completion_earns_its_win_rate_among_those_to_its_prompt():
    shown = []

    def beats(first, second):
        shown.extend(zip(first, second, strict=True))
        order = {("rock", "scissors"), ("scissors", "paper"), ("paper", "rock")}
        return [float(pair in order) for pair in zip(first, second, strict=True)]

    prompts = ["a", "a", "b", "b", "b"]
    found = rewards.from_judge(beats)(prompts, ["rock", "paper", "rock", "paper", "scissors"])
    assert found == [0.0, 1.0, 0.5, 0.5, 0.5]
    assert len(shown) == 2 * (1 + 3)
    assert ("rock", "paper") in shown
    assert ("paper", "rock") in shown


def test_a_liking_for_the_first_place_cancels_only_where_both_orders_are_shown():
    def first_always(first):
        return [1.0] * len(first)

    assert rewards.from_judge(first_always)(["?"] * 2, ["a", "b"]) == [0.5, 0.5]
    assert rewards.from_judge(first_always, both_orders=False)(["?"] * 2, ["a", "b"]) == [1.0, 0.0]


def test_equal_answers_are_not_shown_and_what_cannot_be_said_is_left_out():
    def judge(prompts, first, second, length):
        assert len(prompts) == len(length)
        return [None if "?" in a + b else float(len(a) > len(b)) for a, b in zip(first, second, strict=True)]

    found = rewards.from_judge(judge)(["q"] * 4, ["a", "a", "bb", "?"], length=[1, 1, 2, 1])
    assert found == [0.25, 0.25, 1.0, None]
    assert rewards.from_judge(judge)(["q", "r"], ["a", "b"], length=[1, 1]) == [None, None]


def test_with_an_anchor_each_completion_is_compared_with_it_alone_in_both_orders():
    shown = []

    def judge(prompts, first, second, bar):
        shown.extend(zip(prompts, first, second, bar, strict=True))
        return [0.9 if len(a) > len(b) else 0.2 for a, b in zip(first, second, strict=True)]

    anchored = rewards.from_judge(judge, against="anchor")
    found = anchored(["q", "q", "r"], ["aaa", "bb", "c"], anchor=["bb", "bb", "dd"], bar=[1, 1, 2])
    assert found == pytest.approx([(0.9 + 0.8) / 2, 0.5, (0.2 + 0.1) / 2])
    assert sorted(shown) == [("q", "aaa", "bb", 1), ("q", "bb", "aaa", 1), ("r", "c", "dd", 2), ("r", "dd", "c", 2)]
    assert anchored([], [], anchor=[], bar=[]) == []
    with pytest.raises(ValueError, match="against='anchor' names no column of the data; there are bar"):
        anchored(["q"], ["a"], bar=[1])


def test_a_coroutine_judges_through_the_scorer():
    async def judge(first, second):
        return [float(a > b) for a, b in zip(first, second, strict=True)]

    part = rewards.RewardFunction("judge", rewards.from_judge(judge))
    found = rewards.score([part], ["q", "q", "r"], ["a", "b", "c"])
    assert found.total.tolist()[:2] == [0.0, 1.0]
    assert found.valid.tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (lambda first: [1.0], "shown 2 pairs and returned 1"),
        (lambda first: [1.0, 1.5], "probability in"),
        (lambda first, answer: [1.0, 1.0], "needs 'answer'"),
    ],
)
def test_a_judge_that_does_not_fit_is_an_error_that_says_why(judge, message):
    with pytest.raises(ValueError, match=message):
        rewards.from_judge(judge)(["q", "q"], ["a", "b"])


def test_a_configuration_names_a_judge_and_gets_a_reward(tmp_path):
    code = "def longer(first, second):\n    return [float(len(a) > len(b)) for a, b in zip(first, second)]\n"
    (tmp_path / "own.py").write_text(code)
    given = [{"path": f"{tmp_path}/own.py:longer", "adapter": "judge"}]
    config = configs.from_dict(make(rewards=given, eval={"problems": 0}))
    (reward,) = make_rewards(config, lambda: pytest.fail("the judge needs no task"))
    assert rewards.score([reward], ["q", "q"], ["a", "bb"]).total.tolist() == [0.0, 1.0]

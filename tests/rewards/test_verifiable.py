"""Exact match, a task's own scorer, thresholds."""

import asyncio

import pytest

from jaxrl_post.data import ReasoningGymSource, columns
from jaxrl_post.rewards import (
    RewardError,
    RewardFunction,
    RowErrors,
    exact_match,
    score,
    task_score,
    task_solved,
    thresholded,
)


def test_exact_match_ignores_white_space_at_the_ends_only():
    completions = [" 12\n", "1 2", "12.", "", "x"]
    assert exact_match(["p"] * 5, completions, answer=["12", "12", 12, "", None]) == [1.0, 0.0, 0.0, 1.0, None]


def spelling(words):
    source = ReasoningGymSource("spell_backward", seed=0, size=words, prompt="{word}>", lowercase=True)
    return source, [source[i] for i in range(words)]


def test_the_tasks_own_scorer_is_the_reward():
    source, problems = spelling(3)
    answers = [problem["answer"] for problem in problems]
    completions = [answers[0], answers[1][:-1], ""]
    result = score(
        [RewardFunction("task_score", task_score(source.score_answer))], ["p"] * 3, completions, columns(problems)
    )
    # All letters but the last of a word of n: n - 1 of n places are right.
    assert result.total.tolist() == pytest.approx([1.0, 1 - 1 / len(answers[1]), 0.0])


def test_a_threshold_takes_partial_credit_away():
    source, problems = spelling(2)
    completions = [problems[0]["answer"], problems[1]["answer"][:-1]]
    parts = [RewardFunction("task_score", task_score(source.score_answer, threshold=0.999))]
    assert score(parts, ["p"] * 2, completions, columns(problems)).total.tolist() == [1.0, 0.0]


def test_a_completion_that_the_scorer_cannot_parse_gets_nothing():
    source = ReasoningGymSource("prime_factorization", seed=0, size=1)
    entry = source[0]["entry"]
    with pytest.raises(ValueError, match="invalid literal"):
        source.score_answer("garbage", entry)
    reward = task_score(source.score_answer)
    assert reward(["p"] * 2, ["garbage", entry["answer"]], entry=[entry] * 2) == [0.0, 1.0]


def test_a_scorer_that_fails_on_its_own_answer_is_an_error_at_that_row():
    def broken(answer, entry):
        raise RuntimeError(f"no {entry['kind']}")

    entry = [None, {"answer": "1", "kind": "solver"}]
    part = RewardFunction("task_score", task_score(broken))
    with pytest.raises(RewardError, match="'task_score' raised RuntimeError: no solver, at row 1"):
        score([part], ["p"] * 2, ["1", "1"], {"entry": entry})


def test_a_row_without_an_entry_cannot_be_scored():
    assert task_score(lambda answer, entry: 1.0)(["p"] * 2, ["x", "y"], entry=[None, {}]) == [None, 1.0]


def test_thresholded_cuts_numbers_and_leaves_the_rest():
    values = [0.2, 0.5, True, None, "text", float("nan")]
    cut = thresholded(lambda completions: values, 0.5)(completions=[])
    assert cut[:5] == [0.0, 1.0, 1.0, None, "text"]
    assert cut[5] != cut[5]


def test_thresholded_asks_for_the_columns_of_the_function_inside():
    def level_reward(completions, level):
        return level

    part = RewardFunction("level", thresholded(level_reward, 2))
    assert score([part], ["p"] * 2, ["x"] * 2, {"level": [1, 3], "other": [0, 0]}).total.tolist() == [0.0, 1.0]


def test_thresholded_keeps_failed_rows_and_waits_for_coroutines():
    def some_rows(completions):
        raise RowErrors([0.9, None], {1: ValueError("bad")})

    async def later(completions):
        return [0.4, 0.6]

    async def some_rows_later(completions):
        return some_rows(completions)

    for function in (some_rows, some_rows_later):
        result = score([RewardFunction("f", thresholded(function, 0.5))], ["p"] * 2, ["x"] * 2, on_error="invalid")
        assert (result.total.tolist(), result.errors) == ([1.0, 0.0], {"f": 1})
    assert asyncio.run(thresholded(later, 0.5)(completions=[])) == [0.0, 1.0]


@pytest.mark.parametrize("values", [[0.9], 0.9, "0.9"])
def test_thresholded_does_not_hide_a_wrong_count(values):
    part = RewardFunction("f", thresholded(lambda completions: values, 0.5))
    with pytest.raises(RewardError, match="'f' returned"):
        score([part], ["p"] * 2, ["x"] * 2)


@pytest.mark.parametrize("threshold", [float("nan"), float("inf")])
def test_a_threshold_must_be_finite(threshold):
    with pytest.raises(ValueError, match="threshold must be a finite number"):
        task_score(lambda answer, entry: 1.0, threshold=threshold)


def test_letters_after_the_answer_are_no_solution_whatever_the_scorer_s_rounding_gives():
    """reasoning-gym's scorer adds up 1/n per letter: 0.9999999999999999 for n = 6, 1.0000000000000002 for n = 9."""
    source = ReasoningGymSource("spell_backward", seed=0, size=300, prompt="{word}>", lowercase=True)
    problems = [source[index] for index in range(300)]
    entries = [problem["entry"] for problem in problems]
    answers = [problem["answer"] for problem in problems]
    longer = [answer + "x" for answer in answers]
    nothing = [""] * 300
    assert max(task_score(source.score_answer)(nothing, longer, entries)) > 0.999
    assert task_solved(source.score_answer)(nothing, answers, entries) == [1.0] * 300
    assert task_solved(source.score_answer)(nothing, longer, entries) == [0.0] * 300
    assert task_solved(source.score_answer)([""], ["x"], [None]) == [None]

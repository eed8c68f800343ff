"""Reward functions with the signatures of verl and verifiers."""

import pytest

from jaxrl_post.rewards import RewardError, RewardFunction, from_verifiers, from_verl, score

PROMPTS = ["1+1=", "1+2="]
COMPLETIONS = ["2", "4"]


def run(function, columns=None, **options):
    return score([RewardFunction("f", function)], PROMPTS, COMPLETIONS, columns, **options)


def test_verl_gets_one_sample_at_a_time_from_verls_columns():
    seen = []

    def compute_score(data_source, solution_str, ground_truth, extra_info=None, **rest):
        seen.append((data_source, solution_str, ground_truth, extra_info, rest))
        return {"score": float(solution_str == ground_truth), "acc": 1}

    columns = {
        "data_source": ["gsm8k", "math"],
        "reward_model": [{"style": "rule", "ground_truth": "2"}, {"style": "rule", "ground_truth": "3"}],
        "extra_info": [{"index": 0}, None],
    }
    assert run(from_verl(compute_score), columns).total.tolist() == [1.0, 0.0]
    assert seen == [("gsm8k", "2", "2", {"index": 0}, {}), ("math", "4", "3", None, {})]


def test_verl_truth_may_stand_in_ground_truth_or_answer_and_parameters_may_be_fewer():
    function = from_verl(lambda solution_str, ground_truth: float(solution_str == ground_truth))
    assert run(function, {"ground_truth": ["2", "4"], "answer": ["0", "0"]}).total.tolist() == [1.0, 1.0]
    assert run(function, {"answer": ["0", "4"]}).total.tolist() == [0.0, 1.0]


def test_verl_data_source_has_a_stand_in():
    function = from_verl(lambda data_source, solution_str: float(data_source == "mine"), data_source="mine")
    assert run(function).total.tolist() == [1.0, 1.0]


def test_verl_without_a_truth_says_what_is_missing():
    with pytest.raises(RewardError, match=r"'f' raised ValueError: the function needs 'ground_truth', but the row has"):
        run(from_verl(lambda solution_str, ground_truth: 1.0), {"label": ["a", "b"]})


def test_a_verl_dict_without_score_is_an_error():
    with pytest.raises(RewardError, match=r"dict without 'score', only \['acc'\]"):
        run(from_verl(lambda solution_str: {"acc": 1.0}))


@pytest.mark.parametrize("adapter", [from_verl, from_verifiers])
def test_one_row_that_raises_is_named_and_the_other_still_scored(adapter):
    def function(answer=None, ground_truth=None):
        return 1 / (answer if ground_truth is None else ground_truth)

    columns = {"answer": [4, 0]}
    with pytest.raises(RewardError, match=r"'f' raised ZeroDivisionError: division by zero, at row 1"):
        run(adapter(function), columns)
    result = run(adapter(function), columns, on_error="invalid")
    assert (result.total.tolist(), result.valid.tolist(), result.errors) == ([0.25, 0.0], [True, False], {"f": 1})


def test_none_from_an_adapted_function_means_not_scored():
    result = run(from_verl(lambda solution_str: None if solution_str == "2" else 1.0))
    assert (result.total.tolist(), result.valid.tolist(), result.errors) == ([0.0, 1.0], [False, True], {"f": 0})


def test_verifiers_functions_get_what_they_name():
    seen = []

    def function(completion, state, info, parser, task, level):
        seen.append((completion, state, info, parser, task, level))
        return 1

    run(from_verifiers(function), {"level": [5, 6], "answer": ["2", "3"], "info": [{"k": 1}, {"k": 2}]})
    state = {"prompt": "1+1=", "completion": "2", "answer": "2", "task": "default", "info": {"k": 1}}
    assert seen[0] == ("2", state, {"k": 1}, None, "default", 5)
    assert (seen[1][0], seen[1][1]["prompt"], seen[1][5]) == ("4", "1+2=", 6)


@pytest.mark.parametrize("adapter", [from_verl, from_verifiers])
def test_coroutine_functions_are_adapted_too(adapter):
    class Judge:
        async def __call__(self, answer="", ground_truth=""):
            truth = answer or ground_truth
            if truth == "bad":
                raise TimeoutError("no verdict")
            return float(truth)

    async def plain(answer="", ground_truth=""):
        return await Judge()(answer, ground_truth)

    for function in (plain, Judge()):
        assert run(adapter(function), {"answer": ["2", "3"]}).total.tolist() == [2.0, 3.0]
        result = run(adapter(function), {"answer": ["bad", "3"]}, on_error="invalid")
        assert (result.total.tolist(), result.errors) == ([0.0, 3.0], {"f": 1})

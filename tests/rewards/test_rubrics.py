"""Rubrics as rewards: what functions are given, how they are weighed, and what the package itself makes of the same."""

import asyncio
from types import SimpleNamespace

import pytest

from jaxrl_post.rewards import RewardError, score
from jaxrl_post.rewards.rubrics import from_rubric, rubric_functions

PROMPTS, COMPLETIONS, ANSWERS = ["1+1=", "1+2=", "2+2="], ["2", "4", "four"], ["2", "3", "4"]


def right(completion, answer):
    return float(completion[-1]["content"] == answer)


async def brief(completion):
    await asyncio.sleep(0)
    return float(len(completion[-1].content) == 1)


def rubric(*functions, weights=None, **objects):
    return SimpleNamespace(funcs=list(functions), weights=weights or [1.0] * len(functions), class_objects=objects)


def test_a_rubrics_reward_is_the_weighted_sum_of_plain_and_coroutine_functions():
    reward = from_rubric(rubric(right, brief, weights=[2.0, 0.5]))
    assert reward(PROMPTS, COMPLETIONS, answer=ANSWERS) == [2.5, 0.5, 0.0]


def test_functions_are_components_with_names_and_weights_and_metrics_have_weight_0():
    parts = rubric_functions(
        SimpleNamespace(rubrics=[rubric(right, weights=[2.0]), rubric(brief, right, weights=[0.0, 1])])
    )
    assert [(part.name, part.weight) for part in parts] == [("right", 2.0), ("brief", 0.0), ("right_#2", 1.0)]
    scored = score(parts, PROMPTS, COMPLETIONS, {"answer": ANSWERS})
    assert scored.total.tolist() == [3.0, 0.0, 0.0]
    assert scored.components["brief"].tolist() == [1.0, 1.0, 0.0]


def test_a_function_is_given_messages_state_columns_and_the_rubrics_own_objects():
    seen = []

    def look(prompt, completion, state, info, task, parser, level, **rest):
        seen.append((prompt, completion, state, info, task, parser, level, rest))
        return None

    talk = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1="}]
    columns = {"prompt_messages": [talk, None], "answer": ["2", "3"], "info": [{"a": 1}, {}], "level": [4, 5]}
    assert from_rubric(rubric(look, parser="the parser"))(PROMPTS[:2], COMPLETIONS[:2], **columns) == [None, None]
    (prompt, completion, state, info, task, parser, level, rest), second = seen
    assert prompt == talk
    assert completion == [{"role": "assistant", "content": "2"}]
    assert (info, task, parser, level, rest["answer"]) == ({"a": 1}, "default", "the parser", 4, "2")
    assert (state["answer"], state["info"], len(state["trajectory"])) == ("2", {"a": 1}, 1)
    assert state["trajectory"][0]["completion"] == completion
    assert second[0] == [{"role": "user", "content": "1+2="}]
    assert (completion[-1].role, hasattr(completion[-1], "tool_calls")) == ("assistant", False)


def test_a_function_that_raises_is_an_error_that_names_it_and_the_row():
    def strict(completion):
        return float(completion[-1]["content"])

    with pytest.raises(RewardError, match=r"strict.*could not convert.*at row 2"):
        from_rubric(rubric(strict))(PROMPTS, COMPLETIONS)
    scored = score(rubric_functions(rubric(strict)), PROMPTS, COMPLETIONS, on_error="invalid")
    assert scored.valid.tolist() == [True, True, False]
    assert scored.total.tolist() == [2.0, 4.0, 0.0]


def test_functions_of_groups_and_rubrics_without_weight_are_refused():
    def best(completions):
        return [0.0] * len(completions)

    def ranks(state) -> list[float]:
        return [0.0]

    for function in (best, ranks):
        with pytest.raises(ValueError, match=f"{function.__name__}' scores a whole group at once"):
            rubric_functions(rubric(right, function))
    with pytest.raises(ValueError, match="no function of nonzero weight"):
        from_rubric(rubric(right, weights=[0.0]))
    with pytest.raises(ValueError, match=r"a rubric has funcs and weights.*str has not"):
        from_rubric("rubric")


def test_rubrics_of_the_package_give_the_rewards_that_they_give_there():
    pytest.importorskip("verifiers.rubrics.rubric", reason="verifiers before 0.4 is not installed")
    import verifiers as vf

    parser = vf.XMLParser(["think", "answer"], answer_field="answer")

    def correct(completion, answer, parser):
        return float(parser.parse_answer(completion) == answer)

    def turns(state):
        return len(state["trajectory"]) / 4

    ours = vf.Rubric(funcs=[correct, parser.get_format_reward_func()], weights=[1.0, 0.25], parser=parser)
    group = vf.RubricGroup([ours, vf.Rubric(funcs=[turns], weights=[0.5])])
    completions = ["<think>a</think><answer>2</answer>", "<answer>3</answer>", "4"]

    def theirs(prompt, completion, answer):
        said = [{"role": "assistant", "content": completion}]
        asked = [{"role": "user", "content": prompt}]
        state = vf.State(input={"prompt": asked, "answer": answer, "example_id": 0}, completion=said)
        state |= {"trajectory": [{"completion": said}], "task": "default"}
        asyncio.run(group.score_rollout(state))
        return state["reward"]

    expected = [theirs(*row) for row in zip(PROMPTS, completions, ANSWERS, strict=True)]
    assert expected[0] > expected[1] > expected[2] > 0  # otherwise little is compared
    assert from_rubric(group)(PROMPTS, completions, answer=ANSWERS) == pytest.approx(expected, abs=1e-6)

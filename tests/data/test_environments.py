"""Data sets of environments as problems."""

import signal
from types import SimpleNamespace

import pytest

from jaxrl_post.data import columns, stream
from jaxrl_post.data.environments import verifiers_problems

TURN = {"role": "user", "content": "1+1?"}


def environment(*rows, **more):
    return SimpleNamespace(get_dataset=lambda: list(rows), get_eval_dataset=lambda: list(rows)[:1], **more)


def test_every_column_is_kept_and_messages_become_text_besides():
    rows = [
        {"prompt": [{"role": "system", "content": "Add."}, TURN], "answer": 2, "task": "sums", "example_id": 7},
        {"prompt": "2+2?", "answer": "4", "info": '{"digits": 1}'},
    ]
    first, second = verifiers_problems(environment(*rows))
    assert first == {
        "prompt": "system: Add.\n\nuser: 1+1?",
        "prompt_messages": rows[0]["prompt"],
        "answer": 2,
        "task": "sums",
        "example_id": 7,
        "prompt_id": 0,
    }
    assert second == {"prompt": "2+2?", "answer": "4", "info": {"digits": 1}, "prompt_id": 1}


def test_the_problems_are_a_source_for_streams_and_columns():
    problems = verifiers_problems(environment({"prompt": [TURN], "answer": "2"}, {"prompt": [TURN], "answer": "3"}))
    (batch,) = stream(problems, batch_size=2, seed=0, shuffle=False, repeat=False)
    assert columns(batch)["answer"] == ["2", "3"]


def test_evaluation_data_is_the_environments_own_or_an_error():
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    assert len(verifiers_problems(environment(*rows, eval_dataset=rows), split="eval")) == 1
    with pytest.raises(ValueError, match="no evaluation data; hold problems out"):
        verifiers_problems(environment(*rows, eval_dataset=None), split="eval")


@pytest.mark.parametrize(
    ("env", "split", "message"),
    [
        (environment({"prompt": "a"}), "test", "split must be 'train' or 'eval', got 'test'"),
        (SimpleNamespace(), "train", r"no get_dataset\(\)"),
        (environment({"prompt": "a"}, {"question": "b"}), "train", "row 1 .*'prompt' is missing"),
        (environment({"prompt": "a", "info": "{"}), "train", "row 0 of the environment's data: Expecting"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_names_it(env, split, message):
    with pytest.raises(ValueError, match=message):
        verifiers_problems(env, split=split)


def test_an_environment_of_the_package_gives_its_questions_as_messages(monkeypatch):
    pytest.importorskip("verifiers.envs.singleturn_env", reason="verifiers before 0.4 is not installed")
    import verifiers as vf

    monkeypatch.setattr(signal, "signal", lambda *args: None)  # environments take the process's signals
    from datasets import Dataset

    rows = Dataset.from_list([{"question": "1+1?", "answer": 2, "info": {"a": 1}}, {"question": "2+2?", "answer": 4}])
    env = vf.SingleTurnEnv(dataset=rows, system_prompt="Add.", rubric=vf.Rubric(funcs=[lambda completion: 1.0]))
    first, second = verifiers_problems(env)
    assert first["prompt_messages"] == [{"role": "system", "content": "Add."}, TURN]
    assert (first["answer"], first["info"], second["answer"]) == (2, {"a": 1}, 4)
    with pytest.raises(ValueError, match="no evaluation data"):
        verifiers_problems(env, split="eval")

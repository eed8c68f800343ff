"""From a configuration to problems, rewards and stages."""

import json

import pytest

from jaxrl_post.data import CharTokenizer, ChatSource, columns, open_source
from jaxrl_post.training import config as configs
from jaxrl_post.training import setup
from jaxrl_post.training.problem_setup import TrainingError
from jaxrl_post.training.reward_setup import reward_columns
from tests.training import runs

QUESTIONS = [{"question": f"q{n}"} for n in range(20)]
ANSWERED = [{**row, "answer": 19} for row in QUESTIONS]
ASKED = [{"question": f"z{n}"} for n in range(5)]
PAIRS = [{**row, "chosen": "a", "rejected": "b"} for row in QUESTIONS]
WARM_START = {"steps": 2, "examples": 4, "optimizer": {"learning_rate": 1e-3}}
SMALL = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 16}
VALUES = {
    "run_dir": "unused",
    "data": {"max_prompt_length": 12},
    "rewards": [{"path": "os:getcwd"}],
    "rollout": {"max_new_tokens": 6},
    "method": {"name": "grpo"},
    "training": {"steps": 10, "optimizer": {"learning_rate": 1e-3}},
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def problems(tmp_path, rows, method="grpo", data=None, **sections):
    files = {"files": [write(tmp_path / "train.jsonl", rows)]}
    values = VALUES | {"data": VALUES["data"] | files | (data or {}), "method": {"name": method}}
    return setup.make_problems(configs.from_dict(values | sections), CharTokenizer())


def test_files_without_answers_will_do_where_nothing_reads_them(tmp_path):
    assert "answer" not in problems(tmp_path, QUESTIONS).train[0]
    assert "answer" not in problems(tmp_path, ANSWERED[:5] + QUESTIONS).train[7]


def test_answers_that_are_there_become_text(tmp_path):
    assert problems(tmp_path, ANSWERED).train[0]["answer"] == "19"


@pytest.mark.parametrize(
    "sections",
    [
        {"rewards": [{"name": "exact_match"}]},
        {"method": "sft"},
        {"warm_start": WARM_START},
        {"data": {"answer": "{solution}"}},
    ],
    ids=str,
)
def test_a_missing_answer_is_an_error_where_something_reads_it(sections, tmp_path):
    with pytest.raises(ValueError, match=r"'?(answer|solution)'?"):
        problems(tmp_path, QUESTIONS, **sections)


def test_pairs_need_both_completions_in_training_but_not_held_out(tmp_path):
    held_out = write(tmp_path / "eval.jsonl", [{"question": f"z{n}"} for n in range(5)])
    made = problems(tmp_path, PAIRS, "dpo", {"eval_files": [held_out]})
    assert made.train[0]["chosen"] == "a"
    assert len(made.held_out) == 5
    with pytest.raises(ValueError, match=r"column '(chosen|rejected)' is missing"):
        problems(tmp_path, QUESTIONS, "dpo")


def test_training_never_sees_a_held_out_prompt(tmp_path):
    held_out = write(tmp_path / "eval.jsonl", ANSWERED[:5])
    made = problems(tmp_path, ANSWERED, data={"eval_files": [held_out]}, warm_start=WARM_START)
    assert made.exclude == {f"q{n}" for n in range(5)}
    assert [problem["prompt"] for problem in made.warm_start] == ["q5", "q6", "q7", "q8"]


def test_held_out_prompts_that_are_all_too_long_are_an_error(tmp_path):
    held_out = write(tmp_path / "eval.jsonl", [{"question": "q" * 99, "answer": "ab"}])
    with pytest.raises(ValueError, match=r"data.eval_files: no prompt is within data.max_prompt_length = \d+ tokens"):
        problems(tmp_path, ANSWERED, data={"eval_files": [held_out]}, rewards=[{"name": "exact_match"}])


def test_generated_problems_are_disjoint_by_content():
    values = {
        "run_dir": "unused",
        "data": {"task": "spell_backward", "prompt": "{word}>", "lowercase": True, "max_prompt_length": 11},
        "rewards": [{"name": "task_solved"}],
        "rollout": {"max_new_tokens": 11},
        "training": {"steps": 10, "optimizer": {"learning_rate": 1e-3}},
        "warm_start": {**WARM_START, "examples": 200, "until": 0.3, "check_every": 1, "check_problems": 50},
        "eval": {"problems": 100},
    }
    by_seed = [setup.make_problems(configs.from_dict(values | {"seed": seed}), CharTokenizer()) for seed in (0, 1)]
    for made in by_seed:
        parts = [{p["prompt"] for p in part} for part in (made.warm_start, made.validation, made.held_out)]
        assert [len(part) for part in parts] == [200, 50, 100]
        assert not parts[0] & parts[1]
        assert not parts[0] & parts[2]
        assert not parts[1] & parts[2]
        assert made.exclude == parts[1] | parts[2]
    assert [p["prompt"] for p in by_seed[0].held_out] == [p["prompt"] for p in by_seed[1].held_out]
    assert [p["prompt"] for p in by_seed[0].warm_start] != [p["prompt"] for p in by_seed[1].warm_start]


def test_rows_in_a_layout_of_the_field_need_no_templates(tmp_path):
    pairs = [{"prompt": f"p{n}>", "chosen": "a", "rejected": "b"} for n in range(8)]
    assert problems(tmp_path, pairs, "dpo").train[3]["prompt"] == "p3>"
    given = [{"prompt": f"p{n}>", "completion": "ab"} for n in range(8)]
    made = problems(tmp_path, given, "sft", warm_start=WARM_START)
    assert made.train[0]["completion"] == "ab"
    assert len(made.warm_start) == 4
    row = {"data_source": "sums", "prompt": [{"role": "user", "content": "1+1="}], "extra_info": {"level": 3}}
    verl = [{**row, "reward_model": {"style": "rule", "ground_truth": "2"}}]
    columns = {"level": "{extra_info.level}"}
    made = problems(tmp_path, verl, data={"columns": columns}, rewards=[{"name": "exact_match"}])
    assert (made.train[0]["answer"], made.train[0]["level"]) == ("2", 3)


def test_a_malformed_row_ends_the_set_up_or_is_counted(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [*QUESTIONS[:2], {"wrong": 1}]
    with pytest.raises(ValueError, match=r"train\.jsonl, line 3"):
        problems(tmp_path, rows)
    made = problems(tmp_path, rows, data={"on_bad_row": "skip"})
    assert (len(made.train), made.train.skipped) == (2, 1)
    assert path.exists()


def test_a_held_out_prompt_that_is_too_long_is_left_out(tmp_path):
    rows = [*QUESTIONS[:4], {"question": "x" * 50}]
    held_out = write(tmp_path / "eval.jsonl", [{"question": row["question"] + "?"} for row in rows])
    assert len(problems(tmp_path, QUESTIONS, data={"eval_files": [held_out]}).held_out) == 4


@pytest.mark.parametrize("chat", [False, True])
def test_the_columns_that_rewards_are_given_are_known_before_the_run(chat, tmp_path):
    path = write(tmp_path / "train.jsonl", [*QUESTIONS, {"question": "q", "level": 3}])
    source = open_source([path], columns={"prompt": "{question}"})
    source = ChatSource(source) if chat else source
    config = configs.from_dict(VALUES | {"data": VALUES["data"] | {"files": [path], "chat": chat}})
    given = columns([source[index] for index in range(len(source))])
    assert "level" in given
    assert set(reward_columns(config, source.columns, in_turns=False)) == set(given)
    assert set(reward_columns(config, source.columns, in_turns=True)) == {*given, "environment_reward"}


def test_held_out_pairs_are_measured_where_they_fit_and_never_trained_on(tmp_path):
    rows = [{**row, "chosen": "c" * n, "rejected": "r"} for n, row in enumerate(ASKED)]
    held_out = write(tmp_path / "eval.jsonl", [*rows, {**ASKED[0], "chosen": "x" * 50, "rejected": "r"}])
    made = problems(tmp_path, PAIRS, "dpo", {"eval_files": [held_out]})
    assert [problem["chosen"] for problem in made.held_out_given] == ["", "c", "cc", "ccc", "cccc"]
    assert {"z0", "z4"} <= made.exclude
    fewer = problems(tmp_path, PAIRS, "dpo", {"eval_files": [held_out]}, eval={"problems": 2})
    assert fewer.held_out_given == made.held_out_given[:2]


@pytest.mark.parametrize(
    ("rows", "method", "message"),
    [
        (PAIRS, "dpo", "data.eval_files: rows have no 'chosen' for the method's loss, and no rewards"),
        (ANSWERED, "sft", "data.eval_files: rows have no 'answer' for the method's loss, and no rewards"),
    ],
    ids=["pairs", "completions"],
)
def test_held_out_rows_that_nothing_can_measure_are_an_error(rows, method, message, tmp_path):
    held_out = write(tmp_path / "eval.jsonl", ASKED)
    with pytest.raises(ValueError, match=message):
        problems(tmp_path, rows, method, {"eval_files": [held_out]}, rewards=[])
    made = problems(tmp_path, rows, method, {"eval_files": [held_out]})  # rewards score what is sampled for them
    assert (len(made.held_out), made.held_out_given) == (5, [])


def test_held_out_rows_of_another_layout_are_for_accuracy_alone(tmp_path):
    rows = [{"prompt": row["question"], "completion": "19"} for row in QUESTIONS]
    held_out = write(tmp_path / "eval.jsonl", [{"prompt": row["question"], "answer": "19"} for row in ASKED])
    made = problems(tmp_path, rows, "sft", {"eval_files": [held_out]})
    assert (len(made.held_out), made.held_out_given) == (5, [])


def test_every_held_out_pair_of_a_prompt_is_measured(tmp_path):
    rows = [{**ASKED[0], "chosen": chosen, "rejected": "r"} for chosen in ("a", "b", "x" * 50)]
    held_out = write(tmp_path / "eval.jsonl", rows)
    made = problems(tmp_path, PAIRS, "dpo", {"eval_files": [held_out], "chosen": "{chosen}"})
    assert [problem["chosen"] for problem in made.held_out_given] == ["a", "b"]
    with pytest.raises(TrainingError, match=r"the chosen 'xxx.* and its stop token are more than"):
        problems(tmp_path, PAIRS, "dpo", {"eval_files": [held_out], "on_long_prompt": "error"})
    broken = write(tmp_path / "eval.jsonl", [*rows, {**ASKED[1], "chosen": "a", "rejected": None}])
    with pytest.raises(ValueError, match="line 4: column 'rejected' is null"):
        problems(tmp_path, PAIRS, "dpo", {"eval_files": [broken]})


@pytest.mark.parametrize("reward", [{"name": "exact_match"}, {"path": f"{runs.__file__}:reward"}])
def test_where_nothing_is_sampled_only_held_out_problems_need_what_rewards_read(reward, tmp_path):
    train, held_out = write(tmp_path / "train.jsonl", PAIRS), write(tmp_path / "held.jsonl", ANSWERED)
    files = {"files": [train], "eval_files": [held_out], "prompt": "{question}", "alphabet": "0123456789qz"}
    sections = {"data": VALUES["data"] | files, "rewards": [reward], "method": {"name": "dpo"}, "model": SMALL}
    parts = setup.build(configs.from_dict(VALUES | sections | {"run_dir": str(tmp_path / "run")}))
    parts.prepare()
    assert parts.problems.held_out[0]["answer"] == "19"


@pytest.mark.parametrize(("key", "rows"), [("rewards", (QUESTIONS, ANSWERED)), ("data.eval_files", (ANSWERED, ASKED))])
def test_a_column_that_a_reward_needs_is_missed_before_anything_is_sampled(key, rows, tmp_path):
    train, held_out = (write(tmp_path / f"{n}.jsonl", part) for n, part in enumerate(rows))
    files = {"files": [train], "eval_files": [held_out], "prompt": "{question}", "alphabet": "0123456789qz"}
    sections = {"data": VALUES["data"] | files, "rewards": [{"path": f"{runs.__file__}:reward"}]}
    parts = setup.build(configs.from_dict(VALUES | sections | {"run_dir": str(tmp_path / "run"), "model": SMALL}))
    with pytest.raises(configs.ConfigError, match=f"{key}: reward function 'reward' needs 'answer', but the data has"):
        parts.prepare()

"""Whole runs: what they leave behind, and what they say when something is wrong."""

import json
import math
from pathlib import Path

import pytest

from jaxrl_post.rewards import RewardError
from jaxrl_post.training import config, inference, loop
from tests.training import runs
from tests.training.conftest import PLOT

FAULTS = Path(__file__).with_name("faulty_rewards.py")
NO_WARM_START = {"warm_start": None}
NOTHING_ELSE = {**NO_WARM_START, "eval": {"problems": 0}}


def faulty(name):
    return {"rewards": [{"path": f"{FAULTS}:{name}"}], **NOTHING_ELSE}


def train(directory, *overrides, **changes):
    path = runs.tiny_run(directory, **changes)
    loop.run(config.load(path, overrides))
    return directory / "run"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    logging = {"progress": False, "tensorboard": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "plot", PLOT)
        return train(tmp_path_factory.mktemp("whole"), "eval.every=3", logging=logging)


def test_a_run_writes_the_metrics_that_its_users_know(run_dir):
    rows = runs.lines(run_dir)
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["stage"] for row in rows] == ["warm_start"] * 3 + ["grpo"] * 6
    expected = {
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "accuracy",
        "rewards/reward/mean",
        "rewards/reward/std",
        "kl",
        "entropy",
        "loss",
        "loss/policy",
        "loss/kl",
        "grad_norm",
        "learning_rate",
        "clip_ratio/low_mean",
        "clip_ratio/high_mean",
        "clip_ratio/region_mean",
        "completions/mean_length",
        "completions/min_length",
        "completions/max_length",
        "completions/aborted_ratio",
        "completions/clipped_ratio",
        "sampling/sampling_logp_difference/mean",
        "sampling/sampling_logp_difference/max",
        "num_tokens",
        "nonfinite_updates",
    }
    assert expected <= set(rows[-1])
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-5 for row in rows[3:])
    evaluated = [row["step"] for row in rows if "eval/accuracy" in row]
    assert evaluated == [3, 6, 9]
    assert {"eval/sampled_accuracy", "eval/pass@2", "eval/completions/mean_length"} <= set(rows[-1])
    counted = [row["num_tokens"] for row in rows]
    assert counted == sorted(counted)


def test_only_the_first_steps_of_a_stage_compile_anything(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    compiled = [(row["compilations"], row["time/compile"]) for row in rows]
    assert compiled[1] == compiled[4] == compiled[6] == compiled[7] == compiled[8] == (0, 0.0)  # the last evaluates


def test_a_run_leaves_everything_that_is_needed_to_look_at_it(run_dir):
    names = {path.name for path in run_dir.iterdir()}
    assert {"metrics.jsonl", "completions.jsonl", "config.yaml", "checkpoints", "curves.png", "tensorboard"} <= names
    assert list((run_dir / "tensorboard").glob("events.out.tfevents.*"))
    assert "NaN" not in (run_dir / "metrics.jsonl").read_text()
    shown = [json.loads(line) for line in (run_dir / "completions.jsonl").read_text().splitlines()]
    assert {"step", "prompt", "completion", "reward"} <= set(shown[0])
    assert config.load(run_dir / "config.yaml").training.steps == 6


def test_what_was_trained_can_be_evaluated_and_asked(run_dir):
    last = runs.lines(run_dir)[-1]
    measured = inference.evaluate_run(run_dir)
    assert {name: last[name] for name in measured} == measured
    more = inference.evaluate_run(run_dir, ["eval.samples=3", "eval.k=3"])
    assert more["eval/accuracy"] == last["eval/accuracy"]
    assert "eval/pass@3" in more
    greedy = inference.generate_text(run_dir, ["12>", "7>"], samples=2)
    assert [len(row) for row in greedy] == [2, 2]
    assert greedy[0][0] == greedy[0][1]
    assert set(greedy[0][0]) == {"text", "logp", "finish"}
    drawn = inference.generate_text(run_dir, ["12>"], samples=8, temperature=1.0, seed=3)
    assert len({item["text"] for item in drawn[0]}) > 1
    with pytest.raises(ValueError, match="'!'"):
        inference.generate_text(run_dir, ["12!"])


@pytest.mark.parametrize(
    ("name", "message"),
    [("raises", "raises.*KeyError"), ("nan", "nan.*row 0"), ("wrong_count", "wrong_count.*16")],
)
def test_a_reward_function_that_fails_stops_the_run_with_its_name(name, message, tmp_path):
    with pytest.raises(RewardError, match=f"(?s){message}"):
        train(tmp_path, **faulty(name))
    checkpoints = tmp_path / "run/checkpoints"
    assert not list(checkpoints.iterdir())  # nothing half-written


def test_rewards_of_none_are_left_out_and_counted(tmp_path):
    directory = train(tmp_path, "training.steps=2", **faulty("first_of_four_unscored"))
    assert [row["rewards/unscored"] for row in runs.lines(directory)] == [0.25, 0.25]


def test_oversampling_leaves_out_no_step_of_a_method_that_learns_from_equal_rewards(tmp_path):
    method = {"name": "reinforce"}
    directory = train(tmp_path, "training.steps=2", "curriculum.oversample=2", method=method, **faulty("constant"))
    for row in runs.lines(directory):
        assert row["curriculum/informative_groups"] == row["empty_steps"] == 0.0
        assert row["grad_norm"] > 0


def test_steps_without_any_reward_are_skipped_counted_and_end_the_run(tmp_path):
    with pytest.raises(loop.TrainingError, match="3 steps in a row had nothing to train on"):
        train(tmp_path, "training.max_empty_steps=3", **faulty("nothing"))
    rows = runs.lines(tmp_path / "run")
    assert [row["empty_steps"] for row in rows] == [1.0, 1.0, 1.0]


def test_groups_that_all_got_the_same_reward_are_nothing_to_train_on_when_filtered(tmp_path):
    with pytest.raises(loop.TrainingError, match="2 steps in a row"):
        train(tmp_path, "training.max_empty_steps=2", "curriculum.oversample=2", **faulty("constant"))


def test_updates_that_are_not_finite_are_skipped_and_end_the_run_with_a_report(tmp_path):
    optimizer = {"name": "sgd", "learning_rate": 1e30, "max_grad_norm": None}
    training = {"steps": 6, "optimizer": optimizer, "max_nonfinite_steps": 2}
    with pytest.raises(loop.TrainingError, match=r"2 updates in a row .* Lower training\.optimizer"):
        train(tmp_path, training=training, **NOTHING_ELSE)
    rows = runs.lines(tmp_path / "run")
    assert [row["nonfinite_updates"] for row in rows] == [0.0, 1.0, 1.0]
    assert rows[-1]["loss"] is None  # null, never NaN


def test_long_prompts_are_filtered_and_counted_or_an_error(tmp_path, caplog):
    files = runs.write_problems(tmp_path / "long.jsonl", 6)
    with files.open("a") as file:
        file.write(json.dumps({"question": "12345>", "answer": "1"}) + "\n")
    data = {"files": [str(files)], "alphabet": ">0123456789", "max_prompt_length": 3}
    directory = train(tmp_path / "a", "training.steps=4", data=data, **NOTHING_ELSE)
    assert runs.lines(directory)[-1]["data/filtered_problems"] >= 1
    assert caplog.text.count("leaves out problems that are too long: the prompt for data.max_prompt_length = 3") == 1
    with pytest.raises(ValueError, match="more than max_prompt_length=3"):
        train(tmp_path / "b", data=data | {"on_long_prompt": "error"}, **NOTHING_ELSE)


def test_a_set_up_that_fails_leaves_a_directory_that_can_be_used(tmp_path):
    path = runs.tiny_run(tmp_path, **NOTHING_ELSE)
    with pytest.raises(ValueError, match=r"no module"):
        loop.run(config.load(path, ["rewards.0.path=no_such_module:reward"]))
    loop.run(config.load(path, ["training.steps=1"]))


def test_rewards_that_fail_in_evaluation_are_treated_as_in_training(tmp_path):
    rewards = [{"path": f"{FAULTS}:fails_on_eight_rows"}]
    directory = train(
        tmp_path,
        "training.steps=1",
        "eval.samples=1",
        "eval.k=1",
        on_reward_error="invalid",
        rewards=rewards,
        **NO_WARM_START,
    )
    assert runs.lines(directory)[-1]["eval/accuracy"] == 0.0


def test_the_learning_rate_counts_updates_and_roles_count_steps(tmp_path):
    optimizer = {"learning_rate": 0.01, "schedule": "linear"}
    training = runs.training(steps=3, optimizer=optimizer)
    roles = {"reference": {"refresh": "every", "every": 1}}
    directory = train(tmp_path, training=training, roles=roles, **faulty("nothing"))
    assert [row["learning_rate"] for row in runs.lines(directory)] == pytest.approx([0.01] * 3)


def test_supervised_and_preference_data_need_no_rewards(tmp_path):
    offline = {"rewards": None, "rollout": {"max_new_tokens": 4}, **NOTHING_ELSE}
    training = {"steps": 3, "batch_size": 4, "optimizer": {"learning_rate": 0.01}, "log_completions_every": 0}
    rows = runs.lines(train(tmp_path / "sft", method={"name": "sft"}, training=training, **offline))
    assert rows[-1]["loss"] < rows[0]["loss"]
    pairs, held_out = tmp_path / "pairs.jsonl", tmp_path / "eval.jsonl"
    for path, numbers in ((pairs, range(10, 20)), (held_out, range(20, 23))):
        path.write_text("".join(json.dumps({"question": f"{n}>", "good": "1", "bad": "23"}) + "\n" for n in numbers))
    data = {
        "files": [str(pairs)],
        "alphabet": ">0123456789",
        "max_prompt_length": 3,
        "chosen": "{good}",
        "rejected": "{bad}",
        "eval_files": [str(held_out)],
    }
    offline["eval"] = {"problems": 3}
    rows = runs.lines(train(tmp_path / "dpo", method={"name": "dpo"}, training=training, data=data, **offline))
    assert rows[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert rows[-1]["rewards/margins"] > 0
    assert rows[-1]["eval/loss"] < math.log(2)
    assert rows[-1]["eval/rewards/accuracies"] == 1.0
    # The same answers, each with a label of its own.
    labelled = tmp_path / "labelled.jsonl"
    rows_of = [{"prompt": f"{n}>", "completion": c, "label": c == "1"} for n in range(10, 20) for c in ("1", "23")]
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows_of))
    data = {"files": [str(labelled)], "alphabet": ">0123456789", "max_prompt_length": 3}
    offline["eval"] = {"problems": 0}
    rows = runs.lines(train(tmp_path / "kto", method={"name": "kto"}, training=training, data=data, **offline))
    assert rows[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert rows[-1]["rewards/chosen"] > 0 > rows[-1]["rewards/rejected"]
    with pytest.raises(config.ConfigError, match=r"completions labelled good or bad.*does not learn from their labels"):
        train(tmp_path / "refused", method={"name": "sft"}, training=training, data=data, **offline)


@pytest.mark.nightly  # on every commit one does in tests/training/test_roles.py
def test_ppo_brings_its_critic_through_a_restart(tmp_path):
    changes = {"method": {"name": "ppo", "beta": 0.1}, **NOTHING_ELSE}
    whole = train(tmp_path / "whole", "training.steps=4", **changes)
    train(tmp_path / "parts", "training.steps=2", **changes)
    parts = train(tmp_path / "parts", "training.steps=4", **changes)
    assert runs.lines(parts) == runs.lines(whole)
    assert runs.final_state(parts) == runs.final_state(whole)
    assert "critic/values/mean" in runs.lines(whole)[-1]


@pytest.mark.nightly  # on every commit four do in the end of tests/training/test_distributed.py
def test_eight_devices_train_as_one_does(tmp_path):
    one = train(tmp_path / "one", "training.steps=3", **NOTHING_ELSE)
    mesh = {"fsdp": 4, "tensor": 2}
    eight = train(tmp_path / "eight", "training.steps=3", mesh=mesh, **NOTHING_ELSE)
    assert (one / "completions.jsonl").read_text() == (eight / "completions.jsonl").read_text()
    for left, right in zip(runs.lines(one), runs.lines(eight), strict=True):
        assert left.keys() == right.keys()
        assert left.pop("stage") == right.pop("stage")
        for name, value in left.items():
            assert right[name] == pytest.approx(value, abs=1e-5, rel=1e-4), name

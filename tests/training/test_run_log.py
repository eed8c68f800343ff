"""The growing files of a run directory: what a line holds, what resuming cuts, whose run a directory holds."""

import dataclasses
import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import types
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.training import config as configs
from jaxrl_post.training.config import ConfigError
from jaxrl_post.training.run_log import (
    RunDirError,
    RunLog,
    lock_run_dir,
    prepare_run_dir,
    read_metrics,
    write_atomically,
)


def open_log(directory, resume_from=None, **options):
    return RunLog(
        directory, **{"resume_from": resume_from, "tensorboard": False, "wandb": False, "config": {}, **options}
    )


def make_config(directory, **changes):
    values = {
        "run_dir": str(directory),
        "data": {"task": "spell_backward", "max_prompt_length": 11},
        "rewards": [{"name": "task_score"}],
        "rollout": {"max_new_tokens": 12},
        "method": {"name": "grpo", "beta": 0.0},
        "training": {"steps": 10, "optimizer": {"learning_rate": 1e-3}},
    }
    config = configs.from_dict(values)
    for section, fields in changes.items():
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})
    return config


def begin(config):
    """Prepare the directory of a new run and log its first step."""
    assert prepare_run_dir(config) is False
    with open_log(config.run_dir) as log:
        log.write(1, {"reward": 1.0})


def test_a_line_is_json_with_the_step_first_keys_sorted_and_null_for_what_is_not_finite(tmp_path):
    with open_log(tmp_path) as log:
        log.write(
            3,
            {
                "z": np.float32(0.5),
                "b": jnp.asarray(2),
                "a": math.nan,
                "c": -math.inf,
                "stage": "grpo",
                "n": 2**40,
                "d": jnp.nan,
            },
        )
    text = (tmp_path / "metrics.jsonl").read_text()
    assert (
        text == '{"step": 3, "a": null, "b": 2, "c": null, "d": null, "n": 1099511627776, "stage": "grpo", "z": 0.5}\n'
    )


def test_the_step_cannot_be_overwritten_by_a_metric(tmp_path):
    with open_log(tmp_path) as log, pytest.raises(ValueError, match="must not hold 'step'"):
        log.write(1, {"step": 2})


def test_a_line_is_written_by_a_single_call(tmp_path, monkeypatch):
    log = open_log(tmp_path)
    calls = []
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: calls.append(data) or real(descriptor, data))
    log.write(1, {f"metric/{index}": index / 7 for index in range(500)})
    assert len(calls) == 1
    assert calls[0].endswith(b"}\n")


def test_a_line_that_does_not_fit_on_the_disk_is_an_error(tmp_path, monkeypatch):
    log = open_log(tmp_path)
    monkeypatch.setattr(os, "write", lambda descriptor, data: 3)
    with pytest.raises(OSError, match="is the disk full"):
        log.write(1, {"reward": 1.0})


def test_resuming_keeps_lines_up_to_the_step_and_cuts_later_and_half_written_ones(tmp_path):
    with open_log(tmp_path) as log:
        for step in range(1, 6):
            log.write(step, {"reward": step / 10})
            log.completions(step, [{"prompt": "p", "completion": "c", "reward": 1.0}] * 2)
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 3, "rew')
    with open(tmp_path / "completions.jsonl", "ab") as file:
        file.write('{"step": 2, "prompt": "ü'.encode()[:-1])
    with open_log(tmp_path, resume_from=3) as log:
        log.write(4, {"reward": 0.25})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(before[:3]) + b'{"step": 4, "reward": 0.25}\n'
    steps = [json.loads(line)["step"] for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert steps == [1, 1, 2, 2, 3, 3]


def test_a_run_that_starts_anew_leaves_nothing_of_what_was_there(tmp_path):
    with open_log(tmp_path) as log:
        log.write(0, {"reward": 1.0})
    open_log(tmp_path).close()
    assert read_metrics(tmp_path) == []


def test_resuming_from_step_zero_keeps_step_zero(tmp_path):
    with open_log(tmp_path) as log:
        log.write(0, {"eval/accuracy": 0.1})
        log.write(1, {"reward": 1.0})
    open_log(tmp_path, resume_from=0).close()
    assert read_metrics(tmp_path) == [{"step": 0, "eval/accuracy": 0.1}]


def test_a_kill_while_lines_are_cut_leaves_the_old_file_whole(tmp_path, monkeypatch):
    with open_log(tmp_path) as log:
        for step in range(4):
            log.write(step, {"reward": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        open_log(tmp_path, resume_from=1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_metrics_are_read_without_a_half_written_last_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kl": null}\n{"step": 2')
    assert read_metrics(tmp_path) == [{"step": 1, "kl": None}]
    with pytest.raises(FileNotFoundError, match=r"not the directory of a run"):
        read_metrics(tmp_path / "nowhere")


def test_completions_keep_every_character_of_what_a_model_may_write(tmp_path):
    text = 'line\nbreak "quote" \x1b[31m \u2028 é 漢 \udcff'
    with open_log(tmp_path) as log:
        log.completions(1, [{"prompt": "p", "completion": text, "reward": math.nan}])
    lines = (tmp_path / "completions.jsonl").read_bytes().split(b"\n")
    assert len(lines) == 2
    row = json.loads(lines[0])
    assert row["reward"] is None
    assert row["completion"] == text


def test_tensorboard_receives_the_numbers_and_is_told_at_resume_what_to_forget(tmp_path):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    def events():
        found = []
        for path in sorted((tmp_path / "tensorboard").iterdir()):
            data = path.read_bytes()
            while data:  # length u64, its crc u32, the event, its crc u32
                length = int.from_bytes(data[:8], "little")
                found.append(Event.FromString(data[12 : 12 + length]))
                data = data[12 + length + 4 :]
        return found

    with open_log(tmp_path, tensorboard=True) as log:
        log.write(1, {"reward": 0.5, "stage": "grpo", "kl": math.nan})
        log.write(2, {"reward": 0.75})
    values = [(event.step, v.tag, v.simple_value) for event in events() for v in event.summary.value]
    assert values == [(1, "reward", 0.5), (2, "reward", 0.75)]
    assert not any(event.HasField("session_log") for event in events())
    with open_log(tmp_path, resume_from=1, tensorboard=True) as log:
        log.write(2, {"reward": 1.0})
    starts = [event.step for event in events() if event.session_log.status == SessionLog.START]
    assert starts == [2]


def test_wandb_that_is_asked_for_and_missing_is_an_error_before_anything_is_cut(tmp_path, monkeypatch):
    with open_log(tmp_path) as log:
        log.write(1, {"reward": 1.0})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RunDirError, match=r"pip install 'jaxrl-post\[wandb\]'"):
        open_log(tmp_path, wandb=True)
    assert len(read_metrics(tmp_path)) == 1


def test_wandb_gets_numbers_and_a_resumed_run_goes_on_under_the_same_id(tmp_path, monkeypatch):
    started, logged = [], []
    run = types.SimpleNamespace(log=lambda row, step: logged.append((step, row)), finish=lambda: None)
    fake = types.SimpleNamespace(
        init=lambda **options: started.append(options) or run, util=types.SimpleNamespace(generate_id=lambda: "id1")
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with open_log(tmp_path, wandb=True, config={"seed": 1}) as log:
        log.write(1, {"reward": 0.5, "stage": "x", "kl": math.nan})
    fake.util = None
    open_log(tmp_path, wandb=True, resume_from=1).close()
    assert logged == [(1, {"reward": 0.5})]
    assert [options["id"] for options in started] == ["id1", "id1"]
    assert started[0]["config"] == {"seed": 1}


def test_closing_twice_does_nothing(tmp_path):
    log = open_log(tmp_path)
    log.close()
    log.close()


def test_a_new_run_directory_gets_the_resolved_configuration_and_an_old_one_is_resumed(tmp_path):
    config = make_config(tmp_path / "a" / "b")
    assert prepare_run_dir(config) is False
    assert configs.load(tmp_path / "a" / "b" / "config.yaml") == config
    (tmp_path / "a" / "b" / "checkpoints" / "100").mkdir(parents=True)
    assert prepare_run_dir(config) is True


def test_a_run_that_ended_before_its_first_line_and_checkpoint_does_not_hold_its_directory(tmp_path):
    prepare_run_dir(make_config(tmp_path))
    (tmp_path / "checkpoints" / "100.orbax-checkpoint-tmp").mkdir(parents=True)  # given up half-way
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "rew')
    other = make_config(tmp_path, model={"width": 256})
    assert prepare_run_dir(other) is False
    assert configs.load(tmp_path / "config.yaml") == other


def test_the_directories_of_a_run_without_content_need_no_configuration(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").write_text("")
    assert prepare_run_dir(make_config(tmp_path)) is False


@pytest.mark.parametrize("begun", ["checkpoint", "metrics"])
def test_a_checkpoint_or_a_line_of_metrics_holds_the_directory(tmp_path, begun):
    prepare_run_dir(make_config(tmp_path))
    if begun == "checkpoint":
        (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    else:
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(RunDirError, match=r"model.width: 128 there, 256 here"):
        prepare_run_dir(make_config(tmp_path, model={"width": 256}))


def test_only_a_run_that_has_begun_may_export_over_a_model(tmp_path):
    export = tmp_path / "model"
    config = make_config(tmp_path / "run", model={"export": str(export)})
    export.mkdir()
    (export / "README.md").touch()
    assert prepare_run_dir(config) is False
    (export / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"model\.export = .*model': is there already, and this run did not write it"):
        prepare_run_dir(config)
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    assert prepare_run_dir(config) is True


def test_the_error_of_another_configuration_says_how_to_go_on_from_the_weights(tmp_path):
    prepare_run_dir(make_config(tmp_path))
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(RunDirError, match=rf"`jaxrl-post convert {tmp_path} DIR` .* model\.path=DIR"):
        prepare_run_dir(make_config(tmp_path, model={"width": 256}))


def test_a_file_of_another_kind_that_has_the_name_of_the_configuration_is_not_overwritten(tmp_path):
    for text in ("hydra: {run: {dir: x}}\n", "- 1\n", ""):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(RunDirError, match="is not the configuration of a run"):
            prepare_run_dir(make_config(tmp_path))
        assert (tmp_path / "config.yaml").read_text() == text


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_steps_may_not_change_under_a_schedule_that_ends_with_them(tmp_path, schedule):
    decaying = dataclasses.replace(make_config(tmp_path).training.optimizer, schedule=schedule)
    begin(make_config(tmp_path, training={"steps": 10, "optimizer": decaying}))
    with pytest.raises(
        RunDirError,
        match=rf"training.steps: 10 there, 20 here \(the {schedule} schedule of the step size depends on it",
    ):
        prepare_run_dir(make_config(tmp_path, training={"steps": 20, "optimizer": decaying}))
    assert prepare_run_dir(make_config(tmp_path, training={"optimizer": decaying, "keep_checkpoints": 3})) is True


def test_the_schedule_of_a_role_ends_with_the_steps_too(tmp_path):
    plain = make_config(tmp_path, method={"name": "ppo"})
    optimizer = dataclasses.replace(plain.training.optimizer, schedule="linear")
    ten = dataclasses.replace(plain, roles={"critic": configs.RoleConfig(optimizer=optimizer)})
    begin(ten)
    with pytest.raises(RunDirError, match=r"training.steps: 10 there, 20 here \(the linear schedule of the step size"):
        prepare_run_dir(dataclasses.replace(ten, training=dataclasses.replace(ten.training, steps=20)))


def test_what_does_not_change_a_step_may_change_when_a_run_is_resumed(tmp_path):
    begin(make_config(tmp_path))
    measured = {"every": 5, "samples": 16, "k": 4, "correct_at": 0.5}
    changed = make_config(tmp_path, training={"steps": 20, "checkpoint_every": 5}, eval=measured, logging={})
    assert prepare_run_dir(changed) is True
    assert configs.load(tmp_path / "config.yaml") == changed


def test_the_number_of_held_out_problems_may_not_change_because_training_leaves_them_out(tmp_path):
    begin(make_config(tmp_path))
    with pytest.raises(RunDirError, match=r"eval.problems: 512 there, 64 here"):
        prepare_run_dir(make_config(tmp_path, eval={"problems": 64}))


def test_warnings_about_the_configuration_of_the_run_so_far_are_not_repeated(tmp_path):
    config = make_config(tmp_path)
    rising = dataclasses.replace(config.training.optimizer, warmup_steps=10)
    begin(make_config(tmp_path, training={"steps": 2, "optimizer": rising}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prepare_run_dir(make_config(tmp_path, training={"steps": 20, "optimizer": rising})) is True


def test_a_directory_of_another_configuration_is_refused_with_the_keys_that_differ(tmp_path):
    begin(make_config(tmp_path))
    before = (tmp_path / "config.yaml").read_bytes()
    other = make_config(tmp_path, model={"width": 256}, data={"alphabet": "ab"}, training={"steps": 20})
    with pytest.raises(RunDirError) as caught:
        prepare_run_dir(other)
    message = str(caught.value)
    assert "model.width: 128 there, 256 here" in message
    assert "data.alphabet" in message
    assert "training.steps" not in message
    assert "another run_dir" in message
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_a_run_of_an_older_version_that_lacks_a_key_is_resumed_with_its_default(tmp_path):
    config = make_config(tmp_path)
    begin(config)
    text = (tmp_path / "config.yaml").read_text()
    assert "on_long_prompt: filter\n" in text
    (tmp_path / "config.yaml").write_text(text.replace("  on_long_prompt: filter\n", ""))
    assert prepare_run_dir(config) is True
    (tmp_path / "config.yaml").write_text(text.replace("on_long_prompt: filter", "option_of_old: 3"))
    with pytest.raises(RunDirError, match=r"data.option_of_old: 3 there, '\(not set\)' here"):
        prepare_run_dir(config)


def test_a_configuration_file_that_cannot_be_read_is_not_overwritten(tmp_path):
    (tmp_path / "config.yaml").write_text("a: [1")
    with pytest.raises(RunDirError, match="cannot be read"):
        prepare_run_dir(make_config(tmp_path))
    assert (tmp_path / "config.yaml").read_text() == "a: [1"


def test_remains_of_a_run_without_its_configuration_are_not_overwritten(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(RunDirError, match=r"metrics.jsonl but no config.yaml"):
        prepare_run_dir(make_config(tmp_path))


def test_a_directory_that_cannot_be_written_is_an_error_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match=r"file.* cannot be written"):
        prepare_run_dir(make_config(tmp_path / "file"))

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("tempfile.mkstemp", denied)
    with pytest.raises(RunDirError, match="Permission denied"):
        prepare_run_dir(make_config(tmp_path / "new"))


def test_a_file_is_replaced_whole_and_has_the_permissions_of_any_other(tmp_path):
    write_atomically(tmp_path / "a", "one")
    (tmp_path / "b").write_text("")
    write_atomically(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "two"
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


HOLDER = """
import sys, time
from jaxrl_post.training.run_log import lock_run_dir
with lock_run_dir(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_directory_is_held_against_other_processes_until_its_holder_is_killed(tmp_path):
    directory = tmp_path / "new" / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunDirError) as caught, lock_run_dir(directory):
            pytest.fail("two processes hold one directory")
        expected = (
            f"another process (pid {holder.pid}) is training in {directory}; wait for it, or give another run_dir"
        )
        assert str(caught.value) == expected
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with lock_run_dir(directory):
        assert (directory / ".lock").read_text() == f"{os.getpid()}\n"


def test_a_directory_is_given_back_after_an_error_though_a_forked_child_still_has_the_file_open(tmp_path, monkeypatch):
    inherited = []
    real = os.open

    def open_and_fork(*arguments):
        descriptor = real(*arguments)
        inherited.append(os.dup(descriptor))  # the same open file, as a fork leaves it in the child
        return descriptor

    monkeypatch.setattr(os, "open", open_and_fork)
    with pytest.raises(KeyError), lock_run_dir(tmp_path):
        raise KeyError
    monkeypatch.undo()
    with lock_run_dir(tmp_path):
        pass
    os.close(*inherited)


def test_the_file_of_the_lock_is_not_taken_for_a_run(tmp_path):
    with lock_run_dir(tmp_path):
        assert prepare_run_dir(make_config(tmp_path)) is False


def test_the_lock_of_a_directory_that_cannot_be_written_is_the_error_of_such_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match=r"file.* cannot be written"), lock_run_dir(tmp_path / "file"):
        pass
    with pytest.raises(RunDirError, match=r"file.* cannot be written"), lock_run_dir(tmp_path / "file" / "run"):
        pass


def test_an_error_of_the_run_is_not_taken_for_one_of_the_lock(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"), lock_run_dir(tmp_path):
        raise FileNotFoundError("missing")


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.warns(RuntimeWarning, match=re.escape(f"{tmp_path} has no locks")), lock_run_dir(tmp_path):
        pass

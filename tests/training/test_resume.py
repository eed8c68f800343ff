"""A run that is killed at any moment and started again ends as if nothing had happened."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl_post.training import checkpoint, config, loop, run_log
from tests.conftest import XLA_FLAGS
from tests.training import runs

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "XLA_FLAGS": XLA_FLAGS}

# Steps 1 to 3 are the warm start, 4 to 9 the method; saved are 2, 3 (its end), 5, 7 and 9.
POINTS = {
    "after_a_step": 1,  # before the first checkpoint
    "during_a_rollout": 3,  # the method's third step, its rollouts sampled
    "half_a_line": 6,
    "during_a_save": 5,
    "before_the_commit": 7,
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    loop.run(config.load(runs.tiny_run(directory)))
    return directory / "run"


@pytest.mark.parametrize(
    "point", [pytest.param(p, marks=[] if p == "before_the_commit" else pytest.mark.nightly) for p in POINTS]
)
def test_a_killed_run_ends_with_the_same_bits(point, uninterrupted, tmp_path):
    path = runs.tiny_run(tmp_path)
    command = [sys.executable, str(Path(__file__).with_name("crash.py")), str(path), point, str(POINTS[point])]
    killed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "run/checkpoints/9").exists()

    loop.run(config.load(path))

    assert runs.lines(tmp_path / "run") == runs.lines(uninterrupted)
    assert (tmp_path / "run/completions.jsonl").read_text() == (uninterrupted / "completions.jsonl").read_text()
    assert runs.final_state(tmp_path / "run") == runs.final_state(uninterrupted)


@pytest.mark.nightly  # on every commit one is in tests/training/test_distributed.py
def test_a_run_that_is_asked_to_stop_saves_its_step_and_goes_on_from_there(uninterrupted, tmp_path, monkeypatch):
    path = runs.tiny_run(tmp_path, training=runs.training(checkpoint_every=100))
    write = run_log.RunLog.write

    def write_and_ask(self, step, metrics):
        write(self, step, metrics)
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(run_log.RunLog, "write", write_and_ask)
        with pytest.raises(KeyboardInterrupt):
            loop.run(config.load(path))
    assert sorted(d.name for d in (tmp_path / "run/checkpoints").iterdir()) == ["3", "5"]
    loop.run(config.load(path))
    assert runs.lines(tmp_path / "run") == runs.lines(uninterrupted)
    assert runs.final_state(tmp_path / "run") == runs.final_state(uninterrupted)


def test_looking_at_a_run_changes_nothing_in_its_directory(uninterrupted):
    unfinished = uninterrupted / "checkpoints" / "99.orbax-checkpoint-tmp"
    unfinished.mkdir()
    with checkpoint.Checkpointer(uninterrupted / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps()
    assert unfinished.is_dir()
    unfinished.rmdir()
    with pytest.raises(checkpoint.CheckpointError, match="there is no directory"):
        checkpoint.Checkpointer(uninterrupted / "nowhere", read_only=True)
    assert not (uninterrupted / "nowhere").exists()


def test_a_checkpoint_of_another_model_is_not_called_damaged(tmp_path):
    checkpoint.save(tmp_path / "c", 1, {"w": jax.numpy.zeros((2, 3))})
    with pytest.raises(checkpoint.MismatchError, match=r" w: float32\[2, 3\] saved, float32\[2, 4\] wanted"):
        checkpoint.restore(tmp_path / "c", {"w": jax.numpy.zeros((2, 4))})
    assert (tmp_path / "c/1").is_dir()


def test_a_finished_run_that_is_started_again_changes_nothing(uninterrupted):
    before = (runs.lines(uninterrupted), runs.final_state(uninterrupted))
    loop.run(config.load(uninterrupted.parent / "config.yaml"))
    assert (runs.lines(uninterrupted), runs.final_state(uninterrupted)) == before


def test_another_seed_is_another_run(uninterrupted, tmp_path):
    loop.run(config.load(runs.tiny_run(tmp_path), ["seed=1"]))
    assert runs.lines(tmp_path / "run") != runs.lines(uninterrupted)


def damage(directory: Path, how: str) -> None:
    """Damage the files that hold numbers."""
    for file in (file for file in directory.rglob("d/*") if file.is_file()):
        content = bytearray(file.read_bytes())
        if how == "truncated":
            content = content[: len(content) // 2]
        else:
            content[len(content) // 2] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "one bit flipped"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(how, uninterrupted, tmp_path, caplog):
    # Elsewhere than it was written: this process would read what it wrote from a cache.
    shutil.copytree(uninterrupted, tmp_path / "run")
    damage(tmp_path / "run/checkpoints/9", how)
    loop.run(config.load(uninterrupted.parent / "config.yaml", [f"run_dir={tmp_path / 'run'}"]))
    assert "checkpoint 9 is damaged" in caplog.text
    assert (tmp_path / "run/checkpoints-damaged/9").is_dir()
    assert runs.lines(tmp_path / "run")[-1]["num_tokens"] == runs.lines(uninterrupted)[-1]["num_tokens"]
    assert runs.final_state(tmp_path / "run")[1] == runs.final_state(uninterrupted)[1]


def test_only_damaged_checkpoints_are_an_error_that_says_what_to_do(tmp_path):
    like = {"x": np.arange(1000.0)}
    checkpoint.save(tmp_path / "c", 1, jax.tree.map(jax.numpy.asarray, like))
    for file in (tmp_path / "c/1").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(checkpoint.CheckpointError, match="remove the directory to start again"):
        checkpoint.restore(tmp_path / "c", jax.tree.map(jax.numpy.asarray, like))
    (tmp_path / "empty").mkdir()
    with pytest.raises(checkpoint.CheckpointError, match="there is no checkpoint in"):
        checkpoint.restore(tmp_path / "empty", like)


def test_a_state_comes_back_bit_for_bit_with_its_key(tmp_path):
    state = {
        "half": jax.numpy.linspace(-1, 1, 7, dtype=jax.numpy.bfloat16),
        "key": jax.random.key(7),
        "count": jax.numpy.asarray(3),
        "nothing": (),
    }
    checkpoint.save(tmp_path / "c", 5, state, {"position": [1, 2]})
    step, restored, run, damaged = checkpoint.restore(tmp_path / "c", state)
    assert (step, run, damaged) == (5, {"position": [1, 2]}, [])
    assert restored["half"].tobytes() == state["half"].tobytes()
    assert jax.random.bits(restored["key"]) == jax.random.bits(state["key"])
    assert restored["nothing"] == ()

"""Runs whose directory is in a bucket. The bucket here is a directory that only `epath` reads and writes."""

import os

import pytest

from jaxrl_post.training import config, inference, loop, run_files
from tests.training import runs


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """Makes paths below `tmp_path/bucket` count as addresses in a bucket."""
    root = tmp_path / "bucket"
    monkeypatch.setattr(run_files, "in_bucket", lambda path: str(path).startswith(str(root)))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "local"))
    (tmp_path / "local").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    return root


@pytest.mark.usefixtures("drawn")
def test_a_run_in_a_bucket_goes_on_on_another_machine(bucket, tmp_path, monkeypatch):
    path = runs.tiny_run(tmp_path, warm_start=None, eval={"problems": 0}, run_dir=str(bucket / "run"))
    loop.run(config.load(path, ["training.steps=2"]))
    found = {file.name for file in (bucket / "run").iterdir()}
    assert found >= {"metrics.jsonl", "completions.jsonl", "config.yaml", "curves.png", "checkpoints"}
    # Another machine has none of the local files, and this one went on writing lines that no checkpoint knows.
    with (bucket / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward": 0.0}\n')
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "elsewhere"))
    monkeypatch.setattr("tempfile.tempdir", None)
    loop.run(config.load(path, ["training.steps=4"]))
    assert [row["step"] for row in runs.lines(bucket / "run")] == [1, 2, 3, 4]
    assert len({row["num_tokens"] for row in runs.lines(bucket / "run")}) == 4
    # Whoever looks at it leaves alone what the training process has written since.
    local = run_files.RunFiles(bucket / "run").local / "metrics.jsonl"
    local.write_text("later")
    assert inference.generate_text(str(bucket / "run"), ["12>"])[0][0]["text"] is not None
    assert local.read_text() == "later"


def test_a_directory_in_a_bucket_without_a_run_is_an_error_that_names_it(bucket):
    with (
        pytest.raises(FileNotFoundError, match=f"{bucket}/other is not the directory of a run"),
        run_files.RunFiles(bucket / "other").reading("config.yaml"),
    ):
        pass


def test_users_of_one_machine_have_local_copies_of_their_own(bucket, monkeypatch):
    mine = run_files.RunFiles(bucket / "run").local
    monkeypatch.setattr(os, "getuid", lambda: -1)
    assert run_files.RunFiles(bucket / "run").local.parent != mine.parent


def test_metrics_that_cannot_be_copied_are_told_and_copied_with_the_next_ones(bucket, monkeypatch, caplog):
    files = run_files.RunFiles(bucket / "run")
    files.pull()
    (files.local / "metrics.jsonl").write_text("1\n")
    with monkeypatch.context() as patch:

        def refuse(*_, **__):
            raise OSError("503")

        patch.setattr(type(files.root), "mkdir", refuse)
        files.push()
    assert "metrics could not be copied to" in caplog.text
    files.push()
    assert (bucket / "run/metrics.jsonl").read_text() == "1\n"


def test_a_bucket_without_its_client_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setattr(run_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(run_files.BucketError, match=r"pip install 'jaxrl-post\[gcs\]'"):
        run_files.RunFiles("gs://mine/run")

"""The main job, through the command line, as a newcomer runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def jaxrl_post(*arguments):
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "jaxrl_post.cli.main", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def ends_of_stages(run_dir):
    """The metrics of the last step of each stage."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return list({row["stage"]: row for row in rows}.values())


def test_the_quickstart_warms_up_and_begins_to_learn(tmp_path):
    run_dir = tmp_path / "run"
    out = jaxrl_post("train", "configs/quickstart.yaml", f"run_dir={run_dir}", "training.steps=12", "eval.problems=256")
    after_warm_start, last = ends_of_stages(run_dir)
    assert after_warm_start["stage"] == "warm_start"
    assert 0.2 < after_warm_start["eval/accuracy"] < 0.5
    assert last["stage"] == "grpo"
    assert 0 < last["reward"] < 1
    assert last["eval/problems"] == 256
    assert "completions at step" in out
    assert f"step {last['step']}/{last['step']} " in out  # though the warm start ended early
    measured = json.loads(jaxrl_post("evaluate", run_dir, "--json"))
    assert measured["eval/accuracy"] == last["eval/accuracy"]
    assert jaxrl_post("generate", run_dir, "stevia>").startswith("stevia>")
    assert "curves.png" in jaxrl_post("plot", run_dir)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_quickstart_reaches_what_the_readme_says(seed, tmp_path):
    run_dir = tmp_path / "run"
    jaxrl_post("train", "configs/quickstart.yaml", f"run_dir={run_dir}", f"seed={seed}")
    after_warm_start, last = ends_of_stages(run_dir)
    assert after_warm_start["stage"] == "warm_start"
    assert after_warm_start["eval/accuracy"] < 0.5
    assert last["eval/accuracy"] >= 0.85
    assert last["eval/problems"] >= 256

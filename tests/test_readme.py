"""What the README shows works."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from jaxrl_post.training import config, loop
from tests import tiny

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
YAML = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)


def test_the_example_of_a_loss_runs_and_has_a_gradient(capsys):
    example = EXAMPLES[0]
    names: dict = {}
    exec(example, names)
    assert capsys.readouterr().out
    gradient = jax.grad(names["grpo_loss"])(names["old_logp"])
    # The rewarded completion becomes more probable, the others less, and nothing outside the mask moves.
    assert np.all(np.sign(gradient) == np.where(names["mask"], [[-1], [1], [1], [1]], 0))


@pytest.mark.parametrize(
    "name",
    ["mine", "like_verl", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("dapo", "like_trl"))],
)
def test_the_example_of_a_method_gives_methods_that_train(name):
    names: dict = {}
    exec(EXAMPLES[1], names)
    before = tiny.params_for(names[name])["policy"]
    state, metrics = tiny.one_step(names[name], tiny.batch())
    assert float(metrics["nonfinite_updates"]) == 0
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params["policy"], before)
    assert max(jax.tree.leaves(moved)) > 0


def test_the_example_of_a_configuration_on_a_base_is_valid(tmp_path):
    (example,) = [text for text in YAML if text.startswith("base: ../")]
    path = tmp_path / "own.yaml"
    path.write_text(example.replace("../quickstart.yaml", str(ROOT / "configs" / "quickstart.yaml")))
    assert config.load(path).method.keywords["correction"] == "icepop"


def test_the_example_of_scoring_tokens_runs_and_agrees_with_all_logits(capsys):
    example = EXAMPLES[2]
    names: dict = {}
    exec(example, names)
    logits = np.asarray(names["hidden"], np.float64) @ np.asarray(names["weight"], np.float64).T
    logp = logits[np.arange(64), names["targets"]] - np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(names["stats"].logp, logp, rtol=1e-5)
    ratio = np.exp(logp + 8.0)
    np.testing.assert_allclose(float(capsys.readouterr().out), -np.minimum(ratio, 1.2).sum(), rtol=1e-4)
    assert all(np.all(np.isfinite(g)) for g in names["gradients"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid(path):
    # All others name data or runs that are the user's.
    config.load(path, check_files=path.stem in ("quickstart", "sorting"))


def test_the_readme_names_only_files_that_are_there():
    for name in re.findall(r"(?:configs|tests|\.ci)/[\w./-]*\w", README):
        assert (ROOT / name).exists(), name


def test_the_example_of_a_model_is_valid():
    (example,) = [text for text in YAML if text.startswith("model:")]
    values = yaml.safe_load(example)
    values |= {
        "run_dir": "runs/mine",
        "data": {"files": ["problems.jsonl"], "max_prompt_length": 256},
        "rewards": [{"path": "os:getcwd"}],
        "rollout": {"max_new_tokens": 64},
        "method": {"name": "grpo"},
        "training": {"steps": 1, "optimizer": {"learning_rate": 1e-5}},
    }
    found = config.from_dict(values, check_files=False)
    assert found.roles["reference"].sources == ("base",)
    assert found.data.tokenizer == "Qwen/Qwen3-0.6B"


def test_the_example_of_turns_plays_them(capsys):
    names: dict = {}
    exec(EXAMPLES[3], names)
    transcript, shape, per_token = (
        capsys.readouterr().out.split(" ", 1)[0],
        names["out"].reward.shape,
        names["out"].mask,
    )
    assert shape == (2, 4)
    assert transcript.count("/") >= 2  # the board
    assert names["out"].rewards["environment"].shape == per_token.shape
    assert int(names["out"].extras["turns"].max()) > 1


def test_the_example_of_an_environment_in_python_is_one_that_a_run_trains_in(tmp_path):
    (example,) = [text for text in YAML if "second_try.py" in text]
    (tmp_path / "second_try.py").write_text(EXAMPLES[4])
    for name, place in (("configs/", ROOT), ("second_try.py", tmp_path), ("runs/", tmp_path)):
        example = example.replace(name, f"{place}/{name}")
    (tmp_path / "own.yaml").write_text(example)
    small = ("rollout.prompts=2", "rollout.group_size=2", "training.steps=1", "eval.problems=0", "warm_start=null")
    loop.run(config.load(tmp_path / "own.yaml", [*small, "logging.progress=false", "training.micro_batches=1"]))
    (row,) = [
        json.loads(line) for line in (tmp_path / "runs" / "second_try" / "metrics.jsonl").read_text().splitlines()
    ]
    assert row["completions/mean_turns"] > 1
    assert row["environment/errors"] == 0

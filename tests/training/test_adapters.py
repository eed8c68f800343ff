"""Runs that train adapters: on the model as it was drawn or on few bits of it, stopped and resumed, evaluated."""

import jax
import numpy as np
import pytest

from jaxrl_post import models
from jaxrl_post.training import config as configs
from jaxrl_post.training import inference, loop, setup
from jaxrl_post.training.config import ConfigError
from tests.training import runs

LORA = {"rank": 2, "targets": ["q_proj", "up"]}


def run(directory, *overrides, quantize="none", **changes):
    model = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 16, "lora": LORA, "quantize": quantize}
    path = runs.tiny_run(
        directory, model=model, method={"name": "grpo", "beta": 0.1}, **{"warm_start": None, **changes}
    )
    loop.run(configs.load(path, overrides))
    return path


@pytest.mark.parametrize("quantize", [pytest.param("none", marks=pytest.mark.nightly), "nf4"])
def test_a_run_trains_the_adapters_alone_and_its_reference_is_the_model_without_them(tmp_path, quantize):
    path = run(tmp_path, quantize=quantize)
    parts = setup.build(configs.load(path))
    assert parts.config.roles["reference"].sources == ("base",)
    warm = configs.load(runs.tiny_run(tmp_path / "warm", model={"lora": LORA}, method={"name": "grpo", "beta": 0.1}))
    assert warm.roles["reference"].sources == ("policy",)  # what the method starts from has adapters of its own by then
    drawn = parts.initial_params()
    _, trained = inference.load_run(tmp_path / "run")
    (own, first), (new_own, last) = models.split_adapters(drawn), models.split_adapters(trained)
    jax.tree.map(np.testing.assert_array_equal, own, new_own)
    assert all(
        (np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (first, last)), strict=True)
    )
    rows = runs.lines(tmp_path / "run")
    assert rows[-1]["kl"] > 0
    assert inference.generate_text(tmp_path / "run", ["12>"])[0][0]["text"] is not None


@pytest.mark.nightly  # on every commit whole models are, tests/training/test_resume.py
def test_a_run_of_adapters_that_is_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    run(tmp_path / "whole", quantize="int8", eval={"problems": 0})
    run(tmp_path / "parts", "training.steps=3", quantize="int8", eval={"problems": 0})
    path = tmp_path / "parts" / "config.yaml"
    loop.run(configs.load(path))
    assert runs.final_state(tmp_path / "whole" / "run") == runs.final_state(tmp_path / "parts" / "run")


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"model": {"quantize": "int8"}}, "model.quantize", "without model.lora"),
        ({"model": {"lora": {"rank": 2, "targets": ["lm_head"]}}}, "model.lora", "targets"),
        ({"roles": {"reference": {"from": "base"}}}, "roles.reference.from", "without its adapters"),
        ({"model": {"ignore": ["odd"]}}, "model.ignore", "no model.path"),
        (
            {"model": {"lora": LORA}, "roles": {"reference": {"from": "base", "mix": 0.5}}},
            "roles.reference.mix",
            "never",
        ),
    ],
)
def test_what_cannot_be_is_a_problem_of_its_key(tmp_path, changes, key, words):
    path = runs.tiny_run(tmp_path, method={"name": "grpo", "beta": 0.1}, **changes)
    with pytest.raises(ConfigError) as caught:
        configs.load(path)
    assert any(problem.startswith(key) and words in problem for problem in caught.value.problems), caught.value.problems


def critic_run(directory):
    model = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 16, "lora": LORA}
    return runs.tiny_run(directory, model=model, method={"name": "ppo"}, warm_start=None, eval={"problems": 0})


def test_a_critic_on_adapters_has_weights_of_its_own(tmp_path):
    parts = setup.build(configs.load(critic_run(tmp_path)))
    (stage,) = parts.stages
    assert parts.borrows(stage) in ({}, {"reference": "policy"})
    assert sorted(parts.trainable(stage)) == ["critic", "policy"]


@pytest.mark.nightly  # on every commit it is built, above
def test_a_critic_on_adapters_that_was_drawn_is_trained(tmp_path):
    path = critic_run(tmp_path)
    loop.run(configs.load(path, ["training.steps=1"]))
    assert np.isfinite(runs.lines(tmp_path / "run")[-1]["loss"])

"""Compiled programs in files: a run that starts without compiling, and what such files are refused for."""

import dataclasses
import logging
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxrl_post.planning import compiler, programs
from jaxrl_post.training import config as configs
from jaxrl_post.training import executables, loop, setup
from tests.training import runs

METHOD = {"name": "policy_gradient", "advantage": "remax"}  # which samples greedy completions too


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The configuration of a run, and a directory with its programs."""
    directory = tmp_path_factory.mktemp("made")
    path = runs.tiny_run(directory, warm_start=None, mesh={"fsdp": 2}, method=METHOD, training=runs.training(steps=2))
    setup = programs.plan(configs.load(path), jax.devices()[:2])
    with compiler.uncached():  # what comes from the compilation cache cannot be serialised again on a CPU
        for one in programs.programs(setup, ("rollout", "step", "evaluate")):
            compiled = one.lower().compile()
            executables.save(compiled, directory / "programs", one.name, configuration=one.configuration)
    return path, directory / "programs"


def test_a_run_whose_programs_are_there_compiles_none_of_them_and_gives_the_same(tmp_path, made, caplog):
    path, directory = made
    names = {"step", "rollout", "rollout-greedy", "evaluate-greedy", "evaluate-sampled"}
    assert {file.stem for file in directory.iterdir()} == names
    loop.run(configs.load(path, [f"run_dir={tmp_path}/compiled"]))
    with caplog.at_level(logging.WARNING):
        loop.run(configs.load(path, [f"run_dir={tmp_path}/loaded"]), executables=str(directory))
    assert "is compiled here" not in caplog.text
    assert "rewards/greedy" in runs.lines(tmp_path / "loaded")[-1]
    assert runs.lines(tmp_path / "loaded") == runs.lines(tmp_path / "compiled")
    assert runs.final_state(tmp_path / "loaded") == runs.final_state(tmp_path / "compiled")


def test_a_program_that_is_not_there_is_compiled_and_named(tmp_path, caplog):
    doubled = executables.use(tmp_path, "rollout/greedy", lambda x: 2 * x, configuration="")
    assert doubled(3) == 6
    assert f"there is no {tmp_path}/rollout-greedy.executable; rollout/greedy is compiled here" in caplog.text


def test_what_tells_programs_apart_is_the_same_in_every_process_also_where_there_is_an_environment():
    code = (
        "from jaxrl_post.training import config, executables, setup\n"
        "made = config.load('configs/gridworld.yaml')\n"
        "print(executables.identity(made, setup.build(made).trained_generation()))\n"
    )
    root = Path(__file__).parents[2]
    here = configs.load(root / "configs" / "gridworld.yaml")
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == executables.identity(here, setup.build(here).trained_generation())


def test_arrays_of_other_shapes_are_refused_in_words(tmp_path):
    with compiler.uncached():
        executables.save(jax.jit(jnp.sin).lower(jnp.ones(3)).compile(), tmp_path, "sine")
    with pytest.raises(ValueError, match="was compiled for arrays of other shapes or types"):
        executables.use(tmp_path, "sine", jnp.sin, configuration="")(jnp.ones(4))


def test_a_directory_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="there is no directory"):
        executables.use(tmp_path / "nowhere", "sine", jnp.sin, configuration="")


def test_the_programs_of_another_configuration_are_refused(tmp_path, made):
    path, directory = made
    other = configs.load(path, ["training.optimizer.learning_rate=0.02", f"run_dir={tmp_path}/other"])
    with pytest.raises(ValueError, match="was compiled from another configuration, or for other end tokens"):
        loop.run(other, executables=str(directory))


def test_code_of_ones_own_tells_programs_apart(tmp_path):
    file = tmp_path / "mine.py"
    found = []
    for weight in (1, 1, 2):
        file.write_text(f"from jaxrl_post import methods\nmine = lambda: methods.grpo(beta=0.0) and {weight}\n")
        values = configs.load("configs/quickstart.yaml")
        method = dataclasses.replace(values.method, name=f"{file}:mine")
        found.append(executables.identity(dataclasses.replace(values, method=method)))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("change", "value"), [("jax", "0.0.1"), ("libtpu", "0.0.1"), ("kind", "TPU v5 lite"), ("devices", 9)]
)
def test_a_program_for_other_circumstances_is_refused_and_says_which(tmp_path, monkeypatch, change, value):
    circumstances = executables._circumstances
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(executables, "_circumstances", lambda devices: circumstances(devices) | {change: value})
        path = executables.save(jax.jit(jnp.sin).lower(jnp.ones(3)).compile(), tmp_path, "sine")
    with pytest.raises(ValueError, match=rf"was compiled for .*{change} {value}.*, but here is .*; compile it again"):
        executables.load(path)

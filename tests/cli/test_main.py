"""The command: what each subcommand calls, what it prints, and how it ends."""

import errno
import json
import os
import subprocess
import sys
import types

import pytest

import jaxrl_post
from jaxrl_post.cli import main as cli
from jaxrl_post.training import config as configs

CONFIG = """
run_dir: {run_dir}
data: {{task: spell_backward, max_prompt_length: 11}}
rewards: [{{name: task_score}}]
rollout: {{max_new_tokens: 12}}
method: {{name: grpo, beta: 0.0}}
training: {{steps: 10, optimizer: {{learning_rate: 1e-3}}}}
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(run_dir=tmp_path / "run"))
    return path


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("run_dir: x\n")
    return tmp_path / "run"


def stub(monkeypatch, name, **functions):
    """Put a module in the place of jaxrl_post.training.<name>."""
    module = types.ModuleType(f"jaxrl_post.training.{name}")
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(jaxrl_post.training, name, module, raising=False)


def test_train_runs_the_configuration_with_its_overrides(monkeypatch, config_file):
    runs = []
    stub(monkeypatch, "loop", run=lambda config, executables: runs.append((config, executables)))
    overrides = ["training.steps=3", "method.clip_high=0.28"]
    assert cli.main(["train", str(config_file), *overrides]) == 0
    assert cli.main(["train", str(config_file), *overrides, "--executables", "made"]) == 0
    config = configs.load(config_file, overrides)
    assert runs == [(config, None), (config, "made")]


def test_a_wrong_configuration_gives_all_its_problems_on_stderr_and_no_traceback(monkeypatch, config_file, capsys):
    stub(monkeypatch, "loop", run=lambda config, **options: pytest.fail("must not run"))
    assert cli.main(["train", str(config_file), "training.stepz=3", "rollout.sampling.top_p=0"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"jaxrl-post train: {config_file}: 2 problems\n")
    assert "did you mean 'training.steps'?" in captured.err
    assert "rollout.sampling.top_p" in captured.err
    assert "Traceback" not in captured.err


def test_debug_shows_the_traceback(config_file):
    for arguments in (["--debug", "train", str(config_file), "x=1"], ["train", "--debug", str(config_file), "x=1"]):
        with pytest.raises(configs.ConfigError):
            cli.main(arguments)


def test_a_missing_configuration_is_one_line(capsys, tmp_path):
    assert cli.main(["train", str(tmp_path / "no.yaml")]) == 2
    error = capsys.readouterr().err
    assert "no.yaml: not found" in error
    assert error.count("\n") == 1


def test_warnings_of_a_configuration_are_printed_before_it_runs(monkeypatch, config_file, capsys):
    stub(monkeypatch, "loop", run=lambda config, **options: print("running", file=sys.stderr))
    assert cli.main(["train", str(config_file), "training.optimizer.warmup_steps=10"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("warning: training.optimizer.warmup_steps = 10: ")
    assert lines[1:] == ["running"]


def test_an_interrupted_training_says_that_it_can_be_resumed(monkeypatch, config_file, capsys):
    def interrupted(config, **options):
        raise KeyboardInterrupt

    stub(monkeypatch, "loop", run=interrupted)
    assert cli.main(["train", str(config_file)]) == 130
    assert "resumes the run from its last checkpoint" in capsys.readouterr().err


def test_an_error_that_the_library_did_not_foresee_keeps_its_traceback(monkeypatch, config_file):
    def fails(config, **options):
        raise ValueError("a bug")  # raised outside jaxrl_post, as by JAX or NumPy

    stub(monkeypatch, "loop", run=fails)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["train", str(config_file)])
    stub(monkeypatch, "loop", run=lambda config, **options: {}["missing"])
    with pytest.raises(KeyError):
        cli.main(["train", str(config_file)])


def test_wrong_input_that_the_library_refuses_while_it_runs_is_a_message(monkeypatch, config_file, capsys):
    # Real code of the library, called with wrong input: the ValueError is raised inside jaxrl_post.
    stub(monkeypatch, "loop", run=lambda config, **options: jaxrl_post.mesh.make_mesh(data=0))
    assert cli.main(["train", str(config_file)]) == 2
    assert "mesh sizes must be at least 1" in capsys.readouterr().err

    def denied(config, **options):
        raise PermissionError(13, "Permission denied", "protected/run")

    stub(monkeypatch, "loop", run=denied)
    assert cli.main(["train", str(config_file)]) == 2
    assert capsys.readouterr().err == "jaxrl-post train: protected/run: Permission denied\n"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl"), "run/metrics.jsonl: No space left on"),
        (OSError("only 3 of 90 bytes of a line could be written; is the disk full?"), "only 3 of 90 bytes"),
    ],
)
def test_what_the_operating_system_refuses_is_a_message_and_a_traceback_on_demand(
    monkeypatch, config_file, capsys, error, words
):
    def fails(config, **options):
        raise error

    stub(monkeypatch, "loop", run=fails)
    assert cli.main(["train", str(config_file)]) == 2
    assert capsys.readouterr().err.startswith(f"jaxrl-post train: {words}")
    with pytest.raises(OSError, match=words.split(":")[-1].strip()):
        cli.main(["train", "--debug", str(config_file)])


def test_generate_prints_each_completion_behind_its_prompt(monkeypatch, run_dir, capsys):
    calls = []

    def generate_text(directory, prompts, **options):
        calls.append((directory, prompts, options))
        return [[{"text": f"{index}!", "logp": -0.5, "finish": "stop"}] * 2 for index, _ in enumerate(prompts)]

    stub(monkeypatch, "inference", generate_text=generate_text)
    arguments = ["--samples", "2", "--temperature", "0.7", "--seed", "5", "--max-new-tokens", "9"]
    assert cli.main(["generate", str(run_dir), *arguments, "--", "12+7=", "-1+1="]) == 0
    options = {"samples": 2, "temperature": 0.7, "seed": 5, "max_new_tokens": 9, "chat": None}
    assert calls == [(str(run_dir), ["12+7=", "-1+1="], options)]
    captured = capsys.readouterr()
    assert captured.out == "12+7=0!\n12+7=0!\n-1+1=1!\n-1+1=1!\n"
    assert captured.err.count("log-probability -0.5000 nats, ended by stop") == 4


@pytest.mark.parametrize(
    "option",
    [
        ["--samples", "0"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--seed", "-1"],
        ["--seed", str(2**32)],
        ["--seed", "99999999999999999999999"],
    ],
)
def test_impossible_options_of_generate_are_refused(run_dir, option, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", str(run_dir), "x", *option])
    assert caught.value.code == 2
    assert option[0] in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["generate", "RUN", "x"], ["evaluate", "RUN"], ["plot", "RUN"]])
def test_a_directory_that_holds_no_run_is_one_line(arguments, tmp_path, capsys):
    assert cli.main([str(tmp_path) if part == "RUN" else part for part in arguments]) == 2
    error = capsys.readouterr().err
    assert "is not the directory of a run" in error
    assert error.count("\n") == 1


def test_evaluate_prints_a_table_or_exactly_one_json_object(monkeypatch, run_dir, capsys):
    calls = []
    results = {"eval/pass@8": 0.75, "eval/accuracy": 0.5, "eval/problems": 64, "eval/none": float("nan")}
    stub(monkeypatch, "inference", evaluate_run=lambda *arguments: calls.append(arguments) or results)
    assert cli.main(["evaluate", str(run_dir), "eval.problems=64"]) == 0
    assert calls == [(str(run_dir), ["eval.problems=64"])]
    assert capsys.readouterr().out.splitlines()[:3] == [
        "eval/pass@8    0.7500",
        "eval/accuracy  0.5000",
        "eval/problems  64",
    ]
    assert cli.main(["evaluate", str(run_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {**results, "eval/none": None}


def test_an_evaluation_refuses_to_change_the_model(monkeypatch, run_dir, capsys):
    stub(monkeypatch, "inference", evaluate_run=lambda *arguments: pytest.fail("must not run"))
    assert cli.main(["evaluate", str(run_dir), "model.width=64"]) == 2
    assert "model.width=64: does not apply to a trained model" in capsys.readouterr().err


def test_plot_draws_and_prints_where(run_dir, tmp_path, capsys):
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    assert cli.main(["plot", str(run_dir), "--output", str(tmp_path / "picture.png")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'picture.png'}\n"
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_config_explains_every_key_or_prints_the_defaults(capsys):
    assert cli.main(["config"]) == 0
    assert capsys.readouterr().out == configs.document()
    assert cli.main(["config", "--defaults"]) == 0
    assert capsys.readouterr().out == configs.defaults()


def test_methods_lists_searches_and_shows(capsys):
    assert cli.main(["methods", "median-centered"]) == 0
    assert "  mc-grpo  " in capsys.readouterr().out
    assert cli.main(["methods", "show", "mc-grpo"]) == 0
    shown = capsys.readouterr().out
    for text in (
        "2601.22582",
        "jaxrl_post.advantages.mc_grpo(rewards",
        "median",
        "configs/methods/mc-grpo.yaml",
        "seeds",
    ):
        assert text in shown
    assert cli.main(["methods", "show", "novelty_bonus"]) == 0  # as a configuration names it
    assert capsys.readouterr().out.startswith("e3b-global: ")
    assert cli.main(["methods", "odds", "ratio"]) == 0  # of one without a record
    assert "  orpo  " in capsys.readouterr().out
    assert cli.main(["methods", "show", "orpo"]) == 0
    assert "Monolithic Preference Optimization" in capsys.readouterr().out
    assert cli.main(["methods", "--json", "mc-grpo", "median"]) == 0
    assert "mc-grpo" in [record["id"] for record in json.loads(capsys.readouterr().out)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "mc-grp"], "there is no method 'mc-grp'; did you mean mc-grpo"),
        (["show"], "show takes one id"),
        (["no such words"], "no method's record holds 'no such words'"),
        (["--family", "x"], "there is no family 'x'; there are "),
    ],
)
def test_a_method_that_is_not_there_is_one_line(arguments, message, capsys):
    assert cli.main(["methods", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_help_and_version_do_not_import_jax():
    code = (
        "import sys\nfrom jaxrl_post.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    )
    for option, words in (("--version", f"jaxrl-post {jaxrl_post.__version__}"), ("--help", "evaluate")):
        result = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, check=True)
        assert words in result.stdout


def test_the_package_itself_is_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "jaxrl_post", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout == f"jaxrl-post {jaxrl_post.__version__}\n"


def test_a_reader_that_leaves_early_ends_the_command_quietly():
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [sys.executable, "-c", "import sys; from jaxrl_post.cli.main import main; sys.exit(main(['config']))"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    os.close(write)
    assert result.returncode == 0
    assert result.stderr == ""


def test_no_command_is_an_error_that_lists_them(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err

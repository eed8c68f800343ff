"""Configurations as text: YAML, overrides, a file over its base, the printed reference."""

import dataclasses
import re

import pytest
import yaml

from jaxrl_post.training import config as configs
from jaxrl_post.training.config import ConfigError, yaml_text
from tests.training.configurations import MINIMAL, make, write


def test_overrides_reach_sections_lists_absent_sections_and_method_keywords(tmp_path):
    path = write(tmp_path, yaml_text.write(MINIMAL))
    config = configs.load(
        path,
        [
            "rollout.prompts=16",
            "rewards.0.threshold=0.9",
            "training.optimizer.learning_rate=3e-3",
            "warm_start.steps=7",
            "warm_start.examples=1e2",
            "warm_start.optimizer={learning_rate: 1e-2}",
            "method.clip_high=.28",
            "data.prompt={word}>",
            "data.alphabet=123",
            "data.answer={answer}",
            "model.softcap=null",
        ],
    )
    assert config.rollout.prompts == 16
    assert config.rewards[0].threshold == 0.9
    assert config.training.optimizer.learning_rate == 0.003
    assert config.warm_start is not None
    assert (config.warm_start.steps, config.warm_start.examples) == (7, 100)
    assert config.warm_start.optimizer.learning_rate == 0.01
    assert config.method.keywords == {"beta": 0.0, "clip_high": 0.28}
    assert (config.data.prompt, config.data.alphabet, config.data.answer) == ("{word}>", "123", "{answer}")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "write key=value"),
        ("=3", "write key=value"),
        ("seed.x=1", "seed is not a section"),
        ("rewards.5.weight=1", "items 0 to 0"),
        ("rollout.promts=4", "rollout.promts: unknown key; did you mean 'rollout.prompts'?"),
        ("a.b.c=1", "a.b.c: unknown key; known here: curriculum, data,"),
        ("traning.stepz=4", "traning.stepz: unknown key; did you mean 'training.steps'?"),
        ("optimizer.learning_rate=1", "did you mean 'training.optimizer.learning_rate'?"),
        ("rollout.samplings=1", "did you mean 'rollout.sampling'?"),
        ("rewards.0.wieght=2", "rewards.0.wieght: unknown key; did you mean 'rewards.0.weight'?"),
        ("rewards.weight=2", "rewards is a list; give the number of one of its items, e.g. rewards.0"),
        ("model.width.x=1", "model.width is not a section"),
        ("rollout.prompts=[1", "not valid YAML"),
    ],
)
def test_an_override_that_cannot_be_applied_says_why(tmp_path, override, words):
    values = {**MINIMAL, "seed": 3}
    with pytest.raises(ConfigError) as caught:
        configs.load(write(tmp_path, yaml_text.write(values)), [override])
    assert words in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("change", ["model:", "data: {task_options:}", "method:", "logging: null"])
def test_an_empty_section_of_a_file_leaves_that_of_its_base(tmp_path, change):
    values = {**MINIMAL, "model": {"width": 64, "softcap": 5.0}, "logging": {"wandb": False, "tensorboard": False}}
    values["data"] = {**MINIMAL["data"], "task_options": {"max_word_len": 4}}
    expected = configs.load(write(tmp_path, yaml_text.write(values)))
    (tmp_path / "child.yaml").write_text(f"base: run.yaml\n{change}\n")
    assert configs.load(tmp_path / "child.yaml") == expected


def test_null_over_a_base_is_kept_where_it_means_something(tmp_path):
    warm_start = {"steps": 2, "examples": 4, "optimizer": {"learning_rate": 1e-3}}
    values = {**MINIMAL, "model": {"softcap": 5.0, "lora": {"rank": 2}}, "warm_start": warm_start}
    write(tmp_path, yaml_text.write(values))
    (tmp_path / "child.yaml").write_text("base: run.yaml\nmodel: {softcap: null, lora: null}\nwarm_start:\n")
    config = configs.load(tmp_path / "child.yaml")
    assert (config.model.softcap, config.model.lora, config.warm_start) == (None, None, None)


def test_an_override_of_a_section_goes_over_it_as_a_file_goes_over_its_base(tmp_path):
    values = {**MINIMAL, "model": {"width": 64, "softcap": 5.0}}
    config = configs.load(
        write(tmp_path, yaml_text.write(values)),
        ["model={dtype: bfloat16, softcap: null}", "model=", "method={name: rloo}", "rewards.0={name: task_solved}"],
    )
    assert (config.model.dtype, config.model.width, config.model.softcap) == ("bfloat16", 64, None)
    assert "beta" not in config.method.keywords
    assert config.rewards[0].name == "task_solved"


def test_an_evaluation_may_change_how_a_model_is_measured_and_not_how_it_was_made():
    configs.check_evaluation_overrides(
        [
            "eval.problems=64",
            "data.eval_files=[other.jsonl]",
            "mesh={data: 2}",
            "logging.progress=false",
            "on_reward_error=invalid",
            "rollout.sampling.temperature=0.5",
            "rewards.0.threshold=1",
            "rewards=[]",
        ]
    )
    refused = ["seed=1", "model.width=8", "rollout.max_new_tokens=4", "rollout={}", "training.steps=1", "method.beta=1"]
    with pytest.raises(ConfigError) as caught:
        configs.check_evaluation_overrides(["eval.k=2", *refused])
    assert [text.split(":")[0] for text in caught.value.problems] == refused
    assert all("does not apply to a trained model" in text for text in caught.value.problems)


def test_a_mistyped_key_of_an_evaluation_is_left_to_the_message_that_names_the_right_one():
    configs.check_evaluation_overrides(["evl.problems=64", "eval.problmes=64", "nonsense"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-3", 0.003),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("-2", -2),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("010", "010"),
        ("2024-01-01", "2024-01-01"),
        ("true", True),
        ("null", None),
        ("", None),
    ],
)
def test_plain_scalars_are_read_as_in_yaml_1_2_and_written_so_that_they_are_read_back(text, value):
    (result, duplicates) = yaml_text.read(f"x: {text}", "test")
    assert result == {"x": value}
    assert type(result["x"]) is type(value)
    assert duplicates == []
    # As text, each must come back as text.
    assert yaml_text.read(yaml_text.write([text]), "test")[0] == [text]


def test_a_key_given_twice_is_found_in_nested_sections(tmp_path):
    path = write(tmp_path, yaml_text.write(MINIMAL) + "eval:\n  samples: 8\n  k: 2\n  samples: 9\n")
    with pytest.raises(ConfigError, match="samples: given twice, on lines"):
        configs.load(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1, 2", "not valid YAML: line"),
        ("- 1\n- 2", "must be a mapping"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("", "run_dir: is missing"),
    ],
)
def test_a_file_that_is_no_configuration_gives_a_message_and_not_a_traceback_of_the_parser(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words):
        configs.load(write(tmp_path, text))


def test_a_file_that_is_missing_or_a_directory_is_said_to_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="not found"):
        configs.load(tmp_path / "none.yaml")
    with pytest.raises(FileNotFoundError, match="is a directory"):
        configs.load(tmp_path)


def test_a_file_may_say_only_what_differs_from_its_base(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(make(method={"name": "grpo", "clip_high": 0.28})))
    (tmp_path / "sub").mkdir()
    own = tmp_path / "sub" / "own.yaml"
    own.write_text("base: ../base.yaml\nrun_dir: other\nmethod: {name: reinforce}\ntraining: {epochs: 3}\n")
    base, config = configs.load(tmp_path / "base.yaml"), configs.load(own, ["training.steps=7"])
    assert (config.run_dir, config.training.epochs, config.training.steps) == ("other", 3, 7)
    assert config.method == configs.MethodConfig(name="reinforce", keywords={})
    assert config.rollout == base.rollout
    assert config.data == base.data


def test_a_base_that_is_missing_or_its_own_is_an_error_that_says_so(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("base: b.yaml\n")
    with pytest.raises(FileNotFoundError, match=r"b\.yaml \(the base of .*a\.yaml\): not found"):
        configs.load(path)
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match="base: goes in a circle"):
        configs.load(path)
    path.write_text("base: [1]\n")
    with pytest.raises(ConfigError, match="base: must be the path"):
        configs.load(path)


def test_every_field_has_a_meaning_and_stands_in_the_printed_reference():
    text = configs.document()
    words = " ".join(text.split())
    for section in vars(configs).values():
        if dataclasses.is_dataclass(section):
            for field in dataclasses.fields(section):
                # A section is introduced by the first line of its own description instead.
                is_section = re.search(rf"^# ([a-z_]+\.)*{field.name}: .{{5}}", text, re.MULTILINE)
                assert is_section or field.metadata["help"] in words
                assert len(field.metadata["help"]) > 5
    assert "training.optimizer.learning_rate  (number, above 0, required)" in text
    assert "rollout.sampling.top_p  (number, above 0 and at most 1, default 1.0)" in text
    assert "warm_start.check_problems  (integer, at least 1, default 256)" in text


def test_the_printed_defaults_are_yaml_that_lacks_only_what_is_required():
    values, duplicates = yaml_text.read(configs.defaults(), "defaults")
    assert duplicates == []
    assert values["data"]["prompt"] is None
    assert values["training"]["optimizer"]["eps"] == 1e-8
    values["run_dir"] = "runs/test"
    values["data"].update(task="spell_backward", max_prompt_length=11)
    values["rewards"] = [{"name": "task_score"}]
    values["rollout"]["max_new_tokens"] = 12
    values["training"]["steps"] = 10
    values["training"]["optimizer"]["learning_rate"] = 1e-3
    assert configs.from_dict(values) == configs.from_dict(make(method={"name": "grpo"}))

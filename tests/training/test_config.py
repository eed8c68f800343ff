"""The configuration: what must hold between its fields and its method, and what the messages say."""

import types
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import pytest

from jaxrl_post import methods
from jaxrl_post.data import PRINTABLE, CharTokenizer
from jaxrl_post.training import config as configs
from jaxrl_post.training.config import ConfigError, ConfigWarning
from jaxrl_post.training.stages import make_stages
from tests.training.configurations import make, problems_of, write


def test_a_minimal_configuration_gets_the_documented_defaults_and_what_follows_from_them():
    config = configs.from_dict(make(model={"width": 96, "heads": 6}))
    assert (config.model.kv_heads, config.model.head_dim, config.model.mlp_width) == (6, 16, 384)
    assert config.data.alphabet == PRINTABLE
    assert config.rollout.group_size == 8
    assert config.rollout.sampling.temperature == 1.0
    assert config.training.optimizer.name == "adamw"
    assert config.training.optimizer.max_grad_norm == 1.0
    assert config.warm_start is None
    assert config.roles == {}


def test_a_role_that_the_method_needs_is_filled_in_with_a_frozen_copy_of_the_policy():
    config = configs.from_dict(make(method={"name": "grpo", "beta": 0.1}))
    assert config.roles == {"reference": configs.RoleConfig(source="policy", refresh="frozen")}


def test_a_configuration_written_as_yaml_is_read_back_equal(tmp_path):
    values = make(
        method={"name": "ppo", "beta": 0.1, "gamma": 1, "value_clip": None},
        roles={"reference": {"from": "policy", "refresh": "every", "every": 5, "mix": 0.6}},
        data__alphabet="0123456789 :{}\"'#-\n",
        data__prompt="{question} = ",
        seed=4_000_000_000,
        warm_start={"steps": 5, "examples": 10, "optimizer": {"learning_rate": 1e-3}},
    )
    config = configs.from_dict(values)
    assert config.method.keywords["gamma"] == 1.0
    assert configs.load(write(tmp_path, configs.dump(config))) == config
    assert configs.validate(config) == config


def test_all_problems_of_a_file_and_its_overrides_are_told_at_once(tmp_path):
    path = write(
        tmp_path,
        """
run_dir: x
data: {task: spell_backward, max_prompt_length: 11}
rewards: [{name: task_scor}]
rollout: {max_new_tokens: 11, sampling: {top_p: 0}}
method: {name: grpo, clip_hgh: 0.28}
training: {steps: ten, stepz: 3, optimizer: {}}
seed: 1
seed: 2
""",
    )
    with pytest.raises(ConfigError) as caught:
        configs.load(path, ["nonsense", "model.width=-1"])
    text = str(caught.value)
    for part in (
        f"{path}: 9 problems",
        "seed: given twice, on lines 8 and 9",
        "nonsense: is not an override; write key=value",
        "model.width = -1: must be at least 1",
        "rewards.0.name = 'task_scor': there is no such reward; did you mean 'task_score'?",
        "rollout.sampling.top_p = 0.0: must be above 0 and at most 1",
        "method.clip_hgh = 0.28: methods.grpo has no such keyword; did you mean 'method.clip_high'?",
        "training.steps = 'ten': must be an integer",
        "training.stepz = 3: unknown key; did you mean 'training.steps'?",
        "training.optimizer.learning_rate: is missing and has no default",
    ):
        assert part in text


CASES = [
    # changes, key, words of the message
    ({"modle": {}}, "modle", "did you mean 'model'?"),
    ({"learning_rate": 1e-3}, "learning_rate", "did you mean 'training.optimizer.learning_rate'?"),
    ({"rollout__sampling": {"temperature": 0}}, "rollout.sampling.temperature", "above 0"),
    ({"rollout__sampling": {"top_p": 1.5}}, "rollout.sampling.top_p", "at most 1"),
    ({"rollout__sampling": {"min_p": 1.0}}, "rollout.sampling.min_p", "below 1"),
    ({"rollout__sampling": {"top_k": -1}}, "rollout.sampling.top_k", "at least 0"),
    ({"rollout": 3}, "rollout", "must be a section"),
    ({"rollout__prompts": True}, "rollout.prompts", "must be an integer"),
    ({"rollout__prompts": 2.5}, "rollout.prompts", "must be an integer"),
    ({"training__optimizer": {"learning_rate": "fast"}}, "training.optimizer.learning_rate", "finite number"),
    ({"training__optimizer": {"learning_rate": float("nan")}}, "training.optimizer.learning_rate", "finite number"),
    ({"training__optimizer": {"learning_rate": 0}}, "training.optimizer.learning_rate", "above 0"),
    ({"training__steps": 0}, "training.steps", "at least 1"),
    ({"training__steps": ...}, "training.steps", "is missing"),
    ({"data": ...}, "data.max_prompt_length", "is missing"),
    ({"logging": {"wandb": "yes"}}, "logging.wandb", "true or false"),
    ({"data__alphabet": 123}, "data.alphabet", "quotes"),
    ({"data__alphabet": "abca"}, "data.alphabet", "'a' more than once"),
    ({"data__alphabet": ""}, "data.alphabet", "at least one character"),
    ({"data__alphabet": "abc", "data__tokenizer": "here"}, "data.tokenizer", "remove one"),
    ({"data__tokenizer_revision": "v2"}, "data.tokenizer_revision", "of the hub"),
    ({"model": {"revision": "v2"}}, "model.revision", "no model.path"),
    ({"model": {"path": ".", "revision": "v2"}}, "model.revision", "is a directory"),
    ({"data__files": ["a.jsonl"]}, "data.files", "remove one"),
    ({"data__task": None}, "data", "nothing to train on"),
    ({"data__eval_files": ["a.jsonl"]}, "data.eval_files", "does not apply"),
    ({"data__prompt": "solve it"}, "data.prompt", "names no column"),
    ({"data__prompt": "{}="}, "data.prompt", "must name its columns"),
    ({"data__answer": "{answer"}, "data.answer", "not a template"),
    ({"data__chosen": "{best}"}, "data.chosen", "does not apply"),
    ({"data__size": 31}, "data.size", "32 problems"),
    ({"data__files": "a.jsonl"}, "data.files", "list of text"),
    ({"data__on_long_prompt": "fliter"}, "data.on_long_prompt", "did you mean 'filter'?"),
    ({"rewards": []}, "rewards", "at least one reward"),
    ({"rewards": [{"weight": 2}]}, "rewards.0", "exactly one of name"),
    ({"rewards": [{"name": "agreement", "options": {"votes": "majority"}}]}, "rewards.0.options.votes", "vote"),
    ({"rewards": [{"name": "task_score", "options": {"x": 1}}]}, "rewards.0.options.x", "has no options"),
    (
        {"rewards": [{"name": "agreement"}], "rollout__group_size": 1, "method": {"name": "reinforce"}},
        "rewards.0.name",
        "completions of a group",
    ),
    ({"rewards": [{"name": "task_score", "path": "a:b"}]}, "rewards.0", "exactly one of name"),
    ({"rewards": [{"path": "a.b"}]}, "rewards.0.path", "module:function"),
    ({"rewards": [{"path": "nowhere.py:f"}]}, "rewards.0.path", "no such file"),
    ({"rewards": [{"name": "task_score", "adapter": "verl"}]}, "rewards.0.adapter", "does not apply"),
    (
        {
            "rewards": [{"path": "os:getcwd", "adapter": "judge"}],
            "rollout__group_size": 1,
            "method": {"name": "reinforce"},
        },
        "rewards.0.adapter",
        "completions of a group",
    ),
    ({"curriculum": {"oversample": 0}}, "curriculum.oversample", "at least 1"),
    ({"method": {"name": "grpoo"}}, "method.name", "did you mean 'grpo'?"),
    ({"method": {"name": "grpo", "clip_low": "low"}}, "method.clip_low", "finite number"),
    ({"method": {"name": "grpo", "aggregation": "mean"}}, "method.aggregation", "one of"),
    ({"method": {"name": "grpo", "horizon": 12}}, "method.horizon", "does not apply"),
    (
        {"method": {"name": "grpo", "beta": 0.0, "aggregation": "seq_mean_token_sum_norm"}},
        "method.horizon",
        "is missing",
    ),
    ({"method": {"name": "mc_grpo"}, "rollout__group_size": 1}, "rollout.group_size", "2 or more"),
    (
        {"method": {"name": "reinforce", "baseline": "leave_one_out"}, "rollout__group_size": 1},
        "rollout.group_size",
        "2 or more",
    ),
    (
        {"method": {"name": "reinforce"}, "rollout__group_size": 1, "curriculum": {"oversample": 2}},
        "curriculum.oversample",
        "one completion cannot",
    ),
    ({"training__batch_size": 8}, "training.batch_size", "does not apply"),
    ({"training__micro_batches": 3}, "training.micro_batches", "32 * 8 = 256"),
    (
        {"method": {"name": "reinforce"}, "rollout__group_size": 1, "training__share_prompts": True},
        "training.share_prompts",
        "nobody to share it with",
    ),
    ({"model": {"router_loss": {"coefficient": 0.1}}}, "model.router_loss", "for a model with experts"),
    ({"model": {"router_loss": {"coefficient": 0.0}}}, "model.router_loss.coefficient", "above 0"),
    ({"mesh": {"data": 3}}, "mesh", "make rollout.prompts a multiple of 3"),
    ({"mesh": {"data": 2, "fsdp": 3}}, "mesh", "multiple of 3"),
    ({"mesh": {"sequence": 7}}, "mesh.sequence", "does not divide the positions of a row"),
    ({"mesh": {"expert": 3}}, "mesh", "multiple of 3"),
    ({"model": {"path": "somewhere", "width": 32}}, "model.width", "sizes of its own"),
    ({"model": {"heads": 6, "width": 96, "kv_heads": 4}}, "model.kv_heads", "divide model.heads = 6; try 3"),
    ({"model": {"width": 130}}, "model.width", "try 132"),
    ({"model": {"width": 12}}, "model.width", "heads of size 3"),
    ({"model": {"head_dim": 7}}, "model.head_dim", "set model.head_dim to 8"),
    ({"eval": {"samples": 4}}, "eval.k", "at most eval.samples = 4"),
    ({"roles": {"reference": {}}}, "roles.reference", "no role beside the policy"),
    ({"roles": {"policy": {}}}, "roles.policy", "under model"),
    ({"method": {"name": "ppo"}, "roles": {"critc": {}}}, "roles.critc", "did you mean 'critic'?"),
    (
        {"method": {"name": "ppo"}, "roles": {"critic": {"refresh": "every", "every": 2}}},
        "roles.critic.refresh",
        "trains this role",
    ),
    (
        {"method": {"name": "grpo", "beta": 0.1}, "roles": {"reference": {"refresh": "every"}}},
        "roles.reference.every",
        "is missing",
    ),
    (
        {"method": {"name": "grpo", "beta": 0.1}, "roles": {"reference": {"mix": 0.5}}},
        "roles.reference.mix",
        "refresh is frozen",
    ),
    (
        {"method": {"name": "grpo", "beta": 0.1}, "roles": {"reference": {"from": "polciy"}}},
        "roles.reference.from",
        "did you mean 'policy'?",
    ),
    (
        {
            "method": {"name": "ppo", "beta": 0.1},
            "roles": {"critic": {"from": "reference"}, "reference": {"from": "critic"}},
        },
        "roles.critic.from",
        "circle",
    ),
    (
        {"mesh": {"fsdp": 4}, "rollout__mesh": {"tensor": 8}},
        "rollout.mesh",
        "is 8 devices, but mesh is 4",
    ),
    (
        {
            "method": {"name": "sft"},
            "training__batch_size": 16,
            "eval": {"problems": 0},
            "rollout__mesh": {"data": 1},
        },
        "rollout.mesh",
        "eval.problems is 0",
    ),
    (
        {"method": {"name": "sft"}, "training__batch_size": 16, "eval": {"problems": 0}, "rollout__stop": [">"]},
        "rollout.stop",
        "eval.problems is 0",
    ),
    ({"run_dir": ""}, "run_dir", "must name a directory"),
    ({"rewards": [{"name": "task_score", "weight": 0}]}, "rewards", "all have weight 0"),
    ({"method": {"name": "ppo", "value_clip": 0}}, "method.value_clip", "must be above 0"),
    ({"rollout__slots": 256}, "rollout.slots", "a step samples 256 completions"),
    ({"rollout__slots": 6, "mesh": {"fsdp": 4}}, "rollout.slots", "try 8"),
    ({"rollout__cache_pages": 10, "mesh": {"fsdp": 4}}, "rollout.cache_pages", "try 12"),
    ({"rollout__cache_dtype": "int4"}, "rollout.cache_dtype", "int8"),
    (
        {"training__optimizer": {"learning_rate": 1e-3, "name": "sgd", "b2": 0.9}},
        "training.optimizer.b2",
        "does not apply",
    ),
    (
        {"training__optimizer": {"learning_rate": 1e-3, "name": "sgd", "b1": 0.0, "mu_dtype": "bfloat16"}},
        "training.optimizer.mu_dtype",
        "keeps no momentum",
    ),
    (
        {"training__optimizer": {"learning_rate": 1e-3, "name": "adam", "weight_decay": 0.1}},
        "training.optimizer.weight_decay",
        "adamw decays",
    ),
    (
        {"training__optimizer": {"learning_rate": 1e-3, "end_fraction": 0.0}},
        "training.optimizer.end_fraction",
        "schedule is constant",
    ),
]


JUDGE = {"path": "os:getcwd", "adapter": "judge"}


@pytest.mark.parametrize(("changes", "key", "words"), CASES, ids=[f"{case[1]}-{case[2][:20]}" for case in CASES])
def test_a_value_that_cannot_be_run_is_one_problem_that_names_its_key_and_the_fix(changes, key, words):
    problems = [problem for problem in problems_of(**changes) if problem.split(":")[0].split(" =")[0] == key]
    assert len(problems) == 1
    assert words in problems[0]


WARM = {"steps": 20, "examples": 10, "optimizer": {"learning_rate": 1e-3}}


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"until": 0.3}, "warm_start.check_every", "is missing"),
        ({"until": 1.3, "check_every": 5}, "warm_start.until", "at most 1"),
        ({"until": 0.3, "check_every": 21}, "warm_start.check_every", "never checked"),
        ({"check_every": 5}, "warm_start.check_every", "until is not given"),
        ({"check_problems": 5}, "warm_start.check_problems", "until is not given"),
        ({"optimizer": {}}, "warm_start.optimizer.learning_rate", "is missing"),
    ],
)
def test_options_of_a_warm_start_must_fit_together(changes, key, words):
    (problem,) = problems_of(warm_start={**WARM, **changes})
    assert problem.startswith(key)
    assert words in problem


def test_a_method_without_rollouts_takes_a_batch_size_and_refuses_the_options_of_rollouts(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    offline = make(
        method={"name": "dpo"},
        rewards=[],
        data={"files": [str(tmp_path / "pairs.jsonl")], "max_prompt_length": 8},
        training__batch_size=6,
        training__micro_batches=3,
    )
    config = configs.from_dict(offline)
    assert config.training.batch_size == 6
    offline["rollout"]["group_size"] = 4
    offline["curriculum"] = {"oversample": 2}
    offline["training"]["micro_batches"] = 4  # 12 sequences can be cut in four, six pairs cannot
    with pytest.raises(ConfigError) as caught:
        configs.from_dict(offline)
    assert [problem.split(" =")[0] for problem in caught.value.problems] == [
        "rollout.group_size",
        "curriculum.oversample",
    ]
    del offline["curriculum"], offline["rollout"]["group_size"]
    with pytest.raises(ConfigError, match=r"training.micro_batches = 4: does not divide training.batch_size = 6 pairs"):
        configs.from_dict(offline)


@pytest.mark.parametrize("templates", [{}, {"data__rejected": "{question}"}])
def test_preference_training_on_a_task_that_has_no_pairs_is_an_error(templates):
    problems = problems_of(method={"name": "dpo"}, rewards=[], **templates)
    assert any("preference pairs" in problem for problem in problems)


def test_a_missing_data_file_is_named_unless_an_old_run_is_only_read(tmp_path):
    missing = str(tmp_path / ("a" * 80) / "gone.jsonl")
    values = make(data={"files": [missing], "max_prompt_length": 8, "prompt": "{p}"}, rewards=[{"name": "exact_match"}])
    with pytest.raises(ConfigError, match=r"data.files.0 = .*gone.jsonl.*no such file"):
        configs.from_dict(values)
    assert configs.from_dict(values, check_files=False).data.files == (missing,)


def test_a_batch_is_held_against_mesh_and_micro_batches_together():
    # 4 prompts * 2 completions = 8 rows: 2 micro-batches of 4 fit on 4 devices, 4 micro-batches of 2 do not.
    sizes = {"rollout__prompts": 4, "rollout__group_size": 2, "mesh": {"data": 2, "fsdp": 2}}
    assert configs.from_dict(make(**sizes, training__micro_batches=2)).mesh.fsdp == 2
    (problem,) = problems_of(**sizes, training__micro_batches=4)
    assert "in each of 4 micro-batches evenly; make rollout.prompts a multiple of 8" in problem


def test_shared_prompts_keep_groups_whole_and_one_row_each():
    sizes = {"rollout__prompts": 4, "rollout__group_size": 8, "training__share_prompts": True}
    config = configs.from_dict(make(**sizes, training__micro_batches=4))
    assert config.training.share_prompts
    assert not configs.from_dict(make()).training.share_prompts
    (problem,) = problems_of(**sizes, training__micro_batches=8)
    assert problem.startswith("training.micro_batches = 8")
    assert "groups of one prompt must stay whole: use a divisor of 4" in problem
    (problem,) = problems_of(**sizes, training__micro_batches=2, mesh={"data": 4})
    assert "in one row (training.share_prompts), in each of 2 micro-batches evenly; make rollout.prompts a" in problem
    assert "multiple of 8" in problem


def test_a_warm_start_batch_must_be_shared_evenly_by_the_devices():
    (problem,) = problems_of(mesh={"data": 4}, warm_start={**WARM, "batch_size": 30})
    assert problem.startswith("warm_start.batch_size = 30")
    assert "try 32" in problem


def test_a_mesh_larger_than_the_devices_is_an_error_and_a_smaller_one_a_warning():
    config = configs.from_dict(make(mesh={"fsdp": 4, "tensor": 2}))
    assert configs.check_devices(config, 8) == []
    with pytest.raises(ConfigError, match=r"= 8 devices, but there are 4.*device_count=8"):
        configs.check_devices(config, 4)
    (warning,) = configs.check_devices(config, 16)
    assert "8 devices of 16" in warning


SHORT = {"training__steps": 2, "training__epochs": 2}
FILES = {"data__task": ..., "data__files": [__file__], "rewards": [{"path": "os:getcwd"}]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mesh": {"tensor": 3}}, "does not divide model.heads = 4"),
        ({"mesh": {"tensor": 3}, "rollout__mesh": {"fsdp": 3}}, "cannot share rollout.prompts"),
        ({"training__optimizer": {"learning_rate": 1e-3, "warmup_steps": 10}}, "last of the 10 updates"),
        (
            {"training__optimizer": {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 25}, **SHORT},
            "last of the 4 updates",
        ),
        ({"model__param_dtype": "bfloat16"}, "most updates are rounded away; set it to float32"),
        ({"rewards": [JUDGE]}, "means nothing; set eval.problems to 0"),
        ({**FILES, "eval": {"every": 10}}, "^eval.every = 10: without data.eval_files nothing is held out"),
        (
            {**FILES, "eval": {"problems": 64, "every": 5}},
            "^eval.problems = 64, eval.every = 5: .* set eval.problems to",
        ),
    ],
)
def test_what_can_be_run_but_is_probably_not_meant_is_a_warning(changes, words):
    with pytest.warns(ConfigWarning, match=words):
        configs.from_dict(make(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"param_dtype": "bfloat16", "lora": {"rank": 2}}},
        {"eval": {"every": 10}},  # a task has held-out problems of its own
        FILES,
        {**FILES, "eval": {"every": 10, "problems": 0}},
        {**FILES, "eval": {"every": 10}, "data__eval_files": [__file__]},
    ],
)
def test_what_is_meant_is_no_warning(changes):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConfigWarning)
        configs.from_dict(make(**changes))


@pytest.mark.parametrize("path", ["./nosuch", "/x/nosuch", "~/nosuch", "nosuch/", "a/b/nosuch"])
def test_a_model_that_can_only_be_a_missing_directory_is_a_problem_of_its_path(path):
    (problem,) = problems_of(model={"path": path})
    assert problem.startswith(f"model.path = {path!r}: no such directory (looked from ")
    configs.from_dict(make(model={"path": path}), check_files=False)  # an old run's


def test_an_id_of_the_hub_is_not_looked_for_on_this_machine():
    assert configs.from_dict(make(model={"path": "owner/nosuch"})).model.path == "owner/nosuch"


def test_a_warm_up_is_held_against_updates_of_which_a_step_makes_one_per_epoch():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = {"learning_rate": 1e-3, "schedule": "linear", "warmup_steps": 15}
        assert configs.from_dict(make(training__optimizer=optimizer, training__epochs=2)).training.epochs == 2


class Method(NamedTuple):
    needs: dict
    unit: str = "token"
    trains: frozenset = frozenset({"policy"})
    learns_from: str = "rollouts"
    min_group: int = 1
    wants: frozenset = frozenset()
    stages: Mapping = types.MappingProxyType({})
    combine: Any = None

    @property
    def roles(self):
        return frozenset(self.needs)


def _stub(unit="token", fail=None, **facts):
    def stub(*, kind: Literal["a", "b"] = "a", rate: float, pair: tuple[int, ...] = (), untyped=3) -> Method:
        if fail:
            raise ValueError(fail)
        return Method({"policy": frozenset()}, unit, **facts)

    return types.SimpleNamespace(stub=stub, other=len, __all__=["stub", "other"])


def test_keywords_of_a_method_are_checked_against_annotations_and_defaults():
    values = make(method={"name": "stub", "rate": 1, "pair": [1, 2], "untyped": 4})
    config = configs.from_dict(values, namespace=_stub())
    assert config.method.keywords == {"rate": 1.0, "pair": (1, 2), "untyped": 4}
    assert isinstance(config.method.keywords["rate"], float)
    with pytest.raises(ConfigError) as caught:
        configs.from_dict(make(method={"name": "stub", "kind": "c", "pair": 3, "untyped": "x"}), namespace=_stub())
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "method.kind = 'c'",
        "method.pair = 3",
        "method.untyped = 'x'",
        "method.rate",
    ]


def test_what_a_method_itself_refuses_is_a_problem_of_the_configuration():
    with pytest.raises(ConfigError, match=r"method\.rate: rate must be odd"):
        configs.from_dict(make(method={"name": "stub", "rate": 1}), namespace=_stub(fail="rate must be odd"))


@pytest.mark.parametrize(("unit", "words"), [("batch", "set it to 1"), ("group", "divisor of 32")])
def test_micro_batches_may_not_cut_the_piece_that_the_method_needs_whole(unit, words):
    values = make(method={"name": "stub", "rate": 1}, training__micro_batches=64)
    with pytest.raises(ConfigError, match=words):
        configs.from_dict(values, namespace=_stub(unit))
    assert configs.from_dict(values, namespace=_stub("sequence")).training.micro_batches == 64


def test_what_a_method_that_nothing_here_knows_says_of_its_groups_and_its_data_is_believed(tmp_path):
    values = make(method={"name": "stub", "rate": 1}, rollout__group_size=3)
    with pytest.raises(ConfigError, match=r"rollout.group_size = 3: stub compares.*fewer than 4 has no advantage"):
        configs.from_dict(values, namespace=_stub(min_group=4))
    assert configs.from_dict(values, namespace=_stub(min_group=3)).rollout.group_size == 3

    (tmp_path / "data.jsonl").write_text("{}\n")
    data = {"files": [str(tmp_path / "data.jsonl")], "max_prompt_length": 8, "chosen": "{best}"}
    values = make(method={"name": "stub", "rate": 1}, data=data, rewards=[], training__batch_size=6)
    pairs = configs.from_dict(values, namespace=_stub(learns_from="pairs", min_group=2))
    assert (pairs.data.chosen, pairs.training.batch_size) == ("{best}", 6)
    with pytest.raises(ConfigError) as caught:
        configs.from_dict(values, namespace=_stub(learns_from="completions"))
    assert [problem.split(" =")[0] for problem in caught.value.problems] == ["data.chosen"]
    with pytest.raises(ConfigError) as caught:
        configs.from_dict(values, namespace=_stub(learns_from="rollouts"))
    assert {problem.split(" =")[0] for problem in caught.value.problems} == {
        "data.chosen",
        "rewards",
        "training.batch_size",
    }


def test_what_depends_on_the_method_is_passed_over_where_the_method_is_wrong():
    (problem,) = problems_of(method={"name": "gpro"}, rewards=[], rollout__group_size=1, data__chosen="{best}")
    assert problem.startswith("method.name = 'gpro'")


@pytest.mark.parametrize("name", ["sft", "reinforce", "grpo", "mc_grpo", "ppo", "dpo"])
def test_every_method_of_the_library_can_be_configured_by_name(name, tmp_path):
    assert callable(getattr(methods, name))
    data = {"files": [str(tmp_path / "data.jsonl")], "max_prompt_length": 8}
    (tmp_path / "data.jsonl").write_text("{}\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConfigWarning)
        config = configs.from_dict(make(method={"name": name}, data=data, rewards=[{"name": "exact_match"}]))
    assert config.method.name == name


def with_tokens(*, delimiters: tuple[tuple[int, ...], ...] = (), steps: Mapping[str, Any] | None = None) -> Method:
    del delimiters, steps
    return Method({"policy": frozenset()})


def test_a_text_among_a_methods_keywords_stands_for_its_token_ids(tmp_path):
    namespace = types.SimpleNamespace(with_tokens=with_tokens)
    method = {
        "name": "with_tokens",
        "delimiters": [{"text": "ab"}, [7]],
        "steps": {"name": "delimiter", "delimiters": [{"text": "b"}]},
    }
    config = configs.from_dict(
        make(method=method, data__alphabet="ab", data__max_prompt_length=11), namespace=namespace
    )
    ids = CharTokenizer("ab").encode("ab")
    assert config.method.keywords["delimiters"] == (tuple(ids), (7,))
    assert config.method.keywords["steps"]["delimiters"] == [ids[1:]]
    path = tmp_path / "run.yaml"
    path.write_text(configs.dump(config))
    assert configs.load(path, namespace=namespace) == config


@pytest.mark.parametrize(("text", "words"), [("z", "z"), ("", "at least one token"), (3, "at least one token")])
def test_a_text_that_cannot_be_encoded_is_a_problem_of_its_key(text, words):
    namespace = types.SimpleNamespace(with_tokens=with_tokens)
    method = {"name": "with_tokens", "delimiters": [{"text": text}]}
    with pytest.raises(ConfigError) as caught:
        configs.from_dict(make(method=method, data__alphabet="ab"), namespace=namespace)
    assert any("method.delimiters.0.text" in problem and words in problem for problem in caught.value.problems)


def test_a_role_that_is_trained_may_have_an_optimizer_and_one_that_is_not_may_not():
    own = {"name": "sgd", "learning_rate": 0.5, "b1": 0.0}
    config = configs.from_dict(make(method={"name": "ppo"}, roles={"critic": {"optimizer": own}}))
    (stage,) = make_stages(config)
    assert sorted(stage.optimizer) == ["critic", "policy"]
    assert stage.optimizer["critic"] is not stage.optimizer["policy"]
    problems = problems_of(method={"name": "grpo", "beta": 0.1}, roles={"reference": {"optimizer": own}})
    assert any("roles.reference.optimizer" in problem and "does not train" in problem for problem in problems)
    problems = problems_of(method={"name": "ppo"}, roles={"critic": {"optimizer": {**own, "b2": 0.9}}})
    assert any("roles.critic.optimizer.b2" in problem for problem in problems)

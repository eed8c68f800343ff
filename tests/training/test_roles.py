"""Where roles get their parameters: averages, other runs, and what is wrong with them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jaxrl_post import training
from jaxrl_post.models.quantize import quantize_array
from jaxrl_post.training import config as configs
from jaxrl_post.training import inference, loop
from jaxrl_post.training import setup as setups
from jaxrl_post.training.config import ConfigError
from jaxrl_post.training.roles import Role, make_refresh, role_params, soup
from tests.training import runs


def test_a_soup_is_the_average_of_every_parameter():
    mixed = training.soup([{"a": jnp.array([0.0, 2.0])}, {"a": jnp.array([2.0, 4.0])}], [0.5, 0.5])
    assert mixed["a"].tolist() == [1.0, 3.0]
    assert training.soup([{"a": jnp.array([0.0])}, {"a": jnp.array([3.0])}, {"a": jnp.array([6.0])}])["a"].tolist() == [
        3
    ]
    extrapolated = soup([{"a": jnp.array([1.0])}, {"a": jnp.array([2.0])}], [-1.0, 2.0])
    assert extrapolated["a"].tolist() == [3.0]


def test_a_weight_of_one_gives_that_model_to_the_bit():
    models = [{"w": jax.random.normal(jax.random.key(n), (5,), jnp.bfloat16), "n": jnp.array(7)} for n in (0, 1)]
    for index in (0, 1):
        mixed = soup(models, np.eye(2)[index].tolist())
        np.testing.assert_array_equal(mixed["w"], models[index]["w"])
    # What has weight 0 does not count, whatever it holds.
    broken = models[1] | {"w": models[1]["w"] * jnp.nan}
    np.testing.assert_array_equal(soup([models[0], broken], [1.0, 0.0])["w"], models[0]["w"])


def test_sums_are_taken_in_float32_and_the_type_is_kept():
    # 1/3 of 3 * 1.0078125 in bfloat16 arithmetic rounds on the way; in float32 it does not.
    models = [{"w": jnp.array([1.0 + n / 128], jnp.bfloat16)} for n in (0, 1, 2)]
    mixed = soup(models)
    assert mixed["w"].dtype == jnp.bfloat16
    assert float(mixed["w"][0]) == 1.0 + 1 / 128
    with jax.enable_x64(True):
        wide = soup([{"w": jnp.array([1.0, 1e-12])}, {"w": jnp.array([2.0, 3e-12])}])
        np.testing.assert_allclose(wide["w"], [1.5, 2e-12], rtol=1e-15)


def test_only_models_of_one_shape_mix():
    one = {"a": jnp.zeros(2), "b": {"c": jnp.zeros(3)}}
    with pytest.raises(ValueError, match=r"model 2 differ at \['b'\]\['c'\]: float32\[3\] and float32\[4\]"):
        soup([one, {"a": jnp.zeros(2), "b": {"c": jnp.zeros(4)}}])
    with pytest.raises(ValueError, match=r"differ at \['b'\]\['c'\]: float32\[3\] and nothing"):
        soup([one, {"a": jnp.zeros(2)}])
    with pytest.raises(ValueError, match=r"float32\[2\] and bfloat16\[2\]"):
        soup([one, one | {"a": jnp.zeros(2, jnp.bfloat16)}])
    with pytest.raises(ValueError, match="a weight for each of 2 models, got 3"):
        soup([one, one], [1, 1, 1])
    with pytest.raises(ValueError, match="empty list"):
        soup([])
    with pytest.raises(ValueError, match="finite"):
        soup([one, one], [float("nan"), 1])


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_weights_stay_where_they_are_and_are_not_averaged_with_others(kind):
    def model(seed, base=0):
        weight = jax.random.normal(jax.random.key(base), (8, 64))
        return {"base": quantize_array(weight, kind=kind), "lora": jax.random.normal(jax.random.key(seed), (4,))}

    one, other = model(1), model(2)
    refresh = make_refresh({"reference": Role(every=1, mix=0.1)})
    state = jax.jit(refresh)({"policy": one, "reference": other}, jnp.asarray(1))["reference"]
    for mixed, share in ((soup([one, other], [0.1, 0.9]), 0.1), (state, 0.1)):
        jax.tree.map(np.testing.assert_array_equal, mixed["base"].values, one["base"].values)
        np.testing.assert_allclose(mixed["base"].astype(float), one["base"].astype(float), rtol=1e-6)
        np.testing.assert_allclose(mixed["lora"], share * one["lora"] + (1 - share) * other["lora"], rtol=1e-6)
    with pytest.raises(ValueError, match=r"other integers at .*base.*adapters on one base"):
        soup([one, model(1, base=3)])


def test_roles_are_made_in_the_order_of_their_sources():
    roles = {
        "late": Role(("reference", "runs/x"), (0.5, 0.5)),
        "reference": Role(("policy", "runs/y"), (0.25, 0.75)),
    }
    runs_by_name = {"runs/x": jnp.array(8.0), "runs/y": jnp.array(4.0)}
    made = role_params(roles, {"policy": jnp.array(0.0)}, runs_by_name.__getitem__)
    assert {name: float(value) for name, value in made.items()} == {"policy": 0.0, "reference": 3.0, "late": 5.5}
    with pytest.raises(ValueError, match="from each other"):
        role_params({"a": Role(("b",)), "b": Role(("a",))}, {"policy": jnp.zeros(())}, runs_by_name.__getitem__)


def test_a_refresh_may_follow_an_average_of_roles():
    refresh = make_refresh({"reference": Role(("policy", "teacher"), (0.25, 0.75), every=1, mix=0.5)})
    params = {"policy": jnp.array(4.0), "teacher": jnp.array(8.0), "reference": jnp.array(1.0)}
    assert float(refresh(params, jnp.asarray(1))["reference"]) == 0.5 * 7.0 + 0.5 * 1.0


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Two supervised runs from one model, with different data order."""
    directory = tmp_path_factory.mktemp("others")
    paths = []
    for seed in (1, 2):
        path = runs.tiny_run(
            directory / f"sft-{seed}",
            method={"name": "sft"},
            warm_start=None,
            rollout={"max_new_tokens": 3},
            rewards=[],
        )
        loop.run(configs.load(path, [f"seed={seed}", "training.steps=2", "training.batch_size=4", "eval.problems=0"]))
        paths.append(str(directory / f"sft-{seed}" / "run"))
    return paths


def policy_of(run_dir):
    return inference.load_run(run_dir)[1]


def salsa(directory, others, **changes):
    values = {
        "method": {"name": "ppo", "beta": 0.1},
        "roles": {"policy": {"from": others[0]}, "reference": {"from": others, "weights": [0.25, 0.75]}},
        "warm_start": None,
        "training": runs.training(steps=3),
        "eval": {"problems": 0},
    }
    return runs.tiny_run(directory, **(values | changes))


@pytest.fixture(scope="module")
def begun(others, tmp_path_factory):
    """The directory of a run that has made two of its steps."""
    directory = tmp_path_factory.mktemp("begun")
    loop.run(configs.load(salsa(directory, others), ["training.steps=2"]))
    return directory


def test_a_policy_starts_from_a_run_and_its_reference_from_an_average_of_runs(others, begun):
    first, second = map(policy_of, others)
    expected = jax.tree.map(lambda a, b: 0.25 * a + 0.75 * b, first, second)
    parts = setups.build(configs.load(begun / "run" / "config.yaml"))
    stage = parts.stages[0]
    state = parts.begin(stage, parts.initial_params(), step=0)
    jax.tree.map(np.testing.assert_array_equal, state.params["policy"], first)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), state.params["reference"], expected
    )
    # After training the reference is still the average and the policy has moved on.
    from jaxrl_post.training.checkpoint import restore

    trained = restore(begun / "run" / "checkpoints", parts.template(stage)).state
    jax.tree.map(np.testing.assert_array_equal, trained.params["reference"], state.params["reference"])
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), trained.params["policy"], first)
    assert max(jax.tree.leaves(moved)) > 1e-4


def test_a_run_goes_on_without_the_runs_that_it_started_from(begun, monkeypatch):
    # The reference is in the checkpoint: nothing is read again.
    monkeypatch.setattr(setups.Setup, "load_policy", lambda self, run_dir: pytest.fail("read another run"))
    loop.run(configs.load(begun / "config.yaml", ["training.steps=3"]))
    assert runs.lines(begun / "run")[-1]["step"] == 3


def test_a_run_of_another_model_or_alphabet_is_an_error_that_says_where_they_differ(others, tmp_path):
    wide = salsa(tmp_path / "a", others, model={"width": 32, "layers": 1, "heads": 2, "mlp_width": 16})
    with pytest.raises(ConfigError, match=r"the model of this run and .*sft-1/run differ at .*give both runs the same"):
        loop.run(configs.load(wide))
    sizes = yaml.safe_load(salsa(tmp_path / "c", others).read_text())["model"]
    for change, words in (
        ({"softcap": 1.0}, "softcap is 1.0 here but None in .*sft-1/run"),
        ({"rope_base": 10.0}, r"rope is Rope\(base=10.0.*local_rope is"),
    ):
        with pytest.raises(ConfigError, match=words):
            loop.run(configs.load(salsa(tmp_path / "c", others, model={**sizes, **change})))
    values = yaml.safe_load(salsa(tmp_path / "b", others).read_text())
    values["data"]["alphabet"] = "9876543210>"
    with pytest.raises(ConfigError, match=r"data\.alphabet is '9876543210>' here but '>0123456789' in"):
        loop.run(configs.from_dict(values))


@pytest.mark.parametrize(
    ("roles", "key", "message"),
    [
        ({"reference": {"from": "runs/none"}}, "roles.reference.from", "no run in this directory"),
        ({"reference": {"from": ["policy", "polciy"]}}, "roles.reference.from", "did you mean 'policy'"),
        ({"reference": {"from": []}}, "roles.reference.from", "is empty"),
        ({"reference": {"weights": [1.0]}}, "roles.reference.weights", "does not apply"),
        (
            {"reference": {"from": ["policy", "RUN"], "weights": [1.0]}},
            "roles.reference.weights",
            "one number for each of the 2",
        ),
        (
            {"reference": {"from": ["policy", "RUN"], "weights": [0.5, 0.6]}},
            "roles.reference.weights",
            "must add up to 1, and these add up to 1.1",
        ),
        (
            {"reference": {"from": ["policy", "RUN"], "refresh": "every", "every": 2}},
            "roles.reference.refresh",
            "is a directory, which stays as it is",
        ),
        ({"policy": {"from": "reference"}}, "roles.policy", "give from: the directory of a run"),
        (
            {"policy": {"from": "RUN", "refresh": "every", "every": 2}},
            "roles.policy.refresh",
            "trains this role itself",
        ),
        (
            {"reference": {"from": ["policy", "critic"]}, "critic": {"from": ["reference", "policy"]}},
            "roles.critic.from",
            "circle: critic -> reference -> critic",
        ),
    ],
)
def test_roles_that_make_no_sense_are_errors_with_their_key(roles, key, message, others, tmp_path):
    values = yaml.safe_load(salsa(tmp_path, others).read_text())
    values["roles"] = yaml.safe_load(json.dumps(roles).replace("RUN", others[0]))
    with pytest.raises(ConfigError) as caught:
        configs.from_dict(values)
    lines = [line for line in caught.value.problems if line.startswith(key)]
    assert len(lines) == 1, caught.value.problems
    assert message in lines[0]


def test_a_list_of_sources_survives_being_written_and_read(others, tmp_path):
    config = configs.load(salsa(tmp_path, others))
    assert config.roles["reference"].sources == tuple(others)
    again = configs.from_dict(yaml.safe_load(configs.dump(config)))
    assert dataclasses.asdict(again) == dataclasses.asdict(config)

"""Runs that start from a Hugging Face checkpoint and give one back."""

import json
import shutil
import warnings
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxrl_post import models as hf_models
from jaxrl_post.training import config as configs
from jaxrl_post.training import inference, loop
from jaxrl_post.training import setup as setups
from jaxrl_post.training.checkpoint import CheckpointError
from jaxrl_post.training.config import ConfigError
from jaxrl_post.training.model_setup import warn_of_long_rows
from tests.training import runs

ALPHABET = "_$>0123456789"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny random Qwen3 with a tokenizer of single characters, as transformers saves them."""
    return save_qwen3(tmp_path_factory.mktemp("qwen3"))


def save_qwen3(directory, kind=transformers.Qwen3ForCausalLM, **changes):
    tokenizer = Tokenizer(models.WordLevel({character: i for i, character in enumerate(ALPHABET)}, unk_token="_"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="_", eos_token="$", unk_token="_")
    fast.save_pretrained(directory)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 6, **changes}
    config = transformers.Qwen3Config(
        vocab_size=16, num_attention_heads=2, num_key_value_heads=1, eos_token_id=1, pad_token_id=0, **sizes
    )
    torch.manual_seed(0)
    kind(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def trained(tmp_path_factory, checkpoint):
    """The directory of a run of two steps from it, which is in `run` and what it gave back in `out`."""
    directory = tmp_path_factory.mktemp("trained")
    run(directory, checkpoint, "training.steps=2")
    return directory


LORA = {"rank": 2, "alpha": 3.0, "targets": ["q_proj", "up"], "dropout": 0.25, "rank_stabilized": True}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, checkpoint):
    """The directory of a run of adapters, on few bits of it: in `run`, and what it gave back in `out`."""
    directory = tmp_path_factory.mktemp("adapted")
    run(directory, checkpoint, "training.steps=2", lora=LORA, quantize="int8")
    return directory


def written(tmp_path, checkpoint, **model):
    """The configuration of a run."""
    tmp_path.mkdir(exist_ok=True)
    return runs.tiny_run(
        tmp_path,
        model={"path": checkpoint and str(checkpoint), "export": str(tmp_path / "out"), **model},
        data={
            "files": [str(runs.write_problems(tmp_path / "train.jsonl"))],
            "max_prompt_length": 6,
        },
        method={"name": "grpo", "beta": 0.1},
        warm_start=None,
        eval={"problems": 0},
    )


def run(tmp_path, checkpoint, *overrides, **model):
    path = written(tmp_path, checkpoint, **model)
    loop.run(configs.load(path, overrides))
    return path


def own_states(policy, params, ids):
    positions = np.broadcast_to(np.arange(len(ids[0])), np.shape(ids))
    return jax.jit(policy.hidden)(params, np.array(ids), positions)[0]


def logits(directory, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float().numpy()


def test_what_a_run_gives_back_is_loaded_by_transformers_with_the_runs_own_logits(trained, checkpoint):
    ids = [[3, 4, 2, 5], [8, 8, 2, 1]]
    found = logits(trained / "out", ids)[..., : len(ALPHABET)]  # of the other rows the tokenizer has no token
    assert np.abs(found - logits(checkpoint, ids)[..., : len(ALPHABET)]).max() > 1e-3  # it has learnt
    setup, params = inference.load_run(trained / "run")
    hidden = own_states(setup.policy, params, ids)
    ours = hidden @ setup.policy.unembed(params).weight.T
    np.testing.assert_allclose(found, ours, rtol=2e-4, atol=2e-5)
    assert transformers.AutoTokenizer.from_pretrained(trained / "out").encode("12>") == [4, 5, 2]
    assert json.loads((trained / "out" / "config.json").read_text())["model_type"] == "qwen3"


def test_a_run_of_adapters_gives_back_the_merged_model_and_the_adapters(adapted):
    assert sorted(path.name for path in (adapted / "out" / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    ids = [[3, 4, 2, 5]]
    found = logits(adapted / "out", ids)[..., : len(ALPHABET)]
    setup, params = inference.load_run(adapted / "run")
    hidden = own_states(setup.policy, params, ids)
    np.testing.assert_allclose(found, hidden @ setup.policy.unembed(params).weight.T, rtol=1e-3, atol=1e-4)


def adapters_of(params):
    return hf_models.split_adapters(jax.device_get(params))[1]


def test_a_run_goes_on_from_adapters_whose_options_and_base_it_takes_from_their_directory(
    tmp_path, checkpoint, adapted
):
    from jaxrl_post.training import setup

    shutil.copytree(adapted, tmp_path / "first")
    adapter = str(tmp_path / "first" / "out" / "adapter")
    path = run(tmp_path / "second", None, "training.steps=1", path=None, lora={"path": adapter, "dropout": 0.0})
    config = configs.load(path)
    assert config.model.path == config.data.tokenizer == str(checkpoint)
    assert vars(config.model.lora) == {**LORA, "path": adapter, "targets": ("query", "up"), "dropout": 0.0}
    assert config.roles["reference"].sources == ("policy",)  # what the method starts from is not the bare model
    parts = setup.build(config)
    before, trained = (inference.load_run(tmp_path / name / "run")[1] for name in ("first", "second"))
    jax.tree.map(np.testing.assert_array_equal, adapters_of(parts.initial_params()), adapters_of(before))
    assert runs.lines(tmp_path / "second" / "run")[0]["kl"] == pytest.approx(0, abs=1e-6)
    moved = jax.tree.map(lambda a, b: (a != b).any(), adapters_of(before), adapters_of(trained))
    assert any(jax.tree.leaves(moved))

    for wrong in ({"rank": 3}, {"alpha": 16.0}, {"targets": ["q_proj"]}, {"rank_stabilized": False}):
        with pytest.raises(ConfigError, match=rf"model\.lora\.{next(iter(wrong))} = .*leave it out"):
            configs.load(path, [f"model.lora={json.dumps({'path': adapter, **wrong})}"])
    with pytest.raises(ConfigError, match=r"model\.lora\.path.*no adapter_config"):
        configs.load(path, [f"model.lora={{path: {checkpoint}}}"])
    with pytest.raises(ConfigError, match=r"model\.lora\.rank: is missing"):
        configs.load(path, ["model.lora={alpha: 2, path: null}", f"model.path={checkpoint}"])
    # An old run can be used whatever has become of what it started from.
    options = Path(adapter) / "adapter_config.json"
    options.write_text(options.read_text().replace('"r": 2', '"r": 4'))
    assert inference.load_run(tmp_path / "second" / "run")[1].keys() == trained.keys()
    shutil.rmtree(tmp_path / "first")
    assert inference.load_run(tmp_path / "second" / "run")[1].keys() == trained.keys()


@pytest.fixture
def of_three_sizes(tmp_path, checkpoint, monkeypatch):
    """The configuration of a run whose policy, critic and reference are of their own sizes, and the latter two."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / name.split("/")[1]))

    critic = save_qwen3(
        tmp_path / "critic", transformers.Qwen3ForSequenceClassification, num_labels=1, num_hidden_layers=1
    )
    reference = save_qwen3(tmp_path / "reference", hidden_size=8)
    files = [str(runs.write_problems(tmp_path / "train.jsonl"))]
    values = {
        "model": {"path": str(checkpoint), "lora": {"rank": 2}},
        "data": {"files": files, "max_prompt_length": 3},
        "method": {"name": "ppo", "beta": 0.1},
        "roles": {"critic": {"from": "hf://owner/critic"}, "reference": {"from": str(reference)}},
        "warm_start": None,
        "eval": {"problems": 0},
    }
    return runs.tiny_run(tmp_path, **values), critic, reference


@pytest.mark.nightly  # on every commit they are built, below
def test_a_policy_and_a_critic_of_different_sizes_train(of_three_sizes):
    path, *_ = of_three_sizes
    loop.run(configs.load(path, ["training.steps=1", "eval.problems=0"]))
    assert np.isfinite(runs.lines(path.parent / "run")[-1]["loss"])
    assert runs.final_state(path.parent / "run")[0] == 1


def test_a_critic_and_a_reference_start_from_checkpoints_of_their_own_sizes(of_three_sizes):
    from jaxrl_post.training import setup

    path, critic, reference = of_three_sizes
    parts = setup.build(configs.load(path))
    stage = parts.stages[0]
    params = parts.begin(stage, parts.initial_params(), step=0).params
    ids = [[3, 4, 2, 5]]
    hidden = own_states(parts.model("critic"), params["critic"], ids)
    found = parts.model("critic").heads(params["critic"], hidden)["value"]
    with torch.no_grad():
        scores = transformers.Qwen3ForSequenceClassification.from_pretrained(critic, num_labels=1)
        theirs = scores.score(scores.model(torch.tensor(ids)).last_hidden_state)[..., 0].numpy()
    np.testing.assert_allclose(found, theirs, rtol=2e-5, atol=2e-6)
    assert np.abs(theirs).max() > 1e-3
    hidden = own_states(parts.model("reference"), params["reference"], ids)
    ours = hidden @ parts.model("reference").unembed(params["reference"]).weight.T
    np.testing.assert_allclose(ours, logits(reference, ids)[..., : len(ALPHABET)], rtol=2e-4, atol=2e-5)
    # The critic, which is trained, has adapters as the policy has; the reference has none.
    assert "query_lora" in params["critic"]["layers"]["attention"]
    assert "query_lora" not in params["reference"]["layers"]["attention"]

    both = configs.load(path, [f"roles.reference={{from: [policy, {reference}]}}"])
    parts = setup.build(both)
    with pytest.raises(ConfigError, match=r"the model of this run and .*reference differ at .*\[16, 16\].*\[16, 8\]"):
        parts.begin(parts.stages[0], parts.initial_params(), step=0)
    (critic / "tokenizer.json").write_text((critic / "tokenizer.json").read_text().replace('"3"', '"x"'))
    with pytest.raises(ValueError, match=r"is '3' in this run but 'x' in .*critic; tokens must mean the same"):
        setup.build(configs.load(path)).prepare()
    with pytest.raises(ConfigError, match=r"roles\.policy.*model\.path"):
        configs.load(path, [f"roles.policy.from={reference}"])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "1>", "completion": "1", "label": True}, "labelled good or bad.*kind: completion.*kind: prompt"),
        ({"prompt": "1>", "completions": ["1"], "labels": [True]}, "a label for each.*kind: prompt"),
    ],
)
def test_rows_whose_labels_no_method_learns_from_are_refused_with_what_can_be_done(tmp_path, row, words):
    from jaxrl_post.training import setup

    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    data = {"files": [str(tmp_path / "rows.jsonl")], "alphabet": ALPHABET[2:], "max_prompt_length": 3}
    for method, sizes in {"sft": {}, "grpo": {"group_size": 2, "prompts": 1}}.items():
        changes = {"data": data, "warm_start": None, "eval": {"problems": 0}, "rollout": {"max_new_tokens": 3, **sizes}}
        path = runs.tiny_run(tmp_path, method={"name": method}, **changes)
        with pytest.raises(ConfigError, match=rf"data\.kind: .*{words}"):
            setup.build(configs.load(path)).prepare()
    assert setup.build(configs.load(path, ["data.kind=prompt"])).problems.train[0]["prompt"] == "1>"


@pytest.mark.nightly
def test_a_run_from_a_checkpoint_is_resumed_from_its_own(tmp_path, checkpoint):
    run(tmp_path / "whole", checkpoint, "training.steps=4")
    path = run(tmp_path / "parts", checkpoint, "training.steps=2")
    loop.run(configs.load(path, ["training.steps=4"]))
    assert runs.final_state(tmp_path / "whole" / "run") == runs.final_state(tmp_path / "parts" / "run")


def test_sizes_beside_a_checkpoint_and_one_that_is_not_there_are_refused(tmp_path, checkpoint):
    with pytest.raises(ConfigError, match=r"model\.width.*sizes of its own"):
        run(tmp_path, checkpoint, width=32)
    with pytest.raises(ValueError, match="no such directory"):
        run(tmp_path / "other", tmp_path / "nowhere")


def test_the_first_parameters_are_those_of_the_checkpoint(trained, checkpoint):
    from jaxrl_post.training import setup

    parts = setup.build(configs.load(trained / "config.yaml"))
    params = jax.device_get(parts.initial_params())
    weights = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    np.testing.assert_array_equal(
        params["layers"]["mlp"]["up"][1], weights["model.layers.1.mlp.up_proj.weight"].numpy().T
    )


def test_plain_prompts_can_be_put_through_the_chat_template(tmp_path, checkpoint, monkeypatch):
    from jaxrl_post import data
    from jaxrl_post.training import setup

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chatty")
    path = runs.tiny_run(
        tmp_path,
        model={"path": str(checkpoint)},
        data={
            "files": [str(runs.write_problems(tmp_path / "train.jsonl"))],
            "tokenizer": str(tmp_path / "chatty"),
            "max_prompt_length": 6,
            "chat": True,
            "system": "9",
        },
        method={"name": "grpo", "beta": 0.1},
        warm_start=None,
        eval={"problems": 0},
    )
    parts = setup.build(configs.load(path))
    problem = parts.problems.train[7]
    assert problem["prompt"] == "07>"
    assert parts.tokenizer.decode(data.encode_prompt(parts.tokenizer, problem)) == "9>07>>"
    loop.run(configs.load(path, ["training.steps=1"]))
    asked = []
    real = data.encode_prompt
    monkeypatch.setattr(
        data, "encode_prompt", lambda tokenizer, problem: asked.append(problem) or real(tokenizer, problem)
    )
    (tmp_path / "train.jsonl").unlink()  # which is not needed any more
    inference.generate_text(tmp_path / "run", ["12>"])
    assert asked[0]["prompt_messages"][-1] == {"role": "user", "content": "12>"}
    with pytest.raises(ConfigError, match=r"data\.system"):
        configs.load(path, ["data.chat=false"])


def test_whether_a_prompt_is_a_message_is_what_the_run_was_trained_on(tmp_path, caplog):
    from jaxrl_post.training import setup

    def made(row):
        path = runs.tiny_run(tmp_path, method={"name": "grpo"}, warm_start=None, eval={"problems": 0})
        (tmp_path / "train.jsonl").write_text(json.dumps(row | {"answer": "1"}) + "\n")
        return setup.build(configs.load(path, ["data.eval_files=[]"]))

    assert inference._in_conversations(made({"prompt": [{"role": "user", "content": "1>"}]}))
    parts = made({"prompt": "1>"})
    assert not inference._in_conversations(parts)
    assert not caplog.text
    parts = made({"prompt": "1>"})
    (tmp_path / "train.jsonl").unlink()
    assert not inference._in_conversations(parts)
    assert "prompts are plain text" in caplog.text


def use_unwarned(run_dir, config):
    """Use a run as far as one without a checkpoint can be, with each warning an error."""
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(configs.dump(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match="no checkpoint yet"):
            inference.load_run(run_dir)


def test_what_a_run_was_warned_of_is_not_said_again_where_it_is_used(tmp_path):
    model = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 16, "param_dtype": "bfloat16"}
    path = runs.tiny_run(tmp_path, model=model, warm_start=None)
    with pytest.warns(configs.ConfigWarning, match="rounded away"):
        config = configs.load(path)
    use_unwarned(tmp_path / "run", config)


def test_models_are_converted_there_and_back_bit_by_bit(tmp_path, checkpoint, capsys):
    from safetensors.numpy import load_file

    from jaxrl_post.cli.main import main

    given = json.loads((checkpoint / "generation_config.json").read_text())
    (checkpoint / "generation_config.json").write_text(json.dumps({**given, "top_p": 0.8}))
    assert main(["convert", str(checkpoint), str(tmp_path / "orbax")]) == 0
    assert main(["convert", str(tmp_path / "orbax"), str(tmp_path / "back")]) == 0
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["top_p"] == 0.8
    assert "Orbax" in capsys.readouterr().out
    first, last = (load_file(directory / "model.safetensors") for directory in (checkpoint, tmp_path / "back"))
    assert first.keys() == last.keys()
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, last[name])
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "back").encode("12>") == [4, 5, 2]
    path = written(tmp_path / "from_orbax", tmp_path / "orbax")
    from jaxrl_post.training import setup

    read = setup.build(configs.load(path)).initial_params()
    np.testing.assert_array_equal(read["layers"]["mlp"]["up"][1], first["model.layers.1.mlp.up_proj.weight"].T)
    assert main(["convert", str(checkpoint), str(tmp_path / "orbax")]) == 2
    assert "already" in capsys.readouterr().err


def test_a_finished_run_can_be_converted_later(tmp_path, trained):
    from jaxrl_post.training.convert import convert

    convert(str(trained / "run"), str(tmp_path / "later"), dtype="bfloat16")
    ids = [[3, 4, 2, 5]]
    np.testing.assert_allclose(logits(tmp_path / "later", ids), logits(trained / "out", ids), rtol=0.05, atol=0.01)


def test_ids_that_the_tokenizer_has_not_are_never_sampled_and_the_models_own_stop_tokens_count(
    tmp_path, trained, checkpoint
):
    from jaxrl_post.training import setup

    path = trained / "config.yaml"
    parts = setup.build(configs.load(path))
    assert parts.policy.unembed(parts.initial_params()).weight.shape[0] == len(ALPHABET) < 16
    other = json.loads((checkpoint / "config.json").read_text())
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "config.json").write_text(json.dumps({**other, "eos_token_id": [1, 7, 15]}))
    again = setup.build(configs.load(path, [f"model.path={copy}", "model.export=null"]))
    assert again.stop_tokens == (1, 7)  # 15 is no token


def test_an_export_that_would_fail_or_overwrite_is_refused_before_training(tmp_path, checkpoint):
    with pytest.raises(ValueError, match="overwritten"):
        run(tmp_path / "a", checkpoint, export=str(checkpoint))
    model = {"width": 16, "layers": 1, "heads": 2, "softcap": 5.0, "export": str(tmp_path / "out")}
    path = runs.tiny_run(tmp_path / "b", model=model)
    with pytest.raises(ValueError, match="softcap"):
        loop.run(configs.load(path))
    path = runs.tiny_run(
        tmp_path / "c",
        model={"path": str(checkpoint)},
        data={"files": [str(runs.write_problems(tmp_path / "x.jsonl"))], "max_prompt_length": 10**6},
    )
    with pytest.raises(ConfigError, match="made for"):
        loop.run(configs.load(path))


def test_a_context_that_is_stretched_by_the_length_of_a_row_is_a_warning(tmp_path, checkpoint):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 3, "long_factor": [1.0, 2.0, 4.0]}
    rope["original_max_position_embeddings"] = 5
    stretched = save_qwen3(tmp_path / "model", max_position_embeddings=32, rope_parameters=rope)
    source = hf_models.from_pretrained(stretched, abstract=True)
    options = configs.ModelConfig(path=str(stretched))
    with pytest.warns(configs.ConfigWarning, match=r"\(longrope\) change where a row has more than 5 tokens"):
        warn_of_long_rows(options, source, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_long_rows(options, source, 5)
        warn_of_long_rows(options, hf_models.from_pretrained(checkpoint, abstract=True), 6)
        warn_of_long_rows(options, None, 6)
    # Whoever trained a run was warned, and whoever uses it is not.
    config = configs.load(written(tmp_path, stretched))
    with pytest.warns(configs.ConfigWarning, match="longrope"):
        setups.build(config)
    use_unwarned(tmp_path / "run", config)


def test_a_model_that_was_drawn_here_becomes_a_checkpoint_too(tmp_path):
    model = {"width": 16, "layers": 2, "heads": 2, "mlp_width": 16, "export": str(tmp_path / "out")}
    supervised = {"method": {"name": "sft"}, "rollout": {"max_new_tokens": 3}, "rewards": []}
    training = runs.training(steps=1, batch_size=4)
    path = runs.tiny_run(tmp_path, model=model, warm_start=None, training=training, eval={"problems": 0}, **supervised)
    loop.run(configs.load(path))
    setup, params = inference.load_run(tmp_path / "run")
    ids = [[3, 4, 2, 5]]
    hidden = own_states(setup.policy, params, ids)
    np.testing.assert_allclose(logits(tmp_path / "out", ids), hidden @ setup.policy.unembed(params).weight.T, atol=1e-5)

"""Checkpoints in and out: what is read and written, how much is held meanwhile, what is said of bad ones."""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from jaxrl_post import mesh as meshes
from jaxrl_post import models
from jaxrl_post.data import CharTokenizer, HFTokenizer
from jaxrl_post.models.pretrained import flat
from jaxrl_post.models.safetensors_io import open_checkpoint
from tests.models import hf
from tests.models.peak_memory import TENSOR

TOKENS = np.random.default_rng(0).integers(0, 37, (1, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name in ("llama", "qwen3", "qwen3_moe", "gemma2-full", "phi3"):
        hf.model(name).save_pretrained(root / name, max_shard_size=9000)
    return root


@functools.cache
def loaded(directory):
    return models.from_pretrained(directory)


def copied(directories, name, tmp_path):
    return Path(shutil.copytree(directories / name, tmp_path / name))


def random_params(policy, seed=0):
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(0.3 * random.standard_normal(x.shape), x.dtype), shapes)


def same(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for path, x in a.items():
        assert x.dtype == b[path].dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(b[path]), err_msg=str(path))


def states(found):
    positions = np.arange(TOKENS.shape[1])[None]
    return jax.jit(found.policy.hidden)(found.params, TOKENS, positions)[0]


def logits_of(policy, params):
    def run(params):
        hidden, _ = policy.hidden(params, TOKENS, np.arange(TOKENS.shape[1])[None])
        return models.logits(policy.unembed(params), hidden)[0]

    return np.asarray(jax.jit(run)(params))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("llama", marks=pytest.mark.nightly),
        pytest.param("qwen3", marks=pytest.mark.nightly),
        "qwen3_moe",
        pytest.param("gemma2-full", marks=pytest.mark.nightly),
        "phi3",
    ],
)
def test_a_round_trip_changes_no_bit_and_transformers_reads_what_is_written(name, directories, tmp_path):
    found = loaded(directories / name)
    params = random_params(found.policy)
    models.save_pretrained(tmp_path / "out", params, found.config, max_shard_size=5000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    same(models.from_pretrained(tmp_path / "out").params, params)

    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(theirs) is type(hf.model(name))
    ours, expected = logits_of(found.policy, params), hf.run(theirs.eval(), TOKENS[0])[0]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_what_transformers_writes_comes_back_bit_for_bit(directories, tmp_path):
    for name in ("llama", "qwen3_moe", "phi3"):
        found = loaded(directories / name)
        models.save_pretrained(tmp_path / name, found.params, found.config)
        theirs, ours = open_checkpoint(directories / name), open_checkpoint(tmp_path / name)
        assert theirs.keys() == ours.keys()
        for key, tensor in theirs.items():
            np.testing.assert_array_equal(ours[key].view(), tensor.view())


def test_bfloat16_is_kept_or_cast_as_asked(directories, tmp_path):
    found = models.from_pretrained(directories / "qwen3", param_dtype="bfloat16")
    models.save_pretrained(tmp_path / "kept", found.params, found.config)
    assert {tensor.code for tensor in open_checkpoint(tmp_path / "kept").values()} == {"BF16"}
    assert models.read_config(tmp_path / "kept")["dtype"] == "bfloat16"
    same(models.from_pretrained(tmp_path / "kept", param_dtype="bfloat16").params, found.params)

    exact = loaded(directories / "qwen3")
    models.save_pretrained(tmp_path / "cast", exact.params, exact.config, dtype="bfloat16")
    same(models.from_pretrained(tmp_path / "cast", param_dtype="bfloat16").params, found.params)
    expected = {k: v.to(torch.bfloat16).float() for k, v in hf.model("qwen3").state_dict().items()}
    assert torch.equal(
        load_file(tmp_path / "cast" / "model.safetensors")["model.norm.weight"].float(), expected["model.norm.weight"]
    )


def test_experts_in_one_tensor_are_read_as_well(directories, tmp_path):
    directory = copied(directories, "qwen3_moe", tmp_path)
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    # As transformers holds them in memory.
    save_file(
        {k: v.contiguous() for k, v in hf.model("qwen3_moe").state_dict().items()}, directory / "model.safetensors"
    )
    assert any(name.endswith("experts.gate_up_proj") for name in open_checkpoint(directory))
    same(models.from_pretrained(directory).params, loaded(directories / "qwen3_moe").params)


def test_parameters_lie_on_the_mesh_as_the_table_says(directories):
    mesh = meshes.make_mesh(fsdp=2, tensor=2, expert=2)
    plain = loaded(directories / "qwen3_moe")
    spread = models.from_pretrained(directories / "qwen3_moe", mesh=mesh)
    expected = meshes.shardings(plain.params, plain.policy.axes(), mesh)
    jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(x.sharding)), spread.params, expected
    )
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(spread.params))
    same(spread.params, plain.params)


def test_what_is_spread_over_a_mesh_is_written_whole(directories, tmp_path):
    mesh = meshes.make_mesh(fsdp=2, tensor=2, expert=2)
    spread = models.from_pretrained(directories / "phi3", mesh=mesh)
    models.save_pretrained(tmp_path / "out", spread.params, spread.config)
    same(models.from_pretrained(tmp_path / "out").params, loaded(directories / "phi3").params)


def test_without_weights_only_the_config_is_looked_at(directories, tmp_path):
    (tmp_path / "config.json").write_text((directories / "qwen3" / "config.json").read_text())
    mesh = meshes.make_mesh(fsdp=2)
    found = models.from_pretrained(tmp_path, mesh=mesh, abstract=True, dtype="bfloat16")
    real = models.from_pretrained(directories / "qwen3", mesh=mesh)
    described = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), found.params)
    assert described == jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), real.params)


def test_reading_and_writing_hold_one_tensor_beside_the_parameters(tmp_path):
    command = [sys.executable, "-m", "tests.models.peak_memory", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout)
    assert peak["size"] > 32 * TENSOR
    assert peak["reading"]["arrays"] < 2.5 * TENSOR  # the one made, and the one before, which a device lets go of late
    assert peak["reading"]["process"] < peak["size"] + 10 * TENSOR
    assert peak["writing"]["arrays"] < 2.5 * TENSOR
    assert peak["writing"]["process"] < 7 * TENSOR


# Heads.


@pytest.mark.parametrize(("name", "labels"), [pytest.param("qwen3", 1, marks=pytest.mark.nightly), ("phi3", 2)])
def test_a_token_classifier_is_a_value_head(name, labels, tmp_path):
    config = type(hf.config(name))(**(hf.SIZES | hf.CONFIGS[name]), num_labels=labels)
    theirs = hf.randomize(AutoModelForTokenClassification.from_config(config, attn_implementation="eager"))
    theirs.save_pretrained(tmp_path / "model")
    found = models.from_pretrained(tmp_path / "model", value_head=True)
    assert found.new == ()
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS).long()).logits.numpy()
    # The probability of the second label is the sigmoid of the value.
    expected = expected[..., 0] if labels == 1 else expected[..., 1] - expected[..., 0]
    np.testing.assert_allclose(found.policy.heads(found.params, states(found))["value"], expected, rtol=1e-4, atol=1e-5)

    models.save_pretrained(tmp_path / "out", found.params, found.config)
    same(models.from_pretrained(tmp_path / "out", value_head=True).params, found.params)
    back, info = AutoModelForTokenClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        logits = back.eval()(torch.tensor(TOKENS).long()).logits.numpy()
    logits = logits[..., 0] if labels == 1 else logits[..., 1] - logits[..., 0]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_sequence_classifier_is_a_value_head_without_a_bias(tmp_path):
    config = type(hf.config("gemma3_text"))(**(hf.SIZES | hf.CONFIGS["gemma3_text"]), num_labels=1)
    theirs = hf.randomize(AutoModelForSequenceClassification.from_config(config, attn_implementation="eager"))
    theirs.save_pretrained(tmp_path / "model")
    found = models.from_pretrained(tmp_path / "model", value_head=True)
    assert found.new == ("value_head.bias",)
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS).long()).logits.numpy()
    values = found.policy.heads(found.params, states(found))["value"]
    np.testing.assert_allclose(values[:, -1:], expected, rtol=1e-4, atol=1e-5)

    models.save_pretrained(tmp_path / "out", found.params, found.config)
    back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        np.testing.assert_allclose(back(torch.tensor(TOKENS).long()).logits.numpy(), expected, rtol=1e-4, atol=1e-5)
    params = found.params | {"value_head": found.params["value_head"] | {"bias": jnp.ones(())}}
    with pytest.raises(ValueError, match="sequence_classification has no bias"):
        models.save_pretrained(tmp_path / "other", params, found.config)
    with pytest.raises(ValueError, match="has no Gemma3ForTokenClassification"):
        models.save_pretrained(tmp_path / "other", params, found.config, head="token_classification")


def test_a_value_head_is_added_to_a_language_model_and_saved_as_a_classifier(directories, tmp_path):
    found = models.from_pretrained(directories / "llama", value_head=True)
    assert set(found.new) == {"value_head.kernel", "value_head.bias"}
    assert not np.any(found.policy.heads(found.params, states(found))["value"])
    models.save_pretrained(tmp_path / "critic", found.params, found.config)
    assert models.read_config(tmp_path / "critic")["architectures"] == ["LlamaForTokenClassification"]
    with pytest.raises(ValueError, match="load it with value_head=True"):
        models.from_pretrained(tmp_path / "critic")
    models.save_pretrained(tmp_path / "actor", found.params, found.config, head="causal_lm")
    same(models.from_pretrained(tmp_path / "actor").params, loaded(directories / "llama").params)
    plain = loaded(directories / "llama")
    with pytest.raises(ValueError, match="needs a value head"):
        models.save_pretrained(tmp_path / "no", plain.params, plain.config, head="sequence_classification")


def test_adapters_start_from_a_key_and_are_not_written_by_mistake(directories, tmp_path):
    lora = models.Lora(rank=2)
    with pytest.raises(ValueError, match="pass key="):
        models.from_pretrained(directories / "qwen3", lora=lora)
    found = models.from_pretrained(directories / "qwen3", lora=lora, key=jax.random.key(3))
    assert all("_lora" in name for name in found.new)
    assert np.any(found.params["layers"]["attention"]["query_lora"]["a"])
    with pytest.raises(ValueError, match=r"adapters; pass lora="):
        models.save_pretrained(tmp_path / "out", found.params, found.config)


def test_of_a_model_that_sees_images_the_language_model_is_read(tmp_path):
    theirs = hf.with_images()
    theirs.save_pretrained(tmp_path / "model")
    found = models.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS).long()).logits[0].numpy()
    ours = logits_of(found.policy, found.params)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * np.abs(expected).max())

    models.save_pretrained(tmp_path / "out", found.params, found.config)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert back.config.eos_token_id == 5
    with torch.no_grad():
        np.testing.assert_allclose(back(torch.tensor(TOKENS).long()).logits[0].numpy(), expected, atol=1e-4)


def test_what_was_ignored_in_a_section_of_the_configuration_is_no_reason_not_to_write_the_model(tmp_path):
    config = hf.model("qwen2-yarn").config.to_dict()
    config["rope_parameters"]["finetuned"] = True
    with pytest.raises(ValueError, match="finetuned"):
        models.from_config(config)
    policy = models.from_config(config, ignore=["finetuned"])
    models.save_pretrained(tmp_path, jax.jit(policy.init)(jax.random.key(0)), config)
    assert models.read_config(tmp_path)["rope_parameters"]["finetuned"] is True


def test_the_dtype_of_a_file_stands_under_each_name_that_its_configuration_has(directories, tmp_path):
    found = loaded(directories / "qwen3")
    for names in (["torch_dtype"], ["dtype"], ["dtype", "torch_dtype"], []):
        config = {name: value for name, value in found.config.items() if name not in ("dtype", "torch_dtype")}
        directory = tmp_path / "-".join(["of", *names])
        models.save_pretrained(directory, found.params, config | dict.fromkeys(names, "bfloat16"), dtype="float16")
        written = models.read_config(directory)
        assert {name: written.get(name) for name in names or ["dtype"]} == dict.fromkeys(names or ["dtype"], "float16")


# The other files of a directory.


def test_a_token_for_images_needs_no_row_of_a_model_of_text():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    fast = Tokenizer(WordLevel({"<end>": 0, "yes": 1, "no": 2}, unk_token="no"))
    special = {"extra_special_tokens": {"image_token": "<image_soft_token>"}}
    image = HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>", **special))
    assert (image.vocab_size, image.media_ids) == (4, (3,))
    models.check_vocabulary(3, image)
    with pytest.raises(ValueError, match="the tokenizer has 4 tokens, but the model's embedding only 2 rows"):
        models.check_vocabulary(2, image)
    fast.add_tokens(["<start>"])
    other = HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>"))
    with pytest.raises(ValueError, match="the embedding was not resized when tokens were added"):
        models.check_vocabulary(3, other)


def test_tokenizer_and_generation_config_are_written(directories, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    fast = Tokenizer(WordLevel({"<end>": 0, "yes": 1, "no": 2}, unk_token="no"))
    tokenizer = HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>"), eos_ids=[2])
    found = models.from_pretrained(directories / "qwen3", tokenizer=tokenizer)
    models.save_pretrained(tmp_path / "a", found.params, found.config, tokenizer=tokenizer)
    assert HFTokenizer.load(tmp_path / "a").eos_ids == (0, 2)
    given = {"eos_token_id": [7, 8], "temperature": 0.6}
    models.save_pretrained(tmp_path / "b", found.params, found.config, tokenizer=tokenizer, generation_config=given)
    assert GenerationConfig.from_pretrained(tmp_path / "b").eos_token_id == [7, 8]
    assert models.from_pretrained(tmp_path / "b").generation_config == given
    models.save_pretrained(tmp_path / "c", found.params, found.config)
    assert GenerationConfig.from_pretrained(tmp_path / "c").bos_token_id == 1


def test_a_tokenizer_may_have_fewer_tokens_than_the_embedding_but_not_more(directories, tmp_path):
    found = models.from_pretrained(directories / "qwen3", tokenizer=CharTokenizer("abc"))
    with pytest.raises(ValueError, match="98 tokens, but the model's embedding only 37 rows"):
        models.from_pretrained(directories / "qwen3", tokenizer=CharTokenizer())
    with pytest.raises(ValueError, match="98 tokens"):
        models.save_pretrained(tmp_path / "out", found.params, found.config, tokenizer=CharTokenizer())
    assert not (tmp_path / "out").exists()


def test_a_directory_appears_whole_and_keeps_the_files_of_others(directories, tmp_path):
    found = loaded(directories / "qwen3")

    class Breaks(CharTokenizer):
        def save(self, directory):
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        models.save_pretrained(tmp_path / "out", found.params, found.config, tokenizer=Breaks("abc"))
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    models.save_pretrained(tmp_path / "out", found.params, found.config)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="holds a model already"):
        models.save_pretrained(tmp_path / "out", found.params, found.config)
    other = random_params(found.policy)
    models.save_pretrained(tmp_path / "out", other, found.config, max_shard_size=9000, overwrite=True)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    same(models.from_pretrained(tmp_path / "out").params, other)


def test_a_hub_id_is_downloaded_without_other_formats(directories, monkeypatch):
    asked = {}

    def snapshot_download(name, **keywords):
        asked.update(keywords, name=name)
        return str(directories / "qwen3")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = models.from_pretrained("owner/name", revision="v2")
    same(found.params, loaded(directories / "qwen3").params)
    assert (asked["name"], asked["revision"]) == ("owner/name", "v2")
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])
    models.from_pretrained("owner/name", abstract=True)
    assert "*.safetensors" not in asked["allow_patterns"]

    def offline(name, **keywords):
        raise OSError("no network\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"no directory 'owner/name' is here.*hf download owner/name.*\(no network\)$"):
        models.from_pretrained("owner/name")
    with pytest.raises(ValueError, match=r"\./nowhere: no such directory"):
        models.from_pretrained("./nowhere")


# What is wrong with a checkpoint.


def test_missing_files_are_named(directories, tmp_path):
    directory = copied(directories, "qwen3", tmp_path)
    shards = sorted(directory.glob("model-*.safetensors"))
    shards[0].unlink()
    shards[2].unlink()
    with pytest.raises(ValueError, match=f"lacks 2 of {len(shards)} files.*: {shards[0].name}, {shards[2].name}"):
        models.from_pretrained(directory)
    (directory / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index.json is damaged"):
        models.from_pretrained(directory)
    (directory / "model.safetensors.index.json").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"neither model.safetensors nor .*; it holds .*pytorch_model.bin"):
        models.from_pretrained(directory)
    (directory / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config.json"):
        models.from_pretrained(directory)


def single(directories, name, tmp_path, change):
    """A copy whose tensors are one file, after `change`."""
    directory = copied(directories, name, tmp_path)
    tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (directory / "model.safetensors.index.json").unlink()
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_all_tensors_that_are_wrong_are_named_at_once(directories, tmp_path):
    def change(tensors):
        for layer in range(3):
            del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
        del tensors["model.norm.weight"]
        tensors["model.embed_tokens.weight"] = torch.zeros(36, 24)
        tensors["model.layers.0.self_attn.sinks"] = torch.zeros(4)
        name = "model.layers.1.mlp.gate_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        name = "model.layers.2.mlp.gate_proj.weight"
        tensors[name] = tensors[name].to(torch.int8)

    with pytest.raises(ValueError, match="the tensors of") as error:
        models.from_pretrained(single(directories, "llama", tmp_path, change))
    for part in (
        "4 missing: ",
        "model.layers.{0-2}.mlp.up_proj.weight",
        "model.norm.weight",
        "1 of a shape that does not fit config.json: model.embed_tokens.weight is [36, 24], not [37, 24]",
        "2 of dtype F8_E4M3, I8, which are not read",
        "model.layers.{1-2}.mlp.gate_proj.weight",
        "1 that config.json does not speak of: model.layers.0.self_attn.sinks",
    ):
        assert part in str(error.value)


def test_a_tied_unembedding_may_be_stored_if_it_is_the_embedding(directories, tmp_path):
    def store(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(7)

    directory = single(directories, "qwen3", tmp_path / "same", store)
    same(models.from_pretrained(directory).params, loaded(directories / "qwen3").params)
    with pytest.raises(ValueError, match=r"1 that config.json does not speak of: lm_head.weight"):
        models.from_pretrained(
            single(directories, "qwen3", tmp_path / "other", lambda t: t.update({"lm_head.weight": torch.ones(37, 24)}))
        )


def test_truncated_and_foreign_files_are_told(directories, tmp_path):
    directory = single(directories, "qwen3", tmp_path, lambda tensors: None)
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    for content, message in (
        (whole[:-5], f"truncated: its header speaks of {len(whole)} bytes, it has {len(whole) - 5}"),
        (whole[:40], "truncated or not a safetensors file"),
        (whole[:4], "truncated or not a safetensors file"),
        (b"\x80\x02" + whole[2:], "truncated or not a safetensors file"),
        (whole.replace(b'"shape":[37,24]', b'"shape":[37,25]'), "which is not F32"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            models.from_pretrained(directory)


def test_a_config_of_another_model_is_noticed_when_writing(directories, tmp_path):
    found = loaded(directories / "qwen3")
    with pytest.raises(ValueError, match=r"not those of config.json: .*mlp.down is \[3, 20, 24\], not \[3, 21, 24\]"):
        models.save_pretrained(tmp_path / "out", found.params, found.config | {"intermediate_size": 21})
    config = json.loads((directories / "qwen3" / "config.json").read_text())
    assert config == found.config  # as it was read, whatever was written
    with pytest.raises(ValueError, match=r"not those of config.json: .*query_norm.scale is \[3, 14\], not there"):
        models.save_pretrained(tmp_path / "out", found.params, found.config | {"model_type": "llama"})


# Models that came from no checkpoint.


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        pytest.param(
            *({"kv_heads": 2, "head_dim": 10, "attention_bias": "all", "mlp_bias": True}, "llama"),
            marks=pytest.mark.nightly,
        ),
        ({"layers": 3, "window": 6, "local_layers": [False, True, True], "attention_bias": "qkv"}, "qwen2"),
        ({"kv_heads": 1, "qk_norm": True, "tied": True, "rope_base": 500.0}, "qwen3"),
    ],
)
def test_a_model_made_here_has_a_config_that_transformers_reads(options, kind, tmp_path):
    sizes = {"vocab_size": 37, "width": 24, "heads": 4, "mlp_width": 20}
    policy = models.decoder(**sizes, **options)
    config = models.to_config(**sizes, **options)
    assert config["model_type"] == kind
    params = random_params(policy)
    models.save_pretrained(tmp_path / "out", params, config)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    expected, ours = hf.run(theirs, TOKENS[0])[0], logits_of(policy, params)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_a_model_that_no_family_has_cannot_be_given_a_config():
    with pytest.raises(ValueError, match=r"norms: post, softcap: 5\.0"):
        models.to_config(vocab_size=37, softcap=5.0, norms="post")
    with pytest.raises(ValueError, match="widht is no keyword of decoder"):
        models.to_config(vocab_size=37, widht=3)

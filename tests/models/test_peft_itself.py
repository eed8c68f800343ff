"""Adapters that PEFT wrote and adapters that PEFT reads: the same logits there and here."""

import copy
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from jaxrl_post import models
from jaxrl_post.models.peft import adapter_base, load_adapters, read_adapter_config, save_adapters
from jaxrl_post.training.convert import convert
from tests.models import hf

TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])
CASES = {
    "qwen3": {"target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"], "use_rslora": True},
    "phi3": {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj"]},
    "qwen3_moe": {
        "target_modules": ["q_proj", "o_proj"],
        "use_rslora": True,
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}


@pytest.fixture(params=[*(pytest.param(name, marks=pytest.mark.nightly) for name in ("qwen3", "phi3")), "qwen3_moe"])
def case(request, tmp_path):
    """A family's name, the directory of a random model of it, and one with adapters that PEFT made for it."""
    hf.model(request.param).save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        copy.deepcopy(hf.model(request.param)), peft.LoraConfig(r=3, lora_alpha=5, **CASES[request.param])
    )
    moved_adapters(adapted).save_pretrained(tmp_path / "adapter")
    return request.param, tmp_path, adapted


def moved_adapters(adapted):
    """The same model, whose adapters say something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapted


def read(directory, adapter):
    found = models.from_pretrained(directory / "base", lora=read_adapter_config(adapter), key=jax.random.key(0))
    return found.policy, load_adapters(adapter, found.params)


@functools.cache
def logits_of(policy):
    def run(params):
        hidden, _ = policy.hidden(params, TOKENS, np.arange(TOKENS.size)[None])
        return models.logits(policy.unembed(params), hidden)

    return jax.jit(run)


def ours(policy, params):
    return np.asarray(logits_of(policy)(params))


def theirs(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def test_adapters_go_from_peft_to_here_and_back_with_the_same_logits(case):
    name, directory, adapted = case
    policy, params = read(directory, directory / "adapter")
    found = ours(policy, params)
    np.testing.assert_allclose(found, theirs(adapted), rtol=2e-5, atol=2e-5)
    assert np.abs(found - theirs(hf.model(name))).max() > 0.1

    noise = np.random.default_rng(7)
    moved = jax.tree.map(
        lambda x, train: jnp.asarray(x + 0.1 * noise.standard_normal(x.shape), x.dtype) if train else x,
        params,
        models.trainable(params),
    )
    lora = read_adapter_config(directory / "adapter")
    save_adapters(directory / "ours", moved, lora, base=str(directory / "base"), model_type=name)
    given = peft.PeftModel.from_pretrained(copy.deepcopy(hf.model(name)), directory / "ours").eval()
    np.testing.assert_allclose(theirs(given), ours(policy, moved), rtol=2e-5, atol=2e-5)
    _, again = read(directory, directory / "ours")
    jax.tree.map(np.testing.assert_array_equal, again, moved)
    convert(str(directory / "ours"), str(directory / "merged"))
    merged = transformers.AutoModelForCausalLM.from_pretrained(directory / "merged", attn_implementation="eager")
    np.testing.assert_allclose(theirs(merged), theirs(given), rtol=2e-4, atol=2e-4)


def test_adapters_of_a_model_that_sees_images_are_those_of_its_language_model(tmp_path):
    base = hf.with_images()
    base.save_pretrained(tmp_path / "base")
    pattern = r".*language_model.*\.(q_proj|v_proj|down_proj)"
    adapted = moved_adapters(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, target_modules=pattern)))
    adapted.save_pretrained(tmp_path / "adapter")
    policy, params = read(tmp_path, tmp_path / "adapter")
    found = ours(policy, params)
    np.testing.assert_allclose(found, theirs(adapted), rtol=2e-5, atol=2e-5)
    assert np.abs(found - theirs(base)).max() > 0.1
    lora = read_adapter_config(tmp_path / "adapter")
    models.check_targets(lora, "gemma3")
    save_adapters(tmp_path / "ours", params, lora, base=str(tmp_path / "base"), revision="v1", model_type="gemma3")
    assert adapter_base(tmp_path / "ours") == (str(tmp_path / "base"), "v1")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    np.testing.assert_allclose(theirs(again), found, rtol=2e-5, atol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path, tmp_path / "ours")[1], params)


def test_a_tokenizer_that_was_saved_beside_adapters_goes_with_the_model_they_are_merged_into(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({"<end>": 0, "yes": 1, "no": 2}, unk_token="no"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    base = hf.model("qwen3")
    for number, model in enumerate((base, peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2)))):
        tokenizer.chat_template = f"template {number}"
        model.save_pretrained(tmp_path / str(number))
        tokenizer.save_pretrained(tmp_path / str(number))
    config = tmp_path / "1" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "0")}))
    convert(str(tmp_path / "1"), str(tmp_path / "merged"))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == "template 1"


def test_adapters_of_each_expert_go_to_peft(tmp_path):
    """In the names that they have where experts are modules, which PEFT and serving engines read."""
    name = "qwen3_moe"
    hf.model(name).save_pretrained(tmp_path / "base")
    lora = models.Lora(rank=3, alpha=5.0, targets=("gate", "up", "down"))
    found = models.from_pretrained(tmp_path / "base", lora=lora, key=jax.random.key(0))
    params = found.params
    noise = np.random.default_rng(7)
    for projection in lora.targets:
        b = params["layers"]["mlp"][f"{projection}_lora"]["b"]
        params["layers"]["mlp"][f"{projection}_lora"]["b"] = jnp.asarray(0.3 * noise.standard_normal(b.shape), b.dtype)
    save_adapters(tmp_path / "ours", params, lora, base=str(tmp_path / "base"), model_type=name)
    given = peft.PeftModel.from_pretrained(copy.deepcopy(hf.model(name)), tmp_path / "ours").eval()
    expected = ours(found.policy, params)
    np.testing.assert_allclose(theirs(given), expected, rtol=2e-5, atol=2e-5)
    assert np.abs(expected - theirs(hf.model(name))).max() > 0.1
    _, again = read(tmp_path, tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, again, params)

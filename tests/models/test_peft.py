"""Adapters in PEFT's format: what is written is what PEFT reads, and comes back bit by bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrl_post import models
from jaxrl_post.models.peft import load_adapters, read_adapter_config, save_adapters

LORA = models.Lora(rank=3, alpha=6.0, targets=("q_proj", "v_proj", "o_proj", "down_proj"), rank_stabilized=True)
SIZES = {"vocab_size": 9, "width": 8, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 6, "mlp_width": 10}


def random_params(seed=0):
    params = jax.eval_shape(models.decoder(**SIZES, lora=LORA).init, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)


def test_the_files_hold_the_names_shapes_and_settings_of_peft(tmp_path):
    params = random_params()
    save_adapters(tmp_path, params, LORA, base="owner/name")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1."
    assert len(tensors) == 2 * 4 * 2
    assert tensors[prefix + "self_attn.q_proj.lora_A.weight"].shape == (3, 8)
    assert tensors[prefix + "self_attn.q_proj.lora_B.weight"].shape == (24, 3)
    assert tensors[prefix + "self_attn.v_proj.lora_B.weight"].shape == (12, 3)
    assert tensors[prefix + "self_attn.o_proj.lora_A.weight"].shape == (3, 24)
    assert tensors[prefix + "mlp.down_proj.lora_A.weight"].shape == (3, 10)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 6.0, True)
    assert sorted(config["target_modules"]) == ["down_proj", "o_proj", "q_proj", "v_proj"]


def test_the_product_of_peft_is_what_merging_adds(tmp_path):
    """`W + alpha / sqrt(r) B A`, on matrices `[out, in]`."""
    params = random_params()
    save_adapters(tmp_path, params, LORA)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    merged = models.merge_adapters(params, LORA)
    for name, path, inputs in (
        ("self_attn.q_proj", ("attention", "query"), 8),
        ("self_attn.o_proj", ("attention", "out"), 24),
        ("mlp.down_proj", ("mlp", "down"), 10),
    ):
        a, b = (tensors[f"base_model.model.model.layers.1.{name}.lora_{half}.weight"] for half in "AB")
        before, after = (
            np.asarray(tree["layers"][path[0]][path[1]][1]).reshape(inputs, -1) for tree in (params, merged)
        )
        np.testing.assert_allclose(after.T, before.T + 6.0 / 3**0.5 * b @ a, rtol=1e-5, atol=1e-5)


def test_adapters_come_back_bit_by_bit(tmp_path):
    params = random_params()
    save_adapters(tmp_path, params, LORA)
    lora = read_adapter_config(tmp_path)
    assert lora == LORA.checked()
    fresh = models.decoder(**SIZES, lora=lora).init(jax.random.key(7))
    found = load_adapters(tmp_path, fresh)
    own, adapters = models.split_adapters(found)
    jax.tree.map(np.testing.assert_array_equal, adapters, models.split_adapters(params)[1])
    jax.tree.map(np.testing.assert_array_equal, own, models.split_adapters(fresh)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": "all-linear"}, "all-linear"),
        ({"target_modules": ["lm_head"]}, "targets"),
    ],
)
def test_adapters_of_another_kind_are_refused_by_name(tmp_path, changes, message):
    save_adapters(tmp_path, random_params(), LORA)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        read_adapter_config(tmp_path)


def test_what_does_not_belong_together_is_said(tmp_path):
    save_adapters(tmp_path, random_params(), LORA)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    save_file({name: x for name, x in tensors.items() if name != gone} | {"odd": np.ones(2, np.float32)}, path)
    with pytest.raises(ValueError, match=r"down_proj.*odd"):
        load_adapters(tmp_path, random_params())
    save_file({**tensors, gone: np.ones((3, 4), np.float32)}, path)
    with pytest.raises(ValueError, match="down_proj"):
        load_adapters(tmp_path, random_params())
    with pytest.raises(ValueError, match="no adapters"):
        save_adapters(tmp_path, models.decoder(**SIZES).init(jax.random.key(0)), LORA)
    with pytest.raises(ValueError, match=r"fused.*qkv_proj in the place of query, value"):
        save_adapters(tmp_path, random_params(), LORA, model_type="phi3")
    with pytest.raises(ValueError, match="adapter_config"):
        read_adapter_config(tmp_path / "nowhere")

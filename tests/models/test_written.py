"""What is written of a model with adapters on few bits: the merged model, without a second one on the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl_post import models
from jaxrl_post.mesh import make_mesh, place, shardings
from jaxrl_post.models import export

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
LORA = models.Lora(rank=2, alpha=3.0, targets=("qkv", "out", "down"))


@pytest.mark.parametrize("axes", [{}, pytest.param({"fsdp": 4, "tensor": 2}, marks=pytest.mark.nightly)], ids=str)
def test_adapters_are_merged_layer_by_layer_into_what_merging_the_whole_model_gives(tmp_path, monkeypatch, axes):
    policy = models.from_config(CONFIG, lora=LORA)
    drawn = jax.jit(policy.init)(jax.random.key(0))
    params = jax.tree.map(
        lambda x: jnp.asarray(x + 0.1 * np.arange(x.size).reshape(x.shape) / x.size, jnp.float32), drawn
    )
    if axes:
        params = place(params, shardings(params, policy.axes(), make_mesh(**axes)))
    else:
        params = jax.jit(models.quantize)(params)  # in int8
    del drawn
    before = sum(x.nbytes for x in jax.live_arrays())
    added = []
    write = export.write_checkpoint

    def watched(directory, specs, make, **options):
        def make_and_count(name):
            made = make(name)
            added.append(sum(x.nbytes for x in jax.live_arrays()) - before)
            return made

        return write(directory, specs, make_and_count, **options)

    monkeypatch.setattr(export, "write_checkpoint", watched)
    models.save_pretrained(tmp_path / "out", params, CONFIG, lora=LORA)
    up = 4 * 32 * 64  # bytes of the largest parameter's layer, of which there are four
    assert max(added) <= 2 * up  # one that is made while the last is written; NumPy's arrays are views of these here

    merged = jax.jit(lambda params: models.dequantize(models.merge_adapters(params, LORA)))(params)
    models.save_pretrained(tmp_path / "whole", merged, CONFIG)
    ours, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert ours.keys() == whole.keys()
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, whole[name], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"pass lora="):
        models.save_pretrained(tmp_path / "other", params, CONFIG)

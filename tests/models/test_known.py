"""Published models whose configuration ships with the library: their sizes, and where they lie on a mesh."""

import math

import jax
import pytest

from jaxrl_post import models
from jaxrl_post.mesh import make_mesh
from jaxrl_post.models.pretrained import known_configs

PARAMETERS = {  # billions, as their model cards say
    "Qwen/Qwen3-0.6B": 0.6,
    "Qwen/Qwen3-8B": 8.2,
    "Qwen/Qwen3-32B": 32.8,
    "Qwen/Qwen3-30B-A3B": 30.5,
    "meta-llama/Llama-3.1-8B-Instruct": 8.03,
    "google/gemma-3-4b-it": 3.88,
}


@pytest.mark.parametrize("name", known_configs())
def test_a_known_model_has_the_published_number_of_parameters_and_needs_no_network(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = models.from_pretrained(name, abstract=True, param_dtype="bfloat16", mesh=make_mesh(fsdp=4, tensor=2))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(found.params))
    assert count / 1e9 == pytest.approx(PARAMETERS[name], rel=0.01)
    shards = [math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(found.params)]
    assert sum(shards) < 1.02 * count / 8  # nothing large is whole on a device


def test_what_is_not_known_still_needs_the_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="from the hub nothing can be read now"):
        models.from_pretrained("nobody/nothing", abstract=True)

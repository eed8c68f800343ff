"""The memory by prompt against a dictionary, and what is bounded about it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import curation
from tests.advantages.compiled import all_compiled

curation = all_compiled(curation)

JOIN = {"last": lambda old, new: new, "min": min, "max": max, "sum": lambda old, new: old + new}


@pytest.mark.parametrize("combine", JOIN)
@pytest.mark.parametrize("capacity", [20, 7])
def test_it_remembers_as_a_dictionary_of_slots_does(combine, capacity):
    rng = np.random.default_rng(0)
    memory, slots = curation.init_memory(capacity, 0.0), {}
    write = jax.jit(curation.remember, static_argnames="combine")
    for _ in range(12):
        ids = rng.permutation(20)[:6].astype(np.int32)
        values, keep = rng.integers(0, 50, 6).astype(np.float32), rng.random(6) < 0.7
        memory = write(memory, ids, values, keep, combine=combine)
        owners = {}
        for prompt in ids[keep]:
            owners[prompt % capacity] = max(owners.get(prompt % capacity, -1), prompt)
        for prompt, value in zip(ids[keep], values[keep], strict=True):
            if owners[prompt % capacity] == prompt:
                known = slots.get(prompt % capacity)
                value = JOIN[combine](known[1], value) if known and known[0] == prompt else value
                slots[prompt % capacity] = (prompt, value)
    found, known = curation.recall(memory, jnp.arange(20), -1.0)
    expected = [slots.get(i % capacity, (-1, 0))[0] == i for i in range(20)]
    assert known.tolist() == expected
    assert found.tolist() == [slots[i % capacity][1] if expected[i] else -1.0 for i in range(20)]


def test_a_prompt_that_is_there_twice_counts_twice_and_in_any_order():
    for order in ([0, 1, 2], [2, 0, 1]):
        ids, values = jnp.array([3, 3, 1])[jnp.array(order)], jnp.array([5.0, 2.0, 7.0])[jnp.array(order)]
        memory = curation.init_memory(4, 0.0)
        assert curation.remember(memory, ids, values, combine="sum").values.tolist() == [0.0, 7.0, 0.0, 7.0]
        assert curation.remember(memory, ids, values, combine="min").values.tolist() == [0.0, 7.0, 0.0, 2.0]


def test_a_new_prompt_in_a_full_memory_takes_the_slot_and_the_old_one_is_forgotten():
    memory = curation.remember(curation.init_memory(1, 0.0), jnp.array([4]), jnp.array([1.0]))
    memory = curation.remember(memory, jnp.array([9]), jnp.array([8.0]), combine="min")
    values, known = curation.recall(memory, jnp.array([4, 9]), jnp.inf)
    assert known.tolist() == [False, True]
    assert values.tolist() == [np.inf, 8.0]


def test_prompts_without_a_number_are_neither_written_nor_known():
    memory = curation.remember(curation.init_memory(3, 0.0), jnp.array([-1, -1]), jnp.array([1.0, 2.0]))
    assert memory.prompt_id.tolist() == [-1, -1, -1]
    assert curation.recall(memory, jnp.array([-1]), 5.0)[0].tolist() == [5.0]


def test_several_arrays_of_any_shape_are_kept_together():
    memory = curation.init_memory(2, {"count": 0, "mean": jnp.zeros(3)})
    memory = curation.remember(memory, jnp.array([1]), {"count": jnp.array([2]), "mean": jnp.ones((1, 3))})
    values, _ = curation.recall(memory, jnp.array([1, 0]), {"count": -1, "mean": jnp.zeros(3)})
    assert values["count"].tolist() == [2, -1]
    assert values["mean"].tolist() == [[1.0] * 3, [0.0] * 3]


def test_no_capacity_and_an_unknown_way_to_combine_are_refused():
    with pytest.raises(ValueError, match="capacity"):
        curation.init_memory(0, 0.0)
    with pytest.raises(ValueError, match="combine"):
        curation.remember(curation.init_memory(1, 0.0), jnp.array([0]), jnp.array([0.0]), combine="mean")

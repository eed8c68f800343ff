"""Caches in int8, of a window's tokens, and with shared prompts, against attention to everything as it was."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_post import mesh as mesh_lib
from jaxrl_post import models
from jaxrl_post.models import cache as caches
from jaxrl_post.models.cache import Read, attend_cached, empty_cache, quantize_heads, reach, write
from jaxrl_post.models.cache_kinds import SharedCache, WindowedCache, cache_bytes, insert, share_prompts
from jaxrl_post.models.pretrained import known_configs
from jaxrl_post.rollout import Prompts, SamplingParams, generate
from tests.tpu import pod

V, WINDOW, NEW = 13, 3, 11
SIZES = {"vocab_size": V, "width": 16, "layers": 3, "heads": 4, "kv_heads": 2, "mlp_width": 24, "init_std": 0.4}
MODELS = {
    "mixed": {"window": WINDOW, "local_layers": (True, False, True)},
    "all local": {"window": WINDOW},
    "global": {},
}
LENGTHS = np.array([7, 1, 4, 6])
SEQUENCES = np.random.default_rng(0).integers(0, V, (4, 8 + NEW)).astype(np.int32)
KEY = jax.random.key(3)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setitem(caches.BLOCKS, "cpu", 4)


@functools.cache
def model(name):
    policy = models.decoder(**SIZES, **MODELS[name])
    return policy, jax.jit(policy.init)(jax.random.key(0))


def prompt_positions(lengths=LENGTHS, size=8):
    columns = np.arange(size)
    return jnp.where(columns < lengths[:, None], columns, -1)


def run_through(policy, params, sequences, lengths, cache, prepare=lambda cache: cache):
    """States of prompts, and of `NEW` tokens behind each, one at a time."""
    tokens = jnp.asarray(sequences)

    def step(cache, position):
        state, cache = policy.decode(params, jnp.take_along_axis(tokens, position, axis=1), position, cache)
        return cache, state[:, 0]

    prompts = len(cache.positions)
    first, cache = policy.prefill(params, tokens[:: len(tokens) // prompts, :8], prompt_positions(lengths), cache)
    groups = len(tokens) // prompts
    start = jnp.repeat(jnp.asarray(lengths), groups)[:, None]
    cache, states = jax.lax.scan(step, prepare(cache), start + jnp.arange(NEW)[:, None, None])
    return first, states.swapaxes(0, 1), cache


def assert_states(first, states, whole, lengths=LENGTHS, atol=1e-5):
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(first[row, :length], whole[row, :length], atol=atol)
        np.testing.assert_allclose(states[row], whole[row, length : length + NEW], atol=atol)


def whole_states(policy, params, sequences=SEQUENCES):
    return jax.jit(policy.hidden)(params, sequences, np.broadcast_to(np.arange(sequences.shape[1]), sequences.shape))[0]


# In int8.


def test_no_element_is_off_by_more_than_half_its_scale_and_the_largest_is_kept():
    # Scales that bfloat16 rounds up and down by all it can.
    x = np.random.default_rng(1).standard_normal((4000, 8)) * 10 ** np.linspace(-4, 4, 4000)[:, None]
    q, scale = jax.jit(quantize_heads)(jnp.asarray(x, jnp.float32))
    assert (q.dtype, scale.dtype) == (jnp.int8, jnp.bfloat16)
    q, scale = np.asarray(q, np.float64), np.asarray(scale, np.float64)[:, None]
    assert (np.abs(np.float32(x) - q * scale) / scale).max() < 0.5 + 1e-5
    assert np.all(np.abs(q).max(axis=1) >= 126)
    exact = np.abs(x).max(axis=1, keepdims=True) / 127
    assert (scale / exact).min() < 1 - 0.0015 < 1 + 0.0015 < (scale / exact).max()


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_attention_to_int8_is_within_the_documented_bound_of_float64(softcap):
    random = np.random.default_rng(2)
    layers, rows, heads, kv_heads, head_dim, size = 2, 3, 4, 2, 8, 13
    k, v = random.standard_normal((2, layers, rows, size, kv_heads, head_dim))
    query = random.standard_normal((rows, 1, heads, head_dim))
    key, value = random.standard_normal((2, rows, 1, kv_heads, head_dim))
    positions, position = np.tile(np.arange(size), (rows, 1)), np.full((rows, 1), size)

    @jax.jit
    def ours(k, v, query, key, value):
        cache = empty_cache(layers, rows, 16, kv_heads, head_dim, jnp.int8)
        cache = write(cache, k, v, jnp.asarray(positions))
        read = Read(cache, jnp.asarray(1), reach(cache, jnp.asarray(position), None))
        found = attend_cached(query, key, value, jnp.asarray(position), [read], softcap=softcap)
        return found, cache.k_scale[1].max(), cache.v_scale[1].max()

    found, k_scale, v_scale = ours(*(jnp.asarray(x, jnp.float32) for x in (k, v, query, key, value)))
    keys, values = (
        np.concatenate([a[1], b], axis=1).repeat(heads // kv_heads, axis=2) for a, b in ((k, key), (v, value))
    )
    scores = np.einsum("bhk,bshk->bhs", query[:, 0], keys) / np.sqrt(head_dim)
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("bhs,bshk->bhk", weights, values)
    of_score = np.abs(query).sum(-1).max() / np.sqrt(head_dim) * float(k_scale) / 2
    bound = float(v_scale) / 2 + np.expm1(2 * of_score) * np.abs(values).max()
    error = np.abs(np.asarray(found)[:, 0] - expected).max()
    assert 1e-4 < error < bound < 0.5
    assert error < 0.02  # what it usually is


def completions(rollouts):
    tokens, mask = np.asarray(rollouts.tokens), np.asarray(rollouts.mask) > 0
    ids = np.asarray(rollouts.id).reshape(-1)
    return {int(n): (tokens[b][mask[b]].tolist(), np.asarray(rollouts.logp)[b][mask[b]]) for b, n in enumerate(ids)}


def same(found, expected):
    assert found.keys() == expected.keys()
    for number, (tokens, logp) in expected.items():
        assert found[number][0] == tokens
        np.testing.assert_allclose(found[number][1], logp, atol=1e-5)


def sampled(policy, params, **options):
    prompts = Prompts(jnp.asarray(SEQUENCES[:, :8]), jnp.asarray(LENGTHS))
    run = functools.partial(
        generate, policy, sampling=SamplingParams(stop_tokens=(3,)), max_new_tokens=NEW, group_size=2, **options
    )
    return jax.jit(run)(params, prompts, KEY)


@functools.cache
def sampled_in_int8(**options):
    return sampled(*model("mixed"), cache_dtype=jnp.int8, **options)


@pytest.mark.nightly  # on every commit a pool in int8 is, tests/rollout/test_slots_pages.py
def test_samples_of_an_int8_cache_are_nearly_the_models_own():
    (policy, params), found = model("mixed"), sampled_in_int8(slots=3, refill=2)
    logp = jax.jit(models.score(policy), static_argnums=2)(params, found, frozenset({"logp"}), None).logp
    off = np.abs(np.asarray(found.logp - logp))[np.asarray(found.mask) > 0]
    assert 1e-4 < off.max() < 0.1


@pytest.mark.nightly
def test_samples_of_an_int8_cache_do_not_depend_on_slots():
    same(completions(sampled_in_int8(slots=3, refill=2)), completions(sampled_in_int8()))


# Of a window's tokens.


@pytest.mark.parametrize("name", ["mixed", pytest.param("all local", marks=pytest.mark.nightly)])
def test_a_window_of_tokens_is_kept_and_gives_the_states_of_the_whole_sequence(name):
    policy, params = model(name)
    run = jax.jit(functools.partial(run_through, policy))
    first, states, cache = run(params, SEQUENCES, LENGTHS, policy.init_cache(4, 8 + NEW))
    assert isinstance(cache, WindowedCache)
    local = sum(MODELS[name].get("local_layers", (True,) * 3))
    assert cache.near.k.shape == (local, 4, 2, WINDOW, 4)
    assert cache.whole.k.shape == (3 - local, 4, 2, 8 + NEW, 4)
    assert_states(first, states, whole_states(policy, params))
    last = (LENGTHS + NEW - 1)[:, None] - np.arange(WINDOW)
    np.testing.assert_array_equal(np.sort(cache.near.positions), np.sort(last))


def test_padding_in_a_row_does_not_push_its_tokens_out():
    policy, params = model("mixed")
    # Each row has at most one new token in every four columns that are written.
    given = np.array([[0, -1, -1, -1], [-1, -1, 0, -1], [-1, -1, -1, -1], [-1, 0, -1, -1]])

    @jax.jit
    def run(params, tokens):
        _, cache = policy.prefill(params, tokens[:, :8], prompt_positions(), policy.init_cache(4, 8 + 5 * 4))
        states = []
        for i in range(5):
            positions = jnp.where(given < 0, -1, jnp.asarray(LENGTHS)[:, None] + i)
            tokens_now = jnp.take_along_axis(tokens, jnp.maximum(positions, 0), axis=1)
            state, cache = policy.decode(params, tokens_now, positions, cache)
            states.append(jnp.sum(jnp.where(given[..., None] < 0, 0, state), axis=1))
        return jnp.stack(states, axis=1)

    found, whole = run(params, SEQUENCES), whole_states(policy, params)
    for row in (0, 1, 3):
        np.testing.assert_allclose(found[row], whole[row, LENGTHS[row] : LENGTHS[row] + 5], atol=1e-5)


def test_several_tokens_at_once_may_be_more_than_the_window():
    policy, params = model("mixed")

    @jax.jit
    def run(params, tokens):
        _, cache = policy.prefill(params, tokens[:, :8], prompt_positions(), policy.init_cache(4, 8 + NEW))
        states = []
        for begin, end in ((0, 2), (2, 7), (7, NEW)):
            positions = jnp.asarray(LENGTHS)[:, None] + jnp.arange(begin, end)
            state, cache = policy.decode(params, jnp.take_along_axis(tokens, positions, axis=1), positions, cache)
            states.append(state)
        return jnp.concatenate(states, axis=1)

    found, whole = run(params, SEQUENCES), whole_states(policy, params)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(found[row], whole[row, length : length + NEW], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param("all local", {}, marks=pytest.mark.nightly), ("mixed", {"slots": 3, "refill": 2})],
    ids=["at once", "refilled"],
)
def test_samples_with_a_windows_cache_are_those_with_all_columns(name, options):
    policy, params = model(name)
    whole = policy._replace(
        init_cache=lambda batch, capacity, dtype: empty_cache(3, batch, capacity, 2, 4, jnp.float32)
    )
    same(completions(sampled(policy, params, **options)), completions(sampled(whole, params, **options)))


def test_rows_on_several_devices_keep_their_last_tokens_without_telling_each_other():
    policy, params = model("mixed")
    mesh = mesh_lib.make_mesh(data=4)
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def prefill(params, tokens, positions):
        return policy.prefill(params, tokens, positions, policy.init_cache(4, 8 + NEW))[1]

    tokens, positions = SEQUENCES[:, :8], prompt_positions()
    alone = jax.jit(prefill)(params, tokens, positions)
    with jax.set_mesh(mesh):
        given = (params, jax.device_put(tokens, rows), jax.device_put(positions, rows))
        compiled = jax.jit(prefill).lower(*given).compile()
    assert not re.search("all-gather|all-to-all|collective-permute", compiled.as_text())
    found = compiled(*given)
    assert found.near.k.sharding.shard_shape(found.near.k.shape)[1] == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, alone)


# Memory.


@pytest.mark.parametrize(
    ("dtype", "columns"),
    [(jnp.bfloat16, 2 * 2 * 8 * 2), (jnp.int8, 2 * 2 * (8 + 2)), (jnp.float32, 2 * 2 * 8 * 4)],
    ids=["bfloat16", "int8", "float32"],
)
def test_memory_is_that_of_the_formula_and_of_the_arrays(dtype, columns):
    # Three local layers with 16 columns and one with 100, of 2 key-value heads of 8.
    sizes = {"vocab_size": 8, "width": 32, "layers": 4, "heads": 4, "kv_heads": 2}
    policy = models.decoder(**sizes, window=16, local_layers=(True, True, False, True))
    for windowed, expected in (
        (policy, 5 * (3 * 16 + 100) * columns + 5 * (16 + 100) * 4),
        (models.decoder(**sizes), 5 * 4 * 100 * columns + 5 * 100 * 4),
    ):
        scalars = 8 if windowed is policy else 4
        assert cache_bytes(windowed, 5, 100, dtype) == expected + scalars
        assert sum(x.nbytes for x in jax.tree.leaves(windowed.init_cache(5, 100, dtype))) == expected + scalars


@pytest.mark.parametrize(
    ("name", "dtype"), [pytest.param("mixed", None, marks=pytest.mark.nightly), ("mixed", jnp.int8)]
)
def test_a_loop_over_tokens_copies_no_array_of_the_cache(name, dtype):
    policy, params = model(name)

    def run(params, cache):
        def step(cache, position):
            state, cache = policy.decode(params, jnp.ones((5, 1), jnp.int32), jnp.full((5, 1), position), cache)
            return cache, state

        return jax.lax.scan(step, cache, jnp.arange(64))

    cache = policy.init_cache(5, 64, dtype)
    text = jax.jit(run, donate_argnums=1).lower(params, cache).compile().as_text()
    names = {jnp.dtype("int8"): "s8", jnp.dtype("float32"): "f32", jnp.dtype("bfloat16"): "bf16"}
    for x in jax.tree.leaves(cache):
        if x.ndim > 2:
            shape = f"{names[x.dtype]}[{','.join(map(str, x.shape))}]"
            assert shape in text
            assert [line for line in text.splitlines() if f"= {shape}" in line and " copy(" in line] == []


# With shared prompts.


def grouped_sequences(group):
    """`SEQUENCES` of `group` members each, which differ behind the prompt."""
    sequences = np.random.default_rng(5).integers(0, V, (4 * group, 8 + NEW)).astype(np.int32)
    for row, length in enumerate(LENGTHS):
        sequences[row * group : (row + 1) * group, :length] = sequences[row * group, :length]
    return sequences


def run_shared(policy, params, sequences, dtype, columns=NEW):
    group = len(sequences) // 4
    run = functools.partial(
        run_through, policy, prepare=lambda rows: share_prompts(policy.init_cache(4 * group, columns, dtype), rows)
    )
    return jax.jit(run)(params, sequences, LENGTHS, policy.init_cache(4, 8, dtype))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("global", marks=pytest.mark.nightly),
        "mixed",
        pytest.param("all local", marks=pytest.mark.nightly),
    ],
)
def test_a_shared_prompt_gives_the_states_of_one_for_each_sequence(name):
    policy, params = model(name)
    sequences = grouped_sequences(3)
    first, states, cache = run_shared(policy, params, sequences, None)
    assert isinstance(cache, SharedCache)
    assert len(cache.prompt.positions) == 4
    whole = whole_states(policy, params, sequences)
    assert_states(np.repeat(first, 3, axis=0), states, whole, np.repeat(LENGTHS, 3))


def side_by_side(prompt, own, group):
    """One cache of the numbers of two: the prompts' columns, those behind them, and an empty one for the next token."""
    if isinstance(prompt, WindowedCache):
        return WindowedCache(*(side_by_side(*parts, group) for parts in zip(prompt, own, strict=True)))
    room = {"k": (1, 3), "v": (1, 3), "k_scale": (1, 3), "v_scale": (1, 3), "positions": (0, 1)}
    found = {}
    for name, (rows, columns) in room.items():
        both = [np.repeat(getattr(prompt, name), group, axis=rows), np.asarray(getattr(own, name))]
        empty = np.full_like(np.take(both[1], [0], axis=columns), -1 if name == "positions" else 0)
        found[name] = jnp.asarray(np.concatenate([*both, empty], axis=columns))
    return prompt._replace(index=jnp.asarray(found["positions"].shape[1] - 1), **found)


@pytest.mark.parametrize("name", [pytest.param("global", marks=pytest.mark.nightly), "mixed"])
def test_a_shared_prompt_in_int8_gives_the_state_of_the_same_numbers_in_one_cache(name):
    """Of the same numbers, as the last bits of two programs may round a new key to either of two neighbours."""
    policy, params = model(name)
    _, _, full = run_shared(policy, params, grouped_sequences(3), jnp.int8, columns=NEW + 1)
    begun = share_prompts(policy.init_cache(12, NEW + 1, jnp.int8), full.prompt)
    decode = jax.jit(policy.decode)
    for shared, behind in ((begun, 0), (full, NEW)):
        token, position = np.ones((12, 1), np.int32), np.repeat(LENGTHS + behind, 3)[:, None]
        state = decode(params, token, position, shared)[0]
        alone = decode(params, token, position, side_by_side(shared.prompt, shared.own, 3))[0]
        np.testing.assert_allclose(state, alone, atol=1e-5)
    assert int(np.max(full.own.positions)) == LENGTHS.max() + NEW - 1  # all that was said behind the prompts is there


def test_a_shared_prompt_is_read_in_one_product_for_all_its_sequences():
    policy, params = model("global")
    cache = jax.eval_shape(lambda: share_prompts(policy.init_cache(12, 5), policy.init_cache(4, 7)))
    tokens = jnp.zeros((12, 1), jnp.int32)
    text = str(jax.make_jaxpr(policy.decode)(params, tokens, tokens, cache))
    # [prompts, kv_heads, G * (heads / kv_heads), head_dim] with a block of four columns.
    assert "f32[4,2,6,4]" in text
    assert "f32[12,2,4,4]" in text  # a block of the own tokens
    assert "12,2,7,4]" not in text


@pytest.mark.nightly
def test_samples_with_shared_prompts_are_those_with_a_prompt_for_each():
    policy, params = model("mixed")

    def shared(cache, rows, group_size):
        return share_prompts(policy.init_cache(4 * group_size, NEW), rows)

    same(completions(sampled(policy._replace(insert=shared), params)), completions(sampled(policy, params)))


# On a TPU.


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "dtype", "prompt", "sizes"),
    [
        ("Qwen/Qwen3-8B", jnp.int8, None, {"tensor": 8}),
        ("google/gemma-3-4b-it", jnp.bfloat16, None, {"tensor": 4, "data": 2}),
        ("Qwen/Qwen3-8B", jnp.bfloat16, 1024, {"tensor": 8}),
    ],
    ids=["int8", "window", "shared"],
)
def test_a_step_on_a_tpu_writes_in_place_and_copies_no_array_of_the_cache(name, dtype, prompt, sizes):
    rows, columns = 64, 2048
    policy = models.from_config(known_configs()[name], dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)

    def empty():
        cache = policy.init_cache(rows, columns, dtype)
        return cache if prompt is None else share_prompts(cache, policy.init_cache(rows // 8, prompt, dtype))

    def lie(tree, axes, mesh):
        shardings = mesh_lib.shardings(tree, axes, mesh)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    params, cache = jax.eval_shape(policy.init, jax.random.key(0)), jax.eval_shape(empty)
    axes = jax.tree.map(lambda x: caches.CACHE_AXES[: x.ndim] if x.ndim > 3 else ("batch", None)[: x.ndim], cache)
    with pod("v5e:2x4", **sizes) as mesh:
        params, cache = lie(params, policy.axes(), mesh), lie(cache, axes, mesh)
        tokens = lie(jax.ShapeDtypeStruct((rows, 1), jnp.int32), ("batch", None), mesh)
        compiled = jax.jit(policy.decode, donate_argnums=3).lower(params, tokens, tokens, cache).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    own = {x.sharding.shard_shape(x.shape): x.dtype.itemsize for x in jax.tree.leaves(cache) if x.ndim > 3}
    smallest = min(np.prod(shape) * size for shape, size in own.items() if len(shape) == 5)
    assert memory.temp_size_in_bytes < 0.1 * smallest
    for shape in own:
        whole = ",".join(map(str, shape))
        assert whole in text
        assert not re.search(rf"= \w+\[{whole}\]\S* (copy|copy-start|transpose)\(", text)


# What does not fit.


def test_what_does_not_fit_is_refused_and_named():
    policy, params = model("mixed")
    with pytest.raises(ValueError, match="float type or int8, got int32"):
        policy.init_cache(2, 4, jnp.int32)
    small, float_rows = policy.init_cache(2, 9, jnp.int8), policy.init_cache(1, 4)
    with pytest.raises(ValueError, match="cache of int8 takes no rows of float32"):
        policy.insert(small, float_rows, 2)
    with pytest.raises(ValueError, match="cache of int8 takes no rows of float32"):
        share_prompts(small, float_rows)
    with pytest.raises(ValueError, match="3 sequences are not equally many for each of 2 prompts"):
        share_prompts(policy.init_cache(3, 9), policy.init_cache(2, 4))
    together = share_prompts(policy.init_cache(2, 9), float_rows)
    with pytest.raises(ValueError, match="shared prompts takes no rows"):
        insert(together, float_rows, 2, local_layers=(True, False, True))
    with pytest.raises(ValueError, match="shared prompts already"):
        share_prompts(policy.init_cache(2, 9), together)
    with pytest.raises(ValueError, match="is not empty; prefill the prompts, then share them"):
        policy.prefill(params, jnp.zeros((2, 1), int), jnp.zeros((2, 1), int), together)
    with pytest.raises(ValueError, match="rows of 9 columns do not fit a cache of capacity 4"):
        policy.insert(policy.init_cache(2, 4), policy.init_cache(1, 9), 2)

"""Pages of a pool against columns of each row's own, and against attention to everything as it was."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import mesh as mesh_lib
from jaxrl_post import models
from jaxrl_post.models import cache as caches
from jaxrl_post.models.cache import Read, attend_cached, empty_cache, reach, reach_unordered, write
from jaxrl_post.models.cache_kinds import WindowedCache, cache_bytes, insert, release, share_prompts
from jaxrl_post.models.paged_cache import PagedCache, empty_pages, release_pages, write_pages
from jaxrl_post.models.pretrained import known_configs
from tests.tpu import pod

V, WINDOW, LAYERS, HEADS, KV, K = 13, 3, 2, 4, 2, 8
SIZES = {"vocab_size": V, "width": 16, "layers": 3, "heads": 4, "kv_heads": 2, "mlp_width": 24, "init_std": 0.4}
MODELS = {"global": {}, "mixed": {"window": WINDOW, "local_layers": (True, False, True)}}
LENGTHS = np.array([7, 1, 4, 6])
SEQUENCES = np.random.default_rng(0).integers(0, V, (4, 20)).astype(np.int32)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setitem(caches.BLOCKS, "cpu", 4)


@functools.cache
def model(name):
    policy = models.decoder(**SIZES, **MODELS[name])
    return policy, jax.jit(policy.init)(jax.random.key(0))


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def pages_of(cache):
    return cache.whole if isinstance(cache, WindowedCache) else cache


@pytest.mark.parametrize("name", [pytest.param("global", marks=pytest.mark.nightly), "mixed"])
def test_rows_that_come_and_go_in_a_pool_of_half_their_size_have_the_states_of_whole_sequences(name):
    policy, params = model(name)
    columns, own = np.arange(8), np.array([2, 12, 3, 1])  # tokens behind the prompts
    tokens = jnp.asarray(SEQUENCES)

    def run(params):
        positions = jnp.where(columns < LENGTHS[:, None], columns, -1)
        _, rows = policy.prefill(params, tokens[:, :8], positions, policy.init_cache(4, 8))
        order = jnp.array([2, 0, 9, 3])  # the second row comes later
        cache = policy.insert(policy.init_cache(4, 20, pages=10), rows, jnp.array([2, 0, 1, 3]), order)

        def step(cache, i):
            begin = jnp.where(jnp.arange(4) == 1, 2, 0)
            cache = jax.lax.cond(
                i == 2, lambda c: policy.insert(c, rows, jnp.array([1, 0]), jnp.array([1, 9])), lambda c: c, cache
            )
            at = i - begin
            position = jnp.where((at >= 0) & (at < own), LENGTHS + at, -1)[:, None]
            state, cache = policy.decode(params, jnp.take_along_axis(tokens, position, axis=1), position, cache)
            held = pages_of(cache).table
            return release(cache, at >= own - 1), (state[:, 0], held)

        cache, (states, held) = jax.lax.scan(step, cache, jnp.arange(14))
        return states, held, pages_of(cache), policy.hidden(params, tokens, jnp.tile(jnp.arange(20), (4, 1)))[0]

    states, held, after, whole = jax.jit(run)(params)
    for row, (length, new) in enumerate(zip(LENGTHS, own, strict=True)):
        late = 2 * (row == 1)
        np.testing.assert_allclose(states[late : late + new, row], whole[row, length : length + new], atol=1e-5)
    counts = [np.unique(table[table >= 0], return_counts=True)[1] for table in np.asarray(held)]
    assert max(map(len, counts)) <= 10
    assert all((count == 1).all() for count in counts)  # no page is of two rows
    assert sum((table >= 0).sum() for table in np.asarray(held)) > 30
    np.testing.assert_array_equal(after.table, -1)
    np.testing.assert_array_equal(after.length, 0)


def test_a_row_takes_a_page_with_the_first_token_of_a_block_and_what_no_page_is_left_for_is_lost():
    cache = empty_pages(1, 3, 12, 3, 1, 2, jnp.float32)
    put = jax.jit(
        lambda cache, positions: write_pages(
            cache, jnp.ones((1, *positions.shape, 1, 2)), positions[None, :, :, None, None] * jnp.ones(2), positions
        )
    )

    def tables(cache, *positions):
        for position in positions:
            cache = put(cache, jnp.asarray(position)[:, None])
        return cache, cache.table.tolist()

    cache, table = tables(cache, [0, -1, 0], [1, -1, 1], [2, 0, -1], [3, 1, -1])
    assert table == [[0, -1, -1], [2, -1, -1], [1, -1, -1]]
    full, table = tables(cache, [4, 2, -1])
    assert table == [[0, -1, -1], [2, -1, -1], [1, -1, -1]]  # there is none for the first row's fifth token
    assert full.positions.tolist() == [[0, 1, 2, 3] + [-1] * 8, [0, 1, 2] + [-1] * 9, [0, 1] + [-1] * 10]
    cache, table = tables(release_pages(cache, jnp.array([False, False, True])), [4, 2, -1])
    assert table == [[0, 1, -1], [2, -1, -1], [-1, -1, -1]]
    assert cache.positions.tolist() == [[0, 1, 2, 3, 4] + [-1] * 7, [0, 1, 2] + [-1] * 9, [-1] * 12]
    np.testing.assert_array_equal(cache.v[0, [0, 0, 1, 2], 0, [0, 3, 0, 2], 0], [0, 3, 4, 2])


@pytest.mark.parametrize(
    ("dtype", "window", "softcap"),
    [
        pytest.param(jnp.float32, None, None, marks=pytest.mark.nightly),
        (jnp.float32, 5, 2.0),
        pytest.param(jnp.bfloat16, None, None, marks=pytest.mark.nightly),
        (jnp.int8, None, None),
    ],
    ids=["float32", "window", "bfloat16", "int8"],
)
def test_attention_to_pages_is_that_to_the_same_numbers_in_columns(dtype, window, softcap):
    start, steps = np.array([3, 5, 2]), 9

    @jax.jit
    def both():
        columns = jnp.arange(5)
        prompt = jnp.where(columns < start[:, None], columns, -1)
        kinds = [
            (write, empty_cache(LAYERS, 3, 15, KV, K, dtype)),
            (write_pages, empty_pages(LAYERS, 3, 15, 12, KV, K, dtype)),
        ]
        found = []
        for put, cache in kinds:
            cache = put(cache, draw(0, LAYERS, 3, 5, KV, K), draw(1, LAYERS, 3, 5, KV, K), prompt)

            def step(cache, given, put=put):
                i, k, v = given
                # The last row ends, and the others go on.
                return put(cache, k, v, jnp.where((jnp.arange(3) == 2) & (i > 3), -1, start + i)[:, None]), None

            new = (draw(seed, steps, LAYERS, 3, 1, KV, K) for seed in (5, 6))
            cache, _ = jax.lax.scan(step, cache, (jnp.arange(steps), *new))
            position = jnp.where(jnp.arange(3) == 2, -1, start + steps)[:, None]
            if isinstance(cache, PagedCache):
                read = Read(cache, jnp.asarray(1), reach_unordered(cache.positions, position, window), cache.table)
            else:
                read = Read(cache, jnp.asarray(1), reach(cache, position, window))
            query, key, value = draw(2, 3, 1, HEADS, K), draw(3, 3, 1, KV, K), draw(4, 3, 1, KV, K)
            found.append(attend_cached(query, key, value, position, [read], window=window, softcap=softcap)[:2])
        return found

    columns, pages = both()
    np.testing.assert_allclose(pages, columns, atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8], ids=["float32", "int8"])
def test_what_is_no_number_stays_with_the_row_that_wrote_it(dtype):
    position = jnp.array([[1], [-1]])

    @jax.jit
    def run():
        bad, new, one = (jnp.full(shape, x) for shape, x in (((2, 4), jnp.nan), ((2, 1), 1.0), ((2, 1), 1.0)))
        bad, new = (jnp.broadcast_to(x[None, :, :, None, None], (LAYERS, *x.shape, KV, K)) for x in (bad, new))
        one = jnp.broadcast_to(one[..., None, None], (2, 1, KV, K))
        cache = empty_pages(LAYERS, 2, 8, 1, KV, K, dtype)
        cache = write_pages(cache, bad, bad, jnp.stack([jnp.full(4, -1), jnp.arange(4)]))
        cache = release_pages(cache, jnp.array([False, True]))
        cache = write_pages(cache, new, new, position - 1)
        read = Read(cache, jnp.asarray(0), reach_unordered(cache.positions, position, None), cache.table)
        return cache.table, attend_cached(jnp.ones((2, 1, HEADS, K)), one, 3 * one, position, [read])[0]

    table, found = run()
    assert table.tolist() == [[0, -1], [-1, -1]]
    np.testing.assert_allclose(found, 2.0, rtol=5e-3)  # the mean of 1 and 3


@pytest.mark.parametrize(
    ("dtype", "column"),
    [(jnp.bfloat16, 2 * 2 * 8 * 2), (jnp.int8, 2 * 2 * (8 + 2)), (jnp.float32, 2 * 2 * 8 * 4)],
    ids=["bfloat16", "int8", "float32"],
)
def test_memory_is_that_of_the_pages_whatever_the_number_of_rows(dtype, column):
    # Three local layers with 6 columns in each row, and one in pages of 4; rows of up to 27 positions, 7 pages.
    sizes = {"vocab_size": 8, "width": 32, "layers": 4, "heads": 4, "kv_heads": 2}
    policy = models.decoder(**sizes, window=6, local_layers=(True, True, False, True))
    rows = 5 * (7 + 1) * 4
    for made, expected in (
        (policy, 11 * 4 * column + rows + 5 * 6 * (3 * column + 4) + 4),
        (models.decoder(**sizes), 11 * 4 * 4 * column + rows),
    ):
        assert cache_bytes(made, 5, 27, dtype, pages=11) == expected
        assert sum(x.nbytes for x in jax.tree.leaves(made.init_cache(5, 27, dtype, pages=11))) == expected


@pytest.mark.parametrize(
    ("name", "dtype"), [pytest.param("global", None, marks=pytest.mark.nightly), ("mixed", jnp.int8)]
)
def test_a_loop_over_tokens_copies_no_page(name, dtype):
    policy, params = model(name)

    def run(params, cache):
        def step(cache, position):
            state, cache = policy.decode(params, jnp.ones((5, 1), jnp.int32), jnp.full((5, 1), position), cache)
            return release(cache, jnp.arange(5) == position % 5), state

        return jax.lax.scan(step, cache, jnp.arange(64))

    cache = policy.init_cache(5, 64, dtype, pages=37)
    text = jax.jit(run, donate_argnums=1).lower(params, cache).compile().as_text()
    names = {jnp.dtype("int8"): "s8", jnp.dtype("float32"): "f32", jnp.dtype("bfloat16"): "bf16"}
    for x in jax.tree.leaves(pages_of(cache)):
        if x.ndim > 2:
            shape = f"{names[x.dtype]}[{','.join(map(str, x.shape))}]"
            assert shape in text
            assert [line for line in text.splitlines() if f"= {shape}" in line and " copy(" in line] == []


@pytest.mark.parametrize(
    ("sizes", "pages", "own"), [({"tensor": 2}, 9, (3, 9, 1, 4, 4)), ({"data": 2, "tensor": 2}, 10, (3, 5, 1, 4, 4))]
)
def test_heads_and_rows_of_a_pool_may_lie_on_several_devices(sizes, pages, own):
    policy, params = model("global")
    cache, mesh = policy.init_cache(4, 20, pages=pages), mesh_lib.make_mesh(**sizes)

    def run(params, cache):
        positions = jnp.tile(jnp.arange(6), (4, 1))
        _, cache = policy.decode(params, jnp.asarray(SEQUENCES[:, :6]), positions, cache)
        return policy.decode(params, jnp.asarray(SEQUENCES[:, 6:8]), positions[:, :2] + 6, cache)

    alone = jax.jit(run)(params, cache)[0]
    axes = jax.tree.map(lambda x: caches.CACHE_AXES[: x.ndim] if x.ndim > 2 else None, cache)
    given = mesh_lib.place((params, cache), mesh_lib.shardings((params, cache), (policy.axes(), axes), mesh))
    with jax.set_mesh(mesh):
        compiled = jax.jit(run).lower(*given).compile()
    state, found = compiled(*given)
    np.testing.assert_allclose(state, alone, atol=1e-5)
    assert found.k.sharding.shard_shape(found.k.shape) == own
    assert "all-gather" not in compiled.as_text()


def lie(tree, axes, mesh):
    shardings = mesh_lib.shardings(tree, axes, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "dtype", "data"),
    [
        ("Qwen/Qwen3-8B", jnp.bfloat16, 1),
        ("Qwen/Qwen3-8B", jnp.bfloat16, 2),
        ("Qwen/Qwen3-8B", jnp.int8, 1),
        ("google/gemma-3-4b-it", jnp.bfloat16, 1),
    ],
    ids=["bfloat16", "parts", "int8", "window"],
)
def test_a_step_on_a_tpu_writes_its_pages_in_place_and_copies_no_pool(name, dtype, data):
    rows, columns, pages = 64, 2048, 256  # half of what the rows could need
    policy = models.from_config(known_configs()[name], dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = jax.eval_shape(policy.init, jax.random.key(0))
    with pod("v5e:2x2", data=data, tensor=4 // data) as mesh:
        cache = jax.eval_shape(lambda: policy.init_cache(rows, columns, dtype, pages=pages))
        names = {0: (), 1: ("batch",), 2: ("batch", None)}
        axes = jax.tree.map(lambda x: names.get(x.ndim, caches.CACHE_AXES[: x.ndim]), cache)
        params, cache = lie(params, policy.axes(), mesh), lie(cache, axes, mesh)
        tokens = lie(jax.ShapeDtypeStruct((rows, 1), jnp.int32), ("batch", None), mesh)
        compiled = jax.jit(policy.decode, donate_argnums=3).lower(params, tokens, tokens, cache).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    own = {x.sharding.shard_shape(x.shape): x.dtype.itemsize for x in jax.tree.leaves(cache) if x.ndim > 3}
    smallest = min(np.prod(shape) * size for shape, size in own.items() if len(shape) == 5)
    assert memory.temp_size_in_bytes < 0.05 * smallest
    for shape in own:
        whole = ",".join(map(str, shape))
        assert whole in text
        assert not re.search(rf"= \w+\[{whole}\]\S* (copy|copy-start|transpose)\(", text)


def test_what_does_not_fit_is_refused_and_named():
    policy, _ = model("mixed")
    pool, rows = policy.init_cache(2, 9, pages=3), policy.init_cache(1, 4)
    with pytest.raises(ValueError, match="needs at least one page, got 0"):
        policy.init_cache(2, 9, pages=0)
    with pytest.raises(ValueError, match="float type or int8, got int32"):
        policy.init_cache(2, 9, jnp.int32, pages=3)
    with pytest.raises(ValueError, match="all of whose layers keep 3 tokens"):
        models.decoder(**SIZES, window=3).init_cache(2, 9, pages=3)
    with pytest.raises(ValueError, match="rows are prefilled in a cache of their own columns"):
        policy.insert(pool, pool, 1)
    with pytest.raises(ValueError, match="rows of 16 columns do not fit a cache of capacity 12"):
        policy.insert(pool, policy.init_cache(2, 16), 1)
    with pytest.raises(ValueError, match="cache of int8 takes no rows of float32"):
        insert(policy.init_cache(2, 9, jnp.int8, pages=3), rows, 2, local_layers=(True, False, True))
    with pytest.raises(ValueError, match="shared prompts are not kept in pages"):
        share_prompts(pool, rows)
    with jax.set_mesh(mesh_lib.make_mesh(data=2)), pytest.raises(ValueError, match="3 pages must be a multiple of 2"):
        policy.init_cache(2, 9, pages=3)

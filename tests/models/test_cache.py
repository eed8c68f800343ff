"""Attention to a cache, block by block, against attention to all of it at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.kernels.attention import attention
from jaxrl_post.models import cache as caches
from jaxrl_post.models.cache import Read, attend_cached, empty_cache, reach, write

LAYERS, B, HEADS, KV, K = 2, 3, 4, 2, 8
LENGTHS = (3, 5, 2)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setitem(caches.BLOCKS, "cpu", 4)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


put = jax.jit(write)


def filled(size, steps, ended=None):
    """A cache of padded prompts and some tokens behind them, which go round its end, and the next positions."""
    cache = empty_cache(LAYERS, B, size, KV, K, jnp.float32)
    start = jnp.asarray(LENGTHS)
    columns = jnp.arange(5)
    prompt = jnp.where(columns < start[:, None], columns, -1)
    cache = put(cache, draw(0, LAYERS, B, 5, KV, K), draw(1, LAYERS, B, 5, KV, K), prompt)
    for i in range(steps):
        new = jnp.where(jnp.arange(B) == ended, -1, start + i)[:, None]
        cache = put(cache, draw(10 + i, LAYERS, B, 1, KV, K), draw(50 + i, LAYERS, B, 1, KV, K), new)
    return cache, jnp.where(jnp.arange(B) == ended, -1, start + steps)[:, None]


@pytest.mark.parametrize(
    ("size", "steps", "window", "softcap"),
    [(14, 6, None, None), (14, 13, None, 2.0), (12, 9, 3, None), (3 * 4, 20, None, None), (14, 30, 6, None)],
    ids=["part of it", "round the end", "window", "round and round", "round with a window"],
)
def test_blocks_in_use_give_what_all_columns_give(size, steps, window, softcap):
    cache, position = filled(size, steps)
    query, key, value = draw(2, B, 1, HEADS, K), draw(3, B, 1, KV, K), draw(4, B, 1, KV, K)
    options = {"scale": 0.7, "softcap": softcap}

    @jax.jit
    def attended(cache):
        read = Read(cache, jnp.asarray(1), reach(cache, position, window))
        return attend_cached(query, key, value, position, [read], window=window, **options)

    found = attended(cache)
    after = put(cache, jnp.stack([key] * LAYERS), jnp.stack([value] * LAYERS), position)
    k, v = (jnp.swapaxes(x[1], 1, 2) for x in (after.k, after.v))
    places = {"query_positions": position, "key_positions": after.positions}
    expected = attention(query, k, v, window=window, **places, **options)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_step_reads_the_blocks_that_are_in_use_and_no_more():
    read = [int(reach(*filled(40, steps), None).count) for steps in (0, 3, 4, 8)]
    assert read == [2, 2, 3, 4]
    assert int(reach(*filled(40, 30), 4).count) <= 2


def test_what_has_ended_or_never_was_is_not_read():
    cache, position = filled(40, 8, ended=1)
    nobody = reach(cache, jnp.full_like(position, -1), None)
    assert int(nobody.count) == 0
    empty = empty_cache(LAYERS, B, 40, KV, K, jnp.float32)
    assert int(reach(empty, jnp.zeros((B, 1), jnp.int32), None).count) == 0


def test_several_new_tokens_see_the_cache_and_those_before_them():
    cache, position = filled(20, 4)
    positions = position + jnp.arange(3)
    query, key, value = draw(2, B, 3, HEADS, K), draw(3, B, 3, KV, K), draw(4, B, 3, KV, K)

    @jax.jit
    def attended(cache):
        read = Read(cache, jnp.asarray(0), reach(cache, positions, 4))
        return attend_cached(query, key, value, positions, [read], window=4)

    found = attended(cache)
    after = put(cache, jnp.stack([key] * LAYERS), jnp.stack([value] * LAYERS), positions)
    k, v = (jnp.swapaxes(x[0], 1, 2) for x in (after.k, after.v))
    expected = attention(query, k, v, window=4, query_positions=positions, key_positions=after.positions)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_program_that_writes_a_cache_returns_other_arrays_in_the_order_of_their_axes():
    cache, position = filled(20, 4)
    new = draw(3, LAYERS, B, 1, KV, K)
    x = np.arange(24.0).reshape(2, 3, 4)
    turned = jax.jit(lambda x: (x.swapaxes(0, 1), write(cache, new, new, position)))(x)[0]
    # What is asked of the array is computed by another program.
    np.testing.assert_array_equal(turned[1], x[:, 1])
    np.testing.assert_array_equal(turned + 0, x.swapaxes(0, 1))

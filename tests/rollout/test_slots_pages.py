"""A queue through slots whose cache is a pool of pages, against slots with room of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import mesh as mesh_lib
from jaxrl_post import models
from jaxrl_post.models import cache as caches
from jaxrl_post.models.cache_kinds import WindowedCache
from jaxrl_post.rollout import Prompts, SamplingParams, generate

V, N, GROUP, WIDTH = 16, 14, 2, 4
LENGTH = np.array([3, 1, 5, 2, 4, 1, 3])
TOKENS = np.random.default_rng(0).integers(0, V, (len(LENGTH), 5))
LIMITS = np.random.default_rng(1).integers(3, N + 1, (len(LENGTH), GROUP))
KEY = jax.random.key(5)
SIZES = {"vocab_size": V, "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 24, "init_std": 0.4}
POLICIES = {
    "global": models.decoder(**SIZES),
    "mixed": models.decoder(**SIZES, window=3, local_layers=(True, False)),
}
STOPPED = SamplingParams(stop_tokens=(3,))
BUSY = SamplingParams(temperature=0.8, stop_tokens=(3,), stop_sequences=((1, 2), (5,)), presence_penalty=0.5)
ROOM = -(-(TOKENS.shape[1] + N) // WIDTH)  # pages of a whole sequence


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    monkeypatch.setitem(caches.BLOCKS, "cpu", WIDTH)


@functools.cache
def params(name):
    return jax.jit(POLICIES[name].init)(jax.random.key(0))


def prompts(limits=LIMITS):
    return Prompts(jnp.asarray(TOKENS), jnp.asarray(LENGTH), max_new_tokens=None if limits is None else limits)


def watched(policy, seen):
    """The policy, which notes of every step the positions that it decodes and the pages that rows hold."""

    def note(positions, table):
        seen.append((np.asarray(positions)[:, 0], np.asarray(table)))

    def decode(params, tokens, positions, cache):
        hidden, cache = policy.decode(params, tokens, positions, cache)
        jax.debug.callback(note, positions, (cache.whole if isinstance(cache, WindowedCache) else cache).table)
        return hidden, cache

    return policy._replace(decode=decode)


@functools.cache
def sampled(name, sampling=STOPPED, pages=None, **options):
    seen = []
    policy = POLICIES[name] if pages is None else watched(POLICIES[name], seen)
    run = functools.partial(
        generate, policy, max_new_tokens=N, group_size=GROUP, sampling=sampling, cache_pages=pages, **options
    )
    out = jax.jit(run)(params(name), prompts(), KEY)
    jax.effects_barrier()
    return jax.tree.map(np.asarray, out), seen


def same(found, expected, atol):
    for name in ("tokens", "mask", "finish", "length", "step"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_allclose(found.logp, expected.logp, atol=atol)
    assert found.extras.keys() == expected.extras.keys()
    for name, x in expected.extras.items():
        np.testing.assert_allclose(found.extras[name], x, atol=atol)


@pytest.mark.parametrize(
    ("name", "options", "atol"),
    [
        pytest.param("global", {}, 1e-5, marks=pytest.mark.nightly),
        ("mixed", {"refill": 2, "cache_dtype": jnp.int8}, 1e-5),
        pytest.param("global", {"cache_dtype": jnp.bfloat16}, 1e-5, marks=pytest.mark.nightly),
    ],
    ids=["float32", "window and int8", "bfloat16"],
)
def test_a_pool_half_as_large_as_the_slots_gives_what_room_for_all_gives(name, options, atol):
    expected, _ = sampled(name, slots=6, **options)
    pages = 6 * ROOM // 2
    found, seen = sampled(name, slots=6, pages=pages, **options)
    same(found, expected, atol)
    most = 0
    for positions, table in seen:
        held = table >= 0
        # A row has pages for what it has said and no others, and none once it has ended.
        np.testing.assert_array_equal(held.sum(1), positions // WIDTH + 1)
        assert len(set(table[held].tolist())) == held.sum() <= pages
        most = max(most, held.sum())
    assert most > 6 * 2


def test_where_the_pool_is_full_the_last_to_come_starts_over_and_says_the_same():
    expected, _ = sampled("global", BUSY, slots=6, refill=3, alternatives=2)
    # With pages for one whole sequence.
    found, seen = sampled("global", BUSY, slots=6, refill=3, alternatives=2, pages=ROOM)
    same(found, expected, 1e-5)
    decoded = sum((positions >= 0).sum() for positions, _ in seen)
    assert decoded > expected.mask.sum() + 5  # tokens of those that have gone back
    assert max((table >= 0).sum() for _, table in seen) == ROOM
    assert max((positions >= 0).sum() for positions, _ in seen) > 2


def test_a_pool_with_room_for_all_sends_nobody_back_and_needs_no_queue():
    expected, _ = sampled("global", slots=6)
    found, seen = sampled("global", pages=14 * ROOM)
    same(found, expected, 1e-5)
    assert sum((positions >= 0).sum() for positions, _ in seen) == expected.mask.sum()
    assert len(seen) == expected.mask.sum(1).max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_pages": ROOM - 1}, r"cache_pages=4 of 4 tokens cannot hold .* = 5 \+ 14; give at least 5"),
        ({"cache_pages": 9, "policy": POLICIES["global"]._replace(insert=None)}, "cache_pages needs a policy whose"),
        (
            {"cache_pages": 9, "policy": POLICIES["global"]._replace(init_cache=lambda batch, capacity, dtype: ())},
            "cache_pages needs a policy whose cache takes rows and comes in pages",
        ),
    ],
)
def test_pages_that_do_not_fit_are_refused(options, message):
    given = {"policy": POLICIES["global"], "params": params("global"), "prompts": prompts(), "key": KEY} | options
    with pytest.raises(ValueError, match=message):
        generate(**given, max_new_tokens=N, group_size=GROUP)


@pytest.mark.parametrize(
    ("name", "mesh", "slots", "pages", "options"),
    [
        ("global", {"data": 2}, 6, 2 * ROOM, {"sampling": BUSY, "alternatives": 2}),
        ("mixed", {"fsdp": 2, "tensor": 2}, 4, 4 * ROOM - 4, {"refill": 2, "cache_dtype": jnp.int8}),
        pytest.param("global", {"data": 4}, 8, 4 * ROOM + 4, {"refill": 3}, marks=pytest.mark.nightly),
        pytest.param("global", {"data": 2}, None, 2 * ROOM + 8, {}, marks=pytest.mark.nightly),
        # Devices cannot share five slots, nor eight of them six, of which two have three each.
        pytest.param("global", {"data": 2}, 5, 2 * ROOM, {}, marks=pytest.mark.nightly),
        pytest.param("global", {"data": 2, "fsdp": 4}, 6, 16, {}, marks=pytest.mark.nightly),
    ],
)
def test_devices_that_share_the_slots_have_parts_of_the_pool(name, mesh, slots, pages, options):
    expected, _ = sampled(name, slots=6, **options)
    seen = []
    run = functools.partial(generate, watched(POLICIES[name], seen), max_new_tokens=N, group_size=GROUP)
    given = {"sampling": STOPPED, **options}
    with jax.set_mesh(mesh_lib.make_mesh(**mesh)):
        found = jax.jit(functools.partial(run, cache_pages=pages, slots=slots, **given))(params(name), prompts(), KEY)
        jax.effects_barrier()
    same(found, expected, 1e-5)
    ways = {5: 1, 6: 2, 8: 4}.get(slots, 2)
    for positions, table in seen:
        held = table >= 0
        np.testing.assert_array_equal(held.sum(1), positions // WIDTH + 1)
        assert len(set(table[held].tolist())) == held.sum()
        part = np.arange(len(table)) // (len(table) // ways)
        # A row's pages are of its own device.
        assert (np.where(held, table // (pages // ways), part[:, None]) == part[:, None]).all()
    if pages == ways * ROOM:  # one whole sequence a device: some have gone back
        assert sum((positions >= 0).sum() for positions, _ in seen) > expected.mask.sum() + 5


@pytest.mark.parametrize(
    ("slots", "pages", "message"),
    [
        (6, 2 * ROOM - 1, "on each of 2 devices that share the slots; give at least 10"),
        (6, 2 * ROOM + 1, "11 pages must be a multiple of 2"),
    ],
)
def test_what_devices_cannot_share_evenly_is_refused(slots, pages, message):
    run = functools.partial(generate, POLICIES["global"], max_new_tokens=N, group_size=GROUP, cache_pages=pages)
    with jax.set_mesh(mesh_lib.make_mesh(data=2)), pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(run, slots=slots), params("global"), prompts(None), KEY)

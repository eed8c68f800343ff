"""Rows whose positions are split over the mesh's axis `sequence`, against the same rows on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import data, models
from jaxrl_post.mesh import make_mesh, place, shardings
from jaxrl_post.models.flattening import flatten, rolled, unflatten

SIZES = {"vocab_size": 13, "width": 8, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 8, "init_std": 0.4}
# Every second layer sees three tokens, across the border of two devices.
WINDOWED = models.decoder(**SIZES, window=3, local_layers=(True, False), attention_softcap=3.0, qk_norm=True)
PLAIN = models.decoder(**SIZES, softcap=5.0, value_head=True)
LENGTH = 8
POSITIONS = np.array([[-1, -1, -1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, -1, -1], [0, 1, 2, 0, 1, 2, 3, 0]], np.int32)
SEGMENTS = np.array([[0] * 8, [0] * 8, [0, 0, 0, 1, 1, 1, 1, 2]], np.int32)


def compute(policy, run, mesh):
    """What `run(params)` gives, on one device or on a mesh."""
    params = jax.jit(policy.init)(jax.random.key(0))
    if mesh is not None:
        params = place(params, shardings(params, policy.axes(), mesh))
    with jax.set_mesh(make_mesh() if mesh is None else mesh):
        return jax.tree.map(np.asarray, jax.jit(run)(params))


def assert_same(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, expected)


def test_padding_on_either_side_and_packed_rows_under_a_window_are_read_across_devices():
    tokens = jax.random.randint(jax.random.key(1), POSITIONS.shape, 0, 13)

    def run(params):
        def loss(params):
            hidden = WINDOWED.hidden(params, tokens, jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS))[0]
            hidden = jnp.where(POSITIONS[..., None] >= 0, hidden, 0)
            return jnp.sum(jnp.sin(hidden)), hidden

        cache = WINDOWED.init_cache(2, POSITIONS.shape[1], jnp.float32)
        first, cache = WINDOWED.prefill(params, tokens[1:, :4], jnp.asarray(POSITIONS[1:, :4]), cache)
        return jax.value_and_grad(loss, has_aux=True)(params), first

    mesh = make_mesh(tensor=2, sequence=4)
    assert_same(compute(WINDOWED, run, mesh), compute(WINDOWED, run, None))


@pytest.mark.nightly  # on every commit those of chosen tokens are, and their gradients, tests/training/test_meshes.py
@pytest.mark.parametrize(
    ("options", "lost"),
    [
        ({}, 0),
        ({"max_chosen": 3, "temperature": 0.7}, 2),  # two rows have four
        ({"max_chosen": 4, "shared_prompt": 3}, 0),
    ],
    ids=str,
)
def test_scores_of_split_rows_and_shared_prompts_are_those_of_whole_ones(options, lost):
    rollouts = data.to_rollouts([[1, 2, 3], [4]], [[[5, 6], [7, 8, 9, 10]], [[11, 12, 1, 2], [3]]], length=LENGTH)
    fields, key = frozenset({"logp", "entropy", "value"}), jax.random.key(2)

    def run(params):
        def total(params):
            stats = models.score(PLAIN, **options)(params, rollouts, fields, key)
            found = {name: getattr(stats, name) for name in sorted(fields)}
            return sum(jnp.nansum(jnp.sin(x)) for x in found.values()), found

        return jax.value_and_grad(total, has_aux=True)(params)

    expected = compute(PLAIN, run, None)
    assert np.isnan(expected[0][1]["logp"]).sum() == lost
    assert_same(compute(PLAIN, run, make_mesh(fsdp=2, sequence=4)), expected)


@pytest.mark.parametrize(
    "sizes",
    [pytest.param({"fsdp": 2, "sequence": 2}, marks=pytest.mark.nightly), {"data": 2, "sequence": 2, "expert": 2}],
)
def test_tokens_in_one_list_stay_on_their_device_and_find_their_places_again(sizes):
    x = np.arange(4 * 6 * 2.0).reshape(4, 6, 2)
    with jax.set_mesh(make_mesh(**sizes)):
        compiled = jax.jit(lambda x: (flatten(x), unflatten(flatten(x)[:, 0], (4, 6)), rolled(x)))(x)
        text = jax.jit(lambda x: flatten(rolled(x))).lower(x).compile().as_text()
    flat, back, before = map(np.asarray, compiled)
    assert sorted(map(tuple, flat)) == sorted(map(tuple, x.reshape(-1, 2)))
    # The first device has the first half of the first row's places, then of the second's.
    own = 4 // (sizes.get("data", 1) * sizes.get("fsdp", 1) * sizes.get("expert", 1))
    np.testing.assert_array_equal(flat[: 3 * own], x[:own, :3].reshape(-1, 2))
    np.testing.assert_array_equal(back, x[..., 0])
    np.testing.assert_array_equal(before, np.roll(x, 1, axis=1))
    assert "all-gather" not in text
    assert "all-to-all" not in text

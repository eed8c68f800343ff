import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import models
from jaxrl_post.models.rounding import Rounded, round_late, two_uses
from tests.tpu import one_chip


def test_a_late_rounding_is_to_nearest_even_for_every_bfloat16_and_what_lies_between():
    upper = jnp.arange(2**16, dtype=jnp.uint32) << 16
    bits = jnp.concatenate([upper | lower for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    wide = jax.lax.bitcast_convert_type(bits, jnp.float32)
    zeros = jnp.zeros(wide.shape, jnp.bfloat16)
    found = jax.jit(lambda *x: Rounded(*x, jnp.dtype(jnp.bfloat16)).astype(jnp.bfloat16))(wide, zeros)
    found = np.asarray(jax.lax.bitcast_convert_type(found, jnp.uint16))
    bits = np.asarray(bits).astype(np.uint64)
    number = ~np.isnan(np.asarray(wide))
    expected = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    np.testing.assert_array_equal(found[number], expected[number])
    assert np.all(found[~number] & 0x7FFF > 0x7F80)


def test_rounding_to_fewer_exponents_is_what_astype_does():
    wide = np.array([1e-7, 6e-8, 1.0005], np.float32)  # two of them subnormal
    late = round_late({"w": jnp.asarray(wide)}, {"w": jnp.zeros(3, jnp.float16)})["w"]
    np.testing.assert_array_equal(late.astype(jnp.float16), wide.astype(np.float16))


def test_the_gradient_goes_to_the_rounded_copy_in_its_dtype_and_none_to_the_weight():
    weight, narrow, x = jnp.array([1.0, 2.0]), jnp.zeros(2, jnp.bfloat16), jnp.array([3.0, 4.0], jnp.bfloat16)
    loss = lambda w, n: jnp.sum(round_late({"w": w}, {"w": n})["w"].astype(jnp.bfloat16) * x)  # noqa: E731
    to_weight, to_narrow = jax.grad(loss, argnums=(0, 1))(weight, narrow)
    assert to_narrow.dtype == jnp.bfloat16
    assert (to_narrow.tolist(), to_weight.tolist()) == ([3.0, 4.0], [0.0, 0.0])


def test_only_what_the_cast_changes_is_rounded_and_what_is_missing_stays_missing():
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "c": None}
    late = round_late(params, params | {"b": jnp.ones(2, jnp.bfloat16)})
    assert late["a"] is params["a"]
    assert late["c"] is None
    assert isinstance(late["b"], Rounded)
    assert (late["b"].shape, late["b"].ndim) == ((2,), 1)
    with pytest.raises(TypeError, match="round it with astype first"):
        late["b"][0]


def test_states_and_gradients_with_late_rounding_are_those_of_the_rounded_copy():
    policy = models.decoder(
        vocab_size=11, width=16, layers=3, heads=2, experts=2, experts_per_token=1, dtype=jnp.bfloat16, remat="full"
    )
    params = jax.jit(policy.init)(jax.random.key(0))
    tokens = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8]])

    def loss(params):
        hidden, _ = policy.hidden(params, tokens, jnp.broadcast_to(jnp.arange(4), (2, 4)))
        return jnp.sum(jnp.sin((hidden @ policy.unembed(params).weight.T).astype(jnp.float32)))

    copy = jax.jit(policy.cast)(params)
    expected = jax.jit(jax.value_and_grad(loss))(copy)
    found = jax.jit(jax.value_and_grad(lambda copy: loss(policy.round_late(params, copy))))(copy)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.float32(a), np.float32(b)), found, expected)
    assert [x.dtype for x in jax.tree.leaves(found)] == [x.dtype for x in jax.tree.leaves(expected)]


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_gradients_of_a_table_with_two_uses_add_up_as_wide_as_it_is(tied):
    policy = models.decoder(vocab_size=11, width=16, layers=1, heads=2, tied=tied, dtype=jnp.bfloat16)
    params = jax.jit(policy.init)(jax.random.key(0))
    tokens = jnp.array([[1, 2, 1, 4], [1, 1, 1, 8]])

    def loss(params):
        hidden, _ = policy.hidden(params, tokens, jnp.broadcast_to(jnp.arange(4), (2, 4)))
        return jnp.sum(jnp.sin((hidden @ policy.unembed(params).weight.T).astype(jnp.float32)))

    copy = jax.jit(policy.cast)(params)
    expected = jax.jit(jax.grad(loss))(copy)["embedding"]
    found = jax.jit(jax.grad(lambda copy: loss(policy.round_late(params, copy))))(copy)["embedding"]
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected)


def test_a_table_with_two_uses_has_no_parts():
    with pytest.raises(TypeError, match="has no parts; take its table"):
        two_uses(jnp.ones((2, 3)), jnp.bfloat16)[0]


@pytest.mark.nightly  # on every commit the recorded peaks of train steps show it, tests/planning/test_records.py
@pytest.mark.parametrize("late", [False, True])
def test_a_tpu_holds_rounded_weights_of_all_layers_only_where_they_are_asked_for(late):
    layers, width, inner, tokens = 12, 1024, 3072, 16384

    def loss(x, weights):
        copy = {name: weight.astype(x.dtype) for name, weight in weights.items()}

        def layer(x, weight):
            up, down = (weight[name].astype(x.dtype) for name in ("up", "down"))
            return x + jax.nn.silu(x @ up) @ down, None

        weights = round_late(weights, copy) if late else copy
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, weights)[0].astype(jnp.float32) ** 2)

    with one_chip("v5e"):
        shapes = {"up": (layers, width, inner), "down": (layers, inner, width)}
        weights = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        x = jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16)
        text = jax.jit(jax.grad(loss)).lower(x, weights).compile().as_text()
    assert f"f32[{layers},{width},{inner}]" in text
    assert (f"bf16[{layers},{width},{inner}]" in text) != late

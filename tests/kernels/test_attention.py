"""`kernels.attention` against float64 numpy, in every layout and across devices."""

import functools
import importlib
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxrl_post import models
from jaxrl_post.kernels.attention import attention
from jaxrl_post.kernels.attention.layout import completion_bits, own_start, shared_row
from jaxrl_post.kernels.attention.splash import make_kernel, make_mask, padded_length
from jaxrl_post.mesh import AXES, make_mesh
from jaxrl_post.models.rope import Rope, rotary_angles, rotate
from tests.tpu import one_chip, pod

BOTH = pytest.mark.parametrize("implementation", ["xla", "splash"])


def problem(batch=2, length=130, heads=4, kv_heads=2, head_dim=8, seed=0, keys=None):
    """Query, key, value and the cotangent of the output."""
    random = np.random.default_rng(seed)
    shapes = [(length, heads), (keys or length, kv_heads), (keys or length, kv_heads), (length, heads)]
    return [random.standard_normal((batch, *shape, head_dim)).astype(np.float32) for shape in shapes]


def truth(query, key, value, cotangent, sees, *, scale=None, softcap=None):
    """Output and the gradients of query, key and value in float64 by formula, one row and head at a time."""
    query, key, value, cotangent = (np.asarray(x, np.float64) for x in (query, key, value, cotangent))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, d_query, d_key, d_value = (np.zeros_like(x) for x in (query, query, key, value))
    for b in range(query.shape[0]):
        for h in range(query.shape[2]):
            g = h * key.shape[2] // query.shape[2]
            scores = scale * query[b, :, h] @ key[b, :, g].T
            slope = np.ones_like(scores)
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
                slope = 1 - (scores / softcap) ** 2
            weights = np.where(sees[b], np.exp(scores - scores.max(-1, keepdims=True)), 0)
            weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
            out[b, :, h] = weights @ value[b, :, g]
            d_value[b, :, g] += weights.T @ cotangent[b, :, h]
            d_weights = cotangent[b, :, h] @ value[b, :, g].T
            d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * slope * scale
            d_query[b, :, h] = d_scores @ key[b, :, g]
            d_key[b, :, g] += d_scores.T @ query[b, :, h]
    return out, d_query, d_key, d_value


def run(query, key, value, cotangent, **options):
    """Output and gradients of `attention`; the cotangent is zero where the output is of no meaning."""

    @jax.jit
    def both(query, key, value):
        out, pullback = jax.vjp(functools.partial(attention, **options), query, key, value)
        return out, *pullback(jnp.asarray(cotangent, out.dtype))

    return jax.tree.map(np.asarray, both(query, key, value))


def packed(length):
    """Segment ids of two rows: two segments and padding at the end; padding at the start and one segment."""
    ids = np.full((2, length), -1)
    ids[0, :50], ids[0, 50:110], ids[1, 7:] = 3, 1, 0
    return ids


def seen(ids):
    places = np.arange(ids.shape[1])
    return (places <= places[:, None]) & (ids[:, :, None] == ids[:, None]) & (ids >= 0)[:, None]


def calls(function, *args):
    """How often a function calls a Pallas kernel."""
    return str(jax.make_jaxpr(function)(*args)).count("pallas_call[")


@BOTH
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        pytest.param({}, {}, marks=pytest.mark.nightly),
        ({"heads": 3, "kv_heads": 1, "length": 128}, {"scale": 0.2}),
        ({"heads": 2, "length": 150}, {"softcap": 1.5}),
    ],
)
def test_output_and_gradients_equal_the_float64_formula(implementation, sizes, options):
    inputs = problem(**sizes)
    sees = np.tril(np.ones((2, *(inputs[0].shape[1],) * 2), bool))
    found = run(*inputs, implementation=implementation, **options)
    for name, got, expected in zip(
        ("out", "query", "key", "value"), found, truth(*inputs, sees, **options), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=name)


@BOTH
def test_bfloat16_is_as_exact_as_its_inputs(implementation):
    inputs = [x.astype(jnp.bfloat16) for x in problem(batch=1)]
    sees = np.tril(np.ones((1, 130, 130), bool))
    found = run(*inputs, implementation=implementation)
    for got, expected in zip(found, truth(*inputs, sees), strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(np.float64), expected, atol=0.02 * np.abs(expected).max())


@BOTH
def test_packed_and_padded_rows_equal_the_float64_formula(implementation):
    ids = packed(130)
    *inputs, cotangent = problem()
    cotangent = cotangent * (ids >= 0)[..., None, None]
    found = run(*inputs, cotangent, implementation=implementation, segment_ids=jnp.asarray(ids))
    expected = truth(*inputs, cotangent, seen(ids))
    np.testing.assert_allclose(found[0][ids >= 0], expected[0][ids >= 0], atol=1e-5)
    for got, wanted in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@BOTH
def test_editing_one_segment_or_padding_never_moves_another(implementation):
    ids = packed(130)
    *inputs, cotangent = problem()
    kept = ids == np.array([[1], [0]])
    cotangent = cotangent * kept[..., None, None]
    options = {"implementation": implementation, "segment_ids": jnp.asarray(ids)}
    before = run(*inputs, cotangent, **options)
    edited = [np.where(kept[..., None, None], x, 7 - 3 * x) for x in inputs]
    after = run(*edited, cotangent, **options)
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old[kept], new[kept])
    for gradient in after[1:]:
        np.testing.assert_array_equal(gradient[~kept], 0)
    assert all(np.isfinite(x).all() for x in after)


def test_a_query_that_may_see_nothing_gets_finite_output_and_gradient():
    inputs = problem(length=3)
    nothing = {"query_positions": jnp.full((2, 3), -1), "key_positions": jnp.full((2, 3), -1)}
    for options in (nothing, {"segment_ids": jnp.full((2, 3), -1)}):
        assert all(np.isfinite(x).all() for x in run(*inputs, **options))


def test_positions_decide_what_a_query_sees_in_a_cache():
    *inputs, cotangent = problem(length=2, keys=7)
    key_positions = np.array([[0, 1, -1, 2, 3, -1, -1], [0, -1, -1, 1, 2, 3, 4]])
    query_positions = np.array([[2, 3], [1, 9]])
    sees = (key_positions >= 0)[:, None] & (key_positions[:, None] <= query_positions[:, :, None])
    options = {"query_positions": jnp.asarray(query_positions), "key_positions": jnp.asarray(key_positions)}
    for got, expected in zip(run(*inputs, cotangent, **options), truth(*inputs, cotangent, sees), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


@BOTH
@pytest.mark.parametrize("starts", [(40, 75, 101), (32, 64, 96), pytest.param((31, 64, 97), marks=pytest.mark.nightly)])
def test_a_shared_prefix_gives_what_each_completion_gives_in_a_row_of_its_own(implementation, starts):
    length, prefix, lengths = 130, 29, (20, 26, 9)
    *inputs, cotangent = problem(batch=1, length=length)
    real, positions = np.zeros(length, bool), np.zeros(length, int)
    real[:prefix], positions[:prefix] = True, np.arange(prefix)
    for start, size in zip(starts, lengths, strict=True):
        real[start : start + size], positions[start : start + size] = True, prefix + np.arange(size)

    def rotated(query, key, value, positions, **options):
        rotation = rotary_angles(Rope(base=100.0), 8, jnp.asarray(positions)[None], jnp.dtype(jnp.float32))
        return attention(rotate(query, rotation), rotate(key, rotation), value, **options)

    def shared(query, key, value):
        ids = jnp.asarray(np.where(real, 0, -1))[None]
        options = {"segment_ids": ids, "completion_starts": starts, "implementation": implementation}
        return jnp.where(real[:, None, None], rotated(query, key, value, positions, **options), 0)

    def separate(query, key, value):
        out = jnp.zeros_like(query)
        for start, size in zip(starts, lengths, strict=True):
            row = np.r_[:prefix, start : start + size]
            alone = rotated(query[:, row], key[:, row], value[:, row], np.arange(len(row)), implementation="xla")
            out = out.at[:, :prefix].set(alone[:, :prefix]).at[:, start : start + size].set(alone[:, prefix:])
        return out

    def both(function):
        out, pullback = jax.vjp(function, *inputs)
        return out, *pullback(jnp.asarray(cotangent))

    for got, expected in zip(jax.jit(lambda: both(shared))(), jax.jit(lambda: both(separate))(), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("ids", [None, "packed"])
def test_completions_with_equal_rooms_equal_the_formula_and_form_no_scores_between_them(ids):
    length, starts = 130, (34, 66, 98)
    inputs = problem(length=length)
    own = own_start(length, starts)
    places = np.arange(length)
    sees = (places <= places[:, None]) & ((places < starts[0]) | (places >= own[:, None]))
    sees, options = np.broadcast_to(sees, (2, length, length)), {"completion_starts": starts, "softcap": 2.0}
    if ids is not None:
        segments = packed(length)
        sees, options["segment_ids"] = sees & seen(segments), jnp.asarray(segments)
    real = sees.any(-1)[..., None, None]
    inputs[3] = inputs[3] * real
    for got, expected in zip(run(*inputs, **options), truth(*inputs, sees, softcap=2.0), strict=True):
        np.testing.assert_allclose(got * real, expected, atol=1e-5)
    program = str(jax.make_jaxpr(functools.partial(attention, **options))(*inputs[:3]))
    assert "3,32,34]" in program  # of three completions for the prefix
    assert "130,130]" not in program


@pytest.mark.parametrize(("length", "starts"), [(50, (7, 20, 21)), (64, (16, 24, 56)), (9, (8,))])
def test_the_mask_of_a_shared_prefix_is_the_one_of_its_definition(length, starts):
    mask = make_mask(length, starts)
    own = [max((s for s in starts if s <= place), default=0) for place in range(length)]
    expected = [[k <= q and (k < starts[0] or own[q] <= k) for k in range(length)] for q in range(length)]
    np.testing.assert_array_equal(mask[:, :], expected)
    np.testing.assert_array_equal(mask[3:7, 2:6], np.array(expected)[3:7, 2:6])


def test_a_row_of_equal_rooms_grows_only_where_its_starts_need_more_than_31_bits():
    assert shared_row(100, 20, 3) == (160, (100, 120, 140))
    # 17 bits for a place, and 14 for the last start, 110008, in units of 8; in units of 4 it would need 15.
    length, starts = shared_row(40001, 9999, 8)
    assert (length, starts[0], starts[1] - starts[0]) == (120008, 40008, 10000)
    assert completion_bits(length, starts) == 31
    assert completion_bits(120004, tuple(range(40004, 120004, 10000))) == 32


def test_a_shared_prefix_computes_only_the_tiles_that_hold_something():
    def tiles(length, starts):
        kernel = make_kernel(length, 512, 2, starts, None, None, True)
        infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
        # The mask of a tile is computed in the kernel; none is stored.
        assert all(info.partial_mask_blocks is None and info.q_sequence is not None for info in infos)
        (count,) = {np.count_nonzero(info.block_mask) for info in infos}
        return count

    # In tiles of 512 the prefix has 4 and a completion 2: 4*5/2 for the prefix, 2*4 + 3 for each of 8 completions.
    assert tiles(10240, tuple(range(2048, 10240, 1024))) == 10 + 8 * 11 == 98
    assert 8 * tiles(3072, None) == 8 * (6 * 7 // 2) == 168


def test_the_tile_is_the_largest_that_adds_at_most_an_eighth():
    lengths = (128, 129, 300, 512, 600, 1000, 1152, 4000, 10240)
    expected = [(128, 128), (256, 128), (384, 128), (512, 512), (640, 128), (1024, 512), (1280, 256), (4096, 512)]
    assert [padded_length(length) for length in lengths] == [*expected, (10240, 512)]


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.nightly), "dots"])
def test_a_decoder_gives_the_same_states_and_gradients_through_splash(monkeypatch, remat):
    policy = models.decoder(vocab_size=11, width=16, layers=2, heads=4, kv_heads=2, remat=remat, init_std=0.3)
    params = policy.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 130), 0, 11)
    ids = packed(130)
    positions = np.where(ids < 0, -1, np.arange(130) - np.array([[0], [7]]) - 50 * (ids == 1))

    # By its dotted name, for the package has a function of the module's name.
    module = importlib.import_module("jaxrl_post.models.network")
    results = []
    for implementation in ("xla", "splash"):
        monkeypatch.setattr(module, "attention", functools.partial(attention, implementation=implementation))

        def states(params):
            out = policy.hidden(params, tokens, jnp.asarray(positions), jnp.maximum(ids, 0))[0]
            return jnp.where(ids[..., None] >= 0, out, 0)

        assert bool(calls(states, params)) == (implementation == "splash")

        def both(params, states=states):
            value, pullback = jax.vjp(states, params)
            return value, pullback(jnp.cos(jnp.arange(value.size)).reshape(value.shape))

        results.append(jax.jit(both)(params))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4), *results)


@pytest.mark.parametrize(
    ("sizes", "heads", "kv_heads", "batch"),
    [
        pytest.param({"data": 2, "tensor": 2}, 4, 2, 4, marks=pytest.mark.nightly),
        ({"fsdp": 2, "tensor": 4}, 12, 6, 2),  # key-value heads that the devices do not divide
        (
            {"data": 2, "expert": 2, "tensor": 2},
            3,
            1,
            2,
        ),  # heads that they do not divide, and an axis that splits nothing
        ({"sequence": 2, "tensor": 4}, 4, 2, 1),  # places, which are padded to tiles on each
    ],
)
def test_splash_across_devices_equals_one_device(sizes, heads, kv_heads, batch):
    inputs = problem(batch=batch, heads=heads, kv_heads=kv_heads)
    options = {"segment_ids": jnp.asarray(np.tile(packed(130)[1:], (batch, 1))), "softcap": 2.0}
    real = np.arange(130) >= 7
    cotangent = inputs[3] * real[:, None, None]
    alone = run(*inputs[:3], cotangent, implementation="xla", **options)
    with jax.set_mesh(make_mesh(**sizes)):
        across = run(*inputs[:3], cotangent, implementation="splash", **options)
    np.testing.assert_allclose(across[0][:, real], alone[0][:, real], atol=1e-5)
    for one, many in zip(alone[1:], across[1:], strict=True):
        np.testing.assert_allclose(many, one, atol=1e-5)


def test_splash_runs_where_it_can_on_a_tpu_and_xla_elsewhere_and_a_log_line_says_which(caplog):
    caplog.set_level(logging.DEBUG, "jaxrl_post")

    def chosen(length=128, **options):
        caplog.clear()
        inputs = [jax.ShapeDtypeStruct((2, length, 2, 8), jnp.float32)] * 3
        count = calls(lambda *x: attention(*x, **options), *inputs)
        (line,) = [record.getMessage() for record in caplog.records]
        assert bool(count) == line.startswith("attention: splash")
        return "splash" if count else "xla"

    positions = jnp.zeros((2, 128), jnp.int32)
    assert chosen() == "xla"
    with one_chip("v5e"):
        assert chosen() == "splash"
        assert chosen(segment_ids=positions, completion_starts=(64, 96)) == "splash"
        assert chosen(length=127) == "xla"
        assert chosen(query_positions=positions, key_positions=positions) == "xla"
    with pod("v5e:2x4", fsdp=2, tensor=2):
        assert chosen() == "splash"
    with pod("v5e:2x4", sequence=2):
        assert chosen() == "xla"  # too few places on each
        assert chosen(length=256) == "splash"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": (2, 4, 3, 8), "value": (2, 4, 3, 8)}, "key-value heads must divide heads, got 4 heads and 3"),
        ({"key": (2, 4, 2, 6), "value": (2, 4, 2, 6)}, r"query must be \[B, T, H, K\] and key"),
        ({"value": (2, 4, 4, 8)}, "value must have the shape of key"),
        ({"key": (2, 5, 2, 8), "value": (2, 5, 2, 8)}, "without positions queries and keys are the same tokens"),
        ({"query_positions": (2, 4)}, "come together or not at all"),
        ({"segment_ids": (4,)}, r"segment_ids must be \[2, 4\]"),
        ({"key_segment_ids": (2, 4)}, "key_segment_ids needs segment_ids"),
        ({"completion_starts": (2, 2)}, r"completion_starts must increase within \(0, T\) = \(0, 4\), got \(2, 2\)"),
        ({"completion_starts": (0, 2)}, "completion_starts must increase"),
        ({"completion_starts": (2, 4)}, "completion_starts must increase"),
        ({"completion_starts": (2,), "query_positions": (2, 4), "key_positions": (2, 4)}, "cannot be combined"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"implementation": "flash"}, r"unknown implementation 'flash'; there are \['xla', 'splash'\]"),
        (
            {"implementation": "splash", "query_positions": (2, 4), "key_positions": (2, 4)},
            "splash attention orders tokens by their place in the row and takes no positions",
        ),
        ({"implementation": "splash", "dtype": "float16"}, "computes in float32 and bfloat16, not in float16"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    options = {"query": (2, 4, 4, 8), "key": (2, 4, 2, 8), "value": (2, 4, 2, 8), **options}
    dtype = options.pop("dtype", "float32")
    arrays = {
        name: jnp.zeros(shape, dtype if len(shape) == 4 else "int32")
        for name, shape in options.items()
        if name not in ("completion_starts", "softcap", "implementation")
    }
    with pytest.raises(ValueError, match=message):
        attention(**{**options, **arrays})


def test_a_named_splash_is_refused_where_a_mesh_or_a_row_does_not_suit_it():
    def lower(length=128, **options):
        x = jax.ShapeDtypeStruct((8, length, 4, 8), jnp.float32)
        jax.eval_shape(functools.partial(attention, implementation="splash", **options), x, x, x)

    explicit = jax.make_mesh((2, 1, 1, 1, 1), AXES, axis_types=(AxisType.Explicit,) * 5)
    with jax.set_mesh(explicit), pytest.raises(ValueError, match=r"\['data'\] are explicit"):
        lower()
    with pytest.raises(ValueError, match="31 bits: 65536 places and starts that are multiples of 1 need 32"):
        lower(65536, completion_starts=(40000, 40001))
    lower(512, completion_starts=(40, 41))


@pytest.mark.parametrize("implementation", ["xla", "splash"])
def test_a_query_under_a_window_sees_the_last_keys_only(implementation):
    length, window = 130, 7
    query, key, value = (jax.random.normal(jax.random.key(i), (1, length, 2, 8)) for i in range(3))
    found = attention(query, key, value, window=window, implementation=implementation)
    scores = np.einsum("bthk,bshk->bhts", query, key) / np.sqrt(8)
    distance = np.arange(length)[:, None] - np.arange(length)
    scores = np.where((distance >= 0) & (distance < window), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), value)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    with pytest.raises(ValueError, match="window"):
        attention(query, key, value, window=0)

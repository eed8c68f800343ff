"""The Mosaic kernels: in TPU interpret mode against float64, and compiled ahead of time for each chip.

Interpret mode fills memory that was not written with NaN, hands out NaN beyond the end of an array and looks for races.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxrl_post.kernels import token_logprob
from jaxrl_post.kernels.token_logprob import pallas_tpu
from jaxrl_post.kernels.token_logprob.reference import OUTPUTS, TokenLogprob
from jaxrl_post.kernels.token_logprob.statistics import PerToken, Wanted, finish, join_two, slopes
from jaxrl_post.kernels.token_logprob.tiles import CHIPS, Tiles, choose_tiles
from tests.kernels.test_token_logprob import REAL, close, float64_truth
from tests.tpu import one_chip, pod

N, V, D = 200, 700, 128
"""Two tiles of tokens with 56 too many, three of the vocabulary of which the last has 188 of 256 rows."""
TILES = Tiles(tokens=128, vocab=256, slice=128)
MIB = 2**20


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "choose_tiles", lambda *arguments: TILES)
    mode = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="uninitialized", detect_races=True)
    with pltpu.force_tpu_interpret_mode(mode):
        yield


def no_races():
    races = __import__("jax._src.pallas.mosaic.interpret.interpret_pallas_call", fromlist=["races"]).races
    return races is None or not races.races_found


def problem(seed=0, dtype=jnp.float32, scale=0.15):
    random = np.random.default_rng(seed)
    hidden = jnp.asarray(random.standard_normal((N, D)), dtype)
    weight = jnp.asarray(scale * random.standard_normal((V, D)), dtype)
    targets = random.integers(0, V, N)
    targets[:4] = V - 1, 0, 255, 256  # the last of all, the first, both sides of a tile's edge
    return hidden, weight, targets


def truth(hidden, weight, targets, softcap, temperature, cotangents=None):
    inputs = {
        "hidden": np.asarray(hidden, np.float64),
        "unembedding": np.asarray(weight, np.float64),
        "bias": np.zeros(V),
        "temperature": np.float64(temperature),
    }
    return float64_truth(inputs, targets, softcap, cotangents)


def program(cotangents, *, outputs, softcap=None, temperature=0.7, **keywords):
    """`(hidden, weight, targets, mask) -> (gradients, outputs)`, compiled."""

    @jax.jit
    def both(hidden, weight, targets, mask):
        def loss(hidden, weight):
            out = token_logprob(
                hidden,
                weight,
                targets,
                mask=mask,
                temperature=temperature,
                softcap=softcap,
                outputs=outputs,
                implementation="pallas_tpu",
                **keywords,
            )
            return sum(jnp.sum(jnp.asarray(c, jnp.float32) * getattr(out, n)) for n, c in cotangents.items()), out

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(hidden, weight)

    return both


def run(hidden, weight, targets, cotangents, **options):
    return program(cotangents, **options)(hidden, weight, jnp.asarray(targets, jnp.int32), None)


ASKED = [
    (("logp", "logsumexp"), ("logp", "logsumexp")),  # the states' gradient comes from the forward pass
    (("logp", "entropy"), ("logp",)),
    (("logp", "entropy", "logsumexp"), ("logp", "entropy", "logsumexp")),
    (OUTPUTS, REAL),
]
OFTEN = {(jnp.float32, None): (0, 1, 3), (jnp.bfloat16, 3.0): (0, 3)}


@pytest.mark.parametrize(
    ("outputs", "differentiated", "dtype", "softcap"),
    [
        pytest.param(*asked, dtype, softcap, marks=() if i in OFTEN.get((dtype, softcap), ()) else pytest.mark.nightly)
        for dtype in (jnp.float32, jnp.bfloat16)
        for softcap in (None, 3.0)
        for i, asked in enumerate(ASKED)
    ],
)
def test_values_and_gradients_equal_float64(interpreted, outputs, differentiated, softcap, dtype):
    hidden, weight, targets = problem(dtype=dtype)
    random = np.random.default_rng(1)
    cotangents = {name: random.standard_normal(N) for name in differentiated}
    values, gradients = truth(hidden, weight, targets, softcap, 0.7, cotangents)
    got, out = run(hidden, weight, targets, cotangents, outputs=outputs, softcap=softcap)
    assert no_races()
    for name in outputs:
        close(getattr(out, name), values[name], 1e-6)
    for found, name in zip(got, ("hidden", "unembedding"), strict=True):
        assert found.dtype == dtype
        scale = np.abs(gradients[name]).max()
        error = np.abs(np.asarray(found, np.float64) - gradients[name]).max() / scale
        assert error <= (1e-5 if dtype == jnp.float32 else 6e-3), (name, error)


def test_a_forward_pass_alone_gives_what_the_differentiated_one_gives(interpreted):
    hidden, weight, targets = problem()
    values = truth(hidden, weight, targets, None, 1.0)
    out = jax.jit(lambda h, w: token_logprob(h, w, jnp.asarray(targets), outputs=OUTPUTS, implementation="pallas_tpu"))(
        hidden, weight
    )
    assert no_races()
    for name in OUTPUTS:
        close(getattr(out, name), values[name], 1e-6)


def test_the_gradient_of_a_confident_token_keeps_its_digits(interpreted):
    # p(target) is within 1e-5 of one: a kernel that rounds probabilities before it subtracts them from one returns
    # noise of the size of the unembedding's rows here.
    random = np.random.default_rng(3)
    weight = np.asarray(jnp.asarray(random.standard_normal((V, D)), jnp.bfloat16), np.float64)
    targets = random.integers(0, V, N)
    hidden = 0.18 * weight[targets]
    hidden = np.asarray(jnp.asarray(hidden, jnp.bfloat16), np.float64)
    cotangents = {"logp": np.ones(N)}
    values, gradients = truth(hidden, weight, targets, None, 1.0, cotangents)
    others = -np.expm1(values["logp"])
    assert np.median(others) < 1e-5, "the problem must be one of confident tokens"
    got, out = run(
        jnp.asarray(hidden, jnp.bfloat16),
        jnp.asarray(weight, jnp.bfloat16),
        targets,
        cotangents,
        outputs=("logp",),
        temperature=1.0,
    )
    np.testing.assert_allclose(out.logp, values["logp"], rtol=3e-5)
    error = np.linalg.norm(np.asarray(got[0], np.float64) - gradients["hidden"], axis=1)
    assert np.all(error <= 6e-3 * np.linalg.norm(gradients["hidden"], axis=1))


def test_a_common_offset_of_ten_thousand_costs_no_digits(interpreted):
    # The first of 128 states is 1e4 and meets ones; the other logits are multiples of 1/64, exact beside it.
    random = np.random.default_rng(6)
    hidden = np.zeros((N, D))
    hidden[:, 0], hidden[:, 1:9] = 1e4, random.integers(-16, 17, (N, 8)) / 8
    weight = np.zeros((V, D))
    weight[:, 0], weight[:, 1:9] = 1.0, random.integers(-8, 9, (V, 8)) / 8
    targets = random.integers(0, V, N)
    shifted = hidden.copy()
    shifted[:, 0] = 0.0
    values = truth(shifted, weight, targets, None, 1.0)
    _, out = run(
        jnp.asarray(hidden, jnp.float32),
        jnp.asarray(weight, jnp.float32),
        targets,
        {"logp": np.ones(N)},
        outputs=OUTPUTS,
        temperature=1.0,
    )
    for name in ("logp", "entropy", "max_prob", "mean_logp", "sum_p_squared"):
        close(getattr(out, name), values[name], 2e-6)


def test_masked_tokens_give_zero_and_no_gradient_whatever_they_hold(interpreted):
    hidden, weight, targets = problem()
    mask = (np.arange(N) % 3 == 0).astype(np.float32)
    random = np.random.default_rng(4)
    cotangents = {name: random.standard_normal(N) for name in ("logp", "entropy")}
    masked = {name: c * mask for name, c in cotangents.items()}
    values, gradients = truth(hidden, weight, targets, None, 0.7, masked)
    wild = jnp.where(mask[:, None] > 0, hidden, jnp.nan)
    targets = jnp.asarray(np.where(mask > 0, targets, -100), jnp.int32)
    programs = {bound: program(cotangents, outputs=("logp", "entropy"), max_tokens=bound) for bound in (None, 67)}
    for both in programs.values():
        got, out = both(wild, weight, targets, jnp.asarray(mask))
        for name in cotangents:
            close(getattr(out, name), values[name] * mask, 1e-6)
        for found, name in zip(got, ("hidden", "unembedding"), strict=True):
            close(found, gradients[name], 1e-5)
    nothing, out = programs[None](wild, weight, targets, jnp.zeros(N, jnp.float32))
    assert not any(np.any(x) for x in (*nothing, out.logp, out.entropy))


def test_a_zero_cotangent_gives_a_zero_gradient_and_a_target_outside_no_log_prob(interpreted):
    hidden, weight, targets = problem()
    targets[[2, 5]] = -1, V
    got, out = run(hidden, weight, targets, {"logp": np.zeros(N)}, outputs=("logp", "entropy"))
    assert not any(np.any(x) for x in got)
    assert np.flatnonzero(np.isnan(out.logp)).tolist() == [2, 5]
    assert np.all(np.isfinite(out.entropy))


def test_shards_of_the_vocabulary_joined_give_the_whole(interpreted):
    # What each device of a split vocabulary does, one after the other: interpret mode knows no mesh.
    hidden, weight, targets = problem()
    outputs, temperature, edge = ("logp", "logsumexp", "argmax"), jnp.float32(0.7), 300
    random = np.random.default_rng(7)
    cotangents = {name: random.standard_normal(N) for name in ("logp", "logsumexp")}
    values, gradients = truth(hidden, weight, targets, 3.0, 0.7, cotangents)
    shards = [(0, weight[:edge]), (edge, weight[edge:])]
    targets = jnp.asarray(targets, jnp.int32)
    parts = [
        pallas_tpu.sums(
            hidden, w, None, temperature, targets - first, softcap=3.0, fields=frozenset({"best"}), keep=True
        )
        for first, w in shards
    ]
    sums = [s._replace(best=s.best + first) for (s, _), (first, _) in zip(parts, shards, strict=True)]
    out, distribution = finish(join_two(*sums, temperature), targets, V, temperature, outputs)
    for name in outputs:
        close(getattr(out, name), values[name], 1e-6)
    found = []
    for (first, w), (s, kept) in zip(shards, parts, strict=True):
        token = PerToken(
            targets=targets - first,
            target_z=distribution.top + distribution.target_x * temperature,
            top=distribution.top,
            log_total=distribution.log_total,
            slopes=slopes(
                TokenLogprob(**{n: jnp.asarray(c, jnp.float32) for n, c in cotangents.items()}),
                distribution,
                targets,
                V,
            ),
            best=None,
        )
        share = jnp.exp((s.top - distribution.top) / temperature - distribution.log_total)
        wanted = Wanted(hidden=True, unembedding=jnp.float32, bias=False, temperature=False)
        found.append(
            pallas_tpu.gradients(hidden, w, None, temperature, token, softcap=3.0, wanted=wanted, kept=(kept, share))
        )
    close(found[0].hidden + found[1].hidden, gradients["hidden"], 1e-5)
    close(jnp.concatenate([f.unembedding for f in found]), gradients["unembedding"], 1e-5)


def test_a_frozen_unembedding_costs_no_work():
    def kernels(argnums):
        hidden, weight, targets = problem()

        def loss(hidden, weight):
            return jnp.sum(token_logprob(hidden, weight, jnp.asarray(targets), implementation="pallas_tpu").logp)

        text = str(jax.make_jaxpr(jax.grad(loss, argnums=argnums))(hidden, weight))
        return sorted(set(re.findall(r"token_logprob_\w+", text)))

    assert kernels((0, 1)) == ["token_logprob_d_unembedding", "token_logprob_forward_keeping"]
    assert kernels(0) == ["token_logprob_forward_keeping"]
    assert kernels(1) == ["token_logprob_d_unembedding", "token_logprob_forward"]


def test_what_the_kernels_cannot_do_is_refused_before_launch():
    hidden, weight, targets = problem()
    targets = jnp.asarray(targets)
    refused = functools.partial(token_logprob, implementation="pallas_tpu")
    with pytest.raises(ValueError, match="one dtype, got bfloat16 and float32"):
        refused(hidden.astype(jnp.bfloat16), weight, targets)
    with pytest.raises(ValueError, match="must be bfloat16 or float32, got float16"):
        refused(hidden.astype(jnp.float16), weight.astype(jnp.float16), targets)
    with pytest.raises(ValueError, match="width must be a multiple of 128, got 100"):
        refused(hidden[:, :100], weight[:, :100], targets)
    with pytest.raises(ValueError, match="a bias is not supported"):
        refused(hidden, weight, targets, bias=jnp.zeros(V))
    with pytest.raises(ValueError, match="chunk_bytes is for implementation='chunked'"):
        refused(hidden, weight, targets, chunk_bytes=1000)
    with pytest.raises(ValueError, match="no gradient of the temperature"):
        jax.grad(lambda t: jnp.sum(refused(hidden, weight, targets, temperature=t).logp))(1.0)
    with pytest.raises(ValueError, match="no tile for states of width 65536 in 16 MiB"):
        choose_tiles("forward", 1024, 1024, 65536, 2, CHIPS["TPU v4"])


def test_the_kernels_are_chosen_on_a_tpu_and_nowhere_else(caplog):
    hidden, weight, targets = problem()
    run = functools.partial(jax.make_jaxpr(token_logprob), hidden, weight, jnp.asarray(targets))
    with caplog.at_level("DEBUG", logger="jaxrl_post.kernels.token_logprob.api"):
        assert "pallas_call" not in str(run())
        with one_chip("v5e"):
            assert "pallas_call" in str(jax.make_jaxpr(lambda *a: token_logprob(*a))(hidden, weight, targets))
            narrow = jax.make_jaxpr(lambda h, w, y: token_logprob(h[:, :100], w[:, :100], y))(hidden, weight, targets)
        assert "pallas_call" not in str(narrow)
    assert [re.findall("token_logprob: (\\w+)", line)[0] for line in caplog.messages] == [
        "reference",
        "pallas_tpu",
        "reference",
    ]


# Ahead of time. 16384 tokens in bfloat16, as large as training gets.
T = 16384


def compiled(width, vocabulary, outputs=("logp",), *, backward, differentiated=None):
    def values(hidden, unembedding, targets):
        return token_logprob(hidden, unembedding, targets, temperature=0.9, outputs=outputs)

    def loss(*arguments):
        out = values(*arguments)
        return sum(jnp.sum(getattr(out, name)) for name in differentiated or outputs)

    shapes = (
        jax.ShapeDtypeStruct((T, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((vocabulary, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((T,), jnp.int32),
    )
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1)) if backward else values).lower(*shapes)
    assert "tpu_custom_call" in lowered.as_text()
    both = rf"{T}x{vocabulary}|{vocabulary}x{T}"
    assert not re.search(both, lowered.as_text()), "an array of tokens by vocabulary"
    return lowered.compile()


def check_memory(chip, width, vocabulary):
    with one_chip(chip):
        forward = compiled(width, vocabulary, backward=False)
        backward = compiled(width, vocabulary, backward=True)
    assert forward.memory_analysis().temp_size_in_bytes <= 16 * MIB
    assert backward.memory_analysis().temp_size_in_bytes <= 64 * MIB + 4 * T * width


@pytest.mark.nightly  # on every commit the gradient is compiled for one, tests/kernels/test_recorded_schedule.py
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
def test_the_kernels_compile_for_every_chip_and_take_no_memory_to_speak_of(chip):
    check_memory(chip, 1024, 151936)


def test_the_kernels_take_no_memory_to_speak_of():
    with one_chip("v5e"):
        backward = compiled(256, 151936, backward=True)
    assert backward.memory_analysis().temp_size_in_bytes <= 64 * MIB + 4 * T * 256


@pytest.mark.nightly
def test_the_kernels_compile_for_a_wide_model_with_a_large_vocabulary():
    check_memory("v5e", 4096, 262144)


@pytest.mark.nightly
@pytest.mark.parametrize("vocabulary", [151936, 262144])
@pytest.mark.parametrize("width", [1024, 2048, 4096, 8192])
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
def test_the_kernels_compile_for_every_chip_and_shape(chip, width, vocabulary):
    check_memory(chip, width, vocabulary)


@pytest.mark.nightly
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
def test_the_kernels_with_every_output_compile_for_every_chip(chip):
    with one_chip(chip):
        compiled(2048, 151936, OUTPUTS, backward=True, differentiated=REAL)


@pytest.mark.nightly
def test_the_kernels_compile_for_the_small_memory_of_a_v4():
    with one_chip("v4"):
        compiled(1024, 151936, backward=True)


COLLECTIVE = re.compile(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # Forward: the maximum and the targets' logits in one, then the sum. Backward: the states' gradient.
        ({"tensor": 8}, {"all-reduce": 3}),
        # Gathered once, for both passes; the gradient is scattered over fsdp, and nothing is left to add.
        pytest.param({"fsdp": 8}, {"all-gather": 1, "reduce-scatter": 1}, marks=pytest.mark.nightly),
        pytest.param({"data": 2, "tensor": 4}, {"all-reduce": 4}, marks=pytest.mark.nightly),
    ],
)
def test_on_a_pod_slice_no_vocabulary_is_gathered_and_each_collective_runs_once(sizes, expected):
    from jax.sharding import NamedSharding, PartitionSpec

    width, vocabulary = 256, 32000  # 4000 rows a device are no multiple of 128
    with pod("v5e:2x4", **sizes) as mesh:
        rows = tuple(name for name in sizes if name != "tensor")

        def struct(shape, dtype, *names):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*names)))

        split = "tensor" if "tensor" in sizes else None, "fsdp" if "fsdp" in sizes else None
        shapes = (
            struct((T, width), jnp.bfloat16, rows or None, None),
            struct((vocabulary, width), jnp.bfloat16, *split),
            struct((T,), jnp.int32, rows or None),
        )

        def loss(hidden, unembedding, targets):
            return jnp.sum(token_logprob(hidden, unembedding, targets).logp)

        shardings = tuple(s.sharding for s in shapes[:2])
        program = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=shardings).lower(*shapes).compile()
    found = [m.group(1) for m in COLLECTIVE.finditer(program.as_text())]
    assert {name: found.count(name) for name in set(found)} == expected

"""`token_divergence` against the plain formula in float64, at its limits, and what it costs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_post.kernels import token_logprob
from jaxrl_post.kernels.token_logprob.token_divergence import token_divergence
from jaxrl_post.mesh import make_mesh
from tests import optimized
from tests.kernels.counting import collectives, dot_flops, largest_array
from tests.tpu import pod

N, V, D, TEACHER_D = 11, 37, 8, 6  # chunks of 2 and 4 tokens leave a remainder
STUDENT = ("hidden", "unembedding", "temperature")
MASK = np.array([0, 1, 1, 0, 0, 0, 1, 0, 1, 0, 0], np.float32)
KINDS = [("forward_kl", None), ("reverse_kl", None), ("jsd", None), ("jsd", 0.9)]


def problem(seed=0, tokens=N, vocabulary=V, width=D, teacher_width=TEACHER_D):
    random = np.random.default_rng(seed)
    return {
        "hidden": random.standard_normal((tokens, width)),
        "unembedding": 0.6 * random.standard_normal((vocabulary, width)),
        "teacher_hidden": random.standard_normal((tokens, teacher_width)),
        "teacher_unembedding": 0.8 * random.standard_normal((vocabulary, teacher_width)),
        "temperature": np.float64(0.7),
        "cotangent": random.standard_normal(tokens),
    }


def plain(log_p, log_q, kind, beta=None):
    """By the definitions: of KL, and of the generalised JSD with `beta` the weight of the teacher."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if kind == "forward_kl":
        return jnp.sum(p * (log_p - log_q), -1)
    if kind == "reverse_kl":
        return jnp.sum(q * (log_q - log_p), -1)
    beta = 0.5 if beta is None else beta
    log_m = jnp.log(beta * p + (1 - beta) * q)
    return beta * jnp.sum(p * (log_p - log_m), -1) + (1 - beta) * jnp.sum(q * (log_q - log_m), -1)


def truth(inputs, kind, beta=None, *, softcap=None, teacher_softcap=None, teacher_temperature=None, keep=None):
    """Values and the student's gradients for the cotangent, in float64."""

    @functools.partial(jax.value_and_grad, has_aux=True)
    def total(student, x):
        x = x | student

        def log_probs(hidden, unembedding, temperature, softcap):
            z = hidden @ unembedding.T
            return jax.nn.log_softmax((z if softcap is None else softcap * jnp.tanh(z / softcap)) / temperature)

        log_q = log_probs(x["hidden"], x["unembedding"], x["temperature"], softcap)
        other = inputs["temperature"] if teacher_temperature is None else teacher_temperature
        log_p = log_probs(x["teacher_hidden"], x["teacher_unembedding"], other, teacher_softcap)
        values = plain(log_p, log_q, kind, beta) * (1.0 if keep is None else keep)
        return jnp.sum(x["cotangent"] * values), values

    with jax.enable_x64(True):
        student = {name: jnp.asarray(inputs[name]) for name in STUDENT}
        (_, values), gradients = jax.jit(total)(student, jax.tree.map(jnp.asarray, inputs))
        return np.asarray(values), jax.tree.map(np.asarray, gradients)


def as_dtype(inputs, dtype=jnp.float32):
    narrow = {"hidden", "unembedding", "teacher_hidden", "teacher_unembedding"}
    return {name: jnp.asarray(x, dtype if name in narrow else jnp.float32) for name, x in inputs.items()}


def call(x, kind, rows=None, **keywords):
    chunk_bytes = None if rows is None else 2 * 4 * x["unembedding"].shape[0] * rows
    arrays = (x[name] for name in ("hidden", "unembedding", "teacher_hidden", "teacher_unembedding"))
    return token_divergence(
        *arrays, kind=kind, chunk_bytes=chunk_bytes, **{"temperature": x.get("temperature", 1.0)} | keywords
    )


def values_of(kind, **keywords):
    return jax.jit(functools.partial(call, kind=kind, **keywords))


def gradients_of(kind, **keywords):
    """Values, and gradients of all arguments for the cotangent."""

    def total(x):
        values = call(x, kind, **keywords)
        return jnp.sum(x["cotangent"] * values), values

    return optimized.jit(jax.grad(total, has_aux=True))


def close(actual, expected, tolerance):
    """Within `tolerance` of the largest expected value."""
    expected = np.asarray(expected, np.float64)
    actual = np.asarray(actual, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(1e-30, np.abs(expected).max()))


CAPPED = {"softcap": 3.0, "teacher_softcap": 4.0, "teacher_temperature": 1.3}


@pytest.mark.parametrize(
    ("kind", "beta", "rows", "keywords"),
    [
        pytest.param("forward_kl", None, None, {}, marks=pytest.mark.nightly),
        ("forward_kl", None, 1, CAPPED),
        ("reverse_kl", None, 4, CAPPED),
        pytest.param("jsd", None, 2, {}, marks=pytest.mark.nightly),
        ("jsd", 0.9, 4, CAPPED),
    ],
)
def test_values_and_gradients_agree_with_the_plain_formula_in_float64(kind, beta, rows, keywords):
    inputs = problem()
    values, gradients = truth(inputs, kind, beta, **keywords)
    got, got_values = gradients_of(kind, beta=beta, rows=rows, **keywords)(as_dtype(inputs))
    close(got_values, values, 1e-6)
    for name in STUDENT:
        close(got[name], gradients[name], 1e-5)


@pytest.mark.parametrize(("kind", "beta"), [pytest.param(*KINDS[1], marks=pytest.mark.nightly), KINDS[2]])
def test_bfloat16_inputs_give_float32_values_and_gradients_within_their_rounding(kind, beta):
    x = as_dtype(problem(1), jnp.bfloat16)
    rounded = {name: np.asarray(leaf, np.float64) for name, leaf in x.items()}
    values, gradients = truth(rounded, kind, beta)
    got, got_values = gradients_of(kind, beta=beta, rows=2)(x)
    assert got_values.dtype == jnp.float32
    close(got_values, values, 2e-6)
    for name in STUDENT:
        assert got[name].dtype == x[name].dtype
        close(got[name], gradients[name], 6e-3)


def test_the_teacher_is_a_constant_and_takes_the_student_s_temperature_unless_it_has_its_own():
    inputs = problem(2)
    x = as_dtype(inputs)
    got, values = gradients_of("jsd")(x)
    assert not np.any(got["teacher_hidden"])
    assert not np.any(got["teacher_unembedding"])
    close(values_of("jsd", teacher_temperature=0.7)(x), values, 1e-6)
    assert np.max(np.abs(values - values_of("jsd", teacher_temperature=1.0)(x))) > 0.01


@pytest.mark.parametrize(
    ("kind", "max_tokens"),
    [("forward_kl", None), ("reverse_kl", 4), pytest.param("jsd", 6, marks=pytest.mark.nightly), ("jsd", 2 * N)],
)
def test_masked_tokens_give_zero_and_no_gradient_whatever_stands_there(kind, max_tokens):
    inputs = problem(3)
    values, gradients = truth(inputs, kind, keep=MASK)
    wild = {name: np.where(MASK[:, None] == 0, np.nan, inputs[name]) for name in ("hidden", "teacher_hidden")}
    run = gradients_of(kind, mask=jnp.asarray(MASK), max_tokens=max_tokens, rows=2)
    got, got_values = run(as_dtype(inputs | wild))
    close(got_values, values, 1e-6)
    assert not np.any(np.asarray(got_values)[MASK == 0])
    assert not np.any(np.asarray(got["hidden"])[MASK == 0])
    for name in STUDENT:
        close(got[name], gradients[name], 1e-5)


def test_no_unmasked_token_gives_zeros_and_too_many_give_nan_in_their_places():
    x = as_dtype(problem(3))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients_of("jsd", mask=jnp.zeros(N))(x)))
    values = values_of("jsd", mask=jnp.asarray(MASK), max_tokens=3)(x)
    assert np.flatnonzero(np.isnan(values)).tolist() == [np.flatnonzero(MASK)[3]]
    empty = {name: leaf[:0] if "hidden" in name else leaf for name, leaf in x.items()}
    assert call(empty, "reverse_kl").shape == (0,)


def test_near_its_limits_jsd_is_the_forward_and_the_reverse_kl_as_gkd_says():
    inputs = problem(4) | {"temperature": np.float64(2.0)}
    small = 1e-8
    for kind, beta in (("forward_kl", small), ("reverse_kl", 1 - small)):
        values, gradients = truth(inputs, kind)
        with jax.enable_x64(True):
            found = gradients_of("jsd", beta=beta)(jax.tree.map(jnp.asarray, inputs))
            got, got_values = jax.tree.map(np.asarray, found)
        close(got_values / small, values, 1e-4)
        for name in STUDENT:
            close(got[name] / small, gradients[name], 1e-4)


def test_swapping_the_heads_mirrors_beta_and_the_kinds():
    x = as_dtype(problem(5))
    other = {"hidden": "teacher_hidden", "unembedding": "teacher_unembedding"}
    swapped = x | {a: x[b] for a, b in other.items()} | {b: x[a] for a, b in other.items()}
    close(values_of("jsd", beta=0.3)(x), values_of("jsd", beta=0.7)(swapped), 1e-6)
    close(values_of("forward_kl")(x), values_of("reverse_kl")(swapped), 1e-6)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_equal_heads_differ_by_nothing_and_pull_nowhere(kind, beta):
    inputs = problem(6, teacher_width=D)
    inputs |= {"teacher_hidden": inputs["hidden"], "teacher_unembedding": inputs["unembedding"]}
    got, values = gradients_of(kind, beta=beta)(as_dtype(inputs))
    assert not np.any(values)
    assert not any(np.any(got[name]) for name in STUDENT)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_divergences_of_a_millionth_keep_their_digits_in_float32(kind, beta):
    # The logits of float32 states are exact here (one power of two a row), so that float64 sees the same heads.
    random = np.random.default_rng(7)
    logits = np.round(64 * random.standard_normal((N, V))) / 32
    inputs = {
        "hidden": logits,
        "unembedding": np.eye(V),
        "teacher_hidden": logits + np.round(4 * random.standard_normal((N, V))) / 4096,
        "teacher_unembedding": np.eye(V),
        "temperature": np.float64(1.0),
        "cotangent": np.ones(N),
    }
    values, gradients = truth(inputs, kind, beta)
    assert values.max() < 2e-6
    got, got_values = gradients_of(kind, beta=beta)(as_dtype(inputs))
    np.testing.assert_allclose(got_values, values, rtol=2e-3)
    close(got["hidden"], gradients["hidden"], 2e-3)
    plain_values = plain(
        *(jax.nn.log_softmax(jnp.asarray(inputs[name], jnp.float32)) for name in ("teacher_hidden", "hidden")),
        kind,
        beta,
    )
    assert np.max(np.abs(plain_values / values - 1)) > 2e-2, "the plain formula loses them"


def test_heads_that_exclude_each_other_s_tokens_give_exact_finite_numbers():
    # Student certain of token 0, teacher of token 1; logits 200 apart, beside a common offset of 1e4.
    x = {
        "hidden": jnp.array([[1e4 + 200.0, 1e4]]),
        "teacher_hidden": jnp.array([[1e4, 1e4 + 200.0]]),
        "unembedding": jnp.eye(2),
        "teacher_unembedding": jnp.eye(2),
        "temperature": jnp.float32(1.0),
        "cotangent": jnp.ones(1),
    }
    for kind, expected, slope in (("forward_kl", 200.0, 1.0), ("reverse_kl", 200.0, 0.0), ("jsd", np.log(2), 0.0)):
        got, values = gradients_of(kind)(x)
        np.testing.assert_allclose(values, [expected], rtol=1e-6)
        np.testing.assert_allclose(got["hidden"], [[slope, -slope]], atol=1e-6)


def test_a_teacher_that_is_certain_makes_the_forward_kl_the_negative_log_prob():
    inputs = problem(8, teacher_width=V)
    targets = np.random.default_rng(9).integers(0, V, N)
    inputs |= {"teacher_hidden": np.eye(V)[targets], "teacher_unembedding": 1e3 * np.eye(V)}
    x = as_dtype(inputs)
    logp = token_logprob(x["hidden"], x["unembedding"], jnp.asarray(targets), temperature=x["temperature"]).logp
    np.testing.assert_allclose(values_of("forward_kl")(x), -logp, rtol=1e-6)


def shapes_of(tokens, vocabulary, width):
    names = {
        "hidden": (tokens, width),
        "unembedding": (vocabulary, width),
        "teacher_hidden": (tokens, width),
        "teacher_unembedding": (vocabulary, width),
        "cotangent": (tokens,),
    }
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in names.items()}


def test_a_frozen_unembedding_is_paid_for_with_one_product_beyond_the_values_and_a_trained_one_with_four():
    tokens, vocabulary, width = 1024, 512, 64
    shapes = shapes_of(tokens, vocabulary, width)
    product = 2 * tokens * vocabulary * width

    def total(trained, x):
        x = x | trained
        return jnp.sum(x["cotangent"] * call(x, "jsd", rows=256))

    def cost(*names):
        trained = {name: shapes[name] for name in names}
        return dot_flops(jax.value_and_grad(total), trained, shapes) / product

    assert dot_flops(total, {}, shapes) == 2 * product
    assert cost("hidden") == 3
    assert cost("unembedding") == 5
    assert cost("hidden", "unembedding") == 6
    assert cost("teacher_unembedding") == 2


def test_tokens_by_vocabulary_are_never_held():
    tokens, vocabulary, width = 1024, 1500, 16

    def total(student, x):
        return jnp.sum(x["cotangent"] * call(x | student, "jsd", rows=16))

    shapes = shapes_of(tokens, vocabulary, width)
    student = {name: shapes[name] for name in ("hidden", "unembedding")}
    compiled = jax.jit(jax.value_and_grad(total)).lower(student, shapes).compile()
    assert largest_array(compiled) <= 2 * vocabulary * 16
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * tokens * vocabulary / 8


# 50 tokens and a vocabulary of 37 are split by no mesh axis without remainder, nor is a width of 6 over 4.
@pytest.mark.parametrize(
    ("sizes", "tokens", "vocabulary", "kind"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, 50, 48, "jsd"),
        ({"fsdp": 2, "tensor": 2, "sequence": 2}, 50, 48, "reverse_kl"),
        ({"fsdp": 4, "tensor": 2}, 50, 37, "forward_kl"),
    ],
)
def test_eight_devices_agree_with_one(sizes, tokens, vocabulary, kind):
    x = as_dtype(problem(10, tokens, vocabulary, 16, 6))
    mask = jnp.asarray(np.random.default_rng(11).random(tokens) < 0.7)
    keywords = {"mask": mask, "max_tokens": tokens - 4, "softcap": 5.0, "rows": 4}
    expected = gradients_of(kind, **keywords)(x)
    with jax.set_mesh(make_mesh(**sizes)):
        got = gradients_of(kind, **keywords)(x)
    assert len(got[1].sharding.device_set) == 8
    for one, eight in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        close(eight, one, 1e-5)


@pytest.mark.nightly  # on every commit that of `token_loss` is, test_token_loss_cost
def test_on_a_pod_devices_trade_columns_for_rows_and_none_has_all_of_an_unembedding():
    tokens, width, vocabulary = 16384, 1024, 151936  # four chunks of tokens
    with pod("v5e:2x4", fsdp=4, tensor=2) as mesh:

        def struct(shape, *names):
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*names)))

        heads = (struct((tokens, width), "fsdp", None), struct((vocabulary, width), "tensor", "fsdp")) * 2

        def total(*heads):
            return jnp.sum(token_divergence(*heads, kind="reverse_kl"))

        lowered = jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(*heads)
        compiled = lowered.compile()
    assert lowered.as_text().count("stablehlo.all_to_all") == 5  # both, forward and backward, and the gradient
    assert f"[{vocabulary // 2},{width}]" not in compiled.as_text()
    found = collectives(compiled)
    outside = [(c.operation, math.prod(c.shapes[0])) for c in found if not c.in_loop]
    moved = vocabulary // 2 * width // 4
    assert {("all-reduce", 1), ("all-to-all", moved)} == set(outside)
    assert 3 <= outside.count(("all-to-all", moved)) <= 5  # the compiler may trade once for both passes
    assert max(math.prod(shape) for c in found if c.in_loop for shape in c.shapes) <= 4128 * width
    assert compiled.memory_analysis().temp_size_in_bytes < 0.75 * 2**30


def test_wrong_arguments_are_refused_with_what_was_expected():
    x = as_dtype(problem())
    with pytest.raises(ValueError, match=r"hidden must be \[N, D\] and unembedding \[V, D\], got shapes \(11, 7\)"):
        call(x | {"hidden": x["hidden"][:, 1:]}, "jsd")
    with pytest.raises(ValueError, match=r"teacher_hidden must be \[N, D\] and teacher_unembedding"):
        call(x | {"teacher_hidden": x["hidden"]}, "jsd")
    with pytest.raises(ValueError, match="of the same N tokens, got 11 and 10"):
        call(x | {"teacher_hidden": x["teacher_hidden"][1:]}, "jsd")
    with pytest.raises(ValueError, match="of the same V tokens, got 37 and 36; cut off rows of padding"):
        call(x | {"teacher_unembedding": x["teacher_unembedding"][1:]}, "jsd")
    with pytest.raises(ValueError, match="kind must be one of forward_kl, reverse_kl, jsd, got 'kl'"):
        call(x, "kl")
    with pytest.raises(ValueError, match="beta is for kind='jsd', not 'forward_kl'"):
        call(x, "forward_kl", beta=0.5)
    for beta in (0.0, 1.0):
        with pytest.raises(ValueError, match="use kind='forward_kl' or 'reverse_kl'"):
            call(x, "jsd", beta=beta)
    with pytest.raises(ValueError, match=r"mask must be \[N\] = \[11\], got shape \(10,\)"):
        call(x, "jsd", mask=jnp.ones(10))
    with pytest.raises(ValueError, match="needs a mask"):
        call(x, "jsd", max_tokens=3)

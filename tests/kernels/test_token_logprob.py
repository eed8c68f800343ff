"""`kernels.token_logprob` against float64 numpy, in any number of chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.kernels import token_logprob
from jaxrl_post.kernels.token_logprob import chunked
from jaxrl_post.kernels.token_logprob.reference import OUTPUTS, token_logprob_reference

REAL = tuple(name for name in OUTPUTS if name != "argmax")
INPUTS = ("hidden", "unembedding", "bias", "temperature")
N, V, D = 11, 37, 8  # chunks of 3, 4 and 5 tokens leave a remainder


def in_chunks(columns, rows=N):
    """The chunked implementation, on so many columns of the vocabulary at a time."""
    return functools.partial(token_logprob, implementation="chunked", chunk_bytes=4 * columns * rows)


IMPLEMENTATIONS = {
    "reference": token_logprob_reference,
    "one chunk": in_chunks(V),
    "3 chunks": in_chunks(16),
    "4 chunks": in_chunks(8),
    "a column a chunk": in_chunks(1),
}


def problem(seed=0, scale=1.0):
    """Inputs whose logits have a standard deviation near 2, as float64."""
    random = np.random.default_rng(seed)
    return {
        "hidden": scale * random.standard_normal((N, D)),
        "unembedding": 0.6 * random.standard_normal((V, D)),
        "bias": 0.5 * random.standard_normal(V),
        "temperature": np.float64(0.7),
    }, random.integers(0, V, N)


def float64_truth(inputs, targets, softcap, cotangents=None):
    """All outputs, and the gradients for given cotangents, in float64 by formula."""
    hidden, weight, bias, temperature = (np.asarray(inputs[name], np.float64) for name in INPUTS)
    raw = hidden @ weight.T + bias
    capped = raw if softcap is None else softcap * np.tanh(raw / softcap)
    z = capped / temperature
    top = z.max(-1, keepdims=True)
    lse = top + np.log(np.exp(z - top).sum(-1, keepdims=True))
    log_p = z - lse
    p = np.exp(log_p)
    rows, best = np.arange(len(z)), z.argmax(-1)
    out = {
        "logp": log_p[rows, targets],
        "entropy": -(p * log_p).sum(-1),
        "logsumexp": lse[:, 0],
        "argmax": best,
        "max_prob": p.max(-1),
        "mean_logp": log_p.mean(-1),
        "sum_p_squared": (p * p).sum(-1),
    }
    if cotangents is None:
        return out
    one_hot, at_best = np.eye(z.shape[1])[targets], np.eye(z.shape[1])[best]
    slopes = {
        "logp": one_hot - p,
        "entropy": -p * (log_p + out["entropy"][:, None]),
        "logsumexp": p,
        "max_prob": out["max_prob"][:, None] * (at_best - p),
        "mean_logp": 1 / z.shape[1] - p,
        "sum_p_squared": 2 * p * (p - out["sum_p_squared"][:, None]),
    }
    d_z = sum(cotangents[name][:, None] * slope for name, slope in slopes.items() if name in cotangents)
    d_raw = d_z / temperature * (1.0 if softcap is None else 1 - np.tanh(raw / softcap) ** 2)
    return out, {
        "hidden": d_raw @ weight,
        "unembedding": d_raw.T @ hidden,
        "bias": d_raw.sum(0),
        "temperature": -(d_z * z).sum() / temperature,
    }


def as_dtype(inputs, dtype=jnp.float32):
    return {name: jnp.asarray(x, jnp.float32 if name == "temperature" else dtype) for name, x in inputs.items()}


def call(function, inputs, targets, **keywords):
    return function(
        inputs["hidden"],
        inputs["unembedding"],
        jnp.asarray(targets),
        bias=inputs["bias"],
        temperature=inputs["temperature"],
        **keywords,
    )


def close(actual, expected, tolerance):
    """Within `tolerance` of the largest expected value."""
    expected = np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize(
    ("name", "softcap"),
    [
        ("reference", None),
        ("reference", 3.0),
        ("one chunk", None),
        ("3 chunks", 3.0),
        ("4 chunks", None),
        ("a column a chunk", 3.0),
    ],
)
def test_values_and_gradients_for_any_cotangent_of_every_output_equal_float64(name, softcap):
    inputs, targets = problem()
    random = np.random.default_rng(1)
    cotangents = {output: random.standard_normal(N) for output in REAL}
    values, gradients = float64_truth(inputs, targets, softcap, cotangents)

    @jax.jit
    def run(inputs):
        def loss(inputs):
            out = call(IMPLEMENTATIONS[name], inputs, targets, softcap=softcap, outputs=OUTPUTS)
            return sum(jnp.sum(cotangents[output] * getattr(out, output)) for output in REAL), out

        return jax.grad(loss, has_aux=True)(inputs)

    got, out = run(as_dtype(inputs))
    for output in OUTPUTS:
        close(getattr(out, output), values[output], 3e-6)
    for argument in INPUTS:
        close(got[argument], gradients[argument], 1e-5)


@pytest.mark.parametrize("output", REAL)
def test_each_output_alone_has_the_gradient_it_has_in_company(output):
    inputs, targets = problem(2)
    cotangents = {output: np.random.default_rng(3).standard_normal(N)}
    _, gradients = float64_truth(inputs, targets, None, cotangents)

    def loss(inputs):
        out = call(IMPLEMENTATIONS["4 chunks"], inputs, targets, outputs=(output,))
        assert [name for name, field in out._asdict().items() if field is not None] == [output]
        return jnp.sum(cotangents[output] * getattr(out, output))

    got = jax.jit(jax.grad(loss))(as_dtype(inputs))
    for argument in INPUTS:
        close(got[argument], gradients[argument], 1e-5)


def test_float64_stays_float64():
    inputs, targets = problem()
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(x) for name, x in inputs.items()}

        @jax.jit
        def run(x):
            out, pullback = jax.vjp(lambda x: call(IMPLEMENTATIONS["3 chunks"], x, targets).logp, x)
            return out, pullback(jnp.ones(N))[0]

        out, got = run(wide)
    values, gradients = float64_truth(inputs, targets, None, {"logp": np.ones(N)})
    np.testing.assert_allclose(out, values["logp"], rtol=1e-13)
    for argument in INPUTS:
        np.testing.assert_allclose(got[argument], gradients[argument], rtol=1e-11, atol=1e-13)


def test_bfloat16_inputs_are_summed_in_float32():
    inputs, targets = problem(4)
    half = as_dtype(inputs, jnp.bfloat16)
    exact = {name: np.asarray(x, np.float64) for name, x in half.items()}
    values = float64_truth(exact, targets, None)
    out = jax.jit(lambda x: call(IMPLEMENTATIONS["4 chunks"], x, targets, outputs=OUTPUTS))(half)
    for output in REAL:
        assert getattr(out, output).dtype == jnp.float32
        close(getattr(out, output), values[output], 3e-6)


def test_the_gradient_of_a_bfloat16_unembedding_is_rounded_once_and_not_at_every_share(monkeypatch):
    # Logits are zero and two tokens equally likely, so that the logits' gradients are +-50, exact in bfloat16. Tokens
    # come in pairs whose shares cancel to one part in 64: rounding sums of shares would leave errors of that size.
    monkeypatch.setattr(chunked, "MAX_ROWS", 1)
    random = np.random.default_rng(5)
    hidden = random.integers(-3, 4, (64, D)) / 2  # exact in bfloat16, the next line too
    hidden[32:] = hidden[:32] * (1 + 2**-6)
    cotangents = np.repeat([100.0, -100.0], 32)

    def loss(unembedding):
        state = jnp.asarray(hidden, jnp.bfloat16)
        out = token_logprob(state, unembedding, jnp.zeros(64, jnp.int32), implementation="chunked")
        return jnp.sum(cotangents * out.logp)

    got = jax.jit(jax.grad(loss))(jnp.zeros((2, D), jnp.bfloat16))
    expected = 0.5 * cotangents @ hidden
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), [expected, -expected], rtol=2.0**-8)


@pytest.mark.parametrize("name", ["reference", "3 chunks"])
def test_a_common_offset_of_ten_thousand_costs_no_digits(name):
    # Logits are multiples of 1/64, which float32 holds exactly beside 1e4 (its spacing there is 1/1024).
    random = np.random.default_rng(6)
    logits = np.round(2 * random.standard_normal((N, V)) * 64) / 64
    targets = random.integers(0, V, N)
    hidden, bias = jnp.asarray(logits, jnp.float32), jnp.full(V, 1e4, jnp.float32)
    weight = jnp.eye(V, dtype=jnp.float32)
    truth = float64_truth(
        {"hidden": logits, "unembedding": np.eye(V), "bias": np.full(V, 1e4), "temperature": 1.0}, targets, None
    )
    run = jax.jit(functools.partial(IMPLEMENTATIONS[name], outputs=OUTPUTS))
    out = run(hidden, weight, jnp.asarray(targets), bias=bias)
    for output in ("logp", "entropy", "mean_logp", "max_prob", "sum_p_squared"):
        np.testing.assert_allclose(getattr(out, output), truth[output], rtol=1e-6, atol=2e-6)


def test_a_certain_target_gives_zero_and_a_hopeless_one_its_exact_log_probability():
    # Logits 0 and 60: p of the first token is exp(-60), its log-prob exactly -60 in float32.
    def run(hidden):
        weight, targets = jnp.array([[0.0], [60.0]]), jnp.array([1, 0])
        out = token_logprob(hidden, weight, targets, outputs=("logp", "entropy"))
        return jnp.sum(out.logp + out.entropy), out

    gradient, out = jax.jit(jax.grad(run, has_aux=True))(jnp.ones((2, 1)))
    assert out.logp.tolist() == [0.0, -60.0]
    assert np.all(np.asarray(out.entropy) >= 0)
    assert np.all(np.asarray(out.entropy) < 1e-20)
    assert gradient[:, 0].tolist() == [0.0, -60.0]  # (1 - p) * z_target - (1 - p) * z_other, and p = 0 or 1


@pytest.mark.parametrize("name", ["reference", "3 chunks"])
def test_a_bias_of_minus_infinity_forbids_a_token_without_a_nan(name):
    inputs, targets = problem(7)
    targets = targets % (V - 1)
    smaller = {**inputs, "unembedding": inputs["unembedding"][:-1], "bias": inputs["bias"][:-1]}
    cotangents = {"logp": np.ones(N), "entropy": np.ones(N)}
    values, gradients = float64_truth(smaller, targets, None, cotangents)
    forbidden = as_dtype({**inputs, "bias": np.append(inputs["bias"][:-1], -np.inf)})

    def loss(hidden, unembedding):
        out = IMPLEMENTATIONS[name](
            hidden,
            unembedding,
            jnp.asarray(targets),
            bias=forbidden["bias"],
            temperature=forbidden["temperature"],
            outputs=("logp", "entropy"),
        )
        return jnp.sum(out.logp + out.entropy), out

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    got, out = run(forbidden["hidden"], forbidden["unembedding"])
    close(out.entropy, values["entropy"], 3e-6)
    close(got[0], gradients["hidden"], 1e-5)
    close(got[1][:-1], gradients["unembedding"], 1e-5)
    assert not np.any(got[1][-1])


MASK = np.array([0, 1, 1, 0, 0, 0, 1, 0, 1, 0, 0], np.float32)


@pytest.mark.parametrize(
    ("max_tokens", "implementation"),
    [(None, "reference"), (6, "reference"), (None, "chunked"), (4, "chunked"), (6, "chunked"), (2 * N, "chunked")],
)
def test_masked_tokens_give_zero_and_no_gradient_with_or_without_compaction(max_tokens, implementation):
    inputs, targets = problem(8)
    weights = {output: np.random.default_rng(9).standard_normal(N) for output in REAL}
    values, gradients = float64_truth(inputs, targets, None, {name: w * MASK for name, w in weights.items()})
    # What stands at a masked token is anything: an id out of range, a state that is not a number.
    wild = as_dtype({**inputs, "hidden": np.where(MASK[:, None] > 0, inputs["hidden"], np.nan)})
    targets = np.where(MASK > 0, targets, -100)

    @jax.jit
    def run(x):
        def loss(x):
            out = call(
                token_logprob,
                x,
                targets,
                mask=jnp.asarray(MASK),
                max_tokens=max_tokens,
                outputs=OUTPUTS,
                implementation=implementation,
            )
            return sum(jnp.sum(weights[output] * getattr(out, output)) for output in REAL), out

        return jax.grad(loss, has_aux=True)(x)

    got, out = run(wild)
    for output in OUTPUTS:
        close(getattr(out, output), values[output] * MASK, 3e-6)
    assert not np.any(np.asarray(got["hidden"])[MASK == 0])
    for argument in INPUTS:
        close(got[argument], gradients[argument], 1e-5)


def test_more_tokens_than_max_tokens_are_not_a_number_and_the_others_are_right():
    inputs, targets = problem(8)
    whole = float64_truth(inputs, targets, None)["logp"]
    run = functools.partial(token_logprob, max_tokens=3, outputs=("logp", "argmax"))
    out = jax.jit(lambda x: call(run, x, targets, mask=jnp.asarray(MASK)))(as_dtype(inputs))
    first, surplus = np.flatnonzero(MASK)[:3], np.flatnonzero(MASK)[3:]
    close(np.asarray(out.logp)[first], whole[first], 3e-6)
    assert np.all(np.isnan(np.asarray(out.logp)[surplus]))
    assert np.asarray(out.argmax)[surplus].tolist() == [-1]
    assert not np.any(np.asarray(out.logp)[MASK == 0])


@pytest.mark.parametrize("max_tokens", [None, 1])
def test_when_all_is_masked_everything_is_zero(max_tokens):
    inputs, targets = problem(10)

    def loss(x):
        out = call(
            token_logprob,
            x,
            targets,
            mask=jnp.zeros(N),
            max_tokens=max_tokens,
            outputs=OUTPUTS,
            implementation="chunked",
        )
        return sum(jnp.sum(getattr(out, output)) for output in REAL), out

    got, out = jax.jit(jax.grad(loss, has_aux=True))(as_dtype(inputs))
    assert not any(np.any(x) for x in jax.tree.leaves((got, out)))


def test_wrong_arguments_are_refused_with_what_was_expected():
    inputs, targets = problem()
    x = as_dtype(inputs)
    run = functools.partial(call, token_logprob)
    with pytest.raises(ValueError, match=r"\[N, D\] and unembedding \[V, D\], got shapes \(11, 8\) and \(37, 7\)"):
        run({**x, "unembedding": x["unembedding"][:, 1:]}, targets)
    with pytest.raises(ValueError, match=r"got shapes \(8,\)"):
        run({**x, "hidden": x["hidden"][0]}, targets)
    with pytest.raises(ValueError, match=r"targets must be \[N\] = \[11\], got shape \(10,\)"):
        run(x, targets[1:])
    with pytest.raises(ValueError, match=r"mask must be \[N\] = \[11\], got shape \(1, 11\)"):
        run(x, targets, mask=jnp.ones((1, N)))
    with pytest.raises(ValueError, match=r"bias must be \[V\] = \[37\], got shape \(1,\)"):
        run({**x, "bias": jnp.zeros(1)}, targets)
    with pytest.raises(ValueError, match=r"unknown outputs \['perplexity'\]; there are \['logp'"):
        run(x, targets, outputs=("logp", "perplexity"))
    with pytest.raises(ValueError, match="a tuple of names, got the string 'logp'"):
        run(x, targets, outputs="logp")
    with pytest.raises(ValueError, match="targets must be integers, got float32"):
        run(x, targets.astype(np.float32))
    with pytest.raises(ValueError, match=r"temperature must be a scalar, got shape \(11,\)"):
        run({**x, "temperature": jnp.ones(N)}, targets)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        run({**x, "temperature": 0}, targets)
    with pytest.raises(ValueError, match="softcap must be None or a positive number known when traced"):
        jax.jit(lambda cap: run(x, targets, softcap=cap))(30.0)
    with pytest.raises(ValueError, match="needs a mask"):
        run(x, targets, max_tokens=3)
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        run(x, targets, mask=jnp.ones(N), max_tokens=0)
    with pytest.raises(
        ValueError, match=r"unknown implementation 'pallas'; there are \['chunked', 'pallas_tpu', 'reference'\]"
    ):
        run(x, targets, implementation="pallas")


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32])
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_targets_may_be_of_any_integer_type_even_one_that_cannot_hold_the_vocabularys_size(implementation, dtype):
    hidden, unembedding = jnp.ones((3, 4)), jnp.linspace(0.0, 1.0, 4 * 256).reshape(256, 4)
    out = token_logprob(hidden, unembedding, np.array([0, 7, 255], dtype), implementation=implementation)
    np.testing.assert_allclose(out.logp, jax.nn.log_softmax(hidden @ unembedding.T)[:, [0, 7, 255]][0], rtol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_a_target_that_is_no_token_has_no_log_prob(implementation):
    inputs, targets = problem()
    targets[[2, 5]] = -1, V
    run = functools.partial(token_logprob, implementation=implementation, outputs=("logp", "entropy"))
    out = jax.jit(lambda x: call(run, x, targets))(as_dtype(inputs))
    assert np.flatnonzero(np.isnan(out.logp)).tolist() == [2, 5]
    assert np.all(np.isfinite(out.entropy))


def test_outside_jit_a_target_that_is_no_token_is_an_error_that_names_it():
    inputs, targets = problem()
    targets[3] = V
    x = as_dtype(inputs)
    with pytest.raises(ValueError, match=rf"targets must be in \[0, {V}\), got {V} at 3; mask tokens"):
        call(token_logprob, x, targets)
    mask = (np.arange(N) != 3).astype(np.float32)
    assert np.all(np.isfinite(call(token_logprob, x, targets, mask=jnp.asarray(mask)).logp))


def test_the_gradient_of_the_temperature_keeps_its_digits_beside_an_offset_of_ten_thousand():
    # Logits are multiples of 1/64, exact beside 1e4. All outputs but logsumexp are blind to the offset.
    random = np.random.default_rng(6)
    logits = np.round(2 * random.standard_normal((N, V)) * 64) / 64
    targets = random.integers(0, V, N)
    cotangents = {name: random.standard_normal(N) for name in ("logp", "entropy")}
    plain = {"hidden": logits, "unembedding": np.eye(V), "bias": np.zeros(V), "temperature": 1.0}
    _, gradients = float64_truth(plain, targets, None, cotangents)

    def loss(temperature):
        out = in_chunks(8)(
            jnp.asarray(logits, jnp.float32),
            jnp.eye(V),
            jnp.asarray(targets),
            bias=jnp.full(V, 1e4),
            temperature=temperature,
            outputs=("logp", "entropy"),
        )
        return sum(jnp.sum(c * getattr(out, name)) for name, c in cotangents.items())

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(jnp.float32(1.0)), gradients["temperature"], rtol=1e-5)


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_second_derivatives_are_those_of_the_plain_entropy(implementation):
    draw = jax.random.split(jax.random.key(0), 2)
    hidden, weight = jax.random.normal(draw[0], (5, 4)), jax.random.normal(draw[1], (11, 4))

    def entropy(hidden, temperature):
        out = token_logprob(
            hidden, weight, jnp.arange(5), temperature=temperature, outputs=("entropy",), implementation=implementation
        )
        return jnp.sum(out.entropy)

    def plain(hidden, temperature):
        logits = hidden @ weight.T / temperature
        return jnp.sum(jax.scipy.special.entr(jax.nn.softmax(logits)))

    def second(function):
        squared = jax.grad(lambda hidden: jnp.sum(jax.grad(function)(hidden, 0.7) ** 2))(hidden)
        return squared, jax.grad(jax.grad(function, 1), 1)(hidden, 0.7)

    for found, expected in zip(jax.jit(second, static_argnums=0)(entropy), second(plain), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def test_no_tokens_give_no_numbers():
    inputs, targets = problem()
    x = {**as_dtype(inputs), "hidden": jnp.zeros((0, D))}
    for implementation in ("reference", "chunked"):
        assert call(token_logprob, x, targets[:0], implementation=implementation).logp.shape == (0,)

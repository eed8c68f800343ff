"""`token_loss` against the plain loss in float64, on one device and eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses
from jaxrl_post.kernels import token_logprob
from jaxrl_post.kernels.token_logprob.reference import OUTPUTS, TokenLogprob
from jaxrl_post.kernels.token_logprob.token_loss import token_loss
from jaxrl_post.mesh import make_mesh
from tests import optimized
from tests.kernels.test_independence import INDEPENDENT

N, V, D = 11, 37, 8  # chunks of 2 and 4 tokens leave a remainder
INPUTS = ("hidden", "unembedding", "bias", "temperature", "weights")
MASK = np.array([0, 1, 1, 0, 0, 0, 1, 0, 1, 0, 0], np.float32)


def problem(seed=0):
    random = np.random.default_rng(seed)
    inputs = {
        "hidden": random.standard_normal((N, D)),
        "unembedding": 0.6 * random.standard_normal((V, D)),
        "bias": 0.5 * random.standard_normal(V),
        "temperature": np.float64(0.7),
        "weights": random.standard_normal((N, 2)),  # differentiated too
    }
    fixed = {
        "targets": random.integers(0, V, N).astype(np.int32),
        "old": -3.0 * random.random(N),
        "advantages": random.standard_normal(N),
        "step": random.integers(0, 3, N).astype(np.int32),
    }
    return inputs, fixed


def loss_fn(stats, aux):
    """Every statistic, in a way that is linear in none."""
    policy = losses.ppo(stats.logp, aux["old"], aux["advantages"]) + 0.1 * losses.kl(stats.logp, aux["old"], "k3")
    rest = stats.max_prob**2 + jnp.sqrt(stats.sum_p_squared) + 0.1 * stats.mean_logp + 1e-2 * stats.logsumexp**2
    late = jnp.where(aux["step"] > 1, 0.5, 1.0) + 0.0 * stats.argmax
    return late * (aux["weights"][:, 0] * policy - aux["weights"][:, 1] * jnp.tanh(stats.entropy) + rest)


def plain_stats(x, targets, softcap=None):
    raw = x["hidden"] @ x["unembedding"].T + x["bias"]
    z = (raw if softcap is None else softcap * jnp.tanh(raw / softcap)) / x["temperature"]
    log_p = jax.nn.log_softmax(z)
    p = jnp.exp(log_p)
    logp = log_p[jnp.arange(len(targets)), targets]
    columns = (logp, -(p * log_p).sum(-1), jax.nn.logsumexp(z, -1), z.argmax(-1), p.max(-1), log_p.mean(-1))
    return TokenLogprob(*columns, (p * p).sum(-1))


def truth(inputs, fixed, softcap=None, keep=None, scale=1.0):
    """Total, statistics and gradients of the plain loss in float64, over the tokens to keep."""
    keep = np.ones(N) if keep is None else keep

    def total(x):
        stats = plain_stats(x, fixed["targets"], softcap)
        return scale * jnp.sum(keep * loss_fn(stats, {**fixed, "weights": x["weights"]})), stats

    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(total, has_aux=True))
        (value, stats), gradients = run(jax.tree.map(jnp.asarray, inputs))
        return jax.tree.map(np.asarray, (value, stats, gradients))


def as_dtype(inputs, dtype=jnp.float32):
    narrow = {"hidden", "unembedding", "bias"}
    return {name: jnp.asarray(x, dtype if name in narrow else jnp.float32) for name, x in inputs.items()}


def run(x, fixed, *, function=loss_fn, scale=1.0, rows=None, **keywords):
    aux = {**{name: fixed[name] for name in ("old", "advantages", "step")}, "weights": x["weights"]}
    keywords = {"outputs": OUTPUTS, "bias": x["bias"], "temperature": x["temperature"]} | keywords
    if rows is not None:
        keywords["chunk_bytes"] = 4 * V * rows
    total, stats = token_loss(x["hidden"], x["unembedding"], jnp.asarray(fixed["targets"]), aux, function, **keywords)
    return scale * total, stats


def close(actual, expected, tolerance):
    """Within `tolerance` of the largest expected value."""
    expected = np.asarray(expected, np.float64)
    actual = np.asarray(actual, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(1e-30, np.abs(expected).max()))


@pytest.mark.parametrize(
    ("rows", "softcap", "scale"),
    [(None, None, 1.0), pytest.param(1, None, -2.0, marks=pytest.mark.nightly), (4, 3.0, 0.25)],
)
def test_value_and_every_gradient_agree_with_the_plain_loss_in_float64(rows, softcap, scale):
    inputs, fixed = problem()
    value, stats, gradients = truth(inputs, fixed, softcap, scale=scale)
    gradient = jax.value_and_grad(
        functools.partial(run, fixed=fixed, rows=rows, softcap=softcap, scale=scale), has_aux=True
    )
    (got, got_stats), got_gradients = optimized.jit(gradient)(as_dtype(inputs))
    close(got, value, 1e-6)
    for name in OUTPUTS:
        close(getattr(got_stats, name), getattr(stats, name), 1e-6)
    for name in INPUTS:
        close(got_gradients[name], gradients[name], 1e-5)


def test_bfloat16_inputs_give_float32_values_and_gradients_within_their_rounding():
    inputs, fixed = problem(1)
    x = as_dtype(inputs, jnp.bfloat16)
    rounded = {name: np.asarray(leaf, np.float64) for name, leaf in x.items()}
    value, stats, gradients = truth(rounded, fixed, 3.0)
    gradient = jax.jit(jax.value_and_grad(functools.partial(run, fixed=fixed, rows=4, softcap=3.0), has_aux=True))
    (got, got_stats), got_gradients = gradient(x)
    assert got.dtype == got_stats.logp.dtype == jnp.float32
    close(got, value, 1e-5)
    close(got_stats.logp, stats.logp, 1e-6)
    for name in INPUTS:
        assert got_gradients[name].dtype == x[name].dtype
        close(got_gradients[name], gradients[name], 6e-3)


def test_the_gradient_of_a_bfloat16_unembedding_is_rounded_once_and_not_at_every_chunk():
    # Logits are zero and two tokens equally likely, so that the logits' gradients are +-50, exact in bfloat16. Tokens
    # come in pairs whose shares cancel to one part in 64: rounding the sum after every chunk would leave that much.
    random = np.random.default_rng(5)
    hidden = random.integers(-3, 4, (64, D)) / 2
    hidden[32:] = hidden[:32] * (1 + 2**-6)
    weights = np.repeat([100.0, -100.0], 32).astype(np.float32)

    def total(unembedding):
        state = jnp.asarray(hidden, jnp.bfloat16)
        args = state, unembedding, jnp.zeros(64, jnp.int32), weights, lambda stats, weights: weights * stats.logp
        return token_loss(*args, chunk_bytes=4 * 2)[0]

    got = jax.jit(jax.grad(total))(jnp.zeros((2, D), jnp.bfloat16))
    expected = 0.5 * weights @ hidden
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), [expected, -expected], rtol=2.0**-8)


@pytest.mark.parametrize("max_tokens", [None, 4, 2 * N])
def test_masked_tokens_do_not_count_whatever_stands_there(max_tokens):
    inputs, fixed = problem(2)
    value, stats, gradients = truth(inputs, fixed, keep=MASK)
    hole = MASK == 0
    wild = {
        **inputs,
        "hidden": np.where(hole[:, None], np.nan, inputs["hidden"]),
        "weights": np.where(hole[:, None], np.inf, inputs["weights"]),
    }
    fixed = {**fixed, "targets": np.where(hole, -100, fixed["targets"]), "old": np.where(hole, np.nan, fixed["old"])}
    gradient = functools.partial(run, fixed=fixed, rows=2, mask=jnp.asarray(MASK), max_tokens=max_tokens)
    (got, got_stats), got_gradients = jax.jit(jax.value_and_grad(gradient, has_aux=True))(as_dtype(wild))
    close(got, value, 1e-6)
    for name in OUTPUTS:
        close(getattr(got_stats, name), MASK * getattr(stats, name), 1e-6)
    for name in INPUTS:
        close(got_gradients[name], gradients[name], 1e-5)
    assert not np.any(np.asarray(got_gradients["hidden"])[hole])
    assert not np.any(np.asarray(got_gradients["weights"])[hole])


def test_more_unmasked_tokens_than_max_tokens_make_the_total_and_its_gradients_not_a_number():
    inputs, fixed = problem(2)
    gradient = functools.partial(run, fixed=fixed, mask=jnp.asarray(MASK), max_tokens=3)
    (got, stats), gradients = jax.jit(jax.value_and_grad(gradient, has_aux=True))(as_dtype(inputs))
    assert np.isnan(got)
    assert np.all(np.isnan(gradients["unembedding"]))
    assert np.flatnonzero(np.isnan(stats.logp)).tolist() == [np.flatnonzero(MASK)[3]]
    assert stats.argmax[np.flatnonzero(MASK)[3]] == -1


@pytest.mark.parametrize("max_tokens", [None, 1])
def test_when_all_is_masked_everything_is_zero(max_tokens):
    inputs, fixed = problem(3)
    gradient = functools.partial(run, fixed=fixed, mask=jnp.zeros(N), max_tokens=max_tokens)
    found = jax.jit(jax.value_and_grad(gradient, has_aux=True))(as_dtype(inputs))
    assert not any(np.any(x) for x in jax.tree.leaves(found))


def test_no_tokens_give_zero_and_a_target_that_is_no_token_has_no_loss():
    weight = jnp.ones((V, D))
    total, stats = token_loss(jnp.zeros((0, D)), weight, jnp.zeros(0, int), jnp.zeros(0), lambda s, a: a * s.logp)
    assert total == 0
    assert stats.logp.shape == (0,)
    assert stats.entropy is None
    targets = jnp.array([1, V, -1])
    with pytest.raises(ValueError, match=rf"targets must be in \[0, {V}\), got {V} at 1"):
        token_loss(jnp.ones((3, D)), weight, targets, None, lambda s, _: s.logp)
    run = jax.jit(lambda targets: token_loss(jnp.ones((3, D)), weight, targets, None, lambda s, _: s.logp))
    total, stats = run(targets)
    assert np.isnan(total)
    assert np.isnan(stats.logp).tolist() == [False, True, True]


def test_it_agrees_with_differentiating_through_token_logprob():
    inputs, fixed = problem(4)
    x = as_dtype(inputs)

    def through_log_probs(x):
        keywords = {"outputs": ("logp", "entropy"), "bias": x["bias"], "implementation": "chunked"}
        targets = jnp.asarray(fixed["targets"])
        stats = token_logprob(x["hidden"], x["unembedding"], targets, temperature=x["temperature"], **keywords)
        return jnp.sum(ppo_with_entropy(stats, {**fixed, "weights": x["weights"]}))

    def ppo_with_entropy(stats, aux):
        return losses.ppo(stats.logp, aux["old"], aux["advantages"]) - aux["weights"][:, 0] * stats.entropy

    value, gradients = jax.jit(jax.value_and_grad(through_log_probs))(x)
    one_pass = functools.partial(run, fixed=fixed, function=ppo_with_entropy, outputs=("logp", "entropy"), rows=4)
    (got, _), got_gradients = jax.jit(jax.value_and_grad(one_pass, has_aux=True))(x)
    np.testing.assert_allclose(got, value, rtol=1e-6)
    for name in INPUTS:
        close(got_gradients[name], gradients[name], 5e-6)


def test_no_gradient_flows_through_the_statistics():
    inputs, fixed = problem(4)

    def total(x, weight):
        value, stats = run(x, fixed)
        return value + weight * jnp.sum(stats.logp + stats.entropy)

    gradient = jax.jit(jax.grad(total))
    with_metrics, without = gradient(as_dtype(inputs), 10.0), gradient(as_dtype(inputs), 0.0)
    for name in INPUTS:
        np.testing.assert_array_equal(with_metrics[name], without[name])
    only_metrics = jax.jit(jax.grad(lambda x: jnp.sum(run(x, fixed)[1].logp)))(as_dtype(inputs))
    assert not any(np.any(x) for x in jax.tree.leaves(only_metrics))


# 50 tokens and a vocabulary of 37 are split by no mesh axis without remainder.
@pytest.mark.parametrize(
    ("sizes", "tokens", "vocabulary"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, 50, 48),
        ({"fsdp": 2, "tensor": 2, "sequence": 2}, 50, 48),
        ({"fsdp": 4, "tensor": 2}, 50, 37),
    ],
)
def test_eight_devices_agree_with_one(sizes, tokens, vocabulary):
    random = np.random.default_rng(11)
    width = 16
    hidden = random.standard_normal((tokens, width)).astype(np.float32)
    unembedding = (0.5 * random.standard_normal((vocabulary, width))).astype(np.float32)
    aux = {
        "old": -3 * random.random(tokens).astype(np.float32),
        "advantages": random.standard_normal(tokens).astype(np.float32),
        "step": random.integers(0, 3, tokens).astype(np.int32),
    }
    targets, mask = random.integers(0, vocabulary, tokens).astype(np.int32), random.random(tokens) < 0.7

    def total(hidden, unembedding, bias, temperature, weights, clip):
        def closing_over(stats, aux):
            return jnp.minimum(loss_fn(stats, aux), clip)  # a traced number that is the same for all tokens

        return token_loss(
            hidden,
            unembedding,
            targets,
            {**aux, "weights": weights},
            closing_over,
            mask=mask,
            max_tokens=tokens - 4,
            bias=bias,
            temperature=temperature,
            outputs=OUTPUTS,
            chunk_bytes=4 * 48 * 4,
        )

    inputs = (
        hidden,
        unembedding,
        random.standard_normal(vocabulary).astype(np.float32),
        np.float32(0.8),
        random.standard_normal((tokens, 2)).astype(np.float32),
        np.float32(2.0),
    )
    gradient = jax.value_and_grad(total, argnums=(0, 1, 2, 3, 4), has_aux=True)
    expected = jax.jit(gradient)(*inputs)
    with jax.set_mesh(make_mesh(**sizes)):
        got = jax.jit(gradient)(*inputs)
    assert len(got[1][1].sharding.device_set) == 8
    for one, eight in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        close(eight, one, 1e-5)


def test_unusual_losses_of_each_token_by_itself_are_taken_in_chunks_as_they_stand():
    inputs, fixed = problem(6)
    x = as_dtype(inputs)

    def function(stats, aux):
        return sum(one(stats, aux) for one in INDEPENDENT)

    def plain(x):
        return jnp.sum(function(plain_stats(x, fixed["targets"]), {**fixed, "weights": x["weights"]}))

    value, gradients = jax.jit(jax.value_and_grad(plain))(x)
    ours = functools.partial(run, fixed=fixed, function=function, rows=4)
    (got, _), got_gradients = jax.jit(jax.value_and_grad(ours, has_aux=True))(x)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    for name in INPUTS:
        close(got_gradients[name], gradients[name], 1e-5)


def test_a_loss_over_sequences_is_refused_with_what_to_use_instead():
    inputs, fixed = problem(6)
    with pytest.raises(ValueError, match=r"loss_fn mixes tokens: its `reduce_sum`.* take token_logprob"):
        run(as_dtype(inputs), fixed, function=lambda stats, aux: stats.logp - jnp.mean(stats.logp))


def test_a_loss_may_close_over_traced_numbers_but_not_over_differentiated_ones():
    inputs, fixed = problem(7)
    x = as_dtype(inputs)

    def total(x, coefficient):
        return run(x, fixed, function=lambda stats, aux: coefficient * stats.logp, outputs=("logp",))[0]

    expected = jax.jit(jax.grad(lambda x: 2 * total(x, 1)))(x)
    # Differentiation inside and outside of compilation take different ways through JAX.
    for gradient in (jax.jit(jax.grad(total)), jax.grad(jax.jit(total))):
        close(gradient(x, 2.0)["unembedding"], expected["unembedding"], 1e-6)
    with pytest.raises(ValueError, match="closes over a value that is differentiated; hand it in through aux"):
        jax.grad(total, argnums=1)(x, 2.0)
    with pytest.raises(TypeError) as raised:
        run(x, fixed, function=lambda stats, aux: stats.logp * fixed["old"])
    assert "must come in through aux, not by closure" in " ".join(raised.value.__notes__)
    with pytest.raises(TypeError) as raised:
        run(x, fixed, function=lambda stats, aux: -stats.entropy, outputs=("logp",))
    assert "not among outputs are None" in " ".join(raised.value.__notes__)


def test_wrong_arguments_are_refused_with_what_was_expected():
    inputs, fixed = problem()
    x = as_dtype(inputs)
    with pytest.raises(ValueError, match=r"\[N, D\] and unembedding \[V, D\], got shapes \(11, 8\) and \(37, 7\)"):
        run({**x, "unembedding": x["unembedding"][:, 1:]}, fixed)
    with pytest.raises(ValueError, match=r"targets must be \[N\] = \[11\], got shape \(10,\)"):
        run(x, {**fixed, "targets": fixed["targets"][1:]})
    with pytest.raises(ValueError, match=r"mask must be \[N\] = \[11\], got shape \(1, 11\)"):
        run(x, fixed, mask=jnp.ones((1, N)))
    with pytest.raises(ValueError, match=r"bias must be \[V\] = \[37\], got shape \(1,\)"):
        run(x, fixed, bias=jnp.zeros(1))
    with pytest.raises(ValueError, match=r"aux\['old'\] must be \[N, ...\] with N = 11, got shape \(3,\)"):
        run(x, {**fixed, "old": np.zeros(3)})
    with pytest.raises(ValueError, match=r"aux\['old'\] must be .*, got shape \(\); what is the same for all tokens"):
        run(x, {**fixed, "old": 1.0})
    with pytest.raises(ValueError, match=r"unknown outputs \['perplexity'\]; there are \['logp'"):
        run(x, fixed, outputs=("logp", "perplexity"))
    with pytest.raises(ValueError, match="needs a mask"):
        run(x, fixed, max_tokens=3)
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        run(x, fixed, mask=jnp.ones(N), max_tokens=0)
    with pytest.raises(ValueError, match="chunk_bytes must be at least 1, got 0"):
        run(x, fixed, chunk_bytes=0)

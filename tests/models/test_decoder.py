import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import models
from jaxrl_post.models import network

VARIANTS = {
    "plain": {},
    "grouped_qk_norm": {"kv_heads": 2, "qk_norm": True},
    "one_kv_head_tied": {"kv_heads": 1, "head_dim": 6, "softcap": 5.0, "tied": True},
}


@functools.cache
def make_from(options):
    policy = models.decoder(
        **({"vocab_size": 13, "width": 16, "layers": 2, "heads": 4, "mlp_width": 24} | dict(options))
    )
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.3 * random.standard_normal(x.shape) + (x.ndim < 3), x.dtype),
        jax.eval_shape(policy.init, jax.random.key(0)),
    )
    return policy._replace(
        hidden=numpied(policy.hidden), decode=numpied(policy.decode), prefill=numpied(policy.prefill)
    ), params


def numpied(function):
    """`function` compiled, with NumPy arrays for results: every slice of a device array would compile a program."""
    compiled = jax.jit(function)
    return lambda *args: jax.tree.map(lambda x: x if isinstance(x, jax.core.Tracer) else np.asarray(x), compiled(*args))


def make(**options):
    """A small decoder whose parameters, scales and biases included, are far from their initial values."""
    return make_from(tuple(options.items()))


def ragged(lengths, size, new=4, seed=2):
    """Tokens of whole sequences, and of their right-padded prompts with positions."""
    sequences = np.random.default_rng(seed).integers(0, 13, (len(lengths), size + new)).astype(np.int32)
    slots = np.arange(size)[None]
    positions = np.where(slots < np.array(lengths)[:, None], slots, -1)
    return sequences, np.where(positions >= 0, sequences[:, :size], 12), positions


def arange(tokens):
    return np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)


def numpy_decoder(params, tokens, *, kv_heads, qk_norm, rope_base, eps):
    """Hidden states of one sequence in float64, one query, head and layer at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2) + eps) * scale

    def rope(x, position):
        half = len(x) // 2
        out = np.zeros_like(x)
        for i in range(half):
            angle = position * rope_base ** (-2 * i / len(x))
            pair = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ x[[i, i + half]]
            out[i], out[i + half] = pair
        return out

    xs = [p["embedding"][t] for t in tokens]
    stack = p["layers"]
    for n in range(stack["attention"]["query"].shape[0]):
        w = jax.tree.map(lambda x: x[n], stack)  # noqa: B023
        a = w["attention"]
        heads = a["query"].shape[1]
        keys, values, queries = [], [], []
        for position, x in enumerate(xs):
            y = norm(x, w["attention_norm"]["scale"])
            q = [y @ a["query"][:, h] for h in range(heads)]
            k = [y @ a["key"][:, h] for h in range(kv_heads)]
            if qk_norm:
                q = [norm(v, a["query_norm"]["scale"]) for v in q]
                k = [norm(v, a["key_norm"]["scale"]) for v in k]
            queries.append([rope(v, position) for v in q])
            keys.append([rope(v, position) for v in k])
            values.append([y @ a["value"][:, h] for h in range(kv_heads)])
        out = []
        for t, x in enumerate(xs):
            for h in range(heads):
                g = h * kv_heads // heads
                scores = np.array([queries[t][h] @ keys[s][g] for s in range(t + 1)]) / np.sqrt(len(queries[t][h]))
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                x = x + sum(weights[s] * values[s][g] for s in range(t + 1)) @ a["out"][h]
            y = norm(x, w["mlp_norm"]["scale"])
            gate = y @ w["mlp"]["gate"]
            out.append(x + (gate / (1 + np.exp(-gate)) * (y @ w["mlp"]["up"])) @ w["mlp"]["down"])
        xs = out
    return np.stack([norm(x, p["final_norm"]["scale"]) for x in xs])


@pytest.mark.parametrize(("kv_heads", "qk_norm"), [(4, False), (2, True)])
def test_hidden_equals_a_plain_float64_computation(kv_heads, qk_norm):
    policy, params = make(kv_heads=kv_heads, qk_norm=qk_norm, rope_base=100.0, norm_eps=1e-5)
    tokens = np.array([[3, 12, 0, 7, 7, 1]])
    hidden, aux = policy.hidden(params, tokens, arange(tokens))
    expected = numpy_decoder(params, tokens[0], kv_heads=kv_heads, qk_norm=qk_norm, rope_base=100.0, eps=1e-5)
    np.testing.assert_allclose(hidden[0], expected, rtol=1e-4, atol=1e-5)
    assert aux == {}


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=pytest.mark.nightly if name == "plain" else ()) for name in VARIANTS]
)
def test_prefill_and_decode_give_the_states_of_the_whole_sequence(variant):
    policy, params = make(**VARIANTS[variant])
    lengths, size, new = [5, 2, 1], 5, 4
    sequences, prompts, positions = ragged(lengths, size, new)
    whole, _ = policy.hidden(params, sequences, arange(sequences))

    @jax.jit
    def run(params):
        first, cache = policy.prefill(params, prompts, positions, policy.init_cache(3, size + new, None))
        start = jnp.array(lengths)[:, None]

        def step(cache, i):
            tokens = jnp.take_along_axis(jnp.asarray(sequences), start + i, axis=1)
            state, cache = policy.decode(params, tokens, start + i, cache)
            return cache, state[:, 0]

        cache_after_prompt = cache
        cache, states = jax.lax.scan(step, cache, jnp.arange(new))
        # The same tokens in two calls of two.
        places = start + jnp.arange(new)
        tokens = jnp.take_along_axis(jnp.asarray(sequences), places, axis=1)
        early, cache2 = policy.decode(params, tokens[:, :2], places[:, :2], cache_after_prompt)
        late, cache2 = policy.decode(params, tokens[:, 2:], places[:, 2:], cache2)
        return first, states.swapaxes(0, 1), jnp.concatenate([early, late], axis=1), cache, cache2

    whole = np.asarray(whole)
    first, one_by_one, two_by_two, cache, cache2 = jax.tree.map(np.asarray, run(params))
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(first[row, :n], whole[row, :n], atol=1e-5)
        np.testing.assert_allclose(one_by_one[row], whole[row, n : n + new], atol=1e-5)
        np.testing.assert_allclose(two_by_two[row], whole[row, n : n + new], atol=1e-5)
    assert int(cache.index) == int(cache2.index) == size + new
    assert cache.positions[2].tolist() == [0, -1, -1, -1, -1, 1, 2, 3, 4]


def test_decode_from_an_empty_cache_equals_prefill():
    policy, params = make(kv_heads=2)
    _, prompts, positions = ragged([4, 2], 4)
    by_prefill, _ = policy.prefill(params, prompts, positions, policy.init_cache(2, 6, None))
    by_decode, _ = policy.decode(params, prompts, positions, policy.init_cache(2, 6, None))
    np.testing.assert_allclose(by_decode[0], by_prefill[0], atol=1e-5)
    np.testing.assert_allclose(by_decode[1, :2], by_prefill[1, :2], atol=1e-5)


def test_what_padding_holds_does_not_matter_and_its_states_are_finite():
    policy, params = make()
    _, prompts, positions = ragged([4, 1], 4)
    other = np.where(positions >= 0, prompts, 5)
    outputs = []
    for tokens in (prompts, other):
        first, cache = policy.prefill(params, tokens, positions, policy.init_cache(2, 6, None))
        state, _ = policy.decode(params, jnp.array([[1], [2]]), jnp.array([[4], [1]]), cache)
        assert np.isfinite(first).all()
        outputs.append((first, state))
    np.testing.assert_array_equal(outputs[0][1], outputs[1][1])
    np.testing.assert_array_equal(outputs[0][0][1, 0], outputs[1][0][1, 0])


def test_padding_in_front_of_a_row_is_not_seen():
    policy, params = make()
    tokens = np.array([[7, 8, 1, 2, 3]])
    padded, _ = policy.hidden(params, tokens, np.array([[-1, -1, 0, 1, 2]]))
    alone, _ = policy.hidden(params, tokens[:, 2:], np.arange(3)[None])
    np.testing.assert_allclose(padded[:, 2:], alone, atol=1e-5)


def test_a_later_token_does_not_move_earlier_states():
    policy, params = make()
    tokens = np.array([[1, 2, 3, 4, 5]])
    changed = np.array([[1, 2, 3, 9, 5]])
    before, _ = policy.hidden(params, tokens, arange(tokens))
    after, _ = policy.hidden(params, changed, arange(tokens))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert np.abs(before[:, 3:] - after[:, 3:]).min(axis=-1).max() > 1e-3


def test_segments_in_one_row_do_not_see_each_other():
    policy, params = make()
    first, second = np.array([[1, 2, 3]]), np.array([[4, 5]])
    packed = np.concatenate([first, second], axis=1)
    positions = np.array([[0, 1, 2, 0, 1]])
    states, _ = policy.hidden(params, packed, positions, jnp.array([[1, 1, 1, 2, 2]]))
    alone = [policy.hidden(params, part, arange(part))[0] for part in (first, second)]
    np.testing.assert_allclose(states, np.concatenate(alone, axis=1), atol=1e-5)


def test_more_layers_do_not_make_a_larger_program():
    def equations(jaxpr):
        inner = [v for e in jaxpr.eqns for p in e.params.values() for v in (p if isinstance(p, tuple | list) else [p])]
        nested = [getattr(v, "jaxpr", v) for v in inner if hasattr(getattr(v, "jaxpr", v), "eqns")]
        return len(jaxpr.eqns) + sum(map(equations, nested))

    counts = []
    for depth in (2, 6):
        policy, params = make(layers=depth)
        tokens = jnp.ones((2, 4), jnp.int32)

        def loss(params, policy=policy, tokens=tokens):
            return jnp.sum(policy.hidden(params, tokens, arange(tokens))[0])

        def decode(params, policy=policy):
            return policy.decode(
                params, jnp.ones((2, 1), jnp.int32), jnp.zeros((2, 1), jnp.int32), policy.init_cache(2, 4)
            )

        counts.append([equations(jax.make_jaxpr(f)(params).jaxpr) for f in (jax.grad(loss), decode)])
    assert counts[0] == counts[1]
    assert min(counts[0]) > 50


def test_decoding_updates_the_cache_in_place():
    policy, params = make()

    def run(params, cache):
        def step(cache, position):
            state, cache = policy.decode(params, jnp.ones((4, 1), jnp.int32), jnp.full((4, 1), position), cache)
            return cache, state

        return jax.lax.scan(step, cache, jnp.arange(64))

    cache = policy.init_cache(4, 64, None)
    compiled = jax.jit(run, donate_argnums=1).lower(params, cache).compile()
    shape = ",".join(map(str, cache.k.shape))
    copies = [line for line in compiled.as_text().splitlines() if f"f32[{shape}]" in line and " copy(" in line]
    assert copies == []


def test_rematerialisation_keeps_less_and_gives_the_same_gradient():
    tokens = jnp.array([[1, 2, 3, 4]])
    gradients, kept = [], []
    for remat in ("none", "dots", "full"):
        policy, params = make(remat=remat)

        def loss(params, policy=policy):
            return jnp.sum(policy.hidden(params, tokens, arange(tokens))[0] ** 3)

        gradients.append(jax.jit(jax.grad(loss))(params))
        backward = jax.eval_shape(lambda p, loss=loss: jax.vjp(loss, p)[1], params)
        kept.append(sum(x.size for x in jax.tree.leaves(backward)))
    assert kept[0] > kept[1] > kept[2]
    for gradient in gradients[1:]:
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), gradients[0], gradient)


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
    policy, params = make(dtype="bfloat16", value_head=True)
    tokens = jnp.array([[1, 2, 3, 4]])
    states, _ = policy.hidden(params, tokens, arange(tokens))
    assert states.dtype == policy.unembed(params).weight.dtype == policy.init_cache(1, 4, None).k.dtype == jnp.bfloat16
    assert policy.heads(params, states)["value"].dtype == jnp.float32
    exact, _ = make(value_head=True)
    expected, _ = exact.hidden(params, tokens, arange(tokens))
    np.testing.assert_allclose(np.float32(states), expected, atol=0.15)
    loss = lambda p: jnp.sum(policy.hidden(p, tokens, arange(tokens))[0].astype(jnp.float32))  # noqa: E731
    gradient = jax.eval_shape(jax.grad(loss), params)
    assert (
        {x.dtype for x in jax.tree.leaves(params)} == {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype("f4")}
    )


def test_a_cast_rounds_what_layers_multiply_with_and_nothing_that_adds_up_in_float32():
    options = {"experts": 2, "experts_per_token": 1, "tied": False, "value_head": True, "qk_norm": True}
    policy = models.decoder(vocab_size=5, width=8, heads=2, layers=2, dtype=jnp.bfloat16, **options)
    params = jax.jit(policy.init)(jax.random.key(0))
    cast = jax.eval_shape(policy.cast, params | {"embedding": None})
    assert cast["embedding"] is None
    rounded = {jax.tree_util.keystr(path) for path, x in jax.tree.leaves_with_path(cast) if x.dtype == jnp.bfloat16}
    attention = {f"['layers']['attention']['{name}']" for name in ("query", "key", "value", "out")}
    mlp = {f"['layers']['mlp']['{name}']" for name in ("gate", "up", "down", "router")}
    assert rounded == attention | mlp | {"['unembedding']"}
    tokens = jnp.array([[1, 2, 3, 4]])
    hidden = jax.jit(policy.hidden)
    states = [np.float32(hidden(p, tokens, arange(tokens))[0]) for p in (params, jax.jit(policy.cast)(params))]
    np.testing.assert_array_equal(*states)


def test_a_cast_never_widens():
    policy = models.decoder(vocab_size=5, width=8, heads=2, layers=1, param_dtype=jnp.bfloat16)
    assert {
        x.dtype for x in jax.tree.leaves(jax.eval_shape(policy.cast, jax.eval_shape(policy.init, jax.random.key(0))))
    } == {jnp.dtype(jnp.bfloat16)}


def test_parameters_may_be_stored_in_bfloat16():
    policy = models.decoder(vocab_size=5, width=8, heads=2, layers=1, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(jax.eval_shape(policy.init, jax.random.key(0)))} == {
        jnp.dtype(jnp.bfloat16)
    }


def test_a_float32_cache_serves_a_bfloat16_model():
    policy, params = make(dtype="bfloat16")
    tokens = jnp.array([[1, 2]])
    states, cache = policy.prefill(params, tokens, arange(tokens), policy.init_cache(1, 3, jnp.float32))
    state, cache = policy.decode(params, jnp.array([[3]]), jnp.array([[2]]), cache)
    assert cache.k.dtype == jnp.float32
    assert states.dtype == state.dtype == jnp.bfloat16


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "value_head": True, "tied": True}])
def test_every_parameter_has_one_axis_name_per_dimension(options):
    policy, params = make(**options)
    axes = policy.axes()
    is_names = lambda node: isinstance(node, tuple)  # noqa: E731
    assert jax.tree.structure(axes, is_leaf=is_names) == jax.tree.structure(params)
    pairs = list(zip(jax.tree.leaves(axes, is_leaf=is_names), jax.tree.leaves(params), strict=True))
    assert all(len(names) == x.ndim for names, x in pairs)
    assert axes["layers"]["attention"]["query"] == ("layers", "embed", "heads", "head_dim")
    assert axes["layers"]["mlp"]["down"] == ("layers", "mlp", "embed")
    assert axes["embedding"] == ("vocab", "embed")
    assert ("unembedding" in axes) == (not options.get("tied", False))


def test_initial_parameters_have_the_stated_spread_and_differ_between_layers():
    policy = models.decoder(vocab_size=64, width=64, layers=8, heads=4, init_std=0.1)
    init = jax.jit(policy.init)
    params = jax.tree.map(np.asarray, init(jax.random.key(0)))
    stack = params["layers"]
    for x, std in [
        (params["embedding"], 0.1),
        (params["unembedding"], 0.1),
        (stack["attention"]["query"], 0.1),
        (stack["mlp"]["up"], 0.1),
        (stack["attention"]["out"], 0.1 / 4),
        (stack["mlp"]["down"], 0.1 / 4),
    ]:
        np.testing.assert_allclose(np.std(x), std, rtol=0.05)
    assert np.abs(stack["mlp"]["up"][0] - stack["mlp"]["up"][1]).max() > 0.01
    other = init(jax.random.key(1))
    assert np.abs(other["embedding"] - params["embedding"]).max() > 0.01


def test_the_value_head_starts_at_zero_and_learns():
    policy = models.decoder(vocab_size=5, width=8, heads=2, layers=1, value_head=True)
    params = jax.jit(policy.init)(jax.random.key(0))
    states = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    np.testing.assert_array_equal(policy.heads(params, states)["value"], np.zeros((2, 3)))
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(policy.heads(p, states)["value"])))(params)
    np.testing.assert_allclose(gradient["value_head"]["kernel"], np.sum(states, axis=(0, 1)), rtol=1e-5)
    assert models.decoder(vocab_size=5, width=8, heads=2).heads(params, states) == {}


def test_tying_uses_the_embedding_as_unembedding():
    policy, params = make(tied=True, softcap=7.0)
    weight, softcap, bias = policy.unembed(params)
    np.testing.assert_array_equal(weight, params["embedding"])
    assert (softcap, bias) == (7.0, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_heads": 3}, "kv_heads must divide heads, got heads=4, kv_heads=3"),
        ({"width": 18}, "width=18 is not divisible by heads=4"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"remat": "half"}, "remat must be one of"),
        ({"layers": 0}, "layers=0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_prompt_larger_than_the_cache_is_refused():
    policy, params = make()
    with pytest.raises(ValueError, match="5 tokens do not fit a cache of capacity 4"):
        policy.prefill(params, jnp.ones((1, 5), jnp.int32), jnp.arange(5)[None], policy.init_cache(1, 4, None))


def test_making_and_running_a_decoder_raises_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy, params = make(qk_norm=True, value_head=True)
        policy.hidden(params, jnp.ones((1, 2), jnp.int32), jnp.arange(2)[None])


PIECES = {
    "tied_qk_norm": {"tied": True, "qk_norm": True},
    "experts": {"experts": 4, "experts_per_token": 2},
    "windows": {"window": 3, "local_layers": (True, False), "local_rope": models.Rope(base=7.0)},
    "adapters": {"lora": models.Lora(rank=2, dropout=0.5)},
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "experts" else pytest.mark.nightly) for name in PIECES],
)
def test_rows_in_pieces_give_the_states_and_gradients_of_all_rows_at_once(name, monkeypatch):
    options = {"vocab_size": 13, "width": 16, "layers": 2, "heads": 4, "mlp_width": 24, "remat": "full"}
    policy = models.decoder(**options | PIECES[name])
    params = make(**PIECES[name])[1]
    tokens = np.random.default_rng(0).integers(0, 13, (6, 5))
    segments = np.array([[0, 0, 1, 1, 1]] * 3 + [[0] * 5] * 3)

    def found(tokens_of_a_piece):
        monkeypatch.setattr(network, "PIECE_TOKENS", tokens_of_a_piece)

        def loss(params):
            hidden, aux = policy.hidden(params, tokens, arange(tokens), segments, key=jax.random.key(1))
            return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves((hidden, aux))), (hidden, aux)

        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        return str(run.trace(params).jaxpr).count("scan["), run(params)

    (scans, whole), (more, pieces) = found(30), found(10)  # three pieces of two rows
    assert more > scans
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=3e-6 * np.abs(a).max(), rtol=0), whole, pieces)


def test_gradients_of_pieces_are_added_up_in_float32(monkeypatch):
    monkeypatch.setattr(network, "PIECE_TOKENS", 1)
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "remat": "full", "norms": "post"}
    policy = models.decoder(vocab_size=5, width=8, layers=1, heads=2, **options)
    params = jax.jit(policy.init)(jax.random.key(0))

    def gradient(rows):
        tokens = np.zeros((rows, 1), np.int32)

        def loss(params):
            return jnp.sum(policy.hidden(params, tokens, arange(tokens))[0][..., 0].astype(jnp.float32))

        return jax.jit(jax.grad(loss))(params)["layers"]["mlp"]["up"].astype(jnp.float32)

    # Rows are alike. Added up in bfloat16, 256 equal numbers would not even reach the sum of 200.
    one = np.asarray(gradient(1))
    assert np.any(one != 0)
    np.testing.assert_allclose(gradient(1023), 1023 * one, rtol=2**-8)

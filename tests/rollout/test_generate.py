"""`rollout.generate` against scoring, against itself in other batches and meshes, and against its layout promise."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import models
from jaxrl_post.mesh import make_mesh, place, shardings
from jaxrl_post.rollout import Prompts, SamplingParams, beam_search, generate
from jaxrl_post.sampling import row_keys
from jaxrl_post.types import FINISH_ABORT, FINISH_LENGTH, FINISH_STOP, Unembedding
from tests.rollout.table import markov

V, N, G = 16, 6, 2
LENGTH = np.array([3, 1, 5, 2])
PROMPTS = np.random.default_rng(0).integers(0, V, (4, 5))
KEY = jax.random.key(7)
FIELDS = frozenset({"logp", "entropy"})
TAU = 0.7
FREE = SamplingParams(temperature=TAU)
STOPS = (3, 9, 12)
STOPPED = SamplingParams(temperature=TAU, stop_tokens=STOPS)

POLICY = models.decoder(vocab_size=V, width=16, layers=2, heads=4, kv_heads=2, mlp_width=32, init_std=0.4)


TABLE = markov(V)


@functools.cache
def params(policy=POLICY):
    return jax.jit(policy.init)(jax.random.key(0))


def prompts(rows=(0, 1, 2, 3), *, width=5, group=G, ids=None):
    """The named prompts with ids that go with the prompt (`10 * prompt + g`), garbage behind each."""
    rows = np.array(rows)
    tokens = np.full((len(rows), width), 10**6)
    for row, prompt in enumerate(rows):
        tokens[row, : LENGTH[prompt]] = PROMPTS[prompt, : LENGTH[prompt]]
    ids = 10 * rows[:, None] + np.arange(group) if ids is None else np.array(ids)
    return Prompts(jnp.asarray(tokens), jnp.asarray(LENGTH[rows]), jnp.asarray(rows), jnp.asarray(ids, jnp.uint32))


@functools.cache
def compiled(sampling=FREE, new=N, group=G, policy=POLICY):
    # Compilation is what these tests cost, so that few programs serve many of them.
    return jax.jit(
        functools.partial(generate, policy, sampling=sampling, max_new_tokens=new, group_size=group, version=17)
    )


@functools.cache
def base(sampling=FREE, policy=POLICY):
    return compiled(sampling, policy=policy)(params(policy), prompts(), KEY)


@jax.jit
def model_logits(tokens):
    """`[B, T, V]` of the whole sequences at once: entry t speaks of token t + 1."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return models.logits(POLICY.unembed(params()), POLICY.hidden(params(), tokens, positions)[0])


def probabilities(tokens, temperature, policy=POLICY):
    """`[B, T, V]` float64: entry t is the distribution that token t is drawn from; position 0 has none."""
    logits = model_logits(tokens) if policy is POLICY else params(TABLE)[tokens]
    z = np.asarray(logits, np.float64)[:, :-1] / temperature
    p = np.exp(z - z.max(-1, keepdims=True))
    return np.pad(p / p.sum(-1, keepdims=True), ((0, 0), (1, 0), (0, 0)))


def by_id(rollouts):
    """Completions and their log-probs by sequence id."""
    tokens, mask, logp = (np.asarray(x) for x in (rollouts.tokens, rollouts.mask > 0, rollouts.logp))
    return {
        int(number): (tokens[row][mask[row]].tolist(), logp[row][mask[row]])
        for row, number in enumerate(np.asarray(rollouts.id).reshape(-1))
    }


def near_tie(prompt, completion, number):
    """Whether the two best perturbed logits for the last token of `completion` are within 1e-4."""
    text = np.concatenate([PROMPTS[prompt, : LENGTH[prompt]], completion])
    position = len(text) - 1
    key = row_keys(KEY, jnp.array([number], jnp.uint32), jnp.array([position]))[0]
    padded = jnp.asarray(np.pad(text, (0, 5 + N - len(text))))
    perturbed = model_logits(padded[None])[0, position - 1] / TAU + jax.random.gumbel(key, (V,))
    second, best = np.sort(np.asarray(perturbed))[-2:]
    return best - second < 1e-4


def same_samples(rollouts, expected):
    """The same tokens for the same ids, with log-probs to 1e-5; returns how many ended at a near tie."""
    got, truth = by_id(rollouts), by_id(expected)
    common = set(got) & set(truth)
    assert common
    ties = 0
    for number in common:
        (tokens, logp), (true_tokens, true_logp) = got[number], truth[number]
        if tokens == true_tokens:
            np.testing.assert_allclose(logp, true_logp, atol=1e-5)
            continue
        first = next(t for t, (a, b) in enumerate(zip(tokens, true_tokens, strict=False)) if a != b)
        assert near_tie(number // 10, true_tokens[: first + 1], number), f"sequence {number} differs at token {first}"
        ties += 1
    return ties


@pytest.mark.parametrize("sampling", [FREE, STOPPED], ids=["free", "stopped"])
def test_recorded_log_probs_and_entropies_are_those_that_scoring_gives(sampling):
    rollouts = base(sampling)
    score = jax.jit(models.score(POLICY, temperature=sampling.temperature), static_argnums=2)
    stats = score(params(), rollouts, FIELDS, KEY)
    np.testing.assert_allclose(rollouts.logp, stats.logp * rollouts.mask, atol=1e-5)
    np.testing.assert_allclose(rollouts.extras["entropy"], stats.entropy * rollouts.mask, atol=1e-5)
    # And both are what float64 arithmetic on the model's logits gives.
    p = probabilities(rollouts.tokens, sampling.temperature)
    chosen = np.take_along_axis(p, np.asarray(rollouts.tokens)[..., None], axis=-1)[..., 0]
    inside = np.asarray(rollouts.mask) > 0
    np.testing.assert_allclose(np.asarray(rollouts.logp)[inside], np.log(chosen[inside]), atol=1e-5)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -(p * np.log(p)).sum(-1)
    np.testing.assert_allclose(np.asarray(rollouts.extras["entropy"])[inside], entropy[inside], atol=1e-5)
    assert np.asarray(rollouts.logp)[inside].min() < -1  # not a model for which all is zero


def test_a_prompt_and_an_id_give_the_same_tokens_alone():
    alone = compiled(group=1)
    ties = 0
    for prompt in range(4):
        for number in (10 * prompt, 10 * prompt + 1):
            ties += same_samples(alone(params(), prompts([prompt], ids=[[number]]), KEY), base())
    assert ties == 0


@pytest.mark.parametrize(
    "batch",
    [
        {"rows": (3, 0, 2, 1)},
        {"rows": (0, 0, 2), "ids": [[1, 77, 78], [79, 80, 0], [20, 81, 21]], "width": 9, "group": 3},
    ],
    ids=["another order", "wider padding, larger groups, other samples"],
)
def test_a_prompt_and_an_id_give_the_same_tokens_in_another_batch(batch):
    key = KEY if "group" not in batch else jax.random.PRNGKey(7)  # a raw key stands for the typed one
    rollouts = compiled(group=batch.get("group", G))(params(), prompts(**batch), key)
    assert same_samples(rollouts, base()) == 0


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({}, marks=pytest.mark.nightly),
        pytest.param({"fsdp": 8}, marks=pytest.mark.nightly),
        {"data": 2, "fsdp": 2, "tensor": 2},
    ],
    ids=str,
)
def test_a_prompt_and_an_id_give_the_same_tokens_on_any_mesh(sizes):
    mesh = make_mesh(**sizes)
    split = place(params(), shardings(params(), POLICY.axes(), mesh))
    if sizes:
        assert not split["layers"]["mlp"]["up"].is_fully_replicated
    with jax.set_mesh(mesh):
        rollouts = compiled(STOPPED)(split, prompts(), KEY)
    assert rollouts.tokens.sharding.mesh.size == mesh.size
    assert same_samples(rollouts, base(STOPPED)) == 0


def test_one_key_agrees_with_itself_two_keys_and_the_rows_of_a_group_differ():
    assert jnp.array_equal(compiled()(params(), prompts(), KEY).tokens, base().tokens)
    other = by_id(compiled()(params(), prompts(), jax.random.key(8)))
    assert sum(tokens == by_id(base())[number][0] for number, (tokens, _) in other.items()) == 0
    first, second = zip(*(np.split(np.asarray(row), 2) for row in base().tokens.reshape(4, G * (5 + N))), strict=True)
    assert not any(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


FIRST = 4000


@functools.cache
def first_tokens():
    """One token after the first prompt, many times, with some stops."""
    rollouts = compiled(SamplingParams(temperature=TAU, stop_tokens=STOPS), new=1, group=FIRST)(
        params(), prompts([0], group=FIRST)._replace(id=None, prompt_id=None), KEY
    )
    return rollouts, np.asarray(rollouts.tokens[:, LENGTH[0]])


def test_first_tokens_come_as_often_as_the_model_says():
    rollouts, tokens = first_tokens()
    p = probabilities(rollouts.tokens[:1], TAU)[0, LENGTH[0]]
    counts = np.bincount(tokens, minlength=V)
    # Rare tokens are pooled, so that chi-square holds; 0.9999 quantile with at most 15 degrees of freedom.
    rare = FIRST * p < 5
    observed, expected = (np.append(x[~rare], x[rare].sum() + 1e-9) for x in (counts, FIRST * p))
    assert ((observed - expected) ** 2 / expected).sum() < 44.3
    assert (~rare).sum() >= 4


def test_a_stop_token_drawn_as_the_last_one_allowed_is_a_stop():
    rollouts, tokens = first_tokens()
    expected = np.where(np.isin(tokens, STOPS), FINISH_STOP, FINISH_LENGTH)
    assert np.asarray(rollouts.finish).reshape(-1).tolist() == expected.tolist()
    assert set(expected.tolist()) == {FINISH_STOP, FINISH_LENGTH}
    assert rollouts.mask.sum(1).tolist() == [1.0] * FIRST


def test_a_stop_token_cuts_the_sequence_that_would_have_been():
    stopped, free = base(STOPPED), base()
    lengths = np.asarray(stopped.length).reshape(-1)
    finishes = set()
    for row, (length, prompt) in enumerate(zip(lengths, np.repeat(LENGTH, G), strict=True)):
        whole = np.asarray(free.tokens)[row, prompt : prompt + N]
        stop = np.flatnonzero(np.isin(whole, STOPS))
        new = stop[0] + 1 if len(stop) else N
        assert length == prompt + new
        assert np.asarray(stopped.tokens)[row, prompt:length].tolist() == whole[:new].tolist()
        assert np.asarray(stopped.mask)[row].tolist() == [0] * prompt + [1] * new + [0] * (5 + N - length)
        finish = int(np.asarray(stopped.finish).reshape(-1)[row])
        assert finish == (FINISH_STOP if len(stop) else FINISH_LENGTH)
        finishes.add(finish)
        for field in (stopped.tokens, stopped.logp, stopped.extras["entropy"]):
            assert not np.any(np.asarray(field)[row, length:])
    assert finishes == {FINISH_STOP, FINISH_LENGTH}, "the example must show both ends"
    assert np.all(np.asarray(free.finish) == FINISH_LENGTH)


@pytest.mark.parametrize("last", [pytest.param(0, marks=pytest.mark.nightly), 2])
def test_the_loop_ends_when_the_last_sequence_has(last):
    # What stands at completion token `last` stops, so that every sequence has ended there at the latest.
    completions = np.array([tokens for tokens, _ in by_id(base(policy=TABLE)).values()])
    stops = np.unique(completions[:, last])
    longest = max(np.flatnonzero(np.isin(row, stops))[0] for row in completions) + 1
    assert last == 0 or longest > 1
    calls = []

    def decode(*arguments):
        jax.debug.callback(lambda: calls.append(1))
        return TABLE.decode(*arguments)

    sampling = SamplingParams(temperature=TAU, stop_tokens=tuple(stops.tolist()))
    rollouts = compiled(sampling, policy=TABLE._replace(decode=decode))(params(TABLE), prompts(), KEY)
    jax.effects_barrier()
    assert int(np.max(np.asarray(rollouts.length) - LENGTH[:, None])) == longest < N
    assert len(calls) == longest


def test_greedy_takes_the_most_probable_token_whatever_the_key_and_temperature():
    rollouts = base(SamplingParams(greedy=True, temperature=0.3))
    inside = np.asarray(rollouts.mask) > 0
    p = probabilities(rollouts.tokens, 0.3)
    assert np.asarray(rollouts.tokens)[inside].tolist() == p.argmax(-1)[inside].tolist()
    np.testing.assert_allclose(np.asarray(rollouts.logp)[inside], np.log(p.max(-1)[inside]), atol=1e-5)
    again = compiled(SamplingParams(greedy=True, temperature=0.3))(params(), prompts(), jax.random.key(99))
    assert jnp.array_equal(rollouts.tokens, again.tokens)
    pairs = np.asarray(rollouts.tokens).reshape(4, G, -1)
    assert np.array_equal(pairs[:, 0], pairs[:, 1])


@pytest.mark.parametrize(
    "cut", [pytest.param({"top_p": 0.6}, marks=pytest.mark.nightly), {"top_k": 4, "top_p": 0.8, "min_p": 0.1}]
)
def test_a_truncated_sample_records_both_log_probs(cut):
    rollouts = base(SamplingParams(temperature=1.4, **cut), TABLE)
    inside = np.asarray(rollouts.mask) > 0
    p = probabilities(rollouts.tokens, 1.4, TABLE)[inside]
    descending = -np.sort(-p, axis=-1)
    allowed = np.ones_like(p, bool)
    if "top_k" in cut:
        allowed &= p >= descending[:, cut["top_k"] - 1, None]
    if "top_p" in cut:
        left = np.where(descending >= descending[:, cut.get("top_k", 0) - 1, None], descending, 0.0)
        left = left / left.sum(-1, keepdims=True)  # top-p judges what top-k has left
        needed = (np.cumsum(left, -1) < cut["top_p"]).sum(-1)
        allowed &= p >= np.take_along_axis(descending, needed[:, None], -1)
    if "min_p" in cut:
        allowed &= p >= cut["min_p"] * p.max(-1, keepdims=True)
    kept = (p * allowed).sum(-1)
    tokens = np.asarray(rollouts.tokens)[inside][:, None]
    assert np.all(np.take_along_axis(allowed, tokens, -1)), "a forbidden token was drawn"
    chosen = np.take_along_axis(p, tokens, -1)[:, 0]
    np.testing.assert_allclose(np.asarray(rollouts.logp)[inside], np.log(chosen), atol=1e-5)
    np.testing.assert_allclose(np.asarray(rollouts.extras["sampler_logp"])[inside], np.log(chosen / kept), atol=1e-5)
    assert not np.any(np.asarray(rollouts.extras["sampler_logp"])[~inside])
    assert kept.min() < 0.9


def test_without_truncation_there_is_one_log_prob_only():
    assert set(base().extras) == {"entropy"}


def test_a_prompt_is_followed_directly_by_its_completion_and_every_field_says_so():
    rollouts = base()
    assert rollouts.tokens.shape == (4 * G, 5 + N)
    assert (rollouts.num_prompts, rollouts.group_size) == (4, G)
    for row in range(4 * G):
        prompt = row // G
        length = LENGTH[prompt]
        assert rollouts.tokens[row, :length].tolist() == PROMPTS[prompt, :length].tolist()
        inside = [0] * length + [1] * N + [0] * (5 - length)
        assert rollouts.mask[row].tolist() == inside
        assert rollouts.step[row].tolist() == [0 if m else -1 for m in inside]
        assert rollouts.version[row].tolist() == [17 if m else -1 for m in inside]
        assert [bool(x) for x in rollouts.logp[row] != 0] == [bool(m) for m in inside]
    assert rollouts.length.tolist() == [[int(n) + N] * G for n in LENGTH]
    assert rollouts.id.tolist() == [[0, 1], [10, 11], [20, 21], [30, 31]]
    assert rollouts.prompt_id.tolist() == [0, 1, 2, 3]
    assert rollouts.valid.all()
    assert not rollouts.reward.any()
    assert rollouts.rewards == {}
    dtypes = {name: getattr(rollouts, name).dtype.name for name in ("tokens", "mask", "logp", "finish", "id", "length")}
    assert dtypes == {
        "tokens": "int32", "mask": "float32", "logp": "float32", "finish": "int8", "id": "uint32", "length": "int32"
    }  # fmt: skip


def test_ids_and_prompt_ids_count_from_zero_if_none_are_given():
    rollouts, _ = first_tokens()
    assert rollouts.id.tolist() == [list(range(FIRST))]
    assert rollouts.prompt_id.tolist() == [0]


def test_a_bare_apply_function_without_a_cache_gives_the_same_tokens():
    def apply(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return models.logits(POLICY.unembed(params), POLICY.hidden(params, tokens, positions)[0])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bare = models.from_apply(apply)
    assert same_samples(compiled(policy=bare)(params(), prompts(), KEY), base()) == 0


def test_a_token_forbidden_by_the_models_bias_is_never_drawn_and_breaks_no_statistic():
    bias = jnp.where(jnp.arange(V) % 2 == 0, 0.0, -jnp.inf)
    even = POLICY._replace(unembed=lambda params: Unembedding(POLICY.unembed(params).weight, None, bias))
    rollouts = compiled(policy=even)(params(), prompts(), KEY)
    inside = np.asarray(rollouts.mask) > 0
    assert not np.any(np.asarray(rollouts.tokens)[inside] % 2)
    entropy = np.asarray(rollouts.extras["entropy"])[inside]
    assert np.all((entropy > 0) & (entropy <= np.log(V / 2) + 1e-6))


def test_what_pads_a_prompt_may_have_an_embedding_that_is_no_number():
    policy = models.decoder(vocab_size=V, width=8, layers=1, heads=2, tied=False)
    weights = jax.jit(policy.init)(jax.random.key(0))
    weights["embedding"] = weights["embedding"].at[V - 1].set(jnp.nan)
    some = Prompts(jnp.array([[2, V - 1, V - 1], [3, 4, 5], [2, 3, V - 1]]), jnp.array([1, 3, 2]))
    for way in functools.partial(generate, key=KEY), functools.partial(beam_search, beams=2):
        found = jax.jit(functools.partial(way, policy, max_new_tokens=1))(weights, some)
        assert np.all(found.valid)
        assert np.all(np.isfinite(found.logp))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"tokens": jnp.zeros(4, jnp.int32)}, {}, r"prompts.tokens must be \[P, L\] .* got \(4,\) and \(4,\)"),
        ({"length": jnp.ones(3, jnp.int32)}, {}, r"prompts.length \[P\], got \(4, 5\) and \(3,\)"),
        ({"length": jnp.array([3, 0, 5, 2])}, {}, "must be between 1 and L=5, got 0 for prompt 1; a prompt needs"),
        ({"length": jnp.array([3, 1, 5, 6])}, {}, "must be between 1 and L=5, got 6 for prompt 3"),
        ({"id": jnp.zeros((4, 3), jnp.uint32)}, {}, r"prompts.id must be \[P, G\] = \[4, 2\], got \(4, 3\)"),
        ({"prompt_id": jnp.zeros(8, jnp.int32)}, {}, r"prompts.prompt_id must be \[P\] = \[4\], got \(8,\)"),
        ({}, {"max_new_tokens": 0}, "max_new_tokens and group_size must be at least 1, got 0 and 2"),
        ({}, {"group_size": 0}, "must be at least 1, got 6 and 0"),
        ({}, {"sampling": SamplingParams(temperature=0.0)}, "temperature must be positive, got 0.0; use greedy=True"),
        ({}, {"sampling": SamplingParams(top_p=1.1)}, r"top_p must be in \(0, 1\], got 1.1"),
    ],
)
def test_what_cannot_be_sampled_is_refused(changes, options, message):
    options = {"max_new_tokens": N, "group_size": G, **options}
    with pytest.raises(ValueError, match=message):
        generate(POLICY, params(), prompts()._replace(**changes), KEY, **options)


def test_a_traced_length_that_is_none_aborts_its_prompt_and_no_other():
    broken = prompts()._replace(length=jnp.array([LENGTH[0], 0, 6, LENGTH[3]]))
    found, whole = compiled()(params(), broken, KEY), base()
    assert found.valid.tolist() == [[True] * G, [False] * G, [False] * G, [True] * G]
    assert np.all(np.asarray(found.finish)[1:3] == FINISH_ABORT)
    assert np.all(np.asarray(found.mask)[G : 3 * G] == 0)
    for name in ("tokens", "mask", "logp", "version"):
        np.testing.assert_array_equal(getattr(found, name)[:G], getattr(whole, name)[:G])
        np.testing.assert_array_equal(getattr(found, name)[-G:], getattr(whole, name)[-G:])


def test_a_traced_limit_beyond_the_static_one_is_cut_to_it():
    limit = jnp.array([N, N + 3, 2**30, -1])
    found = compiled()(params(), prompts()._replace(max_new_tokens=limit), KEY)
    np.testing.assert_array_equal(found.tokens[:-G], base().tokens[:-G])
    np.testing.assert_array_equal(found.length[:-1], base().length[:-1])
    assert (np.asarray(found.length)[-1] - LENGTH[-1]).tolist() == [1, 1]


@pytest.mark.parametrize("slots", [pytest.param(None, marks=pytest.mark.nightly), 2])
def test_alternatives_are_the_most_probable_tokens_at_each_place(slots):
    prompts = Prompts(jnp.array([[2, 3, 0], [4, 5, 6], [1, 0, 0]]), jnp.array([2, 3, 1]))
    sampling = SamplingParams(temperature=0.7, top_p=0.9, stop_tokens=(3,))
    sample = functools.partial(generate, TABLE, max_new_tokens=5, group_size=2, sampling=sampling, slots=slots)
    plain = jax.jit(sample)(params(TABLE), prompts, jax.random.key(1))
    out = jax.jit(functools.partial(sample, alternatives=4))(params(TABLE), prompts, jax.random.key(1))
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    # By sorting, in float64, what the model says.
    log_probs = np.log(np.maximum(probabilities(out.tokens, 0.7, TABLE), 1e-300))
    order, sampled = np.argsort(-log_probs, axis=-1)[..., :4], np.asarray(out.mask) > 0
    tokens, logp = (np.asarray(out.extras[name]) for name in ("alternatives", "alternative_logp"))
    np.testing.assert_array_equal(tokens[sampled], order[sampled])
    np.testing.assert_allclose(logp[sampled], np.take_along_axis(log_probs, order, -1)[sampled], atol=1e-5)
    assert not logp[~sampled].any()

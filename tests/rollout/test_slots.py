"""A queue of sequences through fewer slots, and what ends, limits or changes a sequence of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import models
from jaxrl_post.rollout import Prompts, SamplingParams, generate
from jaxrl_post.types import FINISH_ABORT, FINISH_LENGTH, FINISH_STOP
from tests.rollout.table import markov

V, N = 16, 7
LENGTH = np.array([3, 1, 5, 2, 4, 1, 3])
TOKENS = np.random.default_rng(0).integers(0, V, (len(LENGTH), 5))
KEY = jax.random.key(5)
POLICY = models.decoder(vocab_size=V, width=16, layers=2, heads=4, kv_heads=2, mlp_width=32, init_std=0.4)
TABLE = markov(V)
STOPPED = SamplingParams(stop_tokens=(3, 9, 12))


@functools.cache
def params(policy=POLICY):
    return jax.jit(policy.init)(jax.random.key(0))


@functools.cache
def program(sampling=STOPPED, policy=POLICY, **options):
    options = {"max_new_tokens": N, "group_size": 2} | options
    return jax.jit(functools.partial(generate, policy, sampling=sampling, **options))


def by_table(sampling=STOPPED, some=None, *, decode=TABLE.decode, **options):
    """Samples of a policy that is a table."""
    run = program(sampling, TABLE._replace(decode=decode), **options)
    return run(params(TABLE), prompts() if some is None else some, KEY)


ALL = (0, 1, 2, 3, 4, 5, 6)


def prompts(rows=ALL, group=2, **others):
    rows = np.array(rows)
    ids = jnp.asarray(10 * rows[:, None] + np.arange(group), jnp.uint32)
    return Prompts(jnp.asarray(TOKENS[rows]), jnp.asarray(LENGTH[rows]), jnp.asarray(rows), ids, **others)


def completions(rollouts):
    """Tokens, log-probs and finish of each sequence by its id."""
    tokens, mask, logp = (np.asarray(x) for x in (rollouts.tokens, rollouts.mask > 0, rollouts.logp))
    finish = np.asarray(rollouts.finish).reshape(-1)
    ids = np.asarray(rollouts.id).reshape(-1)
    return {
        int(number): (tokens[row][mask[row]].tolist(), logp[row][mask[row]], int(finish[row]))
        for row, number in enumerate(ids)
    }


def same(found, expected):
    assert found.keys() == expected.keys()
    for number, (tokens, logp, finish) in expected.items():
        assert found[number][0] == tokens
        assert found[number][2] == finish
        np.testing.assert_allclose(found[number][1], logp, atol=1e-5)


@pytest.mark.parametrize(
    ("slots", "refill"),
    [
        (3, 2),
        pytest.param(4, 1, marks=pytest.mark.nightly),
        pytest.param(5, 5, marks=pytest.mark.nightly),
    ],
)
def test_a_queue_through_few_slots_gives_what_all_at_once_give_in_the_order_of_the_prompts(slots, refill):
    # 14 sequences in at most 5 slots: the cache, of 11 columns, is written round more than once.
    at_once = program()(params(), prompts(), KEY)
    queued = program(slots=slots, refill=refill)(params(), prompts(), KEY)
    same(completions(queued), completions(at_once))
    assert np.array_equal(queued.id, at_once.id)
    assert set(np.asarray(at_once.finish).reshape(-1).tolist()) == {FINISH_STOP, FINISH_LENGTH}


def test_who_else_is_in_the_queue_and_in_what_order_changes_nothing():
    run = program(slots=3, refill=2)
    first = run(params(), prompts(), KEY)
    same(completions(run(params(), prompts((4, 2, 6, 0, 1, 5, 3)), KEY)), completions(first))


def test_a_prompt_is_read_once_however_large_its_group():
    rows = []

    def prefill(params, tokens, *rest):
        rows.append(tokens.shape[0])
        return POLICY.prefill(params, tokens, *rest)

    jax.eval_shape(program(policy=POLICY._replace(prefill=prefill)), params(), prompts(), KEY)
    assert rows == [len(LENGTH)]


def test_sequences_may_have_limits_of_their_own():
    limits = np.array([[1, 2], [3, 4], [5, 6], [7, 1], [2, 3], [4, 5], [6, 7]])
    free = SamplingParams()
    whole = completions(by_table(free))
    for options in ({}, {"slots": 3, "refill": 1}):
        cut = by_table(free, prompts(max_new_tokens=jnp.asarray(limits)), **options)
        assert np.array_equal(np.asarray(cut.length) - LENGTH[:, None], limits)
        for number, (tokens, _, finish) in completions(cut).items():
            assert tokens == whole[number][0][: len(tokens)]
            assert finish == FINISH_LENGTH


def test_what_is_traced_compiles_once_and_does_what_static_values_do():
    run = jax.jit(functools.partial(generate, TABLE, max_new_tokens=N, group_size=2))
    none = jnp.array([-1])
    for sampling in (
        SamplingParams(0.7, 0, 1.0, 0.0, stop_tokens=(3,)),
        SamplingParams(1.3, 3, 1.0, 0.0, stop_tokens=(5,)),
        SamplingParams(1.0, 0, 0.6, 0.1, stop_tokens=()),
        SamplingParams(greedy=True),
    ):
        stops = jnp.asarray(sampling.stop_tokens or none)
        numbers = [jnp.asarray(value) for value in sampling[:5]]
        traced = run(params(TABLE), prompts(), KEY, sampling=SamplingParams(*numbers, stop_tokens=stops))
        same(completions(traced), completions(by_table(sampling)))
    assert run._cache_size() == 1


def test_prompts_of_one_batch_may_be_sampled_in_different_ways():
    ways = [
        SamplingParams(0.7),
        SamplingParams(1.5, top_k=3),
        SamplingParams(1.5, top_p=0.5),
        SamplingParams(greedy=True),
    ]
    rows = (0, 1, 2, 3)
    columns = [jnp.asarray([getattr(way, name) for way in ways]) for name in SamplingParams._fields[:5]]
    run = program(policy=TABLE, slots=3)
    together = completions(run(params(TABLE), prompts(rows), KEY, sampling=SamplingParams(*columns)))
    for row, way in zip(rows, ways, strict=True):
        alone = completions(by_table(way, prompts(rows)))
        for number in (10 * row, 10 * row + 1):
            assert together[number][0] == alone[number][0]


@pytest.mark.parametrize("slots", [14, 3])
def test_prompts_of_one_batch_may_have_biases_and_vocabularies_of_their_own(slots):
    run = program(policy=TABLE, slots=slots, refill=1)

    def said(**own):
        found = completions(run(params(TABLE), prompts(), KEY, sampling=SamplingParams(**own)))
        return {number: tokens for number, (tokens, _, _) in found.items()}

    one = jnp.arange(V) == jnp.arange(len(LENGTH))[:, None]  # prompt p says p and nothing else, whichever slot it has
    for own in ({"allowed": one}, {"logit_bias": 1e3 * one}):
        assert all(tokens == [number // 10] * N for number, tokens in said(**own).items())
    members = jnp.stack([one, jnp.roll(one, 1, axis=1)], axis=1)  # [P, G, V]
    assert all(tokens == [number // 10 + number % 10] * N for number, tokens in said(allowed=members).items())


def test_prompts_of_one_batch_may_have_stop_tokens_of_their_own():
    ends = ((3, 9, 12), (5, -1, -1), (-1, -1, -1), (0, 1, 2))
    some, own = prompts((0, 1, 2, 3)), jnp.asarray(ends)
    run = program(policy=TABLE, slots=3)
    for how in ({}, {"min_tokens": 3}):
        found = completions(run(params(TABLE), some, KEY, sampling=SamplingParams(stop_tokens=own, **how)))
        lengths = set()
        for row, stops in enumerate(ends):
            expected = completions(by_table(SamplingParams(stop_tokens=stops, **how), some))
            for number in (10 * row, 10 * row + 1):
                assert found[number][0] == expected[number][0]
                lengths.add(len(found[number][0]))
        assert len(lengths) > 2
    groups = completions(run(params(TABLE), some, KEY, sampling=SamplingParams(stop_tokens=own[:, None].repeat(2, 1))))
    plain = completions(run(params(TABLE), some, KEY, sampling=SamplingParams(stop_tokens=own)))
    assert {number: row[0] for number, row in groups.items()} == {number: row[0] for number, row in plain.items()}


def test_a_last_batch_that_is_smaller_is_sampled_in_as_many_slots_as_it_needs():
    found = completions(by_table(some=prompts((4,)), slots=16, refill=4))
    assert {number: row[0] for number, row in found.items()} == {
        number: row[0] for number, row in completions(by_table()).items() if number // 10 == 4
    }


def test_a_sequence_of_tokens_ends_a_completion_where_it_was_sampled_whole():
    free = completions(by_table(SamplingParams()))
    ends = [tuple(free[number][0][2:4]) for number in (0, 31)]
    cut = completions(by_table(SamplingParams(stop_sequences=(*ends, (99, 98, 97)))))
    stopped = 0
    for number, (tokens, _, _) in free.items():
        pairs = [index + 2 for index in range(N - 1) if tuple(tokens[index : index + 2]) in ends]
        assert cut[number][0] == tokens[: pairs[0] if pairs else N]
        assert cut[number][2] == (FINISH_STOP if pairs else FINISH_LENGTH)
        stopped += bool(pairs)
    assert 2 <= stopped < len(free)


def test_a_stop_sequence_that_is_complete_before_the_least_number_of_tokens_is_no_end():
    free = completions(by_table(SamplingParams()))
    pair = tuple(free[0][0][1:3])  # complete with the third token
    rows = {number: tokens for number, (tokens, _, _) in free.items()}
    lengths = []

    @jax.jit
    def run(least):
        sampling = SamplingParams(stop_sequences=(pair,), min_tokens=least)
        return generate(TABLE, params(TABLE), prompts(), KEY, sampling=sampling, max_new_tokens=N, group_size=2)

    for least in (2, 3, np.array([3] + [0] * (len(LENGTH) - 1))):
        cut = completions(run(least))
        for number, tokens in rows.items():
            own = np.broadcast_to(least, LENGTH.shape)[number // 10]
            ends = [end for end in range(2, N + 1) if tuple(tokens[end - 2 : end]) == pair and end > own]
            assert cut[number][0] == tokens[: ends[0] if ends else N]
            assert cut[number][2] == (FINISH_STOP if ends else FINISH_LENGTH)
        lengths.append(len(cut[0][0]))
    assert lengths[0] == 3 < lengths[1] == lengths[2]


def test_no_stop_token_comes_before_the_least_number_of_tokens():
    early = completions(by_table())
    assert min(len(tokens) for tokens, _, _ in early.values()) < 4
    late = by_table(STOPPED._replace(min_tokens=4))
    found = completions(late)
    assert min(len(tokens) for tokens, _, _ in found.values()) == 5  # four, and the one that stops
    assert "sampler_logp" in late.extras
    for number, (tokens, _, _) in early.items():
        if len(tokens) > 4:
            assert found[number][0] == tokens  # what would not have stopped early is as it was


def test_a_presence_penalty_that_large_forbids_to_say_anything_twice():
    found = completions(by_table(SamplingParams(presence_penalty=1e4), slots=4))
    assert all(len(set(tokens)) == N for tokens, _, _ in found.values())
    found = completions(by_table(SamplingParams(repetition_penalty=1e4, greedy=True)))
    said = {10 * row + member: set(TOKENS[row, : LENGTH[row]]) for row in range(len(LENGTH)) for member in (0, 1)}
    free = completions(by_table(SamplingParams(greedy=True)))
    assert any(set(tokens) & said[number] for number, (tokens, _, _) in free.items())
    # Of tokens with a positive logit nearly all is taken, also of those in the prompt.
    assert sum(len(set(tokens) & said[number]) for number, (tokens, _, _) in found.items()) == 0


def test_logits_that_are_no_numbers_abort_their_sequence_and_no_other():
    bad = 9

    def decode(params, tokens, *rest):
        hidden, cache = TABLE.decode(params, tokens, *rest)
        return jnp.where((tokens == bad)[..., None], jnp.nan, hidden), cache

    free = SamplingParams()
    whole = completions(by_table(free))
    for options in ({}, {"slots": 4, "refill": 2}):
        rollouts = by_table(free, decode=decode, **options)
        assert np.array_equal(rollouts.valid, np.asarray(rollouts.finish) != FINISH_ABORT)
        aborted = 0
        for number, (tokens, _, finish) in completions(rollouts).items():
            expected = whole[number][0]
            fails = bad in expected[: N - 1]
            assert tokens == (expected[: expected.index(bad) + 1] if fails else expected)
            assert finish == (FINISH_ABORT if fails else FINISH_LENGTH)
            aborted += fails
        assert 0 < aborted < len(whole)


def test_a_vocabulary_of_which_nothing_is_allowed_aborts_at_once():
    allowed = jnp.zeros(V, bool)
    weights, some = params(TABLE), prompts()
    run = jax.jit(
        lambda allowed: generate(
            TABLE, weights, some, KEY, sampling=SamplingParams(allowed=allowed), max_new_tokens=N, group_size=2
        )
    )
    rollouts = run(allowed)
    assert np.all(np.asarray(rollouts.finish) == FINISH_ABORT)
    assert np.array_equal(rollouts.length, np.repeat(LENGTH[:, None], 2, axis=1))
    some = run(allowed.at[jnp.array([2, 5])].set(True))
    assert set(np.asarray(some.tokens)[np.asarray(some.mask) > 0].tolist()) == {2, 5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots must be at least 1, and refill between 1 and slots, got 0 and 1"),
        ({"slots": 3, "refill": 4}, "refill between 1 and slots, got 3 and 4"),
        ({"slots": 3, "policy": POLICY._replace(insert=None)}, r"3 slots for 14 sequences need .*\(Policy.insert\)"),
        ({"sampling": SamplingParams(stop_sequences=((),))}, "stop_sequences must not hold an empty one"),
        (
            {"sampling": SamplingParams(temperature=jnp.ones(3))},
            r"sampling.temperature must be a number, \[P\] with P = 7, or \[P, G\] with P, G = 7, 2; got shape \(3,\)",
        ),
        (
            {"sampling": SamplingParams(allowed=jnp.ones((14, V), bool))},
            r"sampling.allowed must be \[V\], \[P, V\] with P = 7, or \[P, G, V\] with P, G = 7, 2; got shape \(14,",
        ),
        (
            {"sampling": SamplingParams(logit_bias=jnp.ones(1))},
            r"logit_bias must be \[16\] or \[14, 16\], got",
        ),
        (
            {"sampling": SamplingParams(stop_tokens=jnp.ones((14, 1), int))},
            r"sampling.stop_tokens must be \[K\], \[P, K\] with P = 7, or \[P, G, K\] .* got shape \(14, 1\)",
        ),
        ({"sampling": SamplingParams(stop_tokens=[3])}, r"stop_tokens must be a tuple, or an array .* got \[3\]"),
        ({"sampling": SamplingParams(stop_sequences=(1, 2))}, r"must be a tuple of tuples of token ids, got \(1, 2\)"),
        ({"sampling": SamplingParams(temperature=[1.0])}, r"temperature must be a number, or an array .* got \[1.0\]"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        generate(
            **{
                "policy": POLICY,
                "params": params(),
                "prompts": prompts(),
                "key": KEY,
                "max_new_tokens": N,
                "group_size": 2,
            }
            | options
        )


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (jnp.array([0] * 7), "max_new_tokens must be between 1 and max_new_tokens=7, got 0 for prompt 0"),
        (jnp.array([1] * 6 + [8]), "got 8 for prompt 6; which is the static limit"),
        (jnp.ones(3, int), r"must be \[P\] = \[7\] or \[P, G\] = \[7, 2\], got \(3,\)"),
    ],
)
def test_limits_that_do_not_fit_are_refused(limit, message):
    with pytest.raises(ValueError, match=message):
        generate(POLICY, params(), prompts(max_new_tokens=limit), KEY, max_new_tokens=N, group_size=2)


def test_no_prompt_at_all_is_refused():
    with pytest.raises(ValueError, match="prompts hold no prompt"):
        generate(POLICY, params(), Prompts(jnp.zeros((0, 3), int), jnp.zeros(0, int)), KEY, max_new_tokens=2)

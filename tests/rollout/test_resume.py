"""Sequences sampled in several calls against the same sequences sampled in one `generate`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import models
from jaxrl_post.rollout import Prompts, SamplingParams, generate
from jaxrl_post.rollout.resume import begin, resume
from jaxrl_post.types import FINISH_ABORT, FINISH_LENGTH, FINISH_NONE, FINISH_STOP
from tests.rollout.table import markov

V, N, G = 16, 7, 2
LENGTH = np.array([3, 1, 5, 2])
TOKENS = np.random.default_rng(0).integers(0, V, (len(LENGTH), 5))
KEY = jax.random.key(5)
DECODER = models.decoder(vocab_size=V, width=16, layers=2, heads=4, kv_heads=2, mlp_width=32, init_std=0.4)
STOPPED = SamplingParams(temperature=0.8, stop_tokens=(3, 9, 12))
TABLE = markov(V)


@functools.cache
def params(policy):
    return jax.jit(policy.init)(jax.random.key(0))


def prompts(group=G, **others):
    ids = jnp.arange(len(LENGTH) * group, dtype=jnp.uint32).reshape(-1, group) + 30
    return Prompts(jnp.asarray(TOKENS), jnp.asarray(LENGTH), id=ids, **others)


def jitted(function, policy, **options):
    return jax.jit(functools.partial(function, policy, **options))


@functools.cache
def opened(budget, total):
    """One sequence for each prompt, with its first tokens."""
    return jitted(begin, TABLE, max_new_tokens=budget, total=total)(params(TABLE), prompts(1), KEY)


def in_pieces(policy, sampling, budget, *, some=None, weights=None, total=N, calls=None):
    """All calls that it takes, each with a version of its own; one program serves all but the first."""
    some, weights = prompts() if some is None else some, params(policy) if weights is None else weights
    first = jitted(begin, policy, sampling=sampling, max_new_tokens=budget, total=N, group_size=G)
    more = jitted(resume, policy, sampling=sampling, max_new_tokens=budget)
    out = first(weights, some, KEY)
    number = 1
    while np.any(out.finish == FINISH_NONE):
        out = more(weights, out, KEY, total=jnp.asarray(total), version=jnp.asarray(number))
        number += 1
        assert number < 2 * N
    assert calls is None or number == calls
    assert more._cache_size() <= 1
    return out


def assert_same(found, expected):
    inside = np.arange(expected.tokens.shape[1]) < np.asarray(expected.length).reshape(-1, 1)
    for name in ("length", "finish", "valid", "id", "mask", "step"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    np.testing.assert_array_equal(np.asarray(found.tokens)[inside], np.asarray(expected.tokens)[inside])
    np.testing.assert_allclose(found.logp, expected.logp, atol=1e-5)
    assert found.extras.keys() == expected.extras.keys()
    for name, x in expected.extras.items():
        np.testing.assert_allclose(found.extras[name], x, atol=1e-5, err_msg=name)


@functools.cache
def whole(policy, sampling=STOPPED):
    return jitted(generate, policy, sampling=sampling, max_new_tokens=N, group_size=G)(params(policy), prompts(), KEY)


@pytest.mark.parametrize("budget", [2, pytest.param(5, marks=pytest.mark.nightly)])
def test_pieces_of_any_size_are_what_one_generate_samples_and_each_token_has_its_version(budget):
    expected = whole(DECODER)
    assert set(np.asarray(expected.finish).reshape(-1).tolist()) == {FINISH_STOP, FINISH_LENGTH}
    found = in_pieces(DECODER, STOPPED, budget, calls=-(-N // budget))
    assert_same(found, expected)
    for row, length in enumerate(np.asarray(found.length).reshape(-1)):
        first = LENGTH[row // G]
        versions = [count // budget for count in range(length - first)]
        assert found.version[row].tolist() == [-1] * first + versions + [-1] * (5 + N - length)


def test_penalties_of_the_transcript_and_min_tokens_hold_across_the_cut():
    sampling = STOPPED._replace(min_tokens=4, repetition_penalty=1.5, top_k=12)
    options = {"sampling": sampling, "max_new_tokens": N, "group_size": G}
    expected = jitted(generate, TABLE, **options)(params(TABLE), prompts(), KEY)
    counts = np.asarray(expected.length) - LENGTH[:, None]
    # It says something: without min_tokens sequences end early, and with it none before the fourth token.
    assert np.any(np.asarray(whole(TABLE).length) - LENGTH[:, None] < 4)
    assert counts.min() >= 4
    assert counts.min() < N
    assert_same(in_pieces(TABLE, sampling, 3), expected)


def test_a_stop_sequence_ends_a_completion_also_where_a_cut_goes_through_it():
    free = whole(TABLE, SamplingParams())
    rows = np.asarray(free.tokens)
    # Tokens 1 to 3 of the first, 2 and 3 of the fifth; pieces of two end behind tokens 1, 3, 5.
    first, fifth = LENGTH[0], LENGTH[2]
    sequences = (tuple(rows[0, first + 1 : first + 4].tolist()), tuple(rows[4, fifth + 1 : fifth + 3].tolist()))
    sampling = SamplingParams(stop_sequences=sequences)
    found = in_pieces(TABLE, sampling, 2)
    for row, number in enumerate(np.asarray(found.length).reshape(-1)):
        start = LENGTH[row // G]
        said = rows[row, start : start + N].tolist()
        ends = [
            end
            for end in range(1, N + 1)
            if any(len(s) <= end and tuple(said[end - len(s) : end]) == s for s in sequences)
        ]
        assert number - start == (ends[0] if ends else N)
        assert np.asarray(found.finish).reshape(-1)[row] == (FINISH_STOP if ends else FINISH_LENGTH)
        assert np.asarray(found.tokens)[row, start:number].tolist() == said[: number - start]
    assert np.asarray(found.finish).reshape(-1)[[0, 4]].tolist() == [FINISH_STOP] * 2
    assert found.mask.sum() == (np.asarray(found.length) - LENGTH[:, None]).sum()


def test_a_cut_through_a_stop_sequence_does_not_make_it_end_before_the_least_number_of_tokens():
    rows = np.asarray(whole(TABLE, SamplingParams()).tokens)
    first, fifth = LENGTH[0], LENGTH[2]
    sequences = (tuple(rows[0, first + 1 : first + 3].tolist()), tuple(rows[4, fifth + 3 : fifth + 5].tolist()))
    for least in (2, 3):
        sampling = SamplingParams(stop_sequences=sequences, min_tokens=least)
        found = in_pieces(TABLE, sampling, 2)
        assert_same(found, whole(TABLE, sampling))
        counts = np.asarray(found.length).reshape(-1)[[0, 4]] - [first, fifth]
        assert (counts[0] == 3) == (least < 3)
        assert counts[1] == 5


def test_a_stop_sequence_does_not_reach_from_one_step_into_the_next():
    # Token v is always followed by v + 1, and 5 is the last of the prompt's turn.
    table = jnp.where(jnp.arange(V) == (jnp.arange(V)[:, None] + 1) % V, 50.0, 0.0)
    some = Prompts(jnp.array([[3]]), jnp.array([1]))
    sampling = SamplingParams(stop_sequences=((5, 6), (7, 8)))
    out = jitted(begin, TABLE, max_new_tokens=2, total=6, sampling=sampling)(table, some, KEY)
    out = jitted(resume, TABLE, max_new_tokens=5, sampling=sampling)(table, out, KEY, step=1)
    assert out.tokens[0, :6].tolist() == [3, 4, 5, 6, 7, 8]
    assert (out.length.item(), out.finish.item(), out.step[0].tolist()) == (6, FINISH_STOP, [-1, 0, 0, 1, 1, 1, -1])


def test_limits_and_temperatures_of_sequences_hold_over_all_calls():
    limits = np.array([[1, 2], [3, 4], [5, 6], [7, 1]])
    heat = jnp.linspace(0.3, 3.0, 8).reshape(4, 2)
    sampling = SamplingParams(temperature=heat, greedy=jnp.array([False, False, True, False]))
    some = prompts(max_new_tokens=jnp.asarray(limits))
    expected = jitted(generate, TABLE, sampling=sampling, max_new_tokens=N, group_size=G)(params(TABLE), some, KEY)
    found = in_pieces(TABLE, sampling, 2, some=some, total=limits)
    assert_same(found, expected)
    assert np.array_equal(np.asarray(found.length) - LENGTH[:, None], limits)


def test_sequences_that_have_ended_stay_as_they_are_to_the_bit_under_new_parameters():
    some = jitted(begin, TABLE, max_new_tokens=3, total=N, group_size=G, sampling=STOPPED)
    before = some(params(TABLE), prompts(), KEY)
    before = before.replace(rewards={"judge": before.mask * 0.5}, extras=before.extras | {"agent": before.step + 7})
    ended = np.asarray(before.finish).reshape(-1) != FINISH_NONE
    assert 0 < ended.sum() < len(ended)
    more = jitted(resume, TABLE, max_new_tokens=2, sampling=STOPPED)
    after = more(params(TABLE) + 1.5 * jnp.eye(V), before, KEY, version=9)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        old, new = (np.asarray(x) if x.shape[0] == 8 else np.asarray(x).reshape(-1) for x in (old, new))
        ended_here = ended if len(old) == 8 else slice(None)
        np.testing.assert_array_equal(new[ended_here], old[ended_here])
    # And the tokens that running sequences had are still there, with what was recorded of them.
    old = np.asarray(before.mask) > 0
    for name in ("tokens", "logp", "version", "step"):
        np.testing.assert_array_equal(np.asarray(getattr(after, name))[old], np.asarray(getattr(before, name))[old])
    fresh = (np.asarray(after.mask) > 0) & ~old
    assert fresh[~ended].sum(1).min() >= 1
    assert set(np.asarray(after.version)[fresh].tolist()) == {9}


def test_the_loop_is_over_with_the_last_sequence_that_runs():
    steps = []

    def decode(params, tokens, positions, cache):
        jax.debug.callback(lambda: steps.append(1))
        return params[tokens], cache

    out = opened(2, N)
    finish = jnp.full((4, 1), FINISH_STOP, jnp.int8).at[2].set(FINISH_NONE)
    room = out.mask.shape[1] - out.length[2, 0].item()
    more = jitted(resume, TABLE._replace(decode=decode), max_new_tokens=N)
    out = more(params(TABLE), out.replace(finish=finish), KEY, total=jnp.array([N, N, 5, N]))
    jax.effects_barrier()
    assert room >= 3
    assert len(steps) == 3
    assert out.length.reshape(-1).tolist() == [5, 3, 10, 4]


def test_a_sequence_ends_at_the_width_of_its_row_and_one_that_fills_it_gets_no_more():
    out = opened(2, 4)  # 9 places
    full = out.replace(length=out.length.at[0, 0].set(9))
    after = jitted(resume, TABLE, max_new_tokens=30)(params(TABLE), full, KEY)
    assert after.length.tolist() == [[9], [9], [9], [9]]
    assert set(after.finish.reshape(-1).tolist()) == {FINISH_LENGTH}
    np.testing.assert_array_equal(after.tokens[0], full.tokens[0])
    np.testing.assert_array_equal(after.mask[0], full.mask[0])


def test_nan_in_a_later_call_gives_up_that_sequence_alone():
    weights = params(TABLE)
    out = opened(3, N)
    lasts = [int(out.tokens[row, out.length[row, 0] - 1]) for row in range(4)]
    broken = weights.at[lasts[1]].set(jnp.nan)
    after = jitted(resume, TABLE, max_new_tokens=1)(broken, out, KEY)
    expected = [FINISH_ABORT if last == lasts[1] else FINISH_NONE for last in lasts]
    assert after.finish.reshape(-1).tolist() == expected
    assert after.valid.reshape(-1).tolist() == [state == FINISH_NONE for state in expected]
    assert after.length[1, 0] == out.length[1, 0]
    assert FINISH_NONE in expected


def test_log_probs_of_what_was_drawn_from_are_kept_when_the_truncation_changes():
    out = opened(2, 4)
    cut = jitted(resume, TABLE, max_new_tokens=1, sampling=SamplingParams(top_k=2))(params(TABLE), out, KEY)
    both = jitted(resume, TABLE, max_new_tokens=1)(params(TABLE), cut, KEY)
    assert "sampler_logp" not in out.extras
    for row in range(4):
        start, end = LENGTH[row], LENGTH[row] + 4
        log_probs = np.asarray(params(TABLE), np.float64)[np.asarray(both.tokens)[row, start - 1 : end - 1]]
        said = np.asarray(both.tokens)[row, start:end]
        expected = []
        for number, z in enumerate(log_probs):
            kept = np.sort(z)[-2:] if number == 2 else z
            expected.append(z[said[number]] - np.log(np.exp(kept).sum()))
        np.testing.assert_allclose(both.extras["sampler_logp"][row, start:end], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_penalties_that_count_tokens_of_one_call_are_refused(name):
    out = opened(2, 4)
    with pytest.raises(ValueError, match=f"{name} counts the tokens that one call samples"):
        resume(TABLE, params(TABLE), out, KEY, max_new_tokens=1, sampling=SamplingParams(**{name: 0.5}))


def test_wrong_arguments_say_what_is_wrong():
    some, weights, out = prompts(1), params(TABLE), opened(2, 4)
    own = some._replace(max_new_tokens=jnp.array([1, 6, 2, 3]))
    with pytest.raises(ValueError, match="must be at most total, of all calls, got 5 and 4"):
        begin(TABLE, weights, some, KEY, max_new_tokens=5, total=4)
    with pytest.raises(ValueError, match=r"prompts.max_new_tokens must be at most total=4, got 6"):
        begin(TABLE, weights, own, KEY, max_new_tokens=2, total=4)
    with pytest.raises(ValueError, match=r"total must be a number, \[P\] = \[4\] or \[P, G\] = \[4, 1\]"):
        resume(TABLE, weights, out, KEY, max_new_tokens=1, total=jnp.ones(3))
    with pytest.raises(ValueError, match="max_new_tokens and group_size must be at least 1"):
        resume(TABLE, weights, out, KEY, max_new_tokens=0)

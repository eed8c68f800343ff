"""Serial groups against trajectories and answers that are sampled one by one, and the pieces they are made of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import models
from jaxrl_post.data import to_rollouts
from jaxrl_post.rollout import (
    Exits,
    Prompts,
    SamplingParams,
    draw_exits,
    exit_prompts,
    generate,
    generate_exits,
    join_columns,
    merge_groups,
    thought_length,
)
from jaxrl_post.rollout.served import recompute_logp
from jaxrl_post.types import FINISH_LENGTH, FINISH_STOP

V, L, N, A, M = 12, 4, 6, 3, 3
TEXT = (7, 8)
KEY = jax.random.key(5)
SAMPLING = SamplingParams(temperature=0.9, stop_tokens=(1,))
EXITS = Exits(count=M, text=TEXT, end=(9,), max_new_tokens=A, whole=False)
POLICY = models.decoder(vocab_size=V, width=16, layers=1, heads=2, mlp_width=16, init_std=0.4)
PROMPTS = Prompts(
    jnp.array([[2, 3, 99, 99], [4, 5, 6, 2], [3, 99, 99, 99]]),
    jnp.array([2, 4, 1]),
    jnp.array([30, 10, 20]),
    jnp.arange(100, 100 + 3 * (M + 1), dtype=jnp.uint32).reshape(3, M + 1),
)


@functools.cache
def params():
    return jax.jit(POLICY.init)(jax.random.key(0))


@functools.cache
def alone_of(new):
    return jax.jit(functools.partial(generate, POLICY, sampling=SAMPLING, max_new_tokens=new))


@functools.cache
def serial(exits=EXITS, sampling=SAMPLING):
    return jax.jit(functools.partial(generate_exits, POLICY, exits=exits, sampling=sampling, max_new_tokens=N))


@functools.cache
def made(exits=EXITS, sampling=SAMPLING):
    return jax.device_get(serial(exits, sampling)(params(), PROMPTS, KEY, version=17))


def completion(rollouts, row):
    """Tokens and log-probs of the sampled part of a row."""
    on = np.asarray(rollouts.mask)[row] > 0
    return np.asarray(rollouts.tokens)[row][on].tolist(), np.asarray(rollouts.logp)[row][on]


def test_the_last_member_is_the_trajectory_that_would_have_been_sampled_alone():
    alone = alone_of(N)(params(), PROMPTS._replace(id=PROMPTS.id[:, -1:]), KEY)
    for group in range(3):
        tokens, logp = completion(made(), group * (M + 1) + M)
        expected, expected_logp = completion(alone, group)
        assert tokens == expected
        np.testing.assert_allclose(logp, expected_logp, rtol=1e-6)
    np.testing.assert_array_equal(made().length[:, -1], alone.length[:, 0])
    np.testing.assert_array_equal(made().finish[:, -1], alone.finish[:, 0])


def test_an_exit_is_the_thought_up_to_it_the_text_and_a_fresh_answer():
    width = L + N + len(TEXT)
    for group in range(3):
        whole, _ = completion(made(), group * (M + 1) + M)
        start = PROMPTS.tokens[group, : int(PROMPTS.length[group])].tolist()
        for member in range(M):
            row, cut = group * (M + 1) + member, int(made().extras["exit"][group, member])
            given = [*start, *whole[:cut], *TEXT]
            assert np.asarray(made().tokens)[row][: len(given)].tolist() == given
            # The answer that the same prompt, id and key give when it is sampled alone.
            prompt = Prompts(
                jnp.asarray(given + [0] * (width - len(given)))[None],
                jnp.array([len(given)]),
                id=PROMPTS.id[group : group + 1, member : member + 1],
            )
            alone = alone_of(A)(params(), prompt, KEY)
            tokens, logp = completion(made(), row)
            expected, expected_logp = completion(alone, 0)
            assert tokens == expected
            np.testing.assert_allclose(logp, expected_logp, rtol=2e-5, atol=2e-6)
            assert int(made().length[group, member]) == len(given) + len(tokens)


def test_where_only_answers_are_trained_every_sampled_token_is_trained_once_and_no_other():
    found = made()
    rows, width = found.mask.shape
    assert width == L + N + len(TEXT) + A
    for row in range(rows):
        group, member = divmod(row, M + 1)
        cut = int(found.extras["exit"][group, member])
        begin = int(PROMPTS.length[group]) + (0 if member == M else cut + len(TEXT))
        expected = (np.arange(width) >= begin) & (np.arange(width) < int(found.length[group, member]))
        np.testing.assert_array_equal(found.mask[row], expected)
        np.testing.assert_array_equal(found.version[row], np.where(expected, 17, -1))
        np.testing.assert_array_equal(found.step[row], np.where(expected, 0, -1))
        assert np.all(found.logp[row][~expected] == 0)
        assert np.all(found.extras["entropy"][row][~expected] == 0)


@pytest.mark.parametrize("top_p", [1.0, pytest.param(0.7, marks=pytest.mark.nightly)])
def test_a_whole_member_begins_with_the_thought_as_it_was_sampled_and_the_text_as_the_policy_gives_it(top_p):
    sampling = SAMPLING._replace(top_p=top_p)
    found, answers = made(EXITS._replace(whole=True), sampling), made(EXITS, sampling)
    np.testing.assert_array_equal(found.tokens, answers.tokens)
    score = jax.jit(models.score(POLICY, temperature=sampling.temperature), static_argnums=2)
    scored = score(params(), found, frozenset({"logp", "entropy"}), KEY)
    for row in range(found.mask.shape[0]):
        group, member = divmod(row, M + 1)
        begin, end = int(PROMPTS.length[group]), int(found.length[group, member])
        on = (np.arange(found.mask.shape[1]) >= begin) & (np.arange(found.mask.shape[1]) < end)
        np.testing.assert_array_equal(found.mask[row], on)
        np.testing.assert_array_equal(found.version[row], np.where(on, 17, -1))
        np.testing.assert_allclose(found.logp[row][on], np.asarray(scored.logp)[row][on], rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(found.extras["entropy"][row][on], np.asarray(scored.entropy)[row][on], atol=2e-4)
        cut = begin + int(found.extras["exit"][group, member])
        for name, x in {"logp": found.logp, **found.extras}.items():
            if name != "exit":
                np.testing.assert_array_equal(x[row][:cut], x[group * (M + 1) + M][:cut])
    assert ("sampler_logp" in found.extras) == (top_p < 1)


def test_exits_stand_in_order_and_ids_and_prompt_ids_are_those_given():
    places = made().extras["exit"]
    assert np.all(np.diff(places[:, :-1], axis=1) >= 0)
    assert np.all(places[:, :-1] <= places[:, -1:])
    assert np.all((places[:, :-1] >= 1) | (places[:, -1:] == 0))
    np.testing.assert_array_equal(made().id, PROMPTS.id)
    np.testing.assert_array_equal(made().prompt_id, [30, 10, 20])
    np.testing.assert_array_equal(places[:, -1:], np.asarray(thought_length(made(), (9,)))[:, -1:])


def test_a_serial_group_does_not_depend_on_the_batch_it_is_in():
    order = jnp.array([2, 0, 1])
    again = jax.device_get(serial()(params(), jax.tree.map(lambda x: x[order], PROMPTS), KEY, version=17))
    for place, group in enumerate(order.tolist()):
        np.testing.assert_array_equal(again.extras["exit"][place], made().extras["exit"][group])
        for member in range(M + 1):
            mine, theirs = place * (M + 1) + member, group * (M + 1) + member
            assert completion(again, mine)[0] == completion(made(), theirs)[0]


def test_without_ids_the_members_are_numbered_through():
    found = jax.eval_shape(serial(), params(), PROMPTS._replace(id=None), KEY)
    assert found.id.shape == (3, M + 1)
    with pytest.raises(ValueError, match=r"prompts.id must be \[P, m \+ 1\] = \[3, 4\], got \(3, 2\)"):
        jax.eval_shape(serial(), params(), PROMPTS._replace(id=jnp.zeros((3, 2), jnp.uint32)), KEY)


def test_places_are_uniform_over_the_thought():
    drawn = np.asarray(draw_exits(KEY, jnp.arange(4000), jnp.full(4000, 5), count=2))
    counts = np.bincount(drawn.reshape(-1), minlength=6)
    assert counts[0] == 0
    # 8000 draws of probability 1/5 have a deviation of 36.
    np.testing.assert_allclose(counts[1:], 1600, atol=4 * 36)
    assert np.all(drawn[:, 0] <= drawn[:, 1])


def test_a_thought_of_one_token_is_left_behind_it_and_no_thought_at_once():
    found = draw_exits(KEY, jnp.arange(3), jnp.array([1, 0, 2]), count=4)
    np.testing.assert_array_equal(found[:2], [[1] * 4, [0] * 4])
    assert set(np.asarray(found[2]).tolist()) <= {1, 2}
    one = to_rollouts([[2, 3]], [[[5]]], length=4)
    tokens, length = exit_prompts(one, jnp.array([[0, 1]]), (9,))
    assert [row[:n].tolist() for row, n in zip(tokens, length, strict=True)] == [[2, 3, 9], [2, 3, 5, 9]]


def test_a_cut_beyond_the_trajectory_counts_as_its_end():
    tokens, length = exit_prompts(to_rollouts([[2]], [[[5, 6]]], length=5), jnp.array([[2, 3, 99]]), (8, 9))
    assert length.tolist() == [5, 5, 5]
    assert tokens.tolist() == [[2, 5, 6, 8, 9, 0, 0]] * 3


def test_a_thought_ends_at_the_first_mark_or_before_the_stop_token():
    completions = [[5, 8, 9, 6, 8, 9], [8, 9], [5, 9, 8], [9, 8, 9, 9], [5, 6, 8], []]
    rows = to_rollouts([[8, 9]] * 6, [[c] for c in completions], length=8)
    stops = jnp.array([[FINISH_STOP]] * 5 + [[FINISH_LENGTH]], jnp.int8)
    marked = thought_length(rows.replace(finish=stops), (8, 9))
    # The mark in the prompt does not count, nor one that is cut off.
    np.testing.assert_array_equal(marked, [[1], [0], [2], [1], [2], [0]])
    whole = thought_length(rows.replace(finish=stops))
    np.testing.assert_array_equal(whole, [[5], [1], [2], [3], [2], [0]])
    sequences = thought_length(rows.replace(finish=stops), stop_sequences=((6, 8, 9), (8, 9), (9, 9)))
    np.testing.assert_array_equal(sequences, [[3], [0], [2], [2], [2], [0]])
    cut = thought_length(rows.replace(finish=jnp.full((6, 1), FINISH_LENGTH, jnp.int8)))
    np.testing.assert_array_equal(cut, [[len(c)] for c in completions])


def test_groups_of_several_prompts_become_one_without_moving_a_row():
    parts = to_rollouts([[2], [2, 3], [4], [4, 5]], [[[6], [7]]] * 4, length=3, prompt_id=[1, 1, 5, 5])
    merged = merge_groups(parts, 2)
    np.testing.assert_array_equal(merged.tokens, parts.tokens)
    np.testing.assert_array_equal(merged.id, np.arange(8).reshape(2, 4))
    np.testing.assert_array_equal(merged.length, [[2, 2, 3, 3]] * 2)
    np.testing.assert_array_equal(merged.prompt_id, [1, 5])
    with pytest.raises(ValueError, match="count must divide the number of groups 4, got 3"):
        merge_groups(parts, 3)


def test_extras_of_members_and_of_tokens_go_with_them():
    rows = to_rollouts([[2], [3]], [[[4]], [[5]]], length=2), to_rollouts([[2], [3]], [[[6, 7]], [[8]]], length=3)
    one, two = (
        part.replace(extras={"turns": jnp.array([[n], [n + 1]]), "others": jnp.ones((2, 2 + i, 3)) * n})
        for i, (part, n) in enumerate(zip(rows, (1, 5), strict=True))
    )
    found = join_columns([one, two]).extras
    np.testing.assert_array_equal(found["turns"], [[1, 5], [2, 6]])
    np.testing.assert_array_equal(found["others"][:, :, 0], [[1, 1, 0], [5, 5, 5]] * 2)
    assert found["others"].shape == (4, 3, 3)
    np.testing.assert_array_equal(merge_groups(one, 2).extras["turns"], [[1, 2]])
    assert merge_groups(one, 2).extras["others"].shape == (2, 2, 3)
    with pytest.raises(ValueError, match=r"extras must be \[P, G, ...\] or \[B, T, ...\], got shapes \[\(3,\)"):
        join_columns([one.replace(extras={"x": jnp.ones(3)})] * 2)


def test_what_cannot_be_joined_or_cut_is_an_error():
    one, two = to_rollouts([[2]], [[[3]]], length=2), to_rollouts([[2], [3]], [[[3]], [[4]]], length=2)
    with pytest.raises(ValueError, match="parts must have the same prompts and extras: part 0 has 1 prompts"):
        join_columns([one, two])
    with pytest.raises(ValueError, match=r"part 1 has 1 and \['entropy'\]"):
        join_columns([one, one.replace(extras={"entropy": one.mask})])
    with pytest.raises(ValueError, match="text must hold at least one token"):
        exit_prompts(one, jnp.array([[1]]), ())
    with pytest.raises(ValueError, match="one trajectory per prompt, got groups of 2"):
        exit_prompts(merge_groups(two, 2), jnp.array([[1]]), (9,))
    with pytest.raises(ValueError, match="a row for each of 2 prompts"):
        exit_prompts(two, jnp.array([[1]]), (9,))
    with pytest.raises(ValueError, match="count must be at least 1 exit"):
        draw_exits(KEY, jnp.arange(2), jnp.ones(2, int), count=0)


def test_limits_and_sampling_of_each_prompt_are_refused_by_name():
    prompts, exits = Prompts(jnp.array([[2], [3]]), jnp.array([1, 1])), Exits(1, (7,), (), 2)
    with pytest.raises(ValueError, match=r"prompts\.max_new_tokens does not apply"):
        generate_exits(
            None, None, prompts._replace(max_new_tokens=jnp.ones(2, int)), KEY, exits=exits, max_new_tokens=3
        )
    warm = SamplingParams(temperature=jnp.ones(2), min_p=jnp.zeros((2, 1)))
    with pytest.raises(ValueError, match="sampling's temperature, min_p must be the same"):
        generate_exits(None, None, prompts, KEY, exits=exits, sampling=warm, max_new_tokens=3)


def test_the_text_of_an_exit_is_scored_as_tokens_are_sampled_without_dropout():
    policy = models.decoder(vocab_size=V, width=16, layers=1, heads=2, lora=models.Lora(rank=4, dropout=0.5))
    weights = jax.tree.map(lambda x: x + 0.1, policy.init(jax.random.key(0)))  # adapters that say something
    exits = EXITS._replace(whole=True)
    sample = jax.jit(functools.partial(generate_exits, policy, exits=exits, max_new_tokens=N))
    found = sample(weights, PROMPTS, KEY)
    plain = jax.jit(models.score(policy).still, static_argnums=2)(weights, found, frozenset({"logp"}), KEY)
    np.testing.assert_allclose(found.logp, np.where(found.mask > 0, plain.logp, 0), atol=2e-5)
    again = jax.jit(functools.partial(recompute_logp, models.score(policy)))(weights, found, KEY)
    np.testing.assert_allclose(again.logp, found.logp, atol=2e-5)

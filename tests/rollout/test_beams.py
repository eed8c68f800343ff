"""`rollout.beam_search` against transformers and against enumeration; `rollout.best_of_n` against sorting by hand."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import models
from jaxrl_post.data import to_rollouts
from jaxrl_post.rollout import Prompts
from jaxrl_post.rollout.beams import beam_search, best_of_n
from jaxrl_post.types import FINISH_ABORT, FINISH_LENGTH, FINISH_STOP

V, LENGTH = 5, np.array([3, 1])
PROMPTS = np.array([[4, 0, 2, 9], [1, 9, 9, 9]])
POLICY = models.decoder(vocab_size=V, width=16, layers=2, heads=4, kv_heads=2, mlp_width=32, init_std=0.5, window=3)


@functools.cache
def params():
    return jax.jit(POLICY.init)(jax.random.key(3))


def search(policy=POLICY, prompts=PROMPTS, length=LENGTH, limit=None, weights=None, **options):
    given = Prompts(jnp.asarray(prompts), jnp.asarray(length), max_new_tokens=limit)
    return jax.jit(functools.partial(beam_search, policy, **options))(params() if weights is None else weights, given)


@functools.cache
def three():
    return search(beams=3, max_new_tokens=4)


def completions(out):
    """`[P][K]` lists of new tokens, and their log-probs."""
    tokens, mask, logp = (np.asarray(x) for x in (out.tokens, out.mask > 0, out.logp))
    size = out.reward.shape[1]
    said = [t[m].tolist() for t, m in zip(tokens, mask, strict=True)]
    logs = [x[m] for x, m in zip(logp, mask, strict=True)]
    return [said[i : i + size] for i in range(0, len(said), size)], [
        logs[i : i + size] for i in range(0, len(logs), size)
    ]


@functools.cache
def enumerated(steps):
    """For each prompt all completions of so many tokens with their log-probs `[steps]` in float64, the best first."""
    found = []
    for row, length in zip(PROMPTS, LENGTH, strict=True):
        said = np.array(list(itertools.product(range(V), repeat=steps)))
        tokens = np.concatenate([np.tile(row[:length], (len(said), 1)), said], axis=1)
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        hidden = np.asarray(jax.jit(POLICY.hidden)(params(), tokens, positions)[0], np.float64)
        z = (hidden @ np.asarray(POLICY.unembed(params()).weight, np.float64).T)[:, length - 1 : -1]
        logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
        logp = np.take_along_axis(logp, said[..., None], -1)[..., 0]
        order = np.argsort(-logp.sum(-1), kind="stable")
        found.append((said[order].tolist(), logp[order]))
    return found


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A model of transformers whose layers see five tokens, and ours with its weights."""
    pytest.importorskip("transformers")
    from tests.models import hf

    directory = tmp_path_factory.mktemp("mistral")
    hf.model("mistral").save_pretrained(directory)
    return hf.model("mistral"), models.from_pretrained(directory)


@pytest.mark.parametrize(
    ("beams", "stops", "length_penalty", "early_stopping"),
    [
        (3, tuple(range(10)), 1.0, False),
        pytest.param(4, tuple(range(10)), 1.0, True, marks=pytest.mark.nightly),
        (4, tuple(range(5, 25)), 2.0, "never"),
        pytest.param(2, tuple(range(4, 12)), -0.5, "never", marks=pytest.mark.nightly),
    ],
)
def test_beams_and_scores_are_those_of_transformers(theirs, beams, stops, length_penalty, early_stopping):
    import torch

    model, ours = theirs
    prompts, length = np.random.default_rng(1).integers(0, 37, (4, 5)), np.array([3, 1, 5, 2])
    options = {"length_penalty": length_penalty, "early_stopping": early_stopping, "max_new_tokens": 8}
    out = search(ours.policy, prompts, length, weights=ours.params, beams=beams, stop_tokens=stops, **options)
    found, scores = completions(out)[0], np.asarray(out.extras["beam_score"])
    finish = np.asarray(out.finish)
    assert np.asarray(out.valid).all()
    for p in range(4):
        alone = torch.tensor(prompts[p : p + 1, : length[p]])
        expected = model.generate(
            alone,
            attention_mask=torch.ones_like(alone),
            num_beams=beams,
            num_return_sequences=beams,
            do_sample=False,
            eos_token_id=list(stops),
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        np.testing.assert_allclose(scores[p], expected.sequences_scores.numpy(), rtol=1e-5, atol=1e-5)
        for k, row in enumerate(expected.sequences[:, length[p] :].tolist()):
            end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
            assert found[p][k] == row[:end]
            assert finish[p, k] == (FINISH_STOP if row[end - 1] in stops else FINISH_LENGTH)


@pytest.mark.parametrize("length_penalty", [pytest.param(-5.0, marks=pytest.mark.nightly), 10.0])
def test_what_a_beam_is_worth_does_not_decide_whether_there_is_one(length_penalty):
    out = search(beams=V * V + 2, max_new_tokens=2, length_penalty=length_penalty)
    assert np.asarray(out.valid).tolist() == [[True] * V**2 + [False] * 2] * 2


def test_with_a_beam_for_every_sequence_all_are_found_in_the_order_of_their_log_probs():
    out = search(beams=V * V + 2, max_new_tokens=2, length_penalty=0.0)
    found, logp = completions(out)
    for p, (expected, right) in enumerate(enumerated(2)):
        assert found[p][: V * V] == expected
        np.testing.assert_allclose(np.stack(logp[p][: V * V]), right, atol=1e-5)
        np.testing.assert_allclose(out.extras["beam_score"][p, : V * V], right.sum(-1), atol=1e-5)
    # There are two beams more than sequences.
    assert np.asarray(out.valid).tolist() == [[True] * V**2 + [False] * 2] * 2
    assert np.asarray(out.finish)[:, V * V :].tolist() == [[FINISH_ABORT] * 2] * 2


def test_one_beam_is_greedy_and_more_beams_find_no_less_probable_sequence():
    best = np.array([right[0].sum() for _, right in enumerated(4)])
    greedy, wide = (search(beams=k, max_new_tokens=4, length_penalty=0.0) for k in (1, 30))
    for p, (said, right) in enumerate(enumerated(4)):
        # The greedy completion is the one whose every token is the best of those with the same beginning.
        here = list(range(len(said)))
        for t in range(4):
            token = said[max(here, key=lambda i: right[i, t])][t]
            here = [i for i in here if said[i][t] == token]
        assert completions(greedy)[0][p][0] == said[here[0]]
    assert (np.asarray(greedy.extras["beam_score"])[:, 0] <= best + 1e-5).all()
    np.testing.assert_allclose(np.asarray(wide.extras["beam_score"])[:, 0], best, atol=1e-5)


def test_a_policy_that_keeps_no_keys_and_values_finds_the_same():
    plain = models.recompute_cache(POLICY.hidden)
    slow = POLICY._replace(init_cache=plain[0], prefill=plain[1], decode=plain[2], insert=None)
    out = search(slow, beams=3, max_new_tokens=4)
    assert completions(out)[0] == completions(three())[0]
    np.testing.assert_allclose(out.extras["beam_score"], three().extras["beam_score"], atol=1e-5)


def test_a_prompt_may_have_a_limit_of_its_own():
    limited = search(limit=jnp.array([2, 4]), beams=3, max_new_tokens=4)
    short = search(beams=3, max_new_tokens=2)
    assert completions(limited)[0] == [completions(short)[0][0], completions(three())[0][1]]
    assert np.asarray(limited.length).tolist() == [[5] * 3, [5] * 3]


def test_a_prompt_with_nan_is_not_valid_and_the_others_are_as_without_it():
    def decode(weights, tokens, positions, cache):
        hidden, cache = POLICY.decode(weights, tokens, positions, cache)
        return jnp.where(jnp.arange(len(tokens))[:, None, None] == 1, jnp.nan, hidden), cache

    out = search(POLICY._replace(decode=decode), beams=3, max_new_tokens=4)
    assert np.asarray(out.valid).tolist() == [[False] * 3, [True] * 3]
    assert np.asarray(out.finish)[0].tolist() == [FINISH_ABORT] * 3
    assert completions(out)[0][1] == completions(three())[0][1]


def test_a_traced_length_that_is_none_makes_its_beams_not_valid():
    out = search(length=np.array([3, 0]), beams=3, max_new_tokens=4)
    assert out.valid.tolist() == [[True] * 3, [False] * 3]
    assert out.finish[1].tolist() == [FINISH_ABORT] * 3
    assert completions(out)[0][0] == completions(three())[0][0]


def test_stopping_early_may_be_asked_for_with_a_bool_of_numpy():
    options = {"beams": 3, "max_new_tokens": 5, "stop_tokens": (0, 1), "length_penalty": 2.0}
    early, same, late = (completions(search(early_stopping=stop, **options))[0] for stop in (True, np.True_, False))
    assert early == same != late


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "beams must be at least 1, got 0"),
        ({"early_stopping": "always"}, "early_stopping must be True, False or \"never\", got 'always'"),
        ({"limit": jnp.ones((2, 2), int)}, r"must be \[P\], one for all beams of a prompt, got \(2, 2\)"),
        ({"stop_tokens": tuple(range(5))}, "12 continuations of 2 beams need a vocabulary of 6, got 5"),
        ({"max_new_tokens": 0}, "max_new_tokens and group_size must be at least 1, got 0"),
    ],
)
def test_what_makes_no_search_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        search(**({"beams": 2, "max_new_tokens": 3} | options))


def groups():
    """Two groups of four; the second has one valid member, and a number for each of its prompts, members and tokens."""
    said = [[[10 * p + g] * (g + 1) for g in range(4)] for p in range(2)]
    rollouts = to_rollouts([[7], [8, 8]], said, length=6)
    valid = jnp.array([[True] * 4, [False, False, True, False]])
    extras = {"member": jnp.arange(8.0).reshape(2, 4), "row": jnp.arange(48.0).reshape(8, 6), "prompt": jnp.ones(2)}
    rewards = {"right": jnp.arange(8.0).reshape(2, 4)}
    return rollouts.replace(valid=valid, extras=extras, rewards=rewards)


def test_the_best_members_come_first_and_what_is_said_of_them_goes_with_them():
    scores = jnp.array([[0.5, 2.0, jnp.nan, 2.0], [9.0, 8.0, 1.0, jnp.inf]])
    best = jax.jit(best_of_n, static_argnames="n")(groups(), scores, n=3)
    # The first of two equal scores is first; NaN comes last, and so does what is not valid, in its order.
    order = np.array([[1, 3, 0], [2, 0, 1]])
    rows = (order + np.array([[0], [4]])).reshape(-1)
    for name in ("tokens", "mask", "logp", "step", "version"):
        np.testing.assert_array_equal(getattr(best, name), np.asarray(getattr(groups(), name))[rows])
    for name in ("reward", "valid", "length", "finish", "id"):
        before = np.asarray(getattr(groups(), name))
        np.testing.assert_array_equal(getattr(best, name), np.take_along_axis(before, order, 1))
    assert np.asarray(best.valid).tolist() == [[True] * 3, [True, False, False]]
    np.testing.assert_array_equal(best.extras["member"].reshape(-1), rows)
    np.testing.assert_array_equal(best.rewards["right"].reshape(-1), rows)
    np.testing.assert_array_equal(best.extras["row"][:, 0], 6 * rows)
    np.testing.assert_array_equal(best.extras["prompt"], np.ones(2))
    assert best.prompt_id.tolist() == groups().prompt_id.tolist()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint32", "int32", "bool", "bfloat16"])
def test_scores_may_be_counts(dtype):
    low, high = (jnp.iinfo(dtype).min, jnp.iinfo(dtype).max) if "int" in dtype else (0, 1)
    scores = jnp.asarray([[low, high, low, low], [high, low, high, high]], dtype)
    best = best_of_n(groups(), scores, n=2)
    assert best.extras["member"].tolist()[0] == [1, 0]
    assert best.extras["member"].tolist()[1][0] == 6  # the one that is valid


def test_a_valid_member_of_the_lowest_score_ranks_before_one_that_is_not_valid():
    scores = jnp.array([[1.0, 2.0, 3.0, 4.0], [5.0, 5.0, -jnp.inf, 5.0]])
    best = best_of_n(groups(), scores)
    assert best.tokens[:, :2].tolist() == [[7, 3], [8, 8]]
    assert int(best.tokens[1, 2]) == 12


@pytest.mark.parametrize(
    ("shape", "n", "message"), [((2, 3), 1, r"\[2, 4\], got shape \(2, 3\)"), ((2, 4), 5, "got 5")]
)
def test_scores_and_numbers_that_do_not_fit_the_groups_are_refused(shape, n, message):
    with pytest.raises(ValueError, match=message):
        best_of_n(groups(), jnp.zeros(shape), n)

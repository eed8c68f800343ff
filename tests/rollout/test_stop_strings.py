"""Completions that end where a text comes up, against Python's own search in what is said without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.data import token_bytes
from jaxrl_post.rollout import Exits, Prompts, SamplingParams, begin, generate, generate_exits, resume
from jaxrl_post.sampling import stop_strings
from jaxrl_post.types import FINISH_LENGTH, FINISH_NONE, FINISH_STOP
from tests.rollout import test_host as host
from tests.rollout.table import markov

V, N, P, G = 12, 9, 4, 2
PIECES = [b"a", b"b", b"ab", b"ba", b"aab", b"bb", b"", b"a", b"bba", b"aa", b"b", b"abab"]
TEXTS = ["abbab", "babbb", "aaaa"]
STOP = stop_strings(TEXTS, PIECES)
TABLE = markov(V)
PARAMS = TABLE.init(jax.random.key(0))
KEY = jax.random.key(2)
PROMPTS = Prompts(jnp.arange(P)[:, None], jnp.ones(P, int))


def said(rollouts):
    tokens, mask = np.asarray(rollouts.tokens), np.asarray(rollouts.mask) > 0
    return [row[chosen].tolist() for row, chosen in zip(tokens, mask, strict=True)]


@functools.cache
def freely():
    sample = functools.partial(generate, TABLE, max_new_tokens=N, group_size=G)
    return said(jax.jit(sample)(PARAMS, PROMPTS, KEY))


def cut(tokens, least=0):
    """The tokens up to the first in which a text comes up behind so many, and whether there is one."""
    text = b""
    for count, token in enumerate(tokens):
        before, text = len(text), text + PIECES[token]
        ends = range(before + 1, len(text) + 1)
        if count >= least and any(text[:end].endswith(stop.encode()) for end in ends for stop in TEXTS):
            return tokens[: count + 1], True
    return tokens, False


def check(rollouts, least=0):
    finish = np.asarray(rollouts.finish).reshape(-1).tolist()
    expected = [cut(tokens, least) for tokens in freely()]
    assert said(rollouts) == [tokens for tokens, _ in expected]
    assert finish == [FINISH_STOP if stopped else FINISH_LENGTH for _, stopped in expected]
    return {(stopped, len(tokens)) for tokens, stopped in expected}


@pytest.mark.parametrize("options", [{}, {"slots": 3, "refill": 1}])
def test_a_completion_ends_with_the_token_in_which_a_text_comes_up(options):
    @jax.jit
    def sample(machine, least):
        sampling = SamplingParams(stop_strings=machine, min_tokens=least)
        return generate(TABLE, PARAMS, PROMPTS, KEY, sampling=sampling, max_new_tokens=N, group_size=G, **options)

    lengths = check(sample(STOP, 0))
    assert {stopped for stopped, _ in lengths} == {True, False}
    assert check(sample(STOP, 4), 4) != lengths
    never = stop_strings(["bbbb" * N], PIECES).table[: len(STOP.table)]  # another table of the same shape: no end
    assert said(sample(jax.tree.map(lambda _: np.maximum(never, 0), STOP), 0)) == freely()
    assert sample._cache_size() == 1


def test_a_cut_may_go_through_a_text():
    sampling = SamplingParams(stop_strings=STOP)
    for least in (0, 4):
        how = {"sampling": sampling._replace(min_tokens=least), "max_new_tokens": 2}
        out = jax.jit(functools.partial(begin, TABLE, total=N, group_size=G, **how))(PARAMS, PROMPTS, KEY)
        more = jax.jit(functools.partial(resume, TABLE, total=N, **how))
        while np.any(out.finish == FINISH_NONE):
            out = more(PARAMS, out, KEY)
        check(out, least)


def test_a_text_ends_an_action_and_does_not_reach_from_one_into_the_next():
    # After a the policy says xy and ends its turn, after b it would say zxy: "yz" stands across the turns.
    params = host.script("axy$", "bzxy$")

    def play(*texts):
        stop = stop_strings(texts, token_bytes(host.TOKENIZER)) if texts else None
        how = {"max_turn_tokens": 5, "max_turns": 2, "sampling": host.STOP._replace(stop_strings=stop)}
        return host.text(host.play(lambda task, turn, action: ("b", 0.0, turn == 1), ["a"], params, **how), 0)

    assert play()[:8] == "aXY$bZXY"
    assert play("yz")[:8] == "aXY$bZXY"
    assert play("yz", "zx")[:7] == "aXY$bZX"
    assert "ZXY" not in play("yz", "zx")


def test_who_cannot_heed_them_says_so():
    exits = Exits(count=1, text=(1,), end=(), max_new_tokens=2)
    sampling = SamplingParams(stop_strings=STOP)
    with pytest.raises(ValueError, match="stop_strings do not apply where thoughts are left"):
        generate_exits(TABLE, PARAMS, PROMPTS, KEY, exits=exits, sampling=sampling, max_new_tokens=3)
    with pytest.raises(ValueError, match=r"must be what sampling.stop_strings makes of texts .* got \('a',\)"):
        generate(TABLE, PARAMS, PROMPTS, KEY, sampling=SamplingParams(stop_strings=("a",)), max_new_tokens=3)

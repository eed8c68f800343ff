"""Attacks on judges by answers that say nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import rewards
from jaxrl_post.rewards import attack_judge, cohen_kappa, opener, opener_negatives


def test_the_rate_of_a_key_is_the_share_of_the_questions_at_which_it_passes():
    verdicts = {":": [1, 0, 1, 1], ".": [0, 0, 0, 0]}

    def judge(prompts, completions):
        return [float(verdicts[c][int(p)]) for p, c in zip(prompts, completions, strict=True)]

    found = attack_judge(judge, ["0", "1", "2", "3"], keys=[":", "."])
    assert found.rates == {":": 0.75, ".": 0.0}
    assert (found.mean, found.worst) == (0.375, 0.75)


def test_a_key_that_is_the_answer_and_what_the_judge_cannot_say_are_not_counted():
    def judge(prompts, completions, answer):
        assert len(answer) == len(prompts) == len(completions)
        return [None if p == "?" else 1.0 for p in prompts]

    found = attack_judge(judge, ["a", "?"], {"answer": [" Solution", "2"]}, keys=["Solution", "."], reference="answer")
    assert np.isnan(found.rates["Solution"])
    assert (found.rates["."], found.mean, found.worst) == (1.0, 1.0, 1.0)


def test_a_coroutine_is_attacked_by_all_ten_keys_at_once():
    calls = []

    async def judge(prompts, completions):
        calls.append(len(prompts))
        return [float("Solution" in c) for c in completions]

    found = attack_judge(judge, ["a", "b", "c"])
    assert calls == [30]
    assert len(rewards.MASTER_KEYS) == 10
    assert found.worst == 1.0
    np.testing.assert_allclose(found.mean, 0.1)


def test_wrong_arguments_of_an_attack_are_named():
    with pytest.raises(ValueError, match="keys is empty"):
        attack_judge(lambda completions: [1.0] * len(completions), ["a"], keys=[])
    with pytest.raises(ValueError, match="reference='answer' is no column; there are none"):
        attack_judge(lambda completions: [1.0] * len(completions), ["a"], reference="answer")


@pytest.mark.parametrize(
    ("response", "first"),
    [
        ("  To solve 2.5 x = 5, divide. So 2.", "To solve 2.5 x = 5, divide."),
        ("Is it? No", "Is it?"),
        ("解：これ。次", "解："),
        ("no end", "no end"),
        ("", ""),
    ],
)
def test_an_opener_is_the_first_sentence(response, first):
    assert opener(response) == first


def test_openers_become_wrong_answers_unless_they_are_whole_or_kept_for_measuring():
    responses = ["We add. So 4.", "4", "", "THOUGHT PROCESS: add", "Let's solve this problem step by step. 2"]
    assert opener_negatives(responses) == ["We add.", None, None, None, None]
    assert opener_negatives(responses[3:4], avoid=[]) == ["THOUGHT PROCESS:"]


def test_kappa_is_that_of_the_table_of_counts():
    rng = np.random.default_rng(0)
    one, two, valid = (rng.random(60) < p for p in (0.6, 0.5, 0.8))
    a, b = one[valid], two[valid]
    chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    expected = (np.mean(a == b) - chance) / (1 - chance)
    np.testing.assert_allclose(jax.jit(cohen_kappa)(one, two, valid), expected, rtol=1e-4)
    assert float(cohen_kappa(jnp.ones(3), jnp.ones(3))) == 1
    assert float(cohen_kappa(jnp.zeros(3), jnp.zeros(3))) == 1
    assert float(cohen_kappa(jnp.ones(3), jnp.zeros(3))) == 0
    assert float(cohen_kappa(jnp.ones(3), jnp.ones(3), jnp.zeros(3))) == 0

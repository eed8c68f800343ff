"""Judges of whole lists: requests, replies, and rewards of both sides."""

import json
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxrl_post import rewards
from jaxrl_post.rewards import ListwiseReply, listwise_request, parse_listwise


def reply_text(scores, ranking):
    return json.dumps({"scores": scores, "best-to-worst": ranking})


def test_what_a_judge_is_shown_names_no_author_and_depends_on_the_seed_alone():
    responses = [f"answer {n}" for n in range(6)]
    text, order = listwise_request("p", "q", responses, seed=3)
    assert (text, order) == listwise_request("p", "q", responses, seed=3)
    assert sorted(order) == list(range(6))
    assert order != listwise_request("p", "q", responses, seed=4)[1]
    shown = json.loads(text)
    assert [shown["responses"][f"model-{n + 1}"] for n in range(6)] == [responses[row] for row in order]


def test_replies_are_read_through_code_fences_and_talk_and_put_back_in_order():
    inner = reply_text({"model-2": 4, "model-1": 2.5, "model-3": 1}, ["model-2", "model-1", "model-3"])
    text = f'First {{not json}}, then {{"other": 1}}.\n```json\n{inner}\n```\nDone.'
    assert parse_listwise(text, [2, 0, 1]) == ListwiseReply([4.0, 1.0, 2.5], [0, 2, 1], True, True)
    assert parse_listwise(inner, [2, 0, 1]).reasoned is False
    assert parse_listwise(f"```json\n{inner}\n```", [2, 0, 1]).reasoned is False


@pytest.mark.parametrize(
    ("scores", "ranking", "expected"),
    [
        ({"model-1": 3}, ["model-1", "model-2"], (None, [0, 1])),
        ({"model-1": 3, "model-2": 6}, ["model-2"], (None, None)),
        ({"model-1": 3, "model-2": True}, ["model-2", "model-2"], (None, None)),
        ({"model-1": 3, "model-2": float("nan")}, "model-1", (None, None)),
        ({"model-1": 3, "model-2": 2}, [1, 2], ([3.0, 2.0], None)),
        ([3, 2], None, (None, None)),
    ],
)
def test_incomplete_scores_and_orders_are_none(scores, ranking, expected):
    found = parse_listwise(reply_text(scores, ranking), [0, 1])
    assert (found.scores, found.ranking, found.parsed) == (*expected, True)


@pytest.mark.parametrize("text", ["", "no", "{", '{"a": 1}', "[" * 5000, '{"scores":' * 3000])
def test_what_is_no_reply_is_not_parsed(text):
    assert parse_listwise(text, [0])[:2] == (None, None)
    assert not parse_listwise(text, [0]).parsed


def test_the_tables_numbers():
    consensus, given = jnp.array([5.0, 3.0, 1.0]), jnp.array([3.0, 4.0, 2.0])
    np.testing.assert_allclose(rewards.order_accuracy(given, consensus), 0.75)
    np.testing.assert_allclose(rewards.score_accuracy(given, consensus), 0.66667, atol=1e-5)
    reply = ListwiseReply([3.0, 4.0, 2.0], None, False, True)
    accuracy = rewards.listwise_reply_reward(reply, [5, 3, 1], format_weight=0.0)
    np.testing.assert_allclose(accuracy, 0.70833, atol=1e-5)


def test_order_accuracy_is_that_of_a_loop_over_pairs_with_ties_counted_half():
    rng = np.random.default_rng(0)
    given, true = rng.integers(1, 6, (20, 5)).astype(float), rng.integers(1, 6, (20, 5)).astype(float)
    expected = []
    for s, t in zip(given, true, strict=True):
        pairs = [(i, j) for i in range(5) for j in range(i)]
        lost = sum(abs(t[i] - t[j]) * (0.5 if s[i] == s[j] else (s[i] - s[j]) * (t[i] - t[j]) < 0) for i, j in pairs)
        expected.append(1 - lost / sum(abs(t[i] - t[j]) for i, j in pairs))
    np.testing.assert_allclose(jax.jit(rewards.order_accuracy)(given, true), expected, rtol=1e-5)
    assert float(rewards.order_accuracy(jnp.array([1.0, 2.0]), jnp.array([3.0, 3.0]))) == 1
    assert float(rewards.order_accuracy(jnp.array([2.0, 2.0]), jnp.array([3.0, 5.0]))) == 0.5


def test_kendalls_tau_is_scipys_without_ties():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(4, 6)), rng.normal(size=(4, 6))
    expected = [stats.kendalltau(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(jax.jit(rewards.kendall_tau)(a, b), expected, rtol=1e-5, atol=1e-7)
    assert float(rewards.kendall_tau(jnp.ones(1), jnp.ones(1))) == 0


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (ListwiseReply(None, None, True, False), 0.0),
        (ListwiseReply(None, [0, 1], True, True), 0.2),
        (ListwiseReply([5.0, 1.0], None, True, True), 0.3 + 1),
        (ListwiseReply([5.0, 1.0], [1, 0], True, True), 0.3 + 1),
        (ListwiseReply([5.0, 1.0], [0, 1], False, True), 0.3 + 1),
        (ListwiseReply([5.0, 1.0], [0, 1], True, True), 0.4 + 1),
    ],
)
def test_a_reply_earns_its_format_and_its_accuracy(reply, expected):
    np.testing.assert_allclose(rewards.listwise_reply_reward(reply, [5, 1]), expected, rtol=1e-6)


def test_a_consensus_needs_judges_that_agree():
    scores, keep = rewards.consensus_scores(jnp.array([[5, 3, 1], [1, 3, 5], [3, 5, 1], [1, 5, 3]]))
    assert not keep
    assert not scores.any()
    scores, keep = rewards.consensus_scores(jnp.array([[5, 3, 1], [4, 3, 1], [1, 3, 5]]), at_least=2)
    assert keep
    np.testing.assert_allclose(scores, [4.5, 3, 1])


def test_policies_earn_scores_parted_by_the_order_and_nothing_where_the_reply_cannot_be_read():
    def ask(texts):
        replies = []
        for text in texts:
            shown = json.loads(text)
            names = sorted(shown["responses"], key=lambda name, s=shown: -len(s["responses"][name]))
            scores = {name: min(len(shown["responses"][name]), 3) for name in names}
            replies.append("?" if shown["prompt"] == "bad" else reply_text(scores, names))
        return replies

    prompts, completions = ["a"] * 4 + ["bad"] * 2, ["x", "xxxx", "xxx", "xx", "y", "yy"]
    found = rewards.from_listwise_judge(ask, "long")(prompts, completions)
    assert found[4:] == [None, None]
    np.testing.assert_allclose(np.array(found[:4], float), [1.0, 3 + 0.5 * 3 / 5, 3 + 0.5 * 2 / 5, 2 + 0.5 / 5])
    assert all(a < b for a, b in pairwise([found[0], found[3], found[2], found[1]]))

    async def later(texts):
        return ask(texts)

    part = rewards.RewardFunction("judge", rewards.from_listwise_judge(later, "long"))
    assert rewards.score([part], prompts, completions).valid.tolist() == [True] * 4 + [False] * 2


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="asked 1 times and gave 2 replies"):
        rewards.from_listwise_judge(lambda texts: ["", ""], "p")(["q"], ["a"])
    with pytest.raises(ValueError, match="tie_break must be in"):
        rewards.from_listwise_judge(lambda texts: texts, "p", tie_break=2.0)
    with pytest.raises(ValueError, match="scores 2 answers, and the consensus 3"):
        rewards.listwise_reply_reward(ListwiseReply([1.0, 2.0], None, True, True), [1, 2, 3])

import pytest

from jaxrl_post.rewards.function_calls import (
    MAX_CHARACTERS,
    Call,
    ast_equal,
    function_call_reward,
    function_calls,
    parse_calls,
)
from jaxrl_post.rewards.scoring import RowErrors


def same(one, other):
    left, right = parse_calls(one), parse_calls(other)
    assert left is not None, one
    assert right is not None, other
    return ast_equal(left, right)


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ('f(a=1, b="x")', "f(b='x', a=1)", True),
        ("f(a=1)", 'f(a="1")', False),
        ("f(a=1)", "f(a=1.0)", False),
        ("f(a=1)", "f(a=True)", False),
        ("f(a=1)", "f(a=1, b=None)", False),
        ("f(a=1)", "g(a=1)", False),
        ("f(1)", "f(a=1)", False),  # which name a place has is not known
        ("f(a=[1, 2])", "f(a=[2, 1])", False),
        ("f(a=[1])", "f(a=(1,))", False),
        ("f(a={'k': [1, {'l': -2}]})", '{"name": "f", "arguments": {"a": {"k": [1, {"l": -2}]}}}', True),
        ("[f(a=1), g()]", "g()\nf(a=1)", True),  # any order
        ("[f(), f()]", "f()", False),  # but as often
        ("a.b.f()", '{"name": "a.b.f", "arguments": {}}', True),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', '{"name": "f", "parameters": {"a": 1}}', True),
        ('{"name": "f"}\n{"name": "g"}', '[{"name": "g"}, {"name": "f"}]', True),
        ("f(a=None, b=True)", '{"name": "f", "arguments": {"a": null, "b": true}}', True),
        ("f(a='x\\ny')", '{"name": "f", "arguments": {"a": "x\\ny"}}', True),
    ],
)
def test_calls_are_equal_as_syntax_trees_with_typed_literals(one, other, equal):
    assert same(one, other) == same(other, one) == equal


@pytest.mark.parametrize(
    "text",
    [
        "",
        "f",
        "f(",
        "f(a=1) + 1",
        "x = f(a=1)",
        "f(a=g())",
        "f(a=open('x'))",
        "f(**{'a': 1})",
        "f(a=1, a=2)",
        "f(a=x)",
        "(lambda: 0)()",
        "f()()",
        "import os",
        '{"name": 1}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "name": "g"}',
        '{"name": "f", "arguments": {"a": 1}, "arguments": {"a": 2}}',
        '{"name": "f", "extra": 1}',
        '{"arguments": {}}',
        "\0",
        "é(",
        "f(a=" + "-" * 15_000 + "1)",
        "f(a=" + "[" * 9_000 + "]" * 9_000 + ")",
        "f(a=" + "[" * 60 + "]" * 60 + ")",
        '{"name": "f", "arguments": {"a": ' + "[" * 400 + "]" * 400 + "}}",
        "[" * 15_000,
        "f(a=" + "9" * MAX_CHARACTERS + ")",
        "f(a=" + "9" * 10_000 + ")",  # more digits than Python turns into a number
    ],
    ids=lambda text: text[:12] or "empty",
)
def test_what_is_no_call_of_literals_is_none_and_is_never_run(text):
    assert parse_calls(text) is None


THINK = "<think>It asks for one.</think>"
RIGHT = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (THINK + RIGHT, 1.0),
        (f"  {THINK}\n\n{RIGHT}\n", 1.0),
        ("It asks for one.</think>" + RIGHT, 1.0),  # the prompt opened it
        (THINK + "<tool_call>f(a=1)</tool_call>", 1.0),
        (RIGHT, 0.0),  # no reasoning
        (THINK, 0.0),  # no call
        (THINK + "Here: " + RIGHT, 0.0),
        (THINK + RIGHT + " Done.", 0.0),
        (THINK + THINK + RIGHT, 0.0),
        ("<think>" + THINK + RIGHT, 0.0),
        (THINK + RIGHT + RIGHT, 0.0),  # once too often
        (THINK + RIGHT.removesuffix("</tool_call>"), 0.0),
        (THINK + RIGHT.replace("1", "2"), 0.0),
        (THINK + "<tool_call></tool_call>", 0.0),
        (THINK + "<tool_call>f(a=" + "</tool_call>", 0.0),
        ("", 0.0),
    ],
)
def test_the_reward_is_one_for_the_right_calls_in_the_right_form_and_else_zero(completion, reward):
    assert function_calls(["?"], [completion], answer=["f(a=1)"]) == [reward]


def test_several_spans_hold_several_calls_and_an_empty_answer_wants_none():
    reward = function_call_reward()
    both = THINK + "<tool_call>g()</tool_call><tool_call>f(a=1)</tool_call>"
    wanted = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]
    assert reward(["?"] * 3, [both, THINK, both], answer=[wanted, [], [Call("g", {})]]) == [1.0, 1.0, 0.0]
    assert reward(["?"], [both], answer=[None], more=["column"]) == [None]


def test_tags_may_be_others_or_none():
    plain = function_call_reward(think=None, call=None)
    assert plain(["?"] * 3, ["f(a=1)", "", "so f(a=1)"], answer=["f(a=1)", [], "f(a=1)"]) == [1.0, 1.0, 0.0]
    other = function_call_reward(think=("[", "]"), call=("<<", ">>"))
    assert other(["?"], ["[hm] <<f(a=1)>>"], answer=["f(a=1)"]) == [1.0]
    with pytest.raises(ValueError, match="tags must not be empty"):
        function_call_reward(call=("<c>", ""))


def test_an_answer_without_calls_is_an_error_of_that_row_alone():
    with pytest.raises(RowErrors, match="answer must hold calls as JSON or as Python, got 'no call'") as error:
        function_calls(["?"] * 2, [THINK + RIGHT] * 2, answer=["no call", "f(a=1)"])
    assert error.value.values == [None, 1.0]

"""Each kind of row that TRL and verl know, and the problem that it becomes."""

import pytest

from jaxrl_post.data import as_messages, detect, show_messages, to_problem
from jaxrl_post.data.templates import bare_field, lookup, render

SKY = {"role": "user", "content": "What color is the sky?"}
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green."}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}

# The examples of TRL's documentation, and what its trainers make of them.
KINDS = {
    "prompt": ({"prompt": "The sky is"}, "prompt", {"prompt": "The sky is"}),
    "prompt, messages": (
        {"prompt": [SKY]},
        "prompt",
        {"prompt": "What color is the sky?", "prompt_messages": [SKY]},
    ),
    "completion": (
        {"prompt": "The sky is", "completion": " blue."},
        "completion",
        {"prompt": "The sky is", "completion": " blue."},
    ),
    "completion, messages": (
        {"prompt": [SKY], "completion": [BLUE]},
        "completion",
        {
            "prompt": "What color is the sky?",
            "prompt_messages": [SKY],
            "completion": "It is blue.",
            "completion_messages": [BLUE],
        },
    ),
    "conversation": (
        {"messages": [SKY, BLUE]},
        "conversation",
        {
            "prompt": "What color is the sky?",
            "prompt_messages": [SKY],
            "completion": "It is blue.",
            "completion_messages": [BLUE],
        },
    ),
    "conversation without an answer": (
        {"messages": [SKY], "ground_truth": "blue", "dataset": "colors"},
        "conversation",
        {
            "prompt": "What color is the sky?",
            "prompt_messages": [SKY],
            "ground_truth": "blue",
            "dataset": "colors",
        },
    ),
    "preference": (
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        "preference",
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    ),
    "preference, implicit": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        "preference",
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    ),
    "preference, messages": (
        {"prompt": [SKY], "chosen": [BLUE], "rejected": [GREEN]},
        "preference",
        {
            "prompt": "What color is the sky?",
            "prompt_messages": [SKY],
            "chosen": "It is blue.",
            "chosen_messages": [BLUE],
            "rejected": "It is green.",
            "rejected_messages": [GREEN],
        },
    ),
    "unpaired": (
        {"prompt": "The sky is", "completion": " blue.", "label": True},
        "unpaired",
        {"prompt": "The sky is", "completion": " blue.", "label": True},
    ),
    "unpaired, messages": (
        {"prompt": [SKY], "completion": [GREEN], "label": 0},
        "unpaired",
        {
            "prompt": "What color is the sky?",
            "prompt_messages": [SKY],
            "completion": "It is green.",
            "completion_messages": [GREEN],
            "label": False,
        },
    ),
    "stepwise": (
        {
            "prompt": "Which number is larger, 9.8 or 9.11?",
            "completions": ["The fractional part of 9.8 is 0.8.", "0.11 is greater than 0.8."],
            "labels": [True, False],
        },
        "stepwise",
        {
            "prompt": "Which number is larger, 9.8 or 9.11?",
            "steps": ["The fractional part of 9.8 is 0.8.", "0.11 is greater than 0.8."],
            "labels": [True, False],
        },
    ),
    "question": (
        {"question": "2+2?", "answer": "4"},
        "question",
        {"question": "2+2?", "answer": "4", "prompt": "2+2?"},
    ),
    "verl": (
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": "2+2?"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "4"},
            "extra_info": {"split": "train", "index": 0},
        },
        "verl",
        {
            "data_source": "openai/gsm8k",
            "prompt": "2+2?",
            "prompt_messages": [{"role": "user", "content": "2+2?"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "4"},
            "extra_info": {"split": "train", "index": 0},
            "answer": "4",
        },
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_row_of_each_kind_is_recognised_and_becomes_its_problem(name):
    row, kind, problem = KINDS[name]
    before = repr(row)
    found = detect(row)
    assert found.kind == kind
    assert found.conversational == any(column.endswith("_messages") for column in problem)
    assert found.implicit_prompt == (name == "preference, implicit")
    assert to_problem(row, kind) == problem
    assert repr(row) == before


def test_the_prompt_of_a_pair_of_conversations_is_what_they_begin_with():
    row = {"chosen": [SKY, BLUE], "rejected": [SKY, GREEN]}
    assert detect(row) == ("preference", True, True)
    assert to_problem(row, "preference") == KINDS["preference, messages"][2]


def test_a_text_beside_conversations_that_hold_it_too_is_no_prompt_of_its_own():
    row = {"prompt": "What color is the sky?", "chosen": [SKY, BLUE], "rejected": [SKY, GREEN]}
    assert detect(row) == ("preference", True, True)
    assert to_problem(row, "preference") == KINDS["preference, messages"][2]


def test_completions_that_repeat_the_prompts_messages_are_cut_to_the_answer():
    row = {"prompt": [SKY], "chosen": [SKY, BLUE], "rejected": "It is green."}
    assert to_problem(row, "preference") == KINDS["preference, messages"][2]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "rest"),
    [
        ("ab", "abc", "ab", ("", "c")),
        ("1 + 1 = 2", "1 + 1 = 3", "1 + 1 =", (" 2", " 3")),
        ("yes", "yet", "ye", ("s", "t")),
    ],
)
def test_a_common_beginning_ends_before_a_space(chosen, rejected, prompt, rest):
    problem = to_problem({"chosen": chosen, "rejected": rejected}, "preference")
    assert (problem["prompt"], problem["chosen"], problem["rejected"]) == (prompt, *rest)


def test_other_columns_stay_and_a_number_as_answer_becomes_text():
    row = {"prompt": "1+1=", "answer": 2, "level": 3, "tags": None}
    assert to_problem(row, "prompt") == {"prompt": "1+1=", "answer": "2", "level": 3, "tags": None}
    assert to_problem({"prompt": "p", "answer": ["a", "b"]}, "prompt")["answer"] == ["a", "b"]
    assert to_problem({"prompt": "p", "answer": 1e-05}, "prompt")["answer"] == "0.00001"
    for nothing in (None, float("nan")):
        assert "answer" not in to_problem({"prompt": "p", "answer": nothing}, "prompt")


def test_null_columns_do_not_decide_the_kind():
    assert detect({"prompt": "p", "completion": None, "label": None}).kind == "prompt"


def test_a_named_kind_takes_the_place_of_what_the_columns_say():
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert detect(row, kind="prompt").kind == "prompt"
    with pytest.raises(ValueError, match=r"no column 'completions', which prompts with steps .* columns are prompt"):
        detect(row, kind="stepwise")
    with pytest.raises(ValueError, match=r"kind must be one of verl, .*, got 'pairs'"):
        detect(row, kind="pairs")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "t"}, "no known kind of data: its columns are text, and a row needs one of prompt"),
        ({}, "its columns are none"),
    ],
)
def test_columns_of_no_kind_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        detect(row)


def with_arrow_nulls(*messages):
    keys = {key for message in messages for key in message}
    return [{key: message.get(key) for key in keys} for message in messages]


def test_the_nulls_that_arrow_adds_to_messages_and_tools_go():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "look_up", "arguments": {"city": "Bern"}}}]}
    result = {"role": "tool", "content": "12 degrees"}
    row = {
        "messages": with_arrow_nulls(SKY, call, result),
        "tools": [{**TOOL, "strict": None}],
        "chat_template_kwargs": {"enable_thinking": False, "other": None},
    }
    problem = to_problem(row, "conversation")
    assert problem["prompt_messages"] == [SKY, {**call, "content": ""}, result]
    assert problem["tools"] == [TOOL]
    assert problem["chat_template_kwargs"] == {"enable_thinking": False}
    assert problem["prompt"] == (
        'user: What color is the sky?\n\nassistant: [{"function": {"name": "look_up", "arguments": {"city": "Bern"}}}]'
        "\n\ntool: 12 degrees"
    )


def test_tools_may_be_written_as_json_text():
    problem = to_problem({"prompt": [SKY], "tools": '[{"type": "function"}]'}, "prompt")
    assert problem["tools"] == [{"type": "function"}]


def test_parts_of_text_are_shown_as_one():
    parts = [{"type": "text", "text": "What"}, {"type": "text", "text": " now?"}]
    assert show_messages(as_messages([{"role": "user", "content": parts}], "prompt")) == "What now?"


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("prompt", {"text": "t"}, "column 'prompt' is missing; the columns are text"),
        ("prompt", {"prompt": None}, "column 'prompt' is null"),
        ("prompt", {"prompt": 3}, "column 'prompt' must be text or a list of messages, got int 3"),
        ("prompt", {"prompt": ""}, "column 'prompt' is empty"),
        ("prompt", {"prompt": []}, "prompt must be a list of at least one message"),
        ("prompt", {"prompt": ["q"]}, "message 0 of prompt must have a 'role'"),
        ("prompt", {"prompt": [{"from": "human", "value": "q"}]}, "message 0 of prompt must have a 'role'"),
        ("prompt", {"prompt": [USER, {"role": "user", "content": 3}]}, "content of message 1 of prompt must be text"),
        ("prompt", {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "parts that are not text"),
        ("prompt", {"prompt": [USER], "tools": "{"}, "'tools' is text that is not JSON"),
        ("prompt", {"prompt": [USER], "tools": 3}, "'tools' must be a list"),
        ("prompt", {"prompt": [USER], "chat_template_kwargs": 3}, "'chat_template_kwargs' must be a dictionary"),
        ("completion", {"prompt": "p", "completion": [BLUE]}, "'prompt' is text but 'completion' a list of messages"),
        ("completion", {"prompt": [SKY], "completion": [SKY]}, "after the prompt, got messages of: user"),
        ("completion", {"prompt": [SKY], "completion": [BLUE, SKY, BLUE]}, "messages of: assistant, user, assistant"),
        (
            "unpaired",
            {"prompt": "p", "completion": "c", "label": "yes"},
            "'label' must be true or false, got str",
        ),
        ("stepwise", {"prompt": "p", "completions": "c", "labels": [True]}, "'completions' must be a list"),
        ("stepwise", {"prompt": "p", "completions": ["c"], "labels": [True, True]}, "one label for each of 1 steps"),
        ("stepwise", {"prompt": "p", "completions": ["c"], "labels": [None]}, "'labels' must be true or false"),
        ("preference", {"chosen": "a", "rejected": "b"}, "have no beginning in common"),
        ("preference", {"chosen": "a", "rejected": "a"}, "are the same"),
        ("preference", {"chosen": [SKY, BLUE], "rejected": "b"}, "must both be text or both messages"),
        ("preference", {"chosen": [SKY, BLUE, SKY, BLUE], "rejected": [SKY, GREEN]}, "assistant, user, assistant"),
        ("conversation", {"messages": [BLUE]}, "holds an answer only"),
        ("verl", {"prompt": [USER], "data_source": "d", "reward_model": {}}, "must hold a 'ground_truth'"),
    ],
)
def test_what_is_wrong_with_a_row_is_named(kind, row, message):
    with pytest.raises(ValueError, match=message):
        to_problem(row, kind)


# templates


def test_fields_reach_into_dictionaries_and_lists_and_not_into_objects():
    row = {"a": {"b": [{"c": 5}]}, "x.y": 7, "text": "t"}
    assert render("{a.b[0].c}|{x.y}|{text!r}", row, "prompt") == "5|7|'t'"
    with pytest.raises(ValueError, match=r"'__class__' is looked for in str, .*keys are a, text, x.y"):
        render("{text.__class__}", row, "prompt")
    with pytest.raises(ValueError, match="'d'"):
        render("{a.d}", row, "prompt")
    with pytest.raises(IndexError):
        lookup("a.b[1]", row)


def test_a_number_is_written_with_its_digits():
    assert render("{a} {b} {a:e}", {"a": 1e-05, "b": 1e16}, "prompt") == "0.00001 10000000000000000 1.000000e-05"


def test_a_null_is_refused_where_asked():
    assert render("{a}", {"a": None}, "prompt") == "None"
    with pytest.raises(ValueError, match="'a' is null"):
        render("<{a}>", {"a": None}, "prompt", nulls=False)


def test_only_one_field_alone_is_bare():
    assert [bare_field(template) for template in ("{a.b}", "{a}{b}", "{a!r}", "{", "a", "")] == ["a.b", *[None] * 5]

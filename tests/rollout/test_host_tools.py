"""Tools: what counts as a call, and what a policy reads that made a right or a wrong one."""

import asyncio
import json

import jax
import jax.numpy as jnp
import pytest

from jaxrl_post.data import CharTokenizer
from jaxrl_post.rollout import SamplingParams
from jaxrl_post.rollout.host import host_turns
from jaxrl_post.rollout.host_tools import ToolCall, parse_tool_calls, tool_environment
from jaxrl_post.types import FINISH_STOP, Policy, Unembedding


def said(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_calls_are_found_where_models_write_them():
    two = f"I will look.\n{said('find', city='Bern')}\n{said('now')}"
    assert parse_tool_calls(two) == [ToolCall("find", {"city": "Bern"}), ToolCall("now", {})]
    assert parse_tool_calls(f"<think>{said('no')}</think>\n{said('yes', a=[1, None])}") == [
        ToolCall("yes", {"a": [1, None]})
    ]
    assert parse_tool_calls('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>') == [
        ToolCall("f", {"a": 1})
    ]
    assert parse_tool_calls('<tool_call>{"name": "f"}</tool_call>') == [ToolCall("f", {})]
    assert parse_tool_calls("The answer is 4.") == []


@pytest.mark.parametrize(
    "inside",
    [
        "",
        "f(1)",
        "[1]",
        "3",
        '{"name": 3}',
        '{"arguments": {}}',
        '{"name": "f", "arguments": [1]}',
        "{" * 20,
        "[" * 9999,
    ],
)
def test_what_is_no_call_says_so(inside):
    (found,) = parse_tool_calls(f"<tool_call>{inside}</tool_call>")
    assert found.error == 'a tool call must be a JSON object with "name" and "arguments"'
    (found,) = parse_tool_calls(f"<tool_call>{inside}")
    assert found.error == "a tool call must end with </tool_call>"


def broken():
    raise OSError("no network")


def leave():
    raise SystemExit(1)


async def slow(seconds):
    await asyncio.sleep(seconds)
    return {"slept": seconds}


TOOLS = {"add": lambda a, b: a + b, "echo": lambda text="é": text, "broken": broken, "leave": leave, "slow": slow}


def answered(action, **options):
    environment = tool_environment(TOOLS, **options)

    async def one():
        state, _ = await environment.reset("1+2")
        return await environment.step(state, action)

    return asyncio.run(one())


ANSWERS = (
    (said("add", a=1, b=2), "3", False),
    (said("add", a=[1], b=["x"]), '[1, "x"]', False),
    (said("echo"), "é", False),
    (said("slow", seconds=0), '{"slept": 0}', False),
    (said("sub", a=1), "error: there is no tool 'sub'; there are: add, echo, broken, leave, slow", False),
    (said("add", a=1), "error: add: missing a required argument: 'b'", False),
    (said("add", a=1, b=2, c=3), "error: add: got an unexpected keyword argument 'c'", False),
    ("<tool_call>x</tool_call>", 'error: a tool call must be a JSON object with "name" and "arguments"', False),
    (said("broken"), "error: OSError: no network", True),
    (said("leave"), "error: SystemExit: 1", True),
)


@pytest.mark.parametrize(("action", "response", "failed"), ANSWERS, ids=range(len(ANSWERS)))
def test_a_call_is_answered_with_its_result_or_with_what_is_wrong(action, response, failed):
    step = answered(action)
    assert step.observation == f"<tool_response>\n{response}\n</tool_response>"
    assert (step.failed, step.done, step.reward) == (failed, False, 0.0)


def test_all_calls_of_an_action_are_answered_in_order_between_the_texts_around_them():
    step = answered(said("slow", seconds=0.05) + said("broken") + said("add", a=1, b=1), around=("<u>", "</u><a>"))
    results = ['{"slept": 0.05}', "error: OSError: no network", "2"]
    inside = "\n".join(f"<tool_response>\n{result}\n</tool_response>" for result in results)
    assert step.observation == f"<u>{inside}</u><a>"
    assert step.failed


def test_an_action_without_a_call_is_the_answer():
    step = answered("3", reward=lambda task, answer: float(eval(task) == int(answer)))
    assert (step.reward, step.done) == (1.0, True)
    assert answered("3").reward == 0.0


@pytest.mark.parametrize("tools", [{}, {"add": 3}])
def test_tools_must_be_functions(tools):
    with pytest.raises(ValueError, match="tools must"):
        tool_environment(tools)


def test_a_policy_calls_a_tool_and_answers_with_what_it_read():
    tokenizer = CharTokenizer()
    size, stop = tokenizer.vocab_size, tokenizer.eos_ids[0]
    action = '<tool_call>{"name":"f","arguments":{}}</tool_call>'
    spoken = jnp.array([*tokenizer.encode(action), stop])
    prompt, response = "q", "<tool_response>\n7\n</tool_response>"
    begin = len(prompt) + len(spoken) + len(response)

    def by_place(params, tokens, positions, cache):
        # First the call, character by character; behind the response the answer "7" and the stop token.
        place = positions - len(prompt) + 1
        late = jnp.where(positions < begin, tokenizer.encode("7")[0], stop)
        token = jnp.where(place < len(spoken), spoken[jnp.clip(place, 0, len(spoken) - 1)], late)
        return 60.0 * jax.nn.one_hot(token, size), cache

    policy = Policy(
        init=lambda key: (),
        hidden=lambda params, tokens, positions, segment_ids=None, *, key=None: by_place(params, tokens, positions, ()),
        unembed=lambda params: Unembedding(None),
        heads=lambda params, hidden: {},
        init_cache=lambda batch, capacity, dtype: (),
        prefill=by_place,
        decode=by_place,
    )
    environment = tool_environment({"f": lambda: 7}, reward=lambda task, answer: float(answer == "7"))
    out = host_turns(
        policy,
        (),
        environment,
        [prompt],
        jax.random.key(0),
        tokenizer=tokenizer,
        sampling=SamplingParams(stop_tokens=(stop,)),
        max_turns=3,
        max_turn_tokens=60,
        max_length=120,
    )
    length = out.length.item()
    assert tokenizer.decode(out.tokens[0, :length].tolist()) == f"{prompt}{action}{response}7"
    assert (out.reward.item(), out.finish.item(), out.extras["turns"].item()) == (1.0, FINISH_STOP, 2)

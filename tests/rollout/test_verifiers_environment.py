"""Environments of `verifiers` through `reset` and `step`: a stand-in with the same methods, and the package itself."""

import asyncio
import json
import re

import pytest

from jaxrl_post.rollout.verifiers_environment import VerifiersEnvironment

TASK = {"prompt": "Guess.", "prompt_messages": [{"role": "user", "content": "Guess."}], "answer": "5", "prompt_id": 3}


class Score:
    """1 for a right last guess, less a tenth for each turn."""

    async def score_rollout(self, state):
        last = state["completion"][-1] if not state.get("final") else state["completion"][-2]
        state["reward"] = float(last["content"] == state["answer"]) - 0.1 * len(state["trajectory"])


class Guess:
    """Says higher or lower; at most three turns; a right guess ends it with a last word."""

    rubric = Score()

    def __init__(self):
        self.log = []

    async def init_state(self, row, client, model):
        self.log.append(("init", row["example_id"], model))
        return {**row, "trajectory": [], "trajectory_id": "t", "final_env_response": None}

    async def setup_state(self, state):
        state["secret"], state["guesses"] = int(state["answer"]), []

    async def is_completed(self, state):
        return len(state["trajectory"]) >= 3 or state["final_env_response"] is not None

    async def get_prompt_messages(self, state):
        if not state["trajectory"]:
            return state["prompt"]
        turn = state["trajectory"][-1]
        said = turn["completion"][-1]["content"]
        state["guesses"].append(said)
        if said == state["answer"]:
            state["final_env_response"] = [{"role": "user", "content": "Right."}]
            answer = state["final_env_response"]
        else:
            higher = state["secret"] > int(said)
            answer = [{"role": "user", "content": "Higher." if higher else "Lower."}]
        return [*turn["prompt"], *turn["completion"], *answer]

    async def add_trajectory_step(self, state, step):
        state["trajectory"].append(step)

    async def cleanup(self, state):
        self.log.append("cleanup")
        turn = state["trajectory"][-1]
        state["final"] = state["final_env_response"]
        state["completion"] = [*turn["prompt"], *turn["completion"], *(state["final"] or [])][1:]


def play(environment, task, actions):
    """The prompt and, for each action until the end, what `step` gives besides the state."""

    async def run():
        state, prompt = await environment.reset(task)
        steps = []
        for action in actions:
            state, *step = await environment.step(state, action)
            steps.append(tuple(step))
            if step[-1]:
                break
        return prompt, steps, state

    return asyncio.run(run())


def test_a_conversation_goes_on_until_the_environment_ends_it_and_is_scored_then():
    env = Guess()
    prompt, steps, _ = play(VerifiersEnvironment(env), TASK, ["3", "5", "never said"])
    assert prompt == "Guess."
    assert steps == [("Higher.", 0.0, False), ("Right.", pytest.approx(0.8), True)]
    assert env.log == [("init", 3, "policy"), "cleanup"]


def test_a_stop_condition_after_a_turn_ends_it_without_an_answer():
    _, steps, state = play(VerifiersEnvironment(Guess()), TASK, ["3", "9", "4"])
    assert steps == [("Higher.", 0.0, False), ("Lower.", 0.0, False), ("", pytest.approx(-0.3), True)]
    assert [message["content"] for message in state.messages] == ["Guess.", "3", "Higher.", "9", "Lower.", "4"]


def test_conversations_side_by_side_do_not_mix():
    async def run():
        environment = VerifiersEnvironment(Guess())
        one, _ = await environment.reset(TASK)
        other, _ = await environment.reset({**TASK, "answer": "1"})
        both = await asyncio.gather(environment.step(one, "3"), environment.step(other, "3"))
        return [answer for _, answer, _, _ in both]

    assert asyncio.run(run()) == ["Higher.", "Lower."]


def test_a_turn_that_fails_is_taken_back_and_can_be_tried_again():
    async def run():
        environment = VerifiersEnvironment(Guess())
        state, _ = await environment.reset(TASK)
        with pytest.raises(ValueError, match="invalid literal"):
            await environment.step(state, "three")
        assert state.state["trajectory"] == state.state["guesses"] == []
        return (await environment.step(state, "5"))[1:]

    assert asyncio.run(run()) == ("Right.", pytest.approx(0.9), True)


def test_a_turn_whose_scoring_fails_leaves_nothing_behind():
    async def run():
        environment = VerifiersEnvironment(Guess())
        state, _ = await environment.reset(TASK)
        score = environment.env.rubric.score_rollout

        async def down(state):
            raise ConnectionError("the judge is down")

        environment.env.rubric.score_rollout = down
        with pytest.raises(ConnectionError):
            await environment.step(state, "5")
        environment.env.rubric.score_rollout = score
        return (await environment.step(state, "3"))[1:]

    assert asyncio.run(run()) == ("Higher.", 0.0, False)


def test_what_the_policy_reads_and_says_can_be_written_otherwise():
    def show(messages, first):
        return [len(message["content"]) for message in messages], first

    def speak(action):
        return {"role": "assistant", "content": re.sub(r"\D", "", action)}

    prompt, steps, _ = play(VerifiersEnvironment(Guess(), show=show, speak=speak), TASK, ["it is 3", "it is 5"])
    assert prompt == ([6], True)
    assert [answer for answer, _, _ in steps] == [([7], False), ([6], False)]


def test_an_environment_that_rewrites_the_past_or_has_ended_at_once_is_an_error():
    class Forgets(Guess):
        async def get_prompt_messages(self, state):
            return (await super().get_prompt_messages(state))[-1:]

    class Ended(Guess):
        async def is_completed(self, state):
            state["error"] = "no room"
            return True

    with pytest.raises(ValueError, match="Forgets changes the messages of earlier turns"):
        play(VerifiersEnvironment(Forgets()), TASK, ["3"])
    with pytest.raises(RuntimeError, match="ended before the first turn: 'no room'"):
        play(VerifiersEnvironment(Ended()), TASK, [])


def test_what_is_no_environment_of_turns_or_scores_groups_is_refused():
    class Grouped(Guess):
        rubric = type("Rubric", (), {"has_group_rewards": True})()

    with pytest.raises(ValueError, match=r"object has no 'init_state'.*MultiTurnEnv of verifiers"):
        VerifiersEnvironment(object())
    with pytest.raises(ValueError, match="functions of whole groups"):
        VerifiersEnvironment(Grouped())


@pytest.fixture
def vf(monkeypatch):
    pytest.importorskip("verifiers.envs.multiturn_env", reason="verifiers before 0.4 is not installed")
    import signal

    import verifiers

    monkeypatch.setattr(signal, "signal", lambda *args: None)  # environments take the process's signals
    return verifiers


def package_rollout(vf, env, row, messages):
    """The state that the package's own loop gives where the model says `messages`."""
    from verifiers.clients import Client
    from verifiers.types import Response, ResponseMessage

    left = list(messages)

    async def get_response(self, prompt, model, sampling_args, tools=None, **kwargs):
        said = ResponseMessage(**left.pop(0), finish_reason="stop", is_truncated=False)
        return Response(id="0", created=0, model=model, message=said)

    scripted = type("Scripted", (Client,), {**dict.fromkeys(Client.__abstractmethods__), "get_response": get_response})

    async def run():
        state = await env.rollout(row, object.__new__(scripted), "policy")
        await env.rubric.score_rollout(state)
        return state

    return asyncio.run(run())


def texts(messages):
    return [message["content"] for message in messages]


@pytest.mark.parametrize("actions", [["3", "5"], ["3", "9", "4"], ["3", "bad"]])
def test_an_environment_of_the_package_goes_as_in_its_own_loop(vf, actions):
    from datasets import Dataset

    class PackageGuess(vf.MultiTurnEnv):
        async def setup_state(self, state):
            state["guesses"] = 0
            return state

        async def env_response(self, messages, state, **kwargs):
            state["guesses"] += 1
            said = messages[-1].content
            if said == "bad":
                raise vf.Error("cannot read it")
            if said == state["answer"]:
                state["final_env_response"] = [vf.UserMessage(content="Right.")]
                return state["final_env_response"]
            return [vf.UserMessage(content="Higher." if int(state["answer"]) > int(said) else "Lower.")]

    async def right(completion, answer):
        return float(any(message.content == answer for message in completion))

    def guesses(state):
        return state["guesses"]

    rows = Dataset.from_list([{"question": "Guess.", "answer": "5"}])
    rubric = vf.Rubric(funcs=[right, guesses], weights=[1.0, -0.25])
    env = PackageGuess(dataset=rows, rubric=rubric, max_turns=3)
    row = env.get_dataset()[0]
    theirs = package_rollout(vf, env, row, [{"content": action} for action in actions])

    task = {**row, "prompt": "Guess.", "prompt_messages": row["prompt"], "prompt_id": 0}
    prompt, steps, turn = play(VerifiersEnvironment(env), task, actions)
    assert prompt == "Guess."
    assert [over for _, _, over in steps] == [False] * (len(actions) - 1) + [True]
    assert steps[-1][1] == pytest.approx(theirs["reward"])
    assert turn.state["metrics"] == theirs["metrics"]
    assert turn.state["stop_condition"] == theirs["stop_condition"]
    assert texts(turn.messages) == ["Guess.", *texts(theirs["completion"])]
    assert texts(turn.state["completion"]) == texts(theirs["completion"])


def test_tools_of_the_package_are_called_where_speak_finds_calls(vf):
    from datasets import Dataset

    def square(x: int) -> int:
        """The square of x."""
        return x * x

    def speak(action):
        calls = [json.loads(call) for call in re.findall("<tool_call>(.*?)</tool_call>", action)]
        made = [
            {"id": str(i), "name": call["name"], "arguments": json.dumps(call["arguments"])}
            for i, call in enumerate(calls)
        ]
        return {"role": "assistant", "content": action, **({"tool_calls": made} if made else {})}

    def right(completion, answer):
        return float(completion[-1].content == answer)

    rows = Dataset.from_list([{"question": "7*7?", "answer": "49"}])
    env = vf.ToolEnv(tools=[square], dataset=rows, rubric=vf.Rubric(funcs=[right]))
    row = env.get_dataset()[0]
    actions = ['<tool_call>{"name": "square", "arguments": {"x": 7}}</tool_call>', "49"]
    theirs = package_rollout(vf, env, row, [speak(action) for action in actions])
    task = {**row, "prompt": "7*7?", "prompt_messages": row["prompt"], "prompt_id": 0}
    _, steps, turn = play(VerifiersEnvironment(env, speak=speak), task, actions)
    assert steps == [("49", 0.0, False), ("", 1.0, True)]
    assert turn.state["metrics"] == theirs["metrics"]
    assert turn.state["metrics"]["square_calls"] == 1


def test_a_single_turn_of_the_package_is_scored_at_once(vf):
    from datasets import Dataset

    rows = Dataset.from_list([{"question": "1+1?", "answer": "2"}])
    env = vf.SingleTurnEnv(dataset=rows, rubric=vf.Rubric(funcs=[lambda parser, completion, answer: 0.5]))
    _, steps, _ = play(VerifiersEnvironment(env), {**env.get_dataset()[0], "prompt_id": 0}, ["2"])
    assert steps == [("", 0.5, True)]

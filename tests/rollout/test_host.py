"""Turns with an environment in Python: what stands in the transcripts, and what a broken environment costs."""

import asyncio
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import models
from jaxrl_post.data import CharTokenizer
from jaxrl_post.rollout import SamplingParams
from jaxrl_post.rollout.host import host_turns
from jaxrl_post.rollout.host_environment import Step
from jaxrl_post.types import FINISH_ABORT, FINISH_LENGTH, FINISH_STOP, Policy, Unembedding

TOKENIZER = CharTokenizer()
V = TOKENIZER.vocab_size
EOS = TOKENIZER.eos_ids[0]
KEY = jax.random.key(3)
STOP = SamplingParams(stop_tokens=TOKENIZER.eos_ids)


def table_policy(traces=None):
    """A policy that is a table: `params[v]` are the logits of what follows token v."""

    def look_up(params, tokens, positions, cache):
        if traces is not None:
            traces.append(tokens.shape)
        return params[tokens], cache

    return Policy(
        init=lambda key: jnp.zeros((V, V)),
        hidden=lambda params, tokens, positions, segment_ids=None, *, key=None: (params[tokens], {}),
        unembed=lambda params: Unembedding(None),
        heads=lambda params, hidden: {},
        init_cache=lambda batch, capacity, dtype: (),
        prefill=look_up,
        decode=look_up,
    )


TABLE = table_policy()


def script(*words):
    """Parameters under which each word's characters follow each other; "$" is the stop token."""
    params = np.zeros((V, V), np.float32)
    for word in words:
        ids = [EOS if character == "$" else TOKENIZER.encode(character)[0] for character in word]
        params[ids[:-1], ids[1:]] = 60.0
    return jnp.asarray(params)


class Environment:
    """Prompts are the tasks; `answers` take task, number of the turn and action."""

    def __init__(self, answer):
        self.answer = answer

    async def reset(self, task):
        return (task, 0), task

    async def step(self, state, action):
        task, turn = state
        answer = self.answer(task, turn, action)
        answer = await answer if asyncio.iscoroutine(answer) else answer
        return Step((task, turn + 1), *answer)


def play(answer, tasks, params, *, policy=TABLE, **options):
    options = {"max_turns": 3, "max_turn_tokens": 3, "max_length": 16, "sampling": STOP, "timeout": 20.0} | options
    environment = Environment(answer) if callable(answer) else answer
    return host_turns(policy, params, environment, tasks, KEY, tokenizer=TOKENIZER, **options)


def text(rollouts, row):
    """A row's characters, those that were sampled in upper case, "$" for the stop token."""
    tokens, mask = np.asarray(rollouts.tokens)[row], np.asarray(rollouts.mask)[row]
    length = rollouts.length.reshape(-1)[row]
    shown = ["$" if token == EOS else TOKENIZER.decode([token]) for token in tokens[:length].tolist()]
    return "".join(c.upper() if sampled else c for c, sampled in zip(shown, mask, strict=False))


COPY = script("ax$", "by$", "cz$")


def test_actions_and_observations_follow_each_other_and_every_array_knows_which_is_which():
    seen = []

    def answer(task, turn, action):
        seen.append((task, turn, action))
        return {"a": ("-b", 0.5, False), "b": ("", 2.0, True)}[task if turn == 0 else "b"]

    out = play(answer, ["a", "b"], COPY, version=7)
    assert sorted(seen) == [("a", 0, "x"), ("a", 1, "y"), ("b", 0, "y")]
    assert [text(out, row) for row in (0, 1)] == ["aX$-bY$", "bY$"]
    assert out.mask[0].tolist() == [0, 1, 1, 0, 0, 1, 1] + [0] * 9
    assert out.step[0].tolist() == [-1, 0, 0, -1, -1, 1, 1] + [-1] * 9
    assert out.version[0].tolist() == [-1, 7, 7, -1, -1, 7, 7] + [-1] * 9
    assert out.rewards["environment"][0].tolist() == [0, 0, 0.5, 0, 0, 0, 2.0] + [0] * 9
    assert out.reward.tolist() == [[2.5], [2.0]]
    assert out.finish.tolist() == [[FINISH_STOP], [FINISH_STOP]]
    assert out.extras["turns"].tolist() == [[2], [1]]
    assert out.extras["environment_errors"].tolist() == [[0], [0]]
    assert out.valid.all()
    assert (out.prompt_id.tolist(), out.id.tolist()) == ([0, 1], [[0], [1]])
    assert jnp.all(jnp.where(out.mask == 0, out.logp, 0.0) == 0)


def test_log_probs_are_those_of_scoring_the_whole_transcript_and_a_replay_gives_its_observations():
    policy = models.decoder(vocab_size=V, width=8, layers=1, heads=2, init_std=0.5)
    params = jax.jit(policy.init)(jax.random.key(0))

    def answer(task, turn, action):
        return (f"{len(action)}{action[:1]}", float(len(action) + turn), len(action) == 2)

    sampling = STOP._replace(logit_bias=jnp.zeros(V).at[EOS].set(2.5))
    options = {"group_size": 2, "max_length": 22, "sampling": sampling}
    out = play(answer, ["abc", "d"], params, policy=policy, **options)
    score = jax.jit(models.score(policy), static_argnums=2)
    stats = score(params, out, frozenset({"logp", "entropy"}), KEY)
    np.testing.assert_allclose(out.logp, stats.logp * out.mask, atol=1e-5)
    np.testing.assert_allclose(out.extras["entropy"], stats.entropy * out.mask, atol=1e-5)
    assert float(jnp.sum(jnp.abs(out.extras["sampler_logp"] - out.logp))) > 0.1

    tokens, mask, steps = (np.asarray(x) for x in (out.tokens, out.mask, out.step))
    for row, prompt in enumerate(["abc", "abc", "d", "d"]):
        place, turn, rewards, done = len(prompt), 0, np.zeros(22, np.float32), False
        assert tokens[row, :place].tolist() == TOKENIZER.encode(prompt)
        while place < out.length.reshape(-1)[row]:
            end = place + int((steps[row] == turn).sum())
            assert mask[row, place:end].all()
            said = tokens[row, place:end].tolist()
            assert len(said) == 3 or said[-1] == EOS
            observation, rewards[end - 1], done = answer(prompt, turn, TOKENIZER.decode(said))
            place, turn = end, turn + 1
            if turn < out.extras["turns"].reshape(-1)[row]:
                assert not done
                shown = TOKENIZER.encode(observation)
                assert tokens[row, place : place + len(shown)].tolist() == shown
                place += len(shown)
        assert out.finish.reshape(-1)[row] == (FINISH_STOP if done else FINISH_LENGTH)
        np.testing.assert_array_equal(out.rewards["environment"][row], rewards)
    assert out.extras["turns"].max() == 3
    assert len({tuple(row) for row in tokens.tolist()}) == 4


class Pieces:
    """A tokenizer under which "ab" has two spellings, of which `encode` knows one."""

    vocab_size, eos_ids = V, (EOS,)
    words = ("", "", "a", "b", "ab", "c")

    def encode(self, text):
        ids = []
        while text:
            token = max((4, 2, 3, 5), key=lambda id: text.startswith(self.words[id]) * len(self.words[id]))
            ids, text = [*ids, token], text[len(self.words[token]) :]
        return ids

    def decode(self, ids):
        return "".join(self.words[id] for id in ids)


def test_what_was_sampled_is_never_encoded_again():
    params = np.zeros((V, V), np.float32)
    for before, after in ((5, 2), (2, 3), (3, EOS), (4, 2)):
        params[before, after] = 60.0
    tokenizer = Pieces()
    assert tokenizer.encode(tokenizer.decode([2, 3])) == [4]
    actions = []

    def answer(task, turn, action):
        actions.append(action)
        return "ab", 0.0, False

    options = {"max_turns": 2, "max_turn_tokens": 3, "max_length": 16, "sampling": STOP, "on_error": ""}
    out = host_turns(TABLE, jnp.asarray(params), Environment(answer), ["c"], KEY, tokenizer=tokenizer, **options)
    assert actions == ["ab", "ab"]
    assert out.tokens[0, :8].tolist() == [5, 2, 3, EOS, 4, 2, 3, EOS]
    assert out.mask[0, :8].tolist() == [0, 1, 1, 1, 0, 1, 1, 1]


def test_one_program_serves_all_turns_and_the_next_calls():
    traces = []
    policy = table_policy(traces)
    for version, tasks in enumerate((["a", "bbb"], ["ccaa", "b"])):
        play(lambda task, turn, action: ("-" * turn + "a", 1.0, False), tasks, COPY, policy=policy, version=version)
    assert traces == [(2, 16), (2, 1)]  # prefill and decode
    for heat in (1.0, 2.0):
        sampling = STOP._replace(temperature=jnp.array([heat, 3.0]))
        play(lambda *_: ("a", 1.0, False), ["a", "b"], COPY, policy=policy, sampling=sampling)
    assert len(traces) == 4  # numbers in arrays are another program, one for all their values


def test_a_hanging_call_and_one_that_raises_become_observations_of_their_rows_alone():
    gate, over = threading.Event(), []

    def block():
        gate.wait(60)
        over.append(1)

    class Broken:
        def reset(self, task):
            return 0, task

        def step(self, state, action):
            if state == 0 and action == "x":
                block()
            if state == 0 and action == "y":
                raise KeyError("gone")
            return Step(state + 1, "-", 1.0, state == 1)

    class BrokenAsync(Broken):
        async def step(self, state, action):
            if state == 0 and action == "x":
                await asyncio.sleep(60)
            return super().step(state, action)

    params = script("ax$", "by$", "cz$", "!x$", "-z$")
    for environment in (Broken(), BrokenAsync()):
        options = {"max_turns": 2, "timeout": 0.5, "on_error": "{error}!"}
        out = play(environment, ["a", "b", "c"], params, max_length=40, **options)
        assert text(out, 0) == "aX$timed out after 0.5 s!X$"
        assert text(out, 1) == "bY$KeyError: 'gone'!X$"
        assert text(out, 2) == "cZ$-Z$"
        assert out.extras["environment_errors"].tolist() == [[2], [2], [0]]
        assert out.extras["environment_timeouts"].tolist() == [[2], [1], [0]]
        assert out.reward.tolist() == [[0.0], [0.0], [2.0]]
        assert out.valid.all()
        assert out.finish.tolist() == [[FINISH_LENGTH], [FINISH_LENGTH], [FINISH_STOP]]
    assert not over
    gate.set()


def test_failures_in_a_row_give_a_sequence_up_and_others_do_not():
    asked = {"a": 0, "b": 0}

    def answer(task, turn, action):
        asked[task] += 1
        assert turn == 0 or task == "b"  # a call that fails leaves the state as it was
        if task == "a" or asked[task] % 2:
            raise ValueError("no")
        return "b", 1.0, False

    out = play(answer, ["a", "b"], script("ax$", "bx$", "!b"), max_turns=6, max_errors=2, max_length=40, on_error="!")
    assert out.finish.tolist() == [[FINISH_ABORT], [FINISH_LENGTH]]
    assert out.valid.tolist() == [[False], [True]]
    assert out.extras["environment_errors"].tolist() == [[2], [3]]
    assert out.extras["turns"].tolist() == [[2], [6]]
    assert out.reward.tolist() == [[0.0], [3.0]]
    # What an environment itself calls a failure counts too, with its own observation.
    out = play(lambda *_: ("b", 0.0, False, True), ["a", "b"], script("ax$", "bx$"), max_errors=2)
    assert text(out, 0) == "aX$bX$"
    assert out.finish.tolist() == [[FINISH_ABORT], [FINISH_ABORT]]


def test_nan_logits_and_rewards_that_are_not_finite_give_up_their_row_alone():
    broken = COPY.at[TOKENIZER.encode("y")[0]].set(jnp.nan)
    out = play(lambda task, turn, action: ("-a", 1.0, turn == 1), ["a", "b"], broken)
    assert [text(out, row) for row in (0, 1)] == ["aX$-aX$", "bY"]
    assert (out.finish.tolist(), out.valid.tolist()) == ([[FINISH_STOP], [FINISH_ABORT]], [[True], [False]])
    assert out.extras["turns"].tolist() == [[2], [0]]
    # 1e39 is finite, and is not in float32.
    out = play(lambda task, turn, action: ("-a", float(task == "b") or 1e39, turn == 1), ["a", "b"], COPY)
    assert (out.finish.tolist(), out.valid.tolist()) == ([[FINISH_ABORT], [FINISH_STOP]], [[False], [True]])
    assert out.reward.tolist() == [[0.0], [2.0]]
    assert out.extras["environment_errors"].tolist() == [[1], [0]]


def test_a_transcript_that_is_full_ends_and_the_last_action_is_still_rewarded():
    seen = []

    def answer(task, turn, action):
        seen.append(action)
        return "-" * (12 if task == "a" else 11), 1.0, False

    # 16 places: a prompt, an action of two, an observation of 12 leaves one for another action, of 13 none.
    out = play(answer, ["a", "bb"], script("ax$", "by$", "--"), max_length=16)
    assert [text(out, row) for row in (0, 1)] == ["aX$" + "-" * 12 + "-", "bbY$" + "-" * 11 + "-"]
    assert sorted(seen) == ["-", "-", "x", "y"]
    assert out.length.tolist() == [[16], [16]]
    assert out.finish.tolist() == [[FINISH_LENGTH], [FINISH_LENGTH]]
    assert out.reward.tolist() == [[2.0], [2.0]]
    out = play(lambda *_: ("-" * 13, 1.0, False), ["a", "bb"], script("ax$", "by$", "--"), max_length=16)
    assert [text(out, row) for row in (0, 1)] == ["aX$", "bbY$"]
    assert out.finish.tolist() == [[FINISH_LENGTH], [FINISH_LENGTH]]
    assert out.extras["turns"].tolist() == [[1], [1]]


def test_an_action_without_a_stop_token_ends_at_its_limit():
    out = play(lambda *_: ("a", 1.0, False), ["a", "b"], script("aaa", "bbb"), max_turns=2)
    assert [text(out, row) for row in (0, 1)] == ["aAAAaAAA", "bBBBaAAA"]


def test_tokens_may_stand_for_texts_and_plain_tuples_for_steps():
    class Plain:
        def reset(self, task):
            return 0, TOKENIZER.encode(task)

        def step(self, state, action):
            return state + 1, np.array(TOKENIZER.encode("-b")), 1, state == 1

    out = play(Plain(), ["a", "b"], COPY)
    assert [text(out, row) for row in (0, 1)] == ["aX$-bY$", "bY$-bY$"]
    assert out.reward.tolist() == [[2.0], [2.0]]


def test_an_observation_that_cannot_be_encoded_is_a_failure_without_its_text():
    shown = {"a": "é", "b": [V]}
    options = {"on_error": "!{error}", "max_turns": 2, "max_length": 50}
    out = play(lambda task, turn, action: (shown[task], 1.0, False), ["a", "b"], script("ax$", "by$", "!a"), **options)
    assert text(out, 0) == "aX$!AX$"  # the message quotes the character, and is left out
    assert text(out, 1)[:37] == f"bY$!token ids must be 0 .. {V - 1}, got {V}"
    assert out.extras["environment_errors"].tolist() == [[2], [2]]
    assert out.reward.tolist() == [[0.0], [0.0]]
    wrong = {"a": (b"a", 1.0), "b": ("a", 10**400)}
    options["max_length"] = 120
    out = play(lambda task, turn, action: (*wrong[task], False), ["a", "b"], script("ax$", "by$", "!a"), **options)
    assert out.extras["environment_errors"].tolist() == [[2], [2]]
    done = play(lambda task, *_: (shown[task], 1.0, True), ["a", "b"], COPY)
    assert done.reward.tolist() == [[1.0], [1.0]]


class Tasks(Environment):
    """A task that is an exception fails."""

    async def reset(self, task):
        if isinstance(task, Exception):
            raise task
        return await super().reset(task)


def test_a_sequence_that_cannot_begin_is_given_up_and_if_none_can_the_error_is_shown():
    out = play(Tasks(lambda *_: ("", 1.0, True)), [OSError("disk"), "b"], COPY)
    assert (out.finish.tolist(), out.valid.tolist()) == ([[FINISH_ABORT], [FINISH_STOP]], [[False], [True]])
    assert out.mask[0].sum() == 0
    assert out.reward.tolist() == [[0.0], [1.0]]
    assert out.extras["environment_errors"].tolist() == [[1], [0]]
    with pytest.raises(RuntimeError, match="failed for every sequence, the first with: OSError: disk"):
        play(Tasks(None), [OSError("disk"), OSError("net")], COPY)


OVER = functools.partial(play, lambda *_: ("", 0.0, True))


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ([], {}, "tasks hold no task"),
        (["a", "a" * 16], {}, "prompt of task 1 has 16 tokens; .* fewer than max_length=16"),
        (["a", ""], {}, "prompt of task 1 has 0 tokens; it needs at least 1"),
        (["a", "é"], {}, "prompt of task 1 cannot be encoded: character 'é'"),
        (["a"], {"max_turns": 0}, "max_turns must be at least 1, got 0"),
        (["a"], {"max_turn_tokens": 0}, "max_turn_tokens must be at least 1"),
        (["a"], {"max_errors": 0}, "max_errors must be at least 1"),
        (["a"], {"timeout": 0.0}, "timeout must be positive and finite, in seconds, got 0.0"),
        (["a"], {"on_error": "é"}, "character 'é'"),
        (
            ["a"],
            {"id": jnp.arange(3)},
            r"id must be \[P, G\] = \[1, 1\] and prompt_id \[P\] = \[1\], got shapes \(3,\)",
        ),
        (["a"], {"sampling": SamplingParams(presence_penalty=0.1)}, "presence_penalty counts the tokens"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(tasks, options, message):
    with pytest.raises(ValueError, match=message):
        OVER(tasks, COPY, **options)


def test_an_environment_that_breaks_its_contract_is_an_error():
    class Bare:
        reset = staticmethod(lambda task: (0, task))
        step = staticmethod(lambda state, action: None)

    with pytest.raises(TypeError, match=r"step must return Step or \(state, observation, reward, done\), got None"):
        play(Bare(), ["a", "b"], COPY)
    Bare.reset = staticmethod(lambda task: task)
    with pytest.raises(TypeError, match=r"reset must return \(state, prompt\), got 'a'"):
        play(Bare(), ["a", "b"], COPY)


def test_a_lock_that_an_environment_keeps_serves_one_rollout_after_the_other():
    """What asyncio binds to a loop stays bound to it."""
    lock = asyncio.Semaphore(1)

    async def answer(task, turn, action):
        async with lock:
            await asyncio.sleep(0.001)
        return "b", 1.0, turn == 1

    for _ in range(2):
        out = play(answer, ["x", "y", "z"], script("xa$", "ya$", "za$", "ba$"))
        assert not np.asarray(out.extras["environment_errors"]).any()
        assert np.asarray(out.reward).tolist() == [[2.0]] * 3


def test_what_is_said_behind_a_prompt_has_a_limit_of_its_own():
    out = play(
        lambda task, turn, action: ("b", 1.0, False), ["x", "xyz"], script("xa$", "za$", "ba$"), max_new_tokens=5
    )
    # x a $ | b a $ and x y z a $ | b a $: five behind each prompt, the last action is cut where that is reached.
    assert np.asarray(out.length).tolist() == [[6], [8]]
    assert np.asarray(out.finish).tolist() == [[FINISH_LENGTH]] * 2
    assert np.asarray(out.extras["turns"]).tolist() == [[2]] * 2

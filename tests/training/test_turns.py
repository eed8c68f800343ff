"""Runs whose policy acts in an environment: what is sampled, scored and trained on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.rollout.environments import Text
from jaxrl_post.training import config as configs
from jaxrl_post.training import inference, loop, setup
from jaxrl_post.training.batches import Batches, Cursor
from tests.training import runs, test_distributed
from tests.training.configurations import problems_of

WORLD = {
    "data": {
        "environment": "gridworld",
        "environment_options": {"size": 2},
        "alphabet": "0123456789udlr>?AG#./",
        "max_prompt_length": 6,
        "size": 1000,
    },
    "rewards": [{"name": "environment", "weight": 2.0}],
    "rollout": {"group_size": 4, "prompts": 4, "max_new_tokens": 12, "max_turns": 4, "max_turn_tokens": 2},
    "warm_start": None,
    "eval": {"problems": 2, "samples": 2, "k": 2},
}


def world_run(directory, **changes):
    return runs.tiny_run(directory, **{**WORLD, **changes})


def first_batch(path):
    parts = setup.build(configs.load(path))
    stage = parts.stages[0]
    batches = Batches(parts, stage, Cursor())
    return batches.next(parts.begin(stage, parts.initial_params(), step=0), Cursor()), parts, batches


def run_and_batches(path, monkeypatch, *overrides):
    """Trains; the setup of the run, and its batches as host arrays."""
    parts, batches = [], []
    build, take = setup.build, Batches.next

    def next_batch(*given):
        batch = take(*given)
        batches.append(jax.device_get(batch.rollouts))  # the step may take the arrays
        return batch

    monkeypatch.setattr(setup, "build", lambda *given, **named: parts.append(build(*given, **named)) or parts[-1])
    monkeypatch.setattr(Batches, "next", next_batch)
    loop.run(configs.load(path, overrides))
    return parts[0], batches


def test_the_reward_of_a_sequence_is_what_the_environment_gives_for_its_actions(tmp_path):
    rollout = {**WORLD["rollout"], "max_turns": 8, "max_turn_tokens": 1, "max_new_tokens": 32}
    batch, parts, batches = first_batch(world_run(tmp_path, rollout=rollout))
    environment, rollouts = parts.turns.environment, jax.device_get(batch.rollouts)
    earned = rollouts.rewards["environment_tokens"]
    assert earned.shape == rollouts.mask.shape
    np.testing.assert_allclose(rollouts.reward.reshape(-1), 2.0 * earned.sum(axis=1))
    np.testing.assert_allclose(rollouts.rewards["environment"].reshape(-1), earned.sum(axis=1))
    assert 0 < (earned > 0).sum() < len(earned)
    reset, step = jax.jit(environment.reset), jax.jit(environment.step)
    for row, tokens in enumerate(rollouts.tokens):
        # Played again on the host, one action after the other.
        problem = batches.problems[row // 4]
        state, prompt = reset(jnp.int32(problem["task"]), jax.random.key(0))
        assert tokens[: int(prompt.length)].tolist() == problem["prompt_tokens"]
        total = 0.0
        for turn in range(rollouts.step[row].max() + 1):
            action = tokens[rollouts.step[row] == turn]
            said = Text(jnp.asarray(action), jnp.int32(len(action)))
            state, _, reward, done = step(state, said, jax.random.key(0))
            total += float(reward)
        assert bool(done) == (rollouts.finish.reshape(-1)[row] == 1)
        assert total == earned[row].sum()


@pytest.mark.parametrize("method", ["grpo", pytest.param("gigpo", marks=pytest.mark.nightly)])
def test_a_run_in_an_environment_trains_and_measures(tmp_path, method):
    loop.run(configs.load(world_run(tmp_path, method={"name": method}, training=runs.training(steps=2))))
    (said,) = inference.generate_text(tmp_path / "run", ["2A00?"])
    assert 1 <= len(said[0]["text"]) <= 2  # one action
    rows = runs.lines(tmp_path / "run")
    assert len(rows) == 2
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert 1 <= rows[0]["completions/mean_turns"] <= 4
    assert rows[0]["rewards/environment/mean"] == pytest.approx(rows[0]["reward"] / 2)
    assert "eval/accuracy" in rows[-1]
    # The environment's words are read, not learned: the sampler and the trained model agree on all that was sampled.
    assert rows[0]["sampling/sampling_logp_difference/max"] < 1e-4


def test_episodes_do_not_depend_on_devices_slots_or_pages(tmp_path):
    plain, *_ = first_batch(world_run(tmp_path / "plain"))
    for mesh, room in (({"data": 2}, {"slots": 8}), ({"tensor": 2}, {"slots": 8, "cache_pages": 3})):
        rollout = {**WORLD["rollout"], **room}
        other, parts, _ = first_batch(world_run(tmp_path / str(mesh), rollout=rollout, mesh=mesh))
        assert parts.generation(parts.sampling()).cache_pages == room.get("cache_pages")
        for name in ("tokens", "mask", "step", "reward", "length"):
            np.testing.assert_array_equal(getattr(plain.rollouts, name), getattr(other.rollouts, name))


def test_an_environment_of_ones_own_is_named_by_its_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import jax.numpy as jnp\n"
        "from jaxrl_post.rollout.environments import Environment, Text, Transition\n"
        "def echo(*, vocabulary, worth):\n"
        "    def reset(task, key):\n"
        "        return task % 10, Text(jnp.asarray(vocabulary.encode('0123456789'))[task % 10][None], jnp.int32(1))\n"
        "    def step(state, action, key):\n"
        "        nothing = Text(jnp.zeros(1, jnp.int32), jnp.int32(0))\n"
        "        return Transition(state, nothing, jnp.float32(worth), jnp.bool_(True))\n"
        "    return Environment(reset, step, max_prompt=1, max_observation=1)\n"
    )
    data = {**WORLD["data"], "environment": f"{tmp_path}/mine.py:echo", "environment_options": {"worth": 0.25}}
    batch, *_ = first_batch(world_run(tmp_path, data=data, eval={"problems": 0}))
    assert np.asarray(batch.rollouts.reward).tolist() == [[0.5] * 4] * 4
    data["environment_options"] = {"value": 1}
    with pytest.raises(configs.ConfigError, match=r"data.environment_options: .*mine.py:echo refuses them: .*'value'"):
        setup.build(configs.load(world_run(tmp_path, data=data))).prepare()


SECRETS = """
import jax, jax.numpy as jnp
from jaxrl_post.rollout.environments import Environment, Text, Transition

def secrets(*, vocabulary):
    digits = jnp.asarray(vocabulary.encode("0123456789"))
    def reset(task, key):
        return task % 10, Text(jnp.asarray(vocabulary.encode(">")), jnp.int32(1))
    def step(state, action, key):
        right = action.tokens[0] == digits[state]
        return Transition(state, Text(jnp.asarray(vocabulary.encode("?")), jnp.int32(1)), right.astype(float), right)
    return Environment(reset, step, max_prompt=1, max_observation=1)
"""


def test_tasks_that_all_begin_with_the_same_words_are_told_apart_by_what_is_hidden(tmp_path):
    (tmp_path / "secrets.py").write_text(SECRETS)
    data = {**WORLD["data"], "environment": f"{tmp_path}/secrets.py:secrets", "environment_options": {}}
    rollout = {**WORLD["rollout"], "max_turns": 2}
    parts = setup.build(configs.load(world_run(tmp_path, data=data, rollout=rollout, eval={"problems": 4})))
    held_out = {problem["task"] % 10 for problem in parts.problems.held_out}
    assert len(held_out) == 4
    batches = Batches(parts, parts.stages[0], Cursor())
    state = parts.begin(parts.stages[0], parts.initial_params(), step=0)
    batches.next(state, Cursor())
    assert not held_out & {problem["task"] % 10 for problem in batches.problems}


def in_environment(**changes):
    return problems_of(
        data={"environment": "gridworld", "max_prompt_length": 12},
        rewards=changes.pop("rewards", [{"name": "environment"}]),
        rollout={"max_new_tokens": 12, "max_turns": 4},
        **changes,
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__task": "spell_backward"}, "data.environment = 'gridworld': exactly one of data.task and data.environ"),
        ({"rollout__max_turns": ...}, "rollout.max_turns: is missing"),
        ({"rollout__max_turn_tokens": 13}, "may not be longer than all of rollout.max_new_tokens = 12"),
        ({"data__on_long_prompt": "error"}, "data.on_long_prompt = 'error': does not apply"),
        ({"data__prompt": "{question}"}, "data.prompt = '{question}': does not apply: data.environment is given"),
        ({"rollout__budgets": [4, 8]}, "rollout.budgets = (4, 8): does not apply"),
        ({"rewards": [{"name": "task_score"}]}, "rewards.0.name = 'task_score': scores with the generator"),
        ({"warm_start": {"steps": 1, "examples": 4}}, "warm_start: learns from worked examples"),
        ({"method": {"name": "sft"}, "training__batch_size": 8}, "method sft learns from given completions"),
    ],
)
def test_what_does_not_go_with_an_environment_is_refused(changes, words):
    assert any(words in problem for problem in in_environment(**changes))


def test_turns_and_their_reward_need_an_environment():
    found = problems_of(rewards=[{"name": "environment"}], rollout__max_turns=4)
    assert [problem.split(" =")[0] for problem in found] == ["rewards.0.name", "rollout.max_turns"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"environment": "gridwold"}, "did you mean 'gridworld'"),
        ({"environment_options": {"size": 1}}, "data.environment_options: gridworld refuses them: .*size"),
        ({"max_prompt_length": 3}, "data.max_prompt_length = 3: prompts of gridworld may have 6 tokens"),
    ],
)
def test_an_environment_that_cannot_be_made_is_told_before_anything_is_compiled(tmp_path, data, words):
    with pytest.raises(configs.ConfigError, match=words):
        setup.build(configs.load(world_run(tmp_path, data={**WORLD["data"], **data}))).prepare()


COUNTER = """
import time

class Counter:
    '''The policy may ask twice; it is paid for the digits that it writes.'''

    def __init__(self, slow):
        self.slow = slow

    def reset(self, problem):
        return problem["answer"], problem["prompt"]

    def step(self, state, action):
        if self.slow and state[0] == "1":
            time.sleep(60)
        reward = sum(character.isdigit() for character in action) / 4
        return state + "!", ">", reward, state.endswith("!")

def counter(slow=False):
    return Counter(slow)
"""


def host_run(directory, **rollout):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "counter.py").write_text(COUNTER)
    given = {**runs_rollout(), "environment": f"{directory}/counter.py:counter", **rollout}
    rewards = [{"name": "environment"}, {"path": f"{runs.__file__}:reward", "weight": 0.0}]
    changes = {"rollout": given, "rewards": rewards, "warm_start": None, "training": runs.training(steps=2)}
    return runs.tiny_run(directory, eval={"problems": 2, "samples": 2, "k": 2}, **changes)


def runs_rollout():
    return {
        "group_size": 4,
        "prompts": 4,
        "max_new_tokens": 9,
        "max_turns": 3,
        "max_turn_tokens": 2,
        "environment_error": ">",
    }


def test_an_environment_in_python_answers_between_turns_and_its_words_are_not_trained(tmp_path, monkeypatch):
    parts, (rollouts, *_) = run_and_batches(host_run(tmp_path), monkeypatch)
    separator = parts.tokenizer.encode(">")[0]
    for row, tokens in enumerate(rollouts.tokens):
        assert rollouts.step[row].max() == 1  # two turns each
        first, second = (tokens[rollouts.step[row] == turn] for turn in (0, 1))
        between = np.flatnonzero(rollouts.step[row] == 1)[0] - 1
        assert tokens[between] == separator
        assert rollouts.mask[row, between] == 0
        digits = sum(character.isdigit() for said in (first, second) for character in parts.tokenizer.decode(said))
        assert rollouts.reward.reshape(-1)[row] == digits / 4
    assert jax.tree.map(lambda x: (x.shape, x.dtype), rollouts) == jax.tree.map(
        lambda x: (x.shape, x.dtype), parts.rollout_shapes(parts.stages[0])
    )
    rows = runs.lines(tmp_path / "run")
    assert rows[0]["completions/mean_turns"] == 2
    assert rows[0]["environment/errors"] == 0
    assert rows[0]["sampling/sampling_logp_difference/max"] < 1e-4
    assert "eval/accuracy" in rows[-1]


MESHED = ("mesh.fsdp=4", "eval.problems=4")


def of_two_processes(path, *overrides):
    """How a run ends: statuses and what is written."""
    return test_distributed.ended(test_distributed.launch(path, 2, 2, *MESHED, *overrides), path.parent)


def jax_run(directory):
    """With a reward that tells completions apart: where all are worth the same, gradients are rounding errors."""
    directory.mkdir(parents=True)
    digits = "return [sum(c.isdigit() for c in text) / len(text) for text in completions]"
    (directory / "digits.py").write_text(f"def digits(completions):\n    {digits}\n")
    return world_run(directory, rewards=[*WORLD["rewards"], {"path": f"{directory}/digits.py:digits"}])


@pytest.mark.parametrize("make", [host_run, pytest.param(jax_run, marks=pytest.mark.nightly)])
def test_two_processes_each_answer_their_own_sequences_as_one_answers_all(tmp_path, make):
    one, two = (make(tmp_path / name) for name in ("one", "two"))
    loop.run(configs.load(one, ["eval.problems=4"]))
    statuses, outputs = of_two_processes(two)
    assert statuses == [0, 0], outputs
    test_distributed.check_same(runs.lines(two.parent / "run"), runs.lines(one.parent / "run"))


@pytest.mark.nightly
def test_an_environment_in_python_refuses_rows_that_lie_on_several_processes(tmp_path):
    statuses, outputs = of_two_processes(host_run(tmp_path), "rollout.prompts=3")
    assert all(status > 0 for status in statuses), outputs
    assert "rollout.environment: the rows of 3 prompts do not lie on one process each" in outputs[0]


def test_an_answer_that_does_not_come_is_an_error_that_is_counted(tmp_path):
    batch, _, batches = first_batch(host_run(tmp_path, environment_options={"slow": True}, environment_timeout=0.5))
    slow = np.array([problem["answer"].startswith("1") for problem in batches.problems])
    assert 0 < slow.sum() < 4
    # A third error in a row would end a sequence; before that the policy reads what it is told, and acts again.
    assert batch.metrics["environment/timeouts"] == batch.metrics["environment/errors"] == 3 * 4 * slow.sum()
    assert not np.asarray(batch.rollouts.reward)[slow].any()
    assert np.asarray(batch.rollouts.valid).all(axis=1).tolist() == (~slow).tolist()


TOOLS = """
from jaxrl_post.rollout import tool_environment

def made(lengthy=False):
    prompt = (lambda problem: ">") if lengthy else (lambda problem: problem["prompt"])
    return tool_environment({"add": lambda a, b: a + b}, prompt=prompt, reward=lambda problem, answer: len(answer) / 2)
"""


def tool_run(directory, **rollout):
    (directory / "tools.py").write_text(TOOLS)
    given = {**runs_rollout(), "environment": f"{directory}/tools.py:made", **rollout}
    changes = {"rollout": given, "rewards": [{"name": "environment"}], "warm_start": None}
    return runs.tiny_run(directory, training=runs.training(steps=1), eval={"problems": 0}, **changes)


def test_tools_are_an_environment_of_a_run(tmp_path):
    loop.run(configs.load(tool_run(tmp_path)))
    (row,) = runs.lines(tmp_path / "run")
    assert row["completions/mean_turns"] == 1  # an action without a call is the answer
    assert row["reward"] > 0
    assert np.isfinite(row["loss"])


def test_no_sequence_gets_longer_than_the_run_allows_however_short_its_prompt_is(tmp_path, monkeypatch):
    """What is scored is bounded by `max_new_tokens`; what a short prompt leaves of its row stays empty."""
    path = host_run(tmp_path, max_new_tokens=4, max_turn_tokens=4, max_turns=8)
    (tmp_path / "counter.py").write_text(
        COUNTER.replace('state.endswith("!")', "False").replace('problem["prompt"]', '">"')
    )
    path.write_text(path.read_text().replace("max_prompt_length: 3", "max_prompt_length: 9"))
    _, batches = run_and_batches(path, monkeypatch, "eval.problems=0")
    assert max(rollouts.length.max() for rollouts in batches) <= 1 + 4
    assert all(row["nonfinite_updates"] == 0 and np.isfinite(row["loss"]) for row in runs.lines(tmp_path / "run"))


def test_an_error_that_the_tokenizer_cannot_write_is_told_by_its_key(tmp_path):
    path = host_run(tmp_path, environment_error="error: {error}")
    with pytest.raises(configs.ConfigError, match=r"rollout.environment_error = 'error: \{error\}': character 'e'"):
        loop.run(configs.load(path))

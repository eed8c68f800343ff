"""What the loop gives to a method beside sampled completions: greedy rewards, columns of the data, the batch before."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import data, methods
from jaxrl_post.rollout import Prompts, SamplingParams
from jaxrl_post.training import config as configs
from jaxrl_post.training import evaluate, loop, setup
from jaxrl_post.training.batches import Batches, Cursor, TrainingError, with_greedy_reward
from jaxrl_post.training.generation import sample_groups
from jaxrl_post.training.sampler import Sampler, sampled_metrics
from jaxrl_post.types import FINISH_ABORT, TokenStats
from tests.training import runs

WITHOUT = {"warm_start": None, "eval": {"problems": 0}}


def first_batch(path):
    """The first batch of a run, its stage and its setup."""
    parts = setup.build(configs.load(path))
    stage = parts.stages[0]
    state = parts.begin(stage, parts.initial_params(), step=0)
    batches = Batches(parts, stage, Cursor())
    return batches.next(state, Cursor()), stage, parts, batches


def test_a_method_that_wants_it_gets_the_reward_of_a_greedy_completion_of_each_prompt(tmp_path):
    method = {"name": "policy_gradient", "advantage": "remax"}
    path = runs.tiny_run(tmp_path, method=method, **WITHOUT)
    batch, stage, parts, batches = first_batch(path)
    assert stage.method.wants == {"greedy_reward"}
    found = np.asarray(batch.rollouts.extras["greedy_reward"])
    # The same prompts, completed greedily and scored by hand.
    how = parts.generation(SamplingParams(greedy=True), max_new_tokens=3)
    sampler = Sampler(parts, how, prompts=4, prompt_length=3, rewarded=False)
    greedy = sampler(parts.initial_params(), batches.problems, jax.random.key(9))
    expected = runs.reward(greedy.completions, [problem["answer"] for problem in batches.problems])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(batch.metrics["rewards/greedy"], np.mean(expected), rtol=1e-6)
    assert batch.metrics["rewards/greedy_unscored"] == 0.0


def test_other_methods_do_not_pay_for_greedy_completions(tmp_path):
    batch, stage, _, _ = first_batch(runs.tiny_run(tmp_path, **WITHOUT))
    assert stage.method.wants == frozenset()
    assert "greedy_reward" not in batch.rollouts.extras
    assert not any(name.startswith("rewards/greedy") for name in batch.metrics)


def test_a_prompt_whose_greedy_completion_cannot_be_scored_is_not_valid():
    prompts = [[2], [3], [4]]
    batch = data.to_rollouts(prompts, [[[5]] * 4] * 3, length=2)
    batch = batch.replace(valid=batch.valid.at[0, 1].set(False))
    greedy = data.to_rollouts(prompts, [[[5]]] * 3, length=2)
    greedy = greedy.replace(reward=jnp.array([[1.0], [jnp.nan], [3.0]]), valid=jnp.array([[True], [False], [True]]))
    made = with_greedy_reward(batch, greedy)
    np.testing.assert_array_equal(made.valid, np.asarray(batch.valid) & np.array([[True], [False], [True]]))
    assert made.extras["greedy_reward"].tolist() == [1.0, 0.0, 3.0]


def test_a_completion_that_the_engine_gave_up_is_not_valid_whatever_its_reward(tmp_path):
    parts = setup.build(configs.load(runs.tiny_run(tmp_path, **WITHOUT)))
    sampler = Sampler(parts, parts.generation(SamplingParams(), 4, max_new_tokens=3), prompts=4, prompt_length=3)
    params = parts.initial_params()
    one = parts.tokenizer.encode("1")[0]
    params["embedding"] = params["embedding"].at[one].set(jnp.nan)
    problems = [{"question": f"{text}>", "prompt": f"{text}>", "answer": text} for text in ("11", "22", "33", "44")]
    sampled = sampler(params, problems, jax.random.key(0))
    aborted = sampled.rows["finish"] == FINISH_ABORT
    assert aborted[0].all()
    assert not aborted.all()
    np.testing.assert_array_equal(sampled.rollouts.valid, ~aborted)
    np.testing.assert_array_equal(sampled.scored.valid, ~aborted.reshape(-1))
    assert sampled_metrics(sampled, 1.0)["completions/aborted_ratio"] == aborted.mean()


def write_weighted(tmp_path, weight):
    rows = [{"question": f"{n:02d}>", "answer": f"{n:02d}", "prompt_weight": weight(n)} for n in range(24)]
    tmp_path.mkdir(parents=True, exist_ok=True)
    path = runs.tiny_run(tmp_path, method={"name": "gui_g1", "horizon": 3}, **WITHOUT)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_problems_may_come_in_the_order_of_the_data(tmp_path):
    values = configs.to_dict(configs.load(write_weighted(tmp_path, lambda n: 1.0)))
    for name, sorted_ in (("in_order", True), ("uniform", False)):
        values["curriculum"]["name"] = name
        parts = setup.build(configs.from_dict(values))
        stage = parts.stages[0]
        batches, cursor = Batches(parts, stage, Cursor()), Cursor()
        state = parts.begin(stage, parts.initial_params(), step=0)
        seen = []
        for _ in range(2):
            batches.next(state, cursor)
            seen += [int(problem["answer"]) for problem in batches.problems]
        assert len(set(seen)) == len(seen) > 2
        assert (seen == sorted(seen)) == sorted_


@pytest.mark.parametrize("oversample", [1, 2])
def test_a_column_of_numbers_that_a_method_wants_goes_with_its_prompts(tmp_path, oversample):
    path = write_weighted(tmp_path, lambda n: 0.5 + n)
    values = configs.to_dict(configs.load(path))
    values["curriculum"]["oversample"] = oversample
    config = configs.from_dict(values)
    parts = setup.build(config)
    stage = parts.stages[0]
    state = parts.begin(stage, parts.initial_params(), step=0)
    batch = Batches(parts, stage, Cursor()).next(state, Cursor())
    assert batch.rollouts.num_prompts == 4
    questions = np.asarray(batch.rollouts.tokens)[::4, :2]
    digits = [int(parts.tokenizer.decode(row.tolist())) for row in questions]
    np.testing.assert_array_equal(batch.rollouts.extras["prompt_weight"], 0.5 + np.array(digits))


def test_a_column_that_is_missing_or_no_number_is_an_error_that_names_it(tmp_path):
    with pytest.raises(TrainingError, match=r"the column 'prompt_weight' .* number for every problem, but is 'much'"):
        first_batch(write_weighted(tmp_path / "text", lambda n: "much"))
    path = runs.tiny_run(tmp_path / "none", method={"name": "gui_g1", "horizon": 3}, **WITHOUT)
    with pytest.raises(TrainingError, match="but is None"):
        first_batch(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"name": "grpo"}},
        {"method": {"name": "policy_gradient", "advantage": "remax"}, "curriculum": {"oversample": 2}},
        {"rollout": {"group_size": 2, "prompts": 4, "max_new_tokens": 3, "sampling": {"top_p": 0.9}}},
        {"method": {"name": "sft"}, "rollout": {"max_new_tokens": 3}, "rewards": []},
    ],
    ids=["grpo", "remax", "top_p", "sft"],
)
def test_the_shapes_that_a_method_is_told_are_those_of_the_batches_that_come(changes, tmp_path):
    path = runs.tiny_run(tmp_path, **{**WITHOUT, **changes})
    if changes.get("method") == {"name": "sft"}:
        path = runs.tiny_run(tmp_path, **{**WITHOUT, **changes, "training": runs.training(batch_size=4)})
    batch, stage, parts, _ = first_batch(path)
    told = parts.rollout_shapes(stage)
    came = jax.eval_shape(lambda: batch.rollouts)
    assert jax.tree.structure(told) == jax.tree.structure(came)
    for (name, one), other in zip(jax.tree_util.tree_leaves_with_path(told), jax.tree.leaves(came), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype), jax.tree_util.keystr(name)


def test_a_run_of_a_method_that_keeps_a_batch_goes_on_from_its_checkpoint_as_if_nothing_had_happened(tmp_path):
    method = {"name": "pipo", "window": 2, "beta": 0.0}
    whole = runs.tiny_run(tmp_path / "whole", method=method, **WITHOUT)
    loop.run(configs.load(whole))
    rows = runs.lines(tmp_path / "whole" / "run")
    assert [row["empty_updates"] for row in rows[:2]] == [1.0, 1.0]  # the window is not full
    assert 0.0 in [row["empty_updates"] for row in rows[2:]]
    assert all(row["empty_steps"] == 0.0 for row in rows)  # the method itself had something to train on
    parts = runs.tiny_run(tmp_path / "parts", method=method, **WITHOUT)
    loop.run(configs.load(parts, ["training.steps=4"]))
    loop.run(configs.load(parts))
    assert runs.lines(tmp_path / "parts" / "run") == rows
    assert runs.final_state(tmp_path / "parts" / "run")[1] == runs.final_state(tmp_path / "whole" / "run")[1]


def test_a_method_that_keeps_nothing_makes_an_empty_step(tmp_path, monkeypatch):
    """Rollouts of which the method masks everything count as nothing to train on."""
    plain = methods.grpo(beta=0.0)

    def nothing(state, rollouts, stats, key):
        targets, state = plain.targets(state, rollouts, stats, key)
        return targets._replace(mask=jnp.zeros_like(targets.mask)), state

    from jaxrl_post.training import stages

    monkeypatch.setattr(stages, "make_method", lambda config: plain._replace(targets=nothing))
    training = runs.training(steps=4, max_empty_steps=3)
    with pytest.raises(TrainingError, match="3 steps in a row had nothing to train on"):
        loop.run(configs.load(runs.tiny_run(tmp_path, method={"name": "grpo"}, **{**WITHOUT, "training": training})))
    rows = runs.lines(tmp_path / "run")
    assert [row["empty_steps"] for row in rows] == [1.0, 1.0, 1.0]


def test_a_component_that_could_not_be_scored_reaches_the_method_as_nan(tmp_path):
    """A judge that cannot tell is not one that says 0."""
    source = tmp_path / "judges.py"
    source.write_text(
        "def total(completions, answer): return [float(len(c)) for c in completions]\n"
        "def judge(completions, answer): return [None if i % 2 else 1.0 for i in range(len(completions))]\n"
    )
    rewards = [{"path": f"{source}:total"}, {"path": f"{source}:judge", "weight": 0.5}]
    batch, *_ = first_batch(runs.tiny_run(tmp_path, rewards=rewards, **WITHOUT))
    judged = np.asarray(batch.rollouts.rewards["judge"]).reshape(-1)
    assert np.isnan(judged[1::2]).all()
    assert (judged[::2] == 1).all()
    assert np.isfinite(np.asarray(batch.rollouts.reward)).all()


@pytest.mark.parametrize(
    "method",
    [
        {"name": "gdpo"},
        {"name": "paco_grpo"},
        {"name": "policy_gradient", "advantage": "gdpo"},
        {"name": "policy_gradient", "advantage": {"name": "log_tamed", "threshold": "median"}},
    ],
)
def test_a_method_that_adds_up_the_components_itself_does_so_by_the_weights_of_the_rewards(tmp_path, method):
    source = tmp_path / "judges.py"
    source.write_text(
        "def length(completions, answer): return [float(len(c)) for c in completions]\n"
        "def odd(completions, answer): return [float(i % 3) for i in range(len(completions))]\n"
    )

    def advantages(of_rewards, of_method=None):
        rewards = [{"path": f"{source}:{name}", "weight": weight} for name, weight in of_rewards.items()]
        how = method
        if of_method is not None and "advantage" in method:
            chosen = method["advantage"] if isinstance(method["advantage"], dict) else {"name": method["advantage"]}
            how = {**method, "advantage": {**chosen, "weights": of_method}}
        elif of_method is not None:
            how = {**method, "weights": of_method}
        run = runs.tiny_run(tmp_path / "run", method=how, rewards=rewards, **WITHOUT)
        batch, stage, *_ = first_batch(run)
        stats = {"policy": TokenStats(logp=batch.rollouts.logp)}
        targets, _ = stage.method.targets((), batch.rollouts, stats, jax.random.key(0))
        return np.asarray(targets.advantages)

    found = advantages({"length": 1.0, "odd": -0.5})
    assert np.any(found != 0)
    np.testing.assert_array_equal(found, advantages({"length": 1.0, "odd": 2.0}, {"length": 1.0, "odd": -0.5}))
    assert np.any(found != advantages({"length": 1.0, "odd": 1.0}))
    metric = advantages({"length": 1.0, "odd": 0.0})
    np.testing.assert_array_equal(metric, advantages({"length": 1.0, "odd": 3.0}, {"length": 1.0}))


def test_the_problems_that_end_a_warm_start_are_not_sampled_one_by_one_where_nothing_is_held_out(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(evaluate, "Sampler", lambda setup, how, **options: made.append(options["prompts"]))
    warm = {"steps": 3, "batch_size": 4, "examples": 8, "optimizer": {"learning_rate": 0.01}}
    warm |= {"until": 0.5, "check_every": 1, "check_problems": 7}
    evaluate.Evaluator(setup.build(configs.load(runs.tiny_run(tmp_path, warm_start=warm, eval={"problems": 0}))))
    assert made == [7, 1]


def test_components_that_count_alike_have_no_weights(tmp_path):
    rewards = [{"name": "exact_match", "weight": 0.5}]
    for method in (
        {"name": "bnpo", "decompose": True},
        {"name": "policy_gradient", "advantage": {"name": "bnpo", "decompose": True}},
    ):
        with pytest.raises(configs.ConfigError, match="with decompose each component counts alike"):
            setup.build(configs.load(runs.tiny_run(tmp_path, method=method, rewards=rewards, **WITHOUT)))


GROUPS = {"group_size": 4, "prompts": 4, "max_new_tokens": 3}


@pytest.mark.parametrize(
    "changes",
    [
        {"rollout": {**GROUPS, "slots": 8}, "mesh": {"data": 2, "fsdp": 2}},
        pytest.param({"rollout": {**GROUPS, "slots": 8, "cache_pages": 5}}, marks=pytest.mark.nightly),
        pytest.param(
            {"rollout": {**GROUPS, "slots": 8, "cache_pages": 8}, "mesh": {"data": 2, "fsdp": 2}},
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["on four devices", "of a pool", "of a pool on four devices"],
)
def test_completions_that_take_each_others_slots_are_those_that_are_decoded_together(tmp_path, changes):
    together, found = (
        jax.device_get(first_batch(runs.tiny_run(tmp_path / name, **WITHOUT, **given))[0].rollouts)
        for name, given in (("together", {}), ("in slots", changes))
    )
    np.testing.assert_array_equal(found.tokens, together.tokens)
    np.testing.assert_allclose(found.logp, together.logp, atol=1e-5)
    np.testing.assert_array_equal(found.reward, together.reward)


def test_a_text_that_comes_up_ends_completions_that_are_trained_on_and_those_that_are_measured(tmp_path):
    free, cut = (
        first_batch(runs.tiny_run(tmp_path / name, **WITHOUT, rollout={**GROUPS, "max_new_tokens": 8, **given}))
        for name, given in (("freely", {}), ("cut", {"stop": ["3", "72"]}))
    )
    tokenizer = setup.build(configs.load(tmp_path / "cut" / "config.yaml")).tokenizer
    lengths = []
    for before, after in zip(*(_sampled(batch.rollouts) for batch, *_ in (free, cut)), strict=True):
        text = tokenizer.decode(before)
        end = min(text.find(stop) + len(stop) if stop in text else len(before) for stop in ("3", "72"))
        assert after == before[:end]
        lengths.append((len(before), len(after)))
    assert any(after < before for before, after in lengths)
    assert any(after == before for before, after in lengths)
    parts = setup.build(configs.load(tmp_path / "cut" / "config.yaml"))
    assert parts.generation(SamplingParams(greedy=True)).sampling.stop_strings == parts.stop_strings
    with pytest.raises(configs.ConfigError, match=r"rollout.stop: the stop string '→' can never come up"):
        setup.build(
            configs.load(runs.tiny_run(tmp_path / "never", rollout={**GROUPS, "stop": ["→"]}))
        ).trained_generation()


def _sampled(rollouts):
    return [
        row[mask > 0].tolist() for row, mask in zip(*map(np.asarray, (rollouts.tokens, rollouts.mask)), strict=True)
    ]


def test_keys_and_values_are_kept_in_the_type_that_is_asked_for(tmp_path):
    parts = setup.build(configs.load(runs.tiny_run(tmp_path, rollout={"max_new_tokens": 3, "cache_dtype": "bfloat16"})))
    how, params = parts.trained_generation(), parts.initial_params()
    prompts = Prompts(jnp.ones((32, 3), int), jnp.full(32, 3))
    with jax.set_mesh(parts.mesh):
        sample = functools.partial(sample_groups, parts.policy, how=how)
        program = jax.make_jaxpr(sample)(params, prompts, parts.key)
    cache = "[1,256,2,3,8]"  # layers, rows, heads, columns behind the prompt, size of a head
    assert f"bf16{cache}" in str(program)
    assert f"f32{cache}" not in str(program)

"""Groups with several budgets and serial groups through the real loop: what is sampled, trained and refused."""

import jax
import numpy as np
import pytest

from jaxrl_post.training import config as configs
from jaxrl_post.training import loop, setup
from jaxrl_post.training.batches import Batches, Cursor
from jaxrl_post.training.config import BudgetScheduleConfig, ConfigError
from jaxrl_post.training.evaluate import Evaluator
from jaxrl_post.training.subgroups import Budgets, subgroup_metrics
from tests.training import runs
from tests.training.test_batches import WITHOUT, first_batch

BUDGETS = {"group_size": 6, "prompts": 4, "max_new_tokens": 3, "budgets": [8, 16, None], "budget_prompt": "{budget}>"}
EXITS = {"group_size": 4, "prompts": 4, "max_new_tokens": 4}
EXITS["exits"] = {"count": 3, "text": ">>", "end": None, "max_new_tokens": 2}
HBPO, S_GRPO = {"name": "hbpo", "max_length": 16}, {"name": "s_grpo"}
REWARDS = [{"path": f"{__file__}:even"}]


def even(completions):
    """Whether the last character is an even digit, as that of an untrained policy often is."""
    return [float(text[-1:] in tuple("02468")) for text in completions]


def lengthy(path, limit):
    """Where the problems of a tiny run are, with another longest prompt."""
    files = {"files": [str(path / "train.jsonl")], "eval_files": [str(path / "eval.jsonl")]}
    return {**files, "alphabet": ">0123456789", "max_prompt_length": limit}


def budget_run(path, limit=6, **changes):
    values = {"rollout": BUDGETS, "method": HBPO, "data": lengthy(path, limit), "rewards": REWARDS, **WITHOUT}
    runs.tiny_run(path)  # writes the files
    return runs.tiny_run(path, **(values | changes))


def exit_run(path, **changes):
    return runs.tiny_run(path, **({"rollout": EXITS, "method": S_GRPO, "rewards": REWARDS, **WITHOUT} | changes))


def test_each_sub_group_has_its_own_prompt_and_budget_and_its_answers_are_scored_behind_it(tmp_path):
    batch, _, parts, batches = first_batch(budget_run(tmp_path))
    made, texts = batch.rollouts, batch.sampled.completions
    np.testing.assert_array_equal(made.extras["budget"], [[8, 8, 16, 16, 0, 0]] * 4)
    assert made.extras["budget"].dtype == np.float32
    tokens, mask, length = (np.asarray(x) for x in (made.tokens, made.mask, made.length.reshape(-1)))
    for row in range(24):
        problem, sentence = batches.problems[row // 6], ("8>", "16>", "")[row % 6 // 2]
        begin = int(np.argmax(mask[row]))
        assert parts.tokenizer.decode(tokens[row, :begin].tolist()) == problem["prompt"] + sentence
        assert mask[row].tolist() == [float(begin <= t < length[row]) for t in range(tokens.shape[1])]
        assert parts.tokenizer.decode(tokens[row, begin : length[row]].tolist()) == texts[row]
    assert np.asarray(made.reward).reshape(-1).tolist() == even(texts)
    np.testing.assert_array_equal(made.id, np.arange(24).reshape(4, 6))
    np.testing.assert_array_equal(made.prompt_id, [problem["prompt_id"] for problem in batches.problems])


def test_a_sub_group_is_sampled_as_if_its_prompt_were_the_problems_own(tmp_path):
    budgeted, _, _, _ = first_batch(budget_run(tmp_path / "budgets"))
    plain = BUDGETS | {"budgets": [None], "group_size": 6}
    del plain["budget_prompt"]
    unasked, _, _, _ = first_batch(budget_run(tmp_path / "plain", rollout=plain, method={"name": "grpo"}))
    for row in range(24):
        if row % 6 >= 4:  # the sub-group without a budget, under the same ids
            assert budgeted.sampled.completions[row] == unasked.sampled.completions[row]


def test_scheduled_budgets_are_those_of_the_stages_step(tmp_path):
    schedule = {"start": 20, "decay": 0.5, "every": 2}
    path = budget_run(tmp_path, rollout=BUDGETS | {"budgets": schedule})
    parts = setup.build(configs.load(path))
    state = parts.begin(parts.stages[0], parts.initial_params(), step=0)
    batches = Batches(parts, parts.stages[0], Cursor())
    for step, budget in ((0, 20), (1, 20), (2, 10), (5, 5)):
        made = batches.next(state, Cursor(stage_step=step)).rollouts
        np.testing.assert_array_equal(made.extras["budget"], np.full((4, 6), budget))
        prompt = parts.tokenizer.decode(np.asarray(made.tokens)[0, : int(np.argmax(made.mask[0]))].tolist())
        assert prompt == f"{batches.problems[0]['prompt']}{budget}>"


def test_a_schedule_gives_the_whole_tokens_of_the_paper_and_never_less_than_one():
    budgets = Budgets(BudgetScheduleConfig(start=256, decay=0.7, every=150), "{budget}")
    assert [budgets.at(step) for step in (0, 149, 150, 300, 450, 10**6)] == [
        (256,), (256,), (179,), (125,), (87,), (1,),
    ]  # fmt: skip
    assert budgets.within(600) == [256, 179, 125, 87]
    halved = Budgets(BudgetScheduleConfig(start=1024, decay=0.5, every=1), "{budget}")
    assert [halved.at(step)[0] for step in range(11)] == [2 ** (10 - step) for step in range(11)]


def test_a_prompt_that_is_too_long_with_its_longest_budget_is_not_trained_on(tmp_path):
    path = budget_run(tmp_path, limit=6)
    rows = [f'{{"question": "{q}>", "answer": "{q[:2]}"}}\n' for q in [f"{n:02d}" for n in range(8)] + ["123", "4567"]]
    (tmp_path / "train.jsonl").write_text("".join(rows))
    # "00>16>" has six tokens; "123>16>" has seven, although "123>" and "123>8>" would fit.
    parts = setup.build(configs.load(path))
    batches = Batches(parts, parts.stages[0], Cursor())
    state = parts.begin(parts.stages[0], parts.initial_params(), step=0)
    seen = {problem["prompt"] for _ in range(4) for problem in (batches.next(state, Cursor()), batches.problems)[1]}
    assert seen == {f"{n:02d}>" for n in range(8)}
    path = budget_run(tmp_path / "error", data=lengthy(tmp_path, 6) | {"on_long_prompt": "error"})
    (tmp_path / "train.jsonl").write_text("".join(rows[-2:] * 4))
    with pytest.raises(ValueError, match=r"has [78] tokens, more than max_prompt_length=6"):
        first_batch(path)


@pytest.mark.parametrize("whole", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_exits_are_answers_to_one_trajectory_whose_thought_is_trained_with_them_or_not(whole, tmp_path):
    path = exit_run(tmp_path, rollout=EXITS | {"exits": EXITS["exits"] | {"whole": whole}})
    batch, _, parts, _ = first_batch(path)
    made, texts = batch.rollouts, batch.sampled.completions
    assert made.tokens.shape == (16, 3 + 4 + 2 + 2)
    tokens, mask, length = (np.asarray(x) for x in (made.tokens, made.mask, made.length))
    for row in range(16):
        group, member = divmod(row, 4)
        before = 0 if whole or member == 3 else int(made.extras["exit"][group, member]) + 2
        assert int(np.argmax(mask[row])) == 3 + before
        assert mask[row].sum() == length[group, member] - np.argmax(mask[row])
        assert parts.tokenizer.decode(tokens[row, 3 : length[group, member]].tolist()) == texts[row]
        if member < 3:
            cut = 3 + int(made.extras["exit"][group, member])
            assert tokens[row, 3:cut].tolist() == tokens[group * 4 + 3, 3:cut].tolist()
            assert parts.tokenizer.decode(tokens[row, cut : cut + 2].tolist()) == ">>"
    assert np.asarray(made.reward).reshape(-1).tolist() == even(texts)
    assert batch.tokens == int(mask.sum())
    assert batch.metrics["exits/thought_length"] == pytest.approx(np.asarray(made.extras["exit"])[:, -1].mean())


@pytest.mark.parametrize("oversample", [pytest.param(1, marks=pytest.mark.nightly), 2])
@pytest.mark.parametrize("make", [pytest.param(budget_run, marks=pytest.mark.nightly), exit_run])
def test_the_shapes_that_a_method_is_told_are_those_that_come(make, oversample, tmp_path):
    batch, stage, parts, _ = first_batch(make(tmp_path, curriculum={"oversample": oversample}))
    assert batch.rollouts is not None
    told, came = parts.rollout_shapes(stage), jax.eval_shape(lambda: batch.rollouts)
    assert jax.tree.structure(told) == jax.tree.structure(came)
    for (name, one), other in zip(jax.tree_util.tree_leaves_with_path(told), jax.tree.leaves(came), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype), jax.tree_util.keystr(name)


@pytest.mark.nightly  # on every commit other runs do, tests/training/test_resume.py and test_over_steps.py
@pytest.mark.parametrize("make", [budget_run, exit_run])
def test_a_run_goes_on_from_its_checkpoint_as_if_nothing_had_happened(make, tmp_path):
    training = runs.training(steps=4, max_empty_steps=100)
    loop.run(configs.load(make(tmp_path / "whole", training=training)))
    loop.run(configs.load(make(tmp_path / "parts", training=training), ["training.steps=2"]))
    loop.run(configs.load(make(tmp_path / "parts", training=training)))
    rows = runs.lines(tmp_path / "whole" / "run")
    assert len(rows) == 4
    assert all(row["nonfinite_updates"] == row["empty_steps"] == 0 for row in rows)
    assert all(row["grad_norm"] > 0 for row in rows)
    assert runs.lines(tmp_path / "parts" / "run") == rows
    assert runs.final_state(tmp_path / "parts" / "run")[1] == runs.final_state(tmp_path / "whole" / "run")[1]


def test_evaluation_names_no_budgets_and_leaves_no_thought_early(tmp_path):
    measure = {"eval": {"problems": 8, "samples": 2, "k": 2}, "data": lengthy(tmp_path / "plain", 6)}
    sizes = {"group_size": 4, "prompts": 4, "max_new_tokens": 4}
    budgets = {**sizes, "budgets": [8, None], "budget_prompt": "{budget}>"}
    paths = [
        exit_run(tmp_path / "plain", rollout=sizes, method={"name": "grpo"}, **measure),
        budget_run(tmp_path / "budgets", rollout=budgets, **measure),
        exit_run(tmp_path / "exits", **measure),
    ]
    found = []
    for path in paths:
        parts = setup.build(configs.load(path))
        found.append(Evaluator(parts)(parts.initial_params()))
    assert found[0] == found[1] == found[2]
    assert found[0]["eval/problems"] == 8


@pytest.mark.nightly  # on every commit plain groups do, tests/training/test_router.py
def test_serial_groups_may_share_their_prompts(tmp_path):
    rows = {}
    for share in (False, True):
        training = runs.training(steps=2, share_prompts=share, max_empty_steps=100)
        loop.run(configs.load(exit_run(tmp_path / str(share), training=training)))
        rows[share] = runs.lines(tmp_path / str(share) / "run")
    for one, other in zip(rows[False], rows[True], strict=True):
        assert one["grad_norm"] > 0
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4, abs=1e-7)
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-6)


def test_metrics_tell_the_sub_groups_apart():
    arrays = {
        "length": np.array([[1, 2, 3, 4], [3, 2, 1, 0]]),
        "reward": np.array([[1.0, 0, 1, 1], [1, 1, 0, 0]]),
        "valid": np.array([[True, True, True, True], [True, False, True, True]]),
        "budget": np.array([[8, 8, 0, 0]] * 2),
    }
    found = subgroup_metrics(arrays, correct_at=1.0)
    assert found == {
        "budgets/8/mean_length": 2.0,
        "budgets/8/accuracy": pytest.approx(2 / 3),
        "budgets/none/mean_length": 2.0,
        "budgets/none/accuracy": 0.5,
    }
    exits = {name: x for name, x in arrays.items() if name != "budget"} | {
        "exit": np.array([[1, 1, 2, 4], [0, 1, 1, 2]])
    }
    assert subgroup_metrics(exits, 1.0) == {"exits/thought_length": 3.0, "exits/full_accuracy": 0.5}
    unscored = arrays | {"valid": np.zeros((2, 4), bool)}
    assert subgroup_metrics(unscored, 1.0) == {"budgets/8/mean_length": 2.0, "budgets/none/mean_length": 2.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 7}, r"rollout.group_size = 7: must be a multiple of the 3 budgets.*try 9"),
        ({"budget_prompt": "soon>"}, r"rollout.budget_prompt = 'soon>': must name \{budget\}, and nothing else"),
        ({"budget_prompt": "{budget}{x}"}, "must name .budget., and nothing else"),
        ({"budget_prompt": "{budget"}, "rollout.budget_prompt = '{budget': is not a template"),
        ({"budget_prompt": "{budget} tokens"}, "character ' ' at position 1 of '8 tokens' is not in the alphabet"),
        ({"budgets": []}, "rollout.budgets = .*: must hold at least one budget"),
        ({"budgets": [0, 4]}, "rollout.budgets.0 = 0: must be at least 1 token"),
        ({"budgets": [4, "x"]}, "rollout.budgets.1 = 'x': must be an integer"),
        ({"budgets": 4}, "rollout.budgets = 4: must be list of integer or null or mapping or null"),
        ({"budgets": {"start": 8}}, "rollout.budgets.every: is missing"),
        ({"budgets": {"start": 8, "every": 2, "step": 1}}, "rollout.budgets.step = 1: unknown key"),
        ({"budgets": {"start": 0, "every": 2}}, "rollout.budgets.start = 0: must be at least 1"),
        ({"budgets": None}, "rollout.budgets = null: method hbpo rewards completions by the budget"),
        ({"budgets": None}, "rollout.budget_prompt = .*does not apply: rollout.budgets is not given"),
        ({"exits": EXITS["exits"]}, "rollout.exits: .* give one of them"),
    ],
    ids=str,
)
def test_budgets_that_cannot_be_are_errors_that_say_what_to_change(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        configs.load(budget_run(tmp_path, rollout=BUDGETS | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 3}, r"rollout.group_size = 3: must be rollout.exits.count \+ 1 = 4"),
        ({"exits": {"count": 0}}, "rollout.exits.count = 0: must be at least 1"),
        ({"exits": {"count": 3, "text": "", "end": None}}, "rollout.exits.text = '': must hold at least one token"),
        ({"exits": {"count": 3, "text": ">", "end": ""}}, "rollout.exits.end = '': .*null: all of the completion"),
        ({"exits": {"count": 3}}, "rollout.exits.end: character '<' at position 0 of '</think>'"),
        ({"exits": None}, "rollout.exits = null: method s_grpo compares answers from early exits"),
    ],
    ids=str,
)
def test_exits_that_cannot_be_are_errors_that_say_what_to_change(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        configs.load(exit_run(tmp_path, rollout=EXITS | changes))


def test_prompts_that_differ_within_a_group_are_not_shared(tmp_path):
    shared = {"training": runs.training(share_prompts=True)}
    with pytest.raises(ConfigError, match=r"training.share_prompts = true: .* different prompts.*or give one budget"):
        configs.load(budget_run(tmp_path, **shared))
    one = configs.load(budget_run(tmp_path, rollout=BUDGETS | {"budgets": [8]}, **shared))
    assert one.training.share_prompts


def test_methods_without_rollouts_refuse_both(tmp_path):
    for options in ({"budgets": [8]}, {"exits": EXITS["exits"]}):
        path = runs.tiny_run(tmp_path, method={"name": "sft"}, rollout={"max_new_tokens": 3, **options}, rewards=[])
        with pytest.raises(ConfigError, match="does not apply: method sft samples no completions"):
            configs.load(path)


def test_a_written_configuration_reads_back(tmp_path):
    schedule = BUDGETS | {"budgets": {"start": 8, "decay": 0.5, "every": 3}}
    for path in (budget_run(tmp_path), exit_run(tmp_path), budget_run(tmp_path, rollout=schedule)):
        config = configs.load(path)
        assert configs.from_dict(configs.to_dict(config)) == config
        assert configs.dump(config).count("budget_prompt") == 1
    assert config.rollout.budgets == BudgetScheduleConfig(start=8, decay=0.5, every=3)

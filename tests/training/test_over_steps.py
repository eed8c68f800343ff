"""Completions that outlast the step they begin in: gone on with in the next (partial rollouts), or sampled ahead."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import data
from jaxrl_post.rollout import Prompts, generate
from jaxrl_post.training import config as configs
from jaxrl_post.training import loop, setup
from jaxrl_post.training.batches import Batches, Cursor
from jaxrl_post.training.sampler import Sampler
from jaxrl_post.types import FINISH_NONE, TokenStats
from tests.training import runs, test_distributed
from tests.training.configurations import problems_of

PARTIAL = {"tokens_per_step": 2}
GROUPS, GROUP, NEW = 4, 2, 7


def parts_of(directory, method="grpo", **rollout):
    sizes = {"group_size": GROUP, "prompts": GROUPS, "max_new_tokens": NEW}
    sections = {
        "rollout": {**sizes, **rollout},
        "method": {"name": method},
        "warm_start": None,
        "eval": {"problems": 0},
    }
    return setup.build(configs.load(runs.tiny_run(directory, **sections)))


def batches_of(parts, count, states=None):
    """The first batches of a run, host arrays, with the problems and metrics of each; by default of a policy that
    never changes."""
    stage = parts.stages[0]
    cursor = Cursor()
    states = states or [parts.begin(stage, parts.initial_params(), step=0)] * count
    batches, found = Batches(parts, stage, cursor), []
    for state in states:
        batch = batches.next(state, cursor)
        found.append((batch, list(batches.problems)))
        cursor = dataclasses.replace(cursor, stage_step=cursor.stage_step + 1, next_id=cursor.next_id + batch.sequences)
    return found, batches


def test_a_completion_of_many_steps_is_the_one_that_a_single_call_makes(tmp_path):
    """The policy stays the same here; what is trained on are groups that have ended, each once."""
    parts = parts_of(tmp_path, **PARTIAL)
    found, _ = batches_of(parts, 9)
    params, sampling = parts.initial_params(), parts.trained_generation().sampling
    whole = jax.jit(functools.partial(generate, parts.policy, sampling=sampling, max_new_tokens=NEW, group_size=GROUP))
    seen, steps_taken = set(), set()
    for now, (batch, problems) in enumerate(found):
        assert batch.waiting == (~batch.sampled.rollouts.valid.all(axis=1)).sum()
        rollouts = jax.device_get(batch.sampled.rollouts)
        ended = (rollouts.finish != FINISH_NONE).all(axis=1)
        assert ended.tolist() == rollouts.valid.all(axis=1).tolist() == rollouts.valid.any(axis=1).tolist()
        assert (batch.rollouts is None) == (not ended.any())
        for index in np.flatnonzero(ended):
            tokens, length = data.pad_prompts([data.encode_prompt(parts.tokenizer, problems[index])], 3)
            prompt_id = jnp.array([problems[index]["prompt_id"]])
            prompts = Prompts(jnp.asarray(tokens), jnp.asarray(length), prompt_id, rollouts.id[index : index + 1])
            alone = whole(params, prompts, jax.random.fold_in(parts.key, 4))
            rows = slice(index * GROUP, (index + 1) * GROUP)
            np.testing.assert_array_equal(rollouts.length[index], alone.length[0])
            np.testing.assert_array_equal(rollouts.mask[rows], alone.mask)
            inside = np.arange(rollouts.tokens.shape[1]) < np.asarray(alone.length).reshape(-1, 1)
            np.testing.assert_array_equal(np.where(inside, rollouts.tokens[rows], 0), np.where(inside, alone.tokens, 0))
            np.testing.assert_allclose(rollouts.logp[rows], alone.logp, atol=1e-5)
            # Two tokens for each version, from the step in which the problem was drawn to this one at most.
            for row in rollouts.version[rows]:
                versions = row[row >= 0]
                assert versions.tolist() == [versions[0] + place // 2 for place in range(len(versions))]
                assert versions[-1] <= now
            assert rollouts.version[rows].max() == now
            seen |= set(rollouts.id[index].tolist())
            steps_taken.add(int(np.ptp(rollouts.version[rows][rollouts.mask[rows] > 0])) + 1)
    assert max(steps_taken) == 4  # as 7 tokens take at 2 a step
    assert len(seen) == GROUP * sum(GROUPS - batch.waiting for batch, _ in found)


def test_groups_that_have_ended_make_room_and_the_others_stay(tmp_path):
    found, batches = batches_of(parts_of(tmp_path, **PARTIAL), 6)
    for (before, problems), (_, later) in itertools.pairwise(found):
        ended = set(before.sampled.ended.tolist())
        assert all((problems[i] is later[i]) == (i not in ended) for i in range(GROUPS))
    drawn = [problem["prompt"] for problem in found[0][1]]
    for (before, _), (_, later) in itertools.pairwise(found):
        drawn += [later[i]["prompt"] for i in before.sampled.ended]
    assert len(drawn) == len(set(drawn)) == batches.position()["kept"]


def test_the_share_of_tokens_of_older_policies_is_counted(tmp_path):
    found, _ = batches_of(parts_of(tmp_path, **PARTIAL), 5)
    for now, (batch, _) in enumerate(found):
        rollouts = jax.device_get(batch.sampled.rollouts)
        assert batch.metrics["completions/waiting_groups"] == batch.waiting
        if batch.waiting == GROUPS:
            assert "completions/stale_ratio" not in batch.metrics
            continue
        mask = (rollouts.mask * rollouts.valid.reshape(-1, 1)) > 0
        assert batch.metrics["completions/stale_ratio"] == pytest.approx((rollouts.version < now)[mask].mean())


def test_truncated_ppo_trains_on_each_token_in_the_step_that_samples_it(tmp_path):
    parts = parts_of(tmp_path, "t_ppo", group_size=1, prompts=8, **PARTIAL)
    method, ended, trained = parts.stages[0].method, {}, {}
    running = 0
    for now, (batch, _) in enumerate(batches_of(parts, 8)[0]):
        rollouts = batch.rollouts
        assert rollouts.valid.all()
        goes_on = np.asarray(rollouts.finish[:, 0] == FINISH_NONE)
        assert goes_on.sum() == batch.waiting
        assert not np.asarray(rollouts.reward[goes_on]).any()
        running += goes_on.sum()
        stats = {"policy": TokenStats(logp=rollouts.logp), "critic": TokenStats(value=jnp.zeros_like(rollouts.logp))}
        mask = method.targets(method.init(rollouts, 1), rollouts, stats, parts.key)[0].mask
        rows = zip(rollouts.id[:, 0].tolist(), goes_on, np.asarray(rollouts.mask), np.asarray(mask), strict=True)
        for sequence, more, sampled, learned in rows:
            assert sequence not in ended
            trained[sequence] = trained.get(sequence, 0) + learned
            if not more:
                ended[sequence] = now
                np.testing.assert_array_equal(trained[sequence], sampled)
    assert running
    assert max(map(np.max, trained.values())) == 1
    assert len(ended) > 8


def test_what_is_sampled_ahead_is_of_the_policy_before_the_update(tmp_path):
    plain, ahead = parts_of(tmp_path / "plain"), parts_of(tmp_path / "ahead", ahead=True)
    stage = plain.stages[0]
    old = plain.begin(stage, plain.initial_params(), step=0)
    new = old.replace(
        params=jax.tree.map(lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), old.params)
    )
    (first, second), _ = batches_of(plain, 2, [old, old])
    found, _ = batches_of(ahead, 3, [old, new, new])
    for (batch, problems), (expected, asked) in zip(found, (first, second), strict=False):
        assert [problem["prompt"] for problem in problems] == [problem["prompt"] for problem in asked]
        for name in ("tokens", "logp", "reward", "id", "length"):
            np.testing.assert_array_equal(getattr(batch.rollouts, name), getattr(expected.rollouts, name), err_msg=name)
    versions = [np.unique(batch.rollouts.version[batch.rollouts.mask > 0]).tolist() for batch, _ in found]
    assert versions == [[0], [0], [1]]
    assert [batch.metrics["completions/stale_ratio"] for batch, _ in found] == [0.0, 1.0, 1.0]
    assert not np.array_equal(second[0].rollouts.tokens, batches_of(plain, 2, [old, new])[0][1][0].rollouts.tokens)


def test_the_next_completions_are_begun_before_the_rewards_of_these(tmp_path, monkeypatch):
    calls = []
    for name in ("begin", "score"):
        inner = getattr(Sampler, name)
        monkeypatch.setattr(Sampler, name, lambda *a, inner=inner, name=name, **k: calls.append(name) or inner(*a, **k))
    batches_of(parts_of(tmp_path, ahead=True), 3)
    assert calls == ["begin", "begin", "score", "begin", "score", "begin", "score"]


@pytest.mark.parametrize(
    "rollout",
    [pytest.param({"tokens_per_step": 1}, marks=pytest.mark.nightly), {"tokens_per_step": 1, "ahead": True}],
    ids=str,
)
def test_a_run_that_goes_on_from_a_checkpoint_is_the_run_that_was_never_stopped(tmp_path, rollout):
    sizes = {"group_size": 4, "prompts": 4, "max_new_tokens": 3, **rollout}
    same = {"rollout": sizes, "warm_start": None, "eval": {"problems": 0}}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    loop.run(configs.load(runs.tiny_run(whole, **same, training=runs.training(steps=5))))
    for steps in (2, 5):
        loop.run(configs.load(runs.tiny_run(cut, **same, training=runs.training(steps=steps))))
    assert runs.final_state(cut / "run") == runs.final_state(whole / "run")
    assert runs.lines(cut / "run") == runs.lines(whole / "run")
    assert any("loss" in row for row in runs.lines(whole / "run"))


@pytest.mark.nightly
def test_two_processes_carry_what_one_does(tmp_path):
    changes = {
        "rollout": {"group_size": 4, "prompts": 8, "max_new_tokens": 3, "tokens_per_step": 1, "ahead": True},
        "training": runs.training(steps=5),
        "warm_start": None,
        "eval": {"problems": 0},
    }
    one, two = (runs.tiny_run(tmp_path / name, **changes) for name in ("one", "two"))
    loop.run(configs.load(one))
    for steps in (3, 5):
        launched = test_distributed.launch(two, 2, 2, "mesh.fsdp=4", f"training.steps={steps}")
        statuses, outputs = test_distributed.ended(launched, two.parent)
        assert statuses == [0, 0], outputs
    test_distributed.check_same(runs.lines(two.parent / "run"), runs.lines(one.parent / "run"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout__tokens_per_step": 12}, "lets every completion end in its step, as rollout.max_new_tokens = 12"),
        ({"rollout__tokens_per_step": 8, "rollout__slots": 8}, "not for rollout.slots"),
        ({"rollout__tokens_per_step": 8, "rollout__budgets": [8, 16]}, "not for rollout.budgets"),
        ({"rollout__tokens_per_step": 0}, "at least 1"),
        ({"rollout__tokens_per_step": 8, "method": {"name": "t_ppo"}}, "set it to 1"),
        ({"rollout__tokens_per_step": 8, "rollout__cache_pages": 8}, "not for rollout.cache_pages"),
        ({"rollout__ahead": True, "rollout__environment": "a:b", "rollout__max_turns": 2}, "asked turn by turn"),
        ({"rollout__ahead": True, "method": {"name": "sft"}}, "learns from given completions"),
    ],
)
def test_what_cannot_be_together_is_said_before_anything_runs(changes, said):
    assert any(said in problem for problem in problems_of(**changes))

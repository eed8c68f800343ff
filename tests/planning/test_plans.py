"""Which layouts are tried, in what order, and what is said of them; nothing here is compiled."""

from pathlib import Path

import pytest

from jaxrl_post.planning import chips, plans, programs, report
from jaxrl_post.training import config as configs

TINY = str(Path(__file__).with_name("tiny.yaml"))
DENSE = str(Path(__file__).parents[2] / "configs" / "qwen3-8b-grpo.yaml")
MIXTURE = str(Path(__file__).parents[2] / "configs" / "qwen3-30b-a3b-grpo.yaml")
AXES = ("data", "fsdp", "tensor", "sequence", "expert")


def tiny(*overrides):
    return configs.load(TINY, overrides, check_files=False)


@pytest.fixture
def stand_in(monkeypatch):
    """Put a function of mesh and micro-batches in the compiler's place: bytes and seconds, or an error."""

    def use(function):
        tried = []

        def compile_run(config, wanted, parts, *, say):
            tried.append((config.mesh, config.training.micro_batches))
            peak, seconds = function(*tried[-1])
            program = programs.Program("step", lambda: None, {}, {}, 0, 1, 1000, 1e12)
            times = report.Times(seconds, 0.0, 0.0, None)
            return [report.Compiled(program, {}, peak, peak <= wanted.chip.memory, times=times)]

        monkeypatch.setattr(plans, "compile_run", compile_run)
        return tried

    return use


def test_layouts_split_only_what_they_divide_and_memory_shrinks_with_shards():
    every = list(plans.layouts(tiny("rollout.prompts=16"), chips.topology("v5e:2x4")))
    assert every
    for one in every:
        sizes = one.mesh
        assert tuple(sizes) == AXES
        assert sizes["data"] * sizes["fsdp"] * sizes["tensor"] * sizes["sequence"] == 8
        assert sizes["expert"] == 1
        assert sizes["tensor"] in (1, 2)  # of two heads
        rows = 64 // one.micro_batches / (sizes["data"] * sizes["fsdp"])
        assert rows % 1 == 0
        assert rows == 1 or sizes["sequence"] == 1
    assert {one.mesh["sequence"] for one in every} == {1, 2, 4, 8}
    by_layout = {(tuple(one.mesh.values())[:3], one.micro_batches): one.estimate for one in every}
    assert by_layout[(1, 8, 1), 1][0] < by_layout[(8, 1, 1), 1][0]
    assert by_layout[(1, 8, 1), 4][1] > by_layout[(1, 8, 1), 1][1]  # gathered four times


def test_experts_are_split_over_an_axis_of_their_own_which_gathers_fewer_weights():
    every = list(plans.layouts(configs.load(MIXTURE, check_files=False), chips.topology("v5p:4x4x4")))
    assert {one.mesh["expert"] for one in every} == {1, 2, 4, 8, 16, 32, 64}
    estimates = {}
    for one in every:
        data, fsdp, tensor, sequence, expert = one.mesh.values()
        assert data * fsdp * tensor * sequence * expert == 64
        estimates[(data, fsdp, tensor, sequence, expert), one.micro_batches] = one.estimate
    by_experts, by_all = estimates[(1, 8, 1, 1, 8), 8], estimates[(1, 64, 1, 1, 1), 8]
    assert by_experts[1] < by_all[1]


def test_suggestions_rank_what_fits_by_time_and_say_what_to_pass(stand_in):
    def compiled(mesh, micro):
        if mesh.tensor == 2:
            raise RuntimeError("INTERNAL: cannot be split")
        return (2**34 if mesh.data == 8 else 2**33), 1.0 / mesh.fsdp

    stand_in(compiled)
    ranked = plans.suggest(tiny("rollout.prompts=16"), chips.topology("v5e:2x4"), tries=100)
    fits = [one for one in ranked if one.fits]
    assert [one.fits for one in ranked] == [True] * len(fits) + [False] * (len(ranked) - len(fits))
    seconds = [one.step["seconds"] for one in fits]
    assert seconds == sorted(seconds)
    assert ranked[0].mesh["fsdp"] == 8
    assert "mesh.fsdp=8" in ranked[0].overrides()
    text = plans.describe(ranked)
    assert "take: mesh.data=1 mesh.fsdp=8" in text
    assert "INTERNAL: cannot be split" in text
    assert [one.as_json()["problem"] for one in ranked].count("INTERNAL: cannot be split") == 6


def test_every_try_goes_to_another_mesh_as_long_as_they_fit(stand_in):
    tried = stand_in(lambda mesh, micro: (2**30, 1.0))
    plans.suggest(tiny("rollout.prompts=16"), chips.topology("v5e:2x4"), tries=4)
    assert len(tried) == len({mesh for mesh, _ in tried}) == 4


def test_a_mesh_that_does_not_fit_is_tried_again_with_less_in_memory(stand_in):
    chip = chips.CHIPS["v5e"]
    tried = stand_in(lambda mesh, micro: (int(1.05 * chip.memory) if micro == 1 else 2**30, 1.0))
    ranked = plans.suggest(tiny(), chips.topology("v5e:2x2"), tries=100)
    again = [micro for mesh, micro in tried if mesh.fsdp == 4]
    assert again == [1, 2]
    assert [one.fits for one in ranked if one.mesh["fsdp"] == 4] == [True, False]


def test_what_is_suggested_is_what_train_takes(stand_in):
    stand_in(lambda mesh, micro: (2**30, 1.0))
    own = (
        "rollout.prompts=16",
        "mesh.expert=8",  # of which nothing may be left
        "warm_start={steps: 1, examples: 64, batch_size: 20, optimizer: {learning_rate: 1.0e-3}}",
        "training.share_prompts=true",
    )
    ranked = plans.suggest(tiny(*own[:2], *own[3:]), chips.topology("v5e:2x4"), tries=100)
    assert {one.mesh["tensor"] for one in ranked} == {1, 2}
    # Of 20 examples eight devices have no equal shares, but four have, with two heads or half the positions on each.
    ranked = plans.suggest(tiny("rollout.prompts=16", own[2]), chips.topology("v5e:2x4"), tries=100)
    assert {one.mesh["data"] * one.mesh["fsdp"] for one in ranked} == {1, 2, 4}
    for one in ranked:
        config = configs.load(TINY, [own[0], own[1], own[2], *one.overrides()], check_files=False)
        assert plans.mesh_sizes(config) == one.mesh


def test_where_nothing_can_be_suggested_the_reason_is_said(stand_in):
    stand_in(lambda mesh, micro: (2**30, 1.0))
    with pytest.raises(configs.ConfigError, match=r"no mesh of 1 devices of 15.8 GiB has room .* take a larger slice"):
        plans.suggest(tiny("model.width=65536", "model.heads=512"), chips.topology("v5e:1x1"))
    warm = "warm_start={steps: 1, examples: 64, batch_size: 9, optimizer: {learning_rate: 1.0e-3}}"
    with pytest.raises(configs.ConfigError, match=r"warm_start.batch_size = 9: must be a multiple of"):
        plans.suggest(tiny(warm, "rollout.max_new_tokens=129"), chips.topology("v5e:2x2"))


def test_a_model_that_is_split_over_many_devices_is_sampled_on_copies_that_are_split_over_heads(stand_in):
    stand_in(lambda mesh, micro: (2**30, 1.0))
    config = configs.load(DENSE, check_files=False)  # whose own rollout.mesh is of sixteen devices
    ranked = plans.suggest(config, chips.topology("v6e:2x4"), tries=2)
    best = ranked[0]
    assert best.mesh["fsdp"] == 8
    assert best.rollout_mesh == {"data": 1, "fsdp": 1, "tensor": 8, "sequence": 1, "expert": 1}
    assert "fsdp=8, sampling tensor=8 micro_batches" in plans.describe(ranked)
    assert best.as_json()["rollout_mesh"]["tensor"] == 8
    taken = configs.load(DENSE, best.overrides(), check_files=False)
    assert (taken.mesh.fsdp, taken.rollout.mesh.tensor) == (8, 8)


def test_a_sampling_mesh_that_the_file_has_is_left_aside_where_none_is_faster(stand_in):
    stand_in(lambda mesh, micro: (2**30, 1.0))
    config = tiny("rollout.mesh.data=4", "mesh.data=4")
    (only,) = plans.suggest(config, chips.topology("v5e:1x1"), tries=1)
    assert only.rollout_mesh is None
    assert configs.load(TINY, ["rollout.mesh.data=4", *only.overrides()], check_files=False).rollout.mesh is None

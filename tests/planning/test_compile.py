"""`jaxrl-post compile` and what it is made of: reports for TPUs that are not here, also of what does not fit."""

import contextlib
import importlib.util
import io
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.cli.main import main
from jaxrl_post.mesh import make_mesh, place, rollout_shardings
from jaxrl_post.planning import chips, compiler, executables, plans, programs, report, summary
from jaxrl_post.planning.costs import Collective, Costs
from jaxrl_post.training import config as configs

SMALL = (
    "model.width=16",
    "model.mlp_width=32",
    "model.layers=1",
    "data.max_prompt_length=8",
    "rollout.max_new_tokens=8",
)
WIDE = ("mesh.fsdp=21", "rollout.prompts=42", "training.micro_batches=1")
TINY = str(Path(__file__).with_name("tiny.yaml"))


def tiny(*overrides):
    return configs.load(TINY, overrides, check_files=False)


@pytest.fixture(scope="module")
def printed():
    """The standard output of one command, run as a user runs it, but in this process."""
    out = io.StringIO()
    arguments = ["compile", TINY, "--topology", "v5e:2x2", "mesh.fsdp=4", "--only", "step", "--json"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        assert main(arguments) == 0
    return out.getvalue()


def test_json_is_one_object_that_says_what_fits_and_what_a_step_does(printed):
    found = json.loads(printed)
    assert (found["devices"], found["mesh"]["fsdp"], found["fits"]) == (4, 4, True)
    (step,) = found["programs"]
    assert step["name"] == "step"
    assert step["peak_bytes"] < found["device"]["memory_bytes"]
    assert step["seconds"]["roofline"] == max(step["seconds"][kind] for kind in ("compute", "memory", "communication"))
    assert 0 < step["mfu"] < 1
    once = step["loops_counted_once"]
    # XLA counts norms and the like too, but no attention kernels.
    assert 0.7 * once["ours"]["flops"] < once["xla"]["flops"] < 1.1 * once["ours"]["flops"]


def test_a_sharded_step_keeps_a_share_of_the_state_and_gathers_the_rest(printed):
    (step,) = json.loads(printed)["programs"]
    setup = programs.plan(tiny("mesh.fsdp=4"), compiler.devices("v5e:2x2"))
    leaves = jax.tree.leaves(jax.eval_shape(setup.policy.init, setup.key))
    whole = sum(x.size * 4 for x in leaves)
    memory = step["memory_bytes"]
    assert memory["parameters"] == pytest.approx(2 * whole / 4, rel=0.1)  # of the policy and its reference
    assert memory["optimizer"] == pytest.approx(2 * whole / 4, rel=0.1)
    gathered = [kind for kind in step["costs"]["collectives"] if kind["operation"] == "all-gather"]
    # Forward, again for the backward pass, and for the reference; two micro-batches; in bfloat16 or float32.
    assert 2 * 3 * whole / 2 * 0.5 < sum(kind["bytes"] for kind in gathered) < 2 * 4 * whole
    assert step["costs"]["flops"] > 0.9 * step["model_flops"] / 4


def fake(name, function, *shapes, arguments=None, resident=None, cache=0):
    def lower():
        with jax.set_mesh(mesh()):
            return jax.jit(function).lower(*shapes)

    return programs.Program(name, lower, arguments or {}, resident or {}, cache, 1, 1000, 1e12)


def mesh():
    return make_mesh(devices=compiler.devices("v5e:1x1"))


def sorted_twice(x):
    return jnp.sort(x, axis=0) @ jnp.sort(x, axis=1)


def test_a_program_that_does_not_fit_is_reported_with_its_largest_arrays():
    side = 2**15 + 2**14  # three arrays of 9 GiB
    big = fake("step", sorted_twice, jax.ShapeDtypeStruct((side, side), jnp.float32), arguments={"batch": 4 * side**2})
    one = chips.topology("v5e:1x1")
    found = report.compile_program(big, one)
    assert not found.fits
    assert found.peak > one.chip.memory
    assert "exceeds" in found.problem
    assert found.largest[0].bytes == 4 * side**2
    text = summary.table([found], one, {"data": 1})
    assert "NO" in text
    assert f"f32[{side},{side}]" in text
    assert found.total.flops == 2 * side**3
    json.dumps(summary.as_json([found], one, {"data": 1}))


def test_what_stays_in_memory_beside_a_program_counts():
    one, rows = chips.topology("v5e:1x1"), jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    peaks, fits = [], []
    for gib in (0, 15, 16):
        program = fake("score", lambda x: jnp.tanh(x @ x), rows, resident={"optimizer": gib * 2**30})
        found = report.compile_program(program, one)
        assert found.memory["optimizer"] == gib * 2**30
        peaks.append(found.peak)
        fits.append(found.fits)
    assert peaks == [peaks[0], peaks[0] + 15 * 2**30, peaks[0] + 16 * 2**30]
    assert fits == [True, True, False]


def test_other_errors_of_the_compiler_are_not_taken_for_a_lack_of_memory():
    assert report.out_of_memory(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, ... (20.60G) exceeds available HBM (15.75G)"
    )
    assert not report.out_of_memory("INTERNAL: RET_CHECK failure")
    assert not report.out_of_memory("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem")


def test_times_are_amounts_over_rates():
    chip = chips.CHIPS["v5p"]
    total = Costs(flops=459e12, bytes=2765e9 / 2, cycles=1.75e9 / 4, kernels=[(2.0, 45.9e12, 1.0)])
    total.collectives = {
        Collective("all-gather", 4): (600e9, 3),  # three quarters of it come from others
        Collective("all-reduce", 2): (150e9, 1),  # scattered, then gathered
        Collective("collective-permute", 2, crosses_slices=True): (6.25e9, 1),
    }
    found = report.times(total, chip)
    assert (found.compute, found.memory) == (1.0, 0.5)
    assert found.communication == pytest.approx(0.75 + 0.25 + 1.0)
    assert found.compiler == pytest.approx(0.25 + 2 * 0.1)
    assert found.roofline == found.communication


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5e:2x2"], "'fsdp': 1.* is 1 devices, but the topology has 4"),
        (["--topology", "v5e:2x2x1"], "a slice of v5e has 2 sizes, as in v5e:2x2; got 'v5e:2x2x1'"),
        (["--topology", "h100:8"], "topology must be like v5e:2x4 or v5p:4x4x4, of v4, v5e, .*; got 'h100:8'"),
        (
            ["--topology", "v5e:3x7", *WIDE],
            "the compiler knows no topology 'v5e:3x7'",
        ),
        (["--topology", "v5e:2x2", "mesh.fsdp=8", "--slices", "2"], "mesh.data: must be a multiple of the 2 slices"),
    ],
)
def test_what_cannot_be_is_one_clear_message(arguments, message, capfd):
    assert main(["compile", TINY, *arguments]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert re.search(message, captured.err), captured.err


def test_without_the_compiler_the_extra_to_install_is_named(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else found(name, *rest)
    )
    assert main(["compile", TINY, "--topology", "v5e:1x1"]) == 2
    assert 'pip install "jaxrl-post[compile]"' in capsys.readouterr().err


def test_two_slices_are_joined_by_the_data_axis_alone():
    devices = compiler.devices("v5e:2x4", 2)
    assert [device.slice_index for device in devices] == [0] * 8 + [1] * 8
    places = compiler.slice_of("v5e:2x4", 2)
    setup = programs.plan(tiny("mesh.data=2", "mesh.fsdp=8", "rollout.prompts=16", "training.micro_batches=1"), devices)
    grid = np.array([[place // 8 for place in range(16)]]).reshape(2, 8)
    assert [{places[i] for i in row} for row in np.arange(16).reshape(2, 8)] == [{0}, {1}]
    assert (np.vectorize(lambda device: device.slice_index)(setup.mesh.devices.reshape(2, 8)) == grid).all()


def test_layouts_split_only_what_they_divide_and_memory_shrinks_with_shards():
    every = list(plans.layouts(tiny("rollout.prompts=16"), chips.topology("v5e:2x4")))
    assert every
    for one in every:
        sizes = one.mesh
        assert sizes["data"] * sizes["fsdp"] * sizes["tensor"] == 8
        assert sizes["tensor"] in (1, 2)  # of two heads
        assert 64 // one.micro_batches % (sizes["data"] * sizes["fsdp"]) == 0
    by_layout = {(tuple(one.mesh.values()), one.micro_batches): one.estimate for one in every}
    assert by_layout[(1, 8, 1), 1][0] < by_layout[(8, 1, 1), 1][0]
    assert by_layout[(1, 8, 1), 4][1] > by_layout[(1, 8, 1), 1][1]  # gathered four times


def test_suggestions_rank_what_fits_by_time_and_say_what_to_pass(monkeypatch):
    def compile_run(config, wanted, parts, *, say):
        sizes = plans.mesh_sizes(config)
        if sizes["tensor"] == 2:
            raise ValueError("cannot be split")
        peak = 2**34 if sizes["data"] == 8 else 2**33
        times = report.Times(1.0 / sizes["fsdp"], 0.0, 0.0, None)
        program = programs.Program("step", lambda: None, {}, {}, 0, 1, 1000, 1e12)
        return [report.Compiled(program, {}, peak, peak < wanted.chip.memory, times=times)]

    monkeypatch.setattr(plans, "compile_run", compile_run)
    ranked = plans.suggest(tiny("rollout.prompts=16"), chips.topology("v5e:2x4"), tries=100)
    fits = [one for one in ranked if one.fits]
    assert [one.fits for one in ranked] == [True] * len(fits) + [False] * (len(ranked) - len(fits))
    seconds = [one.step["seconds"] for one in fits]
    assert seconds == sorted(seconds)
    assert ranked[0].mesh["fsdp"] == 8
    assert "mesh.fsdp=8" in ranked[0].overrides()
    assert any(one.problem == "cannot be split" for one in ranked)
    assert "take: mesh.data=1 mesh.fsdp=8" in plans.describe(ranked)
    with pytest.raises(configs.ConfigError, match=r"no mesh of 1 devices of 15.8 GiB has room .* take a larger slice"):
        plans.suggest(tiny("model.width=65536", "model.heads=512"), chips.topology("v5e:1x1"))


def test_a_saved_train_step_goes_on_without_compiling_and_gives_the_same(tmp_path):
    setup = programs.plan(tiny(*SMALL, "mesh.fsdp=8", "rollout.prompts=16", "training.micro_batches=1"), jax.devices())
    (stage,) = setup.stages
    batch = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), setup.rollout_shapes(stage))
    layout = rollout_shardings(batch, setup.mesh)
    step = setup.step(stage)
    state = setup.begin(stage, setup.initial_params(), step=0)
    with compiler.uncached():  # what comes from the compilation cache cannot be serialised again on a CPU
        path = executables.save(step.lower(setup.state_shapes(stage), batch).compile(), tmp_path / "made", "step/grpo")
    assert path.name == "step-grpo.executable"
    saved_state, saved_metrics = executables.load(path)(jax.tree.map(jnp.copy, state), place(batch, layout))
    state, metrics = step(state, batch)
    assert int(saved_state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, saved_state.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, saved_metrics, metrics)


def test_a_program_of_another_version_is_refused(tmp_path, monkeypatch):
    path = executables.save(jax.jit(jnp.sin).lower(jnp.ones(3)).compile(), tmp_path, "sine")
    monkeypatch.setattr(jax, "__version__", "0.0.1")
    with pytest.raises(ValueError, match=r"was compiled by .*; compile it again with this version"):
        executables.load(path)


def test_programs_for_tpus_are_serialised_too(tmp_path):
    with compiler.uncached():
        compiled = fake("step", lambda x: x @ x, jax.ShapeDtypeStruct((256, 256), jnp.float32)).lower().compile()
        path = executables.save(compiled, tmp_path, "step")
    assert path.stat().st_size > 10_000

"""`jaxrl-post compile` and what it is made of: reports for TPUs that are not here, also of what does not fit.

Which layouts `--suggest` finds is in `test_plans`, what the programs of a run are in `test_programs`.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.cli import compile as compile_command
from jaxrl_post.cli.main import main
from jaxrl_post.mesh import make_mesh
from jaxrl_post.planning import chips, compiler, plans, programs, report, summary
from jaxrl_post.planning.costs import Collective, Costs
from jaxrl_post.training import config as configs
from jaxrl_post.training import executables

SMALL = (
    "model.width=16",
    "model.mlp_width=32",
    "model.layers=1",
    "data.max_prompt_length=8",
    "rollout.max_new_tokens=8",
)
WIDE = ("mesh.fsdp=21", "rollout.prompts=42", "training.micro_batches=1")
MESHES = ("mesh.fsdp=4", "rollout.mesh.tensor=2", "mesh={data: 2}")
TINY = str(Path(__file__).with_name("tiny.yaml"))


def tiny(*overrides):
    return configs.load(TINY, overrides, check_files=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Where the command of `printed` saves its program."""
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def printed(saved):
    """The standard output of one command, run as a user runs it, but in this process."""
    out = io.StringIO()
    arguments = ["compile", TINY, "--topology", "v5e:2x2", "mesh.fsdp=4", "--only", "step", "--save", str(saved)]
    arguments.append("--json")
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
    assert step["unread_loops"] == 0
    assert found["step"] is None  # what it would sample was not compiled


def test_a_sharded_step_keeps_a_share_of_the_state_and_gathers_the_rest(printed):
    (step,) = json.loads(printed)["programs"]
    setup = programs.plan(tiny("mesh.fsdp=4"), compiler.devices("v5e:2x2"))
    leaves = jax.tree.leaves(jax.eval_shape(setup.policy.init, setup.key))
    whole = sum(x.size * 4 for x in leaves)
    memory = step["memory_bytes"]
    assert memory["parameters"] == pytest.approx(2 * whole / 4, rel=0.1)  # of the policy and its reference
    assert memory["optimizer"] == pytest.approx(2 * whole / 4, rel=0.1)
    gathered = sum(kind["bytes"] for kind in step["costs"]["collectives"] if kind["operation"] == "all-gather")
    layers, width, mlp, vocabulary, micro_batches, bfloat16 = 2, 256, 512, setup.tokenizer.vocab_size, 2, 2
    matrices, head = layers * (4 * width**2 + 3 * width * mlp), vocabulary * width
    # Layers three times: the reference's, the policy's, and those again for the backward pass; the head twice.
    assert gathered == pytest.approx(micro_batches * bfloat16 * (3 * matrices + 2 * head), rel=0.05)
    rows, length, new = 16, 256, 128
    layer_flops = 2 * rows * length * matrices + 4 * layers * width * rows * length**2  # every score, also masked ones
    # The same and two gradients, a quarter on each device.
    assert step["costs"]["flops"] == pytest.approx((5 * layer_flops + 4 * 2 * rows * new * head) / 4, rel=0.05)


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


class Ready:
    """What `Program.lower` gives, compiled before; the compiler's notes and errors can be made up."""

    def __init__(self, executable=None, text=None, error=None):
        self.executable, self.text, self.error = executable, text, error

    def compile(self, compiler_options):
        if self.text is not None:
            Path(compiler_options["xla_dump_to"], "a.after_codegen.txt").write_text(self.text)
        if self.error is not None:
            raise self.error
        return self.executable


def ready(name, *arguments, rounds=1, resident=None, needs=()):
    return programs.Program(name, lambda: Ready(*arguments), {}, resident or {}, 0, rounds, 1000, 1e12, needs)


@pytest.fixture(scope="module")
def product():
    """A small program of a TPU."""
    with compiler.uncached():
        return fake("score", lambda x: x @ x, jax.ShapeDtypeStruct((256, 256), jnp.float32)).lower().compile()


def test_what_stays_in_memory_beside_a_program_counts(product):
    one = chips.topology("v5e:1x1")
    found = [
        report.compile_program(ready("score", product, resident={"optimizer": gib * 2**30}), one) for gib in (0, 15, 16)
    ]
    assert [each.memory["optimizer"] for each in found] == [0, 15 * 2**30, 16 * 2**30]
    assert [each.peak - found[0].peak for each in found] == [0, 15 * 2**30, 16 * 2**30]
    assert [each.fits for each in found] == [True, True, False]


def test_a_program_that_the_compiler_gives_up_on_leaves_the_others_standing(product):
    one = chips.topology("v5e:1x1")
    error = jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile TPU kernel\nThe MLIR operation was ...")
    bad = report.compile_program(ready("a", None, None, error), one)
    good = report.compile_program(ready("b", product), one)
    assert (bad.fits, bad.peak, bad.problem) == (False, None, "INTERNAL: Mosaic failed to compile TPU kernel")
    assert good.fits
    text = summary.table([bad, good], one, {"data": 1})
    assert "a does not compile: INTERNAL: Mosaic failed" in text
    shown = summary.as_json([bad, good], one, {"data": 1})
    assert [each["problem"] for each in shown["programs"]] == [bad.problem, None]


def test_loops_that_cannot_be_read_are_counted_as_the_program_says_and_named(product):
    def run(x):
        return jax.lax.while_loop(lambda x: jnp.all(x < 1e9), lambda x: x @ x, x)

    text = jax.jit(run).lower(jnp.ones((16, 16))).compile().as_text()
    one = chips.topology("v5e:1x1")
    found = [report.compile_program(ready("step", product, text, rounds=rounds), one) for rounds in (1, 7)]
    assert [each.total.flops for each in found] == [2 * 16**3, 7 * 2 * 16**3]
    assert [each["unread_loops"] for each in summary.as_json(found, one, {})["programs"]] == [1, 1]
    assert "step: loops that do not say how often they run: 1, counted 1 times" in summary.table(found[:1], one, {})
    assert "how often they run" not in summary.table(found[1:], one, {})  # it is the one over tokens


def test_a_step_is_what_it_samples_and_what_it_trains_and_unknown_without_either():
    one = chips.topology("v5e:1x1")

    def made(name, seconds, needs=()):
        times = None if seconds is None else report.Times(seconds, 0.0, 0.0, None)
        return report.Compiled(ready(name, needs=needs), {}, 0, True, times=times)

    needs = ("rollout", "rollout/greedy")
    rollout, greedy, warm = made("rollout", 3.0), made("rollout/greedy", 1.0), made("step/warm_start", 9.0)
    score, evaluation = made("score", 9.0), made("evaluate/greedy", 9.0)
    step, failed = made("step/remax", 2.0, needs), made("step/remax", None, needs)
    assert summary.step([warm, rollout, greedy, score, step, evaluation], one)["seconds"] == 6.0
    assert summary.step([made("step", 2.0)], one)["seconds"] == 2.0  # trains on given completions
    for some in ([], [rollout], [step], [warm, rollout, step], [rollout, greedy, failed]):
        assert summary.step(some, one) is None
    assert "a step: not known, since not every program of it was compiled" in summary.table([step], one, {})


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
        (["--topology", "v5e:2x2"], "product of its sizes is 1, but the topology has 4 devices; .*mesh.fsdp=4"),
        (["--topology", "v5e:2x2x1"], "a slice of v5e has 2 sizes, as in v5e:2x2; got 'v5e:2x2x1'"),
        (["--topology", "h100:8"], "topology must be like v5e:2x4 or v5p:4x4x4, of v4, v5e, .*; got 'h100:8'"),
        (
            ["--topology", "v5e:3x7", *WIDE],
            "the compiler knows no topology 'v5e:3x7'",
        ),
        (["--topology", "v5e:2x2", "mesh.fsdp=8", "--slices", "2"], "mesh.data: must be a multiple of the 2 slices"),
        (["--topology", "v4:2x2x1", "--slices", "2"], "slices must be 1 for v4, .* network .* is not published; got 2"),
        (["--topology", "v5e:2x2", "--tries", "2"], "--tries is for --suggest; leave it out"),
        (
            ["--topology", "v5e:2x2", "--suggest", "--only", "step", "--save", "x", *MESHES],
            "--suggest chooses the meshes .* itself.* leave out mesh.fsdp, rollout.mesh.tensor, mesh, --only, --save",
        ),
        (["--topology", "v5e:2x2", "--suggest", "training.micro_batches=2"], "leave out training.micro_batches"),
    ],
)
def test_what_cannot_be_is_one_clear_message(arguments, message, capfd):
    assert main(["compile", TINY, *arguments]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert re.search(message, captured.err), captured.err


def test_the_command_offers_every_part_that_there_is():
    assert compile_command.PARTS == programs.PARTS


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
    setup = programs.plan(tiny("mesh.data=2", "mesh.fsdp=8", "rollout.prompts=16", "training.micro_batches=1"), devices)
    grid = np.array([[place // 8 for place in range(16)]]).reshape(2, 8)
    assert (np.vectorize(lambda device: device.slice_index)(setup.mesh.devices.reshape(2, 8)) == grid).all()


@pytest.mark.nightly
def test_a_step_on_two_slices_sends_gradients_between_them():
    two = chips.topology("v5e:2x2", slices=2)
    config = tiny("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    (step,) = plans.compile_run(config, two, ("step",))
    between = sum(moved for kind, (moved, _) in step.total.collectives.items() if kind.crosses_slices)
    layers, width, mlp, micro_batches, bfloat16 = 2, 256, 512, 2, 2
    share = layers * (4 * width**2 + 3 * width * mlp) / 4
    assert 1 < between / (micro_batches * bfloat16 * share) < 1.5  # beside the layers' the head's, in float32


def test_a_chip_of_v4_is_one_device_as_it_is_where_there_is_one():
    assert len(compiler.devices("v4:2x2x1")) == chips.topology("v4:2x2x1").devices == 4


def test_programs_for_tpus_are_serialised_and_belong_to_their_chips(printed, saved):
    (path,) = saved.iterdir()
    assert path.name == "step.executable"
    assert path.stat().st_size > 10_000
    with pytest.raises(
        ValueError, match=r"for devices 4, kind TPU v5 lite, .*libtpu .*, but here is devices 8, kind cpu"
    ):
        executables.load(path)


@pytest.mark.nightly
def test_the_command_needs_no_environment_and_prints_nothing_but_its_object():
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX", "TPU", "XLA", "ALLOW"))}
    command = [sys.executable, "-m", "jaxrl_post.cli.main", "compile", TINY, "--topology", "v5e:1x1", "--only", "step"]
    root = Path(__file__).parents[2]
    done = subprocess.run([*command, "--json"], cwd=root, env=clean, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["programs"][0]["fits"]
    assert "compiling step" in done.stderr

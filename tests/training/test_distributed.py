"""Real processes on one machine: they train as one process does, stop together, and go on in other numbers."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from jaxrl_post import mesh
from jaxrl_post.training import config, distributed, loop, run_log, shares
from tests.conftest import XLA_FLAGS
from tests.training import runs, test_held_out

REWARD = Path(__file__).with_name("rewards_of_processes.py")
STEPS = 4


def write_run(directory):
    """Eight prompts a step, all different within an epoch of 24."""
    return runs.tiny_run(
        directory,
        rollout={"group_size": 4, "prompts": 8, "max_new_tokens": 3},
        rewards=[{"path": f"{REWARD}:reward"}],
        training=runs.training(steps=STEPS, checkpoint_every=1),
        eval={"problems": 6, "samples": 1, "k": 1, "every": 2},
        warm_start=None,
    )


def launch(path, count, devices, *overrides, **variables):
    """Start the processes of a run; they write to `out<index>` beside its configuration."""
    command = ["-m", "jaxrl_post.cli.main", "train", str(path), *overrides]
    return start(command, path.parent, count, devices, **variables)


def start(command, directory, count, devices, **variables):
    """Start Python processes that find each other; they write to `out<index>` in the directory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    for index in range(count):
        environment = (
            os.environ
            | variables
            | {
                "PYTHONPATH": str(Path(__file__).parents[2]),
                "XLA_FLAGS": XLA_FLAGS.replace("device_count=8", f"device_count={devices}"),
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            }
        )
        with (directory / f"out{index}").open("w") as output:
            arguments = {"env": environment, "stdout": output, "stderr": subprocess.STDOUT}
            started.append(subprocess.Popen([sys.executable, *command], **arguments))
    return started


def ended(processes, directory, seconds=300):
    """The exit statuses, and what each process has written."""
    try:
        statuses = [process.wait(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return statuses, [(directory / f"out{index}").read_text() for index in range(len(processes))]


def check_same(rows, expected, without=("(none)",)):
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        assert row.keys() == {name for name in wanted if not name.startswith(without)}
        for name, value in wanted.items():
            if name.startswith(without):
                continue
            assert row[name] == (value if isinstance(value, str) else pytest.approx(value, abs=1e-5, rel=1e-5)), name


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one process with one device."""
    path = write_run(tmp_path_factory.mktemp("one"))
    loop.run(config.load(path))
    return path.parent / "run"


def test_a_run_goes_from_one_process_to_two_and_back_as_if_there_had_never_been_two(one, tmp_path):
    path = write_run(tmp_path)
    write = run_log.RunLog.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_log.RunLog, "write", lambda *given: write(*given) or signal.raise_signal(signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            loop.run(config.load(path))
    assert [row["step"] for row in runs.lines(tmp_path / "run")] == [1]

    # SIGTERM reaches one process only, while it scores the third step's completions: its fourth call, after those of
    # the second step and two of an evaluation.
    variables = {"REWARD_LOG": str(tmp_path), "REWARD_SIGNAL": f"1:4:{signal.SIGTERM.value}"}
    other = ("rollout.mesh.data=2", "rollout.mesh.tensor=2")  # parameters move to another layout to be sampled with
    statuses, outputs = ended(launch(path, 2, 2, "mesh.fsdp=4", *other, **variables), tmp_path)
    assert statuses == [130, 130], outputs
    assert "resuming" in outputs[0]
    assert "stopped after step 2, which is saved with the rollouts of the next one" in outputs[0]
    assert "resuming" not in outputs[1]
    check_same(runs.lines(tmp_path / "run"), runs.lines(one)[:2])

    # Every problem was scored once, half of them by each process.
    scored = [[json.loads(line) for line in (tmp_path / f"scored{i}.jsonl").open()] for i in range(2)]
    assert [len(ids) for process in scored for ids in process] == [4, 3, 3, 4] * 2
    assert len({i for process in scored for call in (0, 3) for i in process[call]}) == 16
    assert sorted(i for process in scored for i in process[1]) == list(range(6))

    # One process, another mesh: the rollouts in flight are not sampled again, and the curve is the same.
    from jaxrl_post.training import sampler

    sampled = []
    sample = sampler.Sampler.begin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sampler.Sampler, "begin", lambda *given, **named: sampled.append(named) or sample(*given, **named)
        )
        loop.run(config.load(path, ["mesh.fsdp=2", "mesh.tensor=2", "training.micro_batches=2"]))
    assert [named["version"] for named in sampled if "carried" in named] == [3]
    check_same(runs.lines(tmp_path / "run"), runs.lines(one))
    assert (tmp_path / "run/completions.jsonl").read_text() == (one / "completions.jsonl").read_text()


@pytest.mark.nightly
def test_two_processes_train_on_given_pairs_as_one_does_and_measure_the_same_held_out_loss(tmp_path):
    found = []
    for count in (1, 2):
        directory = tmp_path / str(count)
        directory.mkdir()
        path = directory / "config.yaml"
        path.write_text(yaml.safe_dump(test_held_out.values(directory, "dpo") | {"mesh": {"data": 2}}))
        statuses, outputs = ended(launch(path, count, 2 // count, "training.steps=3", "eval.every=1"), directory)
        assert statuses == [0] * count, outputs
        found.append(runs.lines(directory / "run"))
    assert len({row["eval/loss"] for row in found[0]}) == 3
    check_same(found[1], found[0])


LAST = """
import time
from jaxrl_post.training import distributed
distributed.SHUTDOWN_SECONDS = 1
try:
    with distributed.session(print):
        if distributed.is_main():
            time.sleep(3)
        {end}
except distributed.Stopped:
    pass
"""


@pytest.mark.parametrize("end", ["pass", pytest.param("raise distributed.Stopped", marks=pytest.mark.nightly)])
def test_the_others_wait_while_the_first_process_does_what_is_left_to_it(end, tmp_path):
    statuses, outputs = ended(start(["-c", LAST.format(end=end)], tmp_path, 2, 1), tmp_path)
    assert statuses == [0, 0], outputs


LOST = (os.EX_TEMPFAIL, -signal.SIGABRT)
"""Exit statuses where another process is gone: seen in a collective, or by JAX's runtime first."""


@pytest.mark.nightly
def test_a_process_that_dies_makes_the_other_three_stop_and_the_run_goes_on_from_its_checkpoint(one, tmp_path):
    path = write_run(tmp_path)
    variables = {"REWARD_SIGNAL": f"2:3:{signal.SIGKILL.value}"}
    processes = launch(path, 4, 1, "mesh.data=2", "mesh.tensor=2", "eval.problems=0", **variables)
    assert processes[2].wait(timeout=300) == -signal.SIGKILL, (tmp_path / "out0").read_text()
    died = time.monotonic()
    statuses, outputs = ended(processes, tmp_path)
    assert time.monotonic() - died < 60
    for index in (0, 1, 3):
        assert statuses[index] in LOST, outputs[index]
        assert "another one has died or cannot be reached" in outputs[index] or "another task died" in outputs[index]
    check_same(runs.lines(tmp_path / "run"), runs.lines(one)[:2], without=("eval/",))
    loop.run(config.load(path, ["eval.problems=0"]))
    check_same(runs.lines(tmp_path / "run"), runs.lines(one), without=("eval/",))
    assert (tmp_path / "run/completions.jsonl").read_text() == (one / "completions.jsonl").read_text()


@pytest.mark.nightly
def test_a_process_that_hangs_is_given_up_within_a_minute(tmp_path):
    """Its connections stay open, so that only its missing heartbeat tells."""
    path = write_run(tmp_path)
    variables = {"REWARD_SIGNAL": f"1:2:{signal.SIGSTOP.value}", "REWARD_LOG": str(tmp_path)}
    processes = launch(path, 2, 1, "mesh.data=2", "eval.problems=0", **variables)
    try:
        scored = tmp_path / "scored1.jsonl"
        for _ in range(3000):
            if scored.exists() and len(scored.read_text().splitlines()) == 2:
                break
            time.sleep(0.1)
        stopped = time.monotonic()
        assert processes[0].wait(timeout=60) in LOST
        assert 10 < time.monotonic() - stopped < 60
        assert "another task died" in (tmp_path / "out0").read_text()
    finally:
        for process in processes:
            process.kill()


FAILING_STORE = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint._src.path import atomicity
from jaxrl_post.training import checkpoint, distributed

checkpoint.BACKGROUND_SECONDS = 4
finalize, failures = atomicity.AtomicRenameTemporaryPath.finalize, []

async def failing(self, *rest, **options):
    if not failures:
        failures.append(self)
        raise OSError("no space left")
    await finalize(self, *rest, **options)

with distributed.session(lambda error: print("failed:", error) or 1):
    if distributed.is_main():
        atomicity.AtomicRenameTemporaryPath.finalize = failing
    mesh = jax.make_mesh((2,), ("data",))
    values = np.arange(4.0)
    split = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.make_array_from_callback((4,), split, lambda index: values[index])
    with checkpoint.Checkpointer("saved") as checkpointer:
        checkpointer.save(1, {"x": x}, {})
        checkpointer.commit(2, {"x": x}, {})
        print("steps", checkpointer.steps())
"""


@pytest.mark.nightly
def test_a_save_that_fails_in_the_background_of_one_process_is_tried_again_by_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    statuses, outputs = ended(start(["-c", FAILING_STORE], tmp_path, 2, 1), tmp_path)
    assert statuses == [0, 0], outputs
    assert "checkpoint 2 could not be saved" in outputs[0]
    assert all("trying again" in output and "steps [2]" in output for output in outputs)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES is set but JAX_COORDINATOR_ADDRESS is not"),
        ({"JAX_COORDINATOR_ADDRESS": "host", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "host:port"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "one below it"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "must be a number"),
    ],
)
def test_an_environment_that_cannot_be_right_is_an_error_that_says_what_to_set(variables, message):
    with pytest.raises(distributed.DistributedError, match=message):
        distributed.initialize(variables)


@pytest.mark.parametrize("prompts", [1, 3, 8])
@pytest.mark.parametrize("blocks", [[{0, 1, 2, 3}], [{0, 1}, {2, 3}], [{0}, {1}, {2}, {3}], [{0, 2}, {1, 3}]], ids=str)
def test_every_problem_has_one_owner_which_holds_it(blocks, prompts):
    cuts = np.linspace(0, prompts, len(blocks) + 1).astype(int)
    holders = {(int(a), int(b)): who for a, b, who in zip(cuts, cuts[1:], blocks, strict=False) if b > a}
    found = [shares.split(prompts, holders, mesh.make_mesh(), process) for process in range(4)]
    assert sorted(i for share in found for i in share.own) == list(range(prompts))
    for share in found:
        assert set(share.own) <= set(share.held)
        assert list(share.held) == sorted(share.held)


def test_what_a_process_holds_comes_back_as_it_was_placed():
    # Two processes' worth of rows, of which this one (the only one there is) is given all.
    grid = mesh.make_mesh(data=2, fsdp=2, tensor=2)
    share = shares.make_share(6, grid)  # four devices do not divide six problems: they are split in two
    rows = np.arange(6 * 4 * 3).reshape(24, 3)
    placed = share.place(rows)
    assert placed.sharding.shard_shape(placed.shape) == (12, 3)
    np.testing.assert_array_equal(share.read(placed), rows)


def test_only_a_process_s_own_rows_are_copied_to_its_host(monkeypatch):
    """Eight problems of two rows; the devices of this process hold 0 to 3 and 6 to 7, of which it owns 1, 3 and 6."""
    import jax

    rows = np.arange(16 * 3).reshape(16, 3)
    copied = []

    class OnDevice:
        def __init__(self, first, last):
            self.index, self.first, self.last = (slice(first, last), slice(None)), first, last
            self.data = self

        def __getitem__(self, wanted):
            copied.extend(range(self.first + wanted.start, self.first + wanted.stop))
            return rows[self.first : self.last][wanted]

    class Elsewhere:
        is_fully_addressable, shape, ndim, dtype = False, rows.shape, 2, rows.dtype
        addressable_shards = (OnDevice(0, 4), OnDevice(4, 8), OnDevice(12, 16))

    monkeypatch.setattr(jax, "device_put", lambda x, layout: x)
    share = shares.Share(8, np.array([0, 1, 2, 3, 6, 7]), np.array([1, 3, 6]), mesh.make_mesh())
    np.testing.assert_array_equal(share.read(Elsewhere()), rows[[2, 3, 6, 7, 12, 13]])
    assert copied == [2, 3, 6, 7, 12, 13]


def test_a_failure_on_one_process_is_named_on_the_others(monkeypatch):
    """The exchange between processes is replaced by what another one would have sent."""
    import jax

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    sent = []

    def gathered(arrays):
        sent.append(arrays)
        return [dict(arrays), {"error": np.asarray(json.dumps("RewardError: no answer"))}]

    monkeypatch.setattr(distributed, "gather", gathered)
    with pytest.raises(
        distributed.PeerError, match="process 1 failed, so that process 0 stops: RewardError: no answer"
    ):
        distributed.together(lambda: 1)
    with pytest.raises(KeyError):  # its own error is the one that a process raises
        distributed.together(lambda: {}["x"])
    assert json.loads(str(sent[-1]["error"])) == "KeyError: 'x'"

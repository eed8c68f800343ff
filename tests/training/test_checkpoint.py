"""Checkpoints: what never changes is written once, parts can be read alone, and a store may fail."""

import asyncio
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.path import atomicity, atomicity_defaults

from jaxrl_post.training import checkpoint, config, fingerprints, loop, sampler, setup
from tests.training import runs


def state(step):
    """A base that stays, adapters that move, and a reference."""
    params = {
        "policy": {"base": jnp.arange(64.0), "adapter": jnp.full(4, step, jnp.float32)},
        "reference": {"base": jnp.arange(64.0) + 1},
    }
    return {"step": jnp.asarray(step), "params": params, "key": jax.random.key(1)}


FROZEN = {"params/policy/base", "params/reference/base"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(checkpoint, "PAUSE_SECONDS", 0.0)


def failing_store(monkeypatch, times, where="", after=0.0, kind=atomicity.AtomicRenameTemporaryPath):
    """The next commits fail, `after` seconds, as a bucket does that is not there for a moment."""
    finalize = kind.finalize
    left = [times]

    async def sometimes(self, *given, **named):
        if left[0] > 0 and where in str(self.get_final()):
            left[0] -= 1
            await asyncio.sleep(after)
            raise OSError("503 Service Unavailable")
        await finalize(self, *given, **named)

    monkeypatch.setattr(kind, "finalize", sometimes)
    return left


def test_what_is_frozen_is_written_once_and_comes_back(tmp_path):
    with checkpoint.Checkpointer(tmp_path / "c") as store:
        for step in (1, 2):
            store.commit(step, state(step), {}, frozen=FROZEN)
    places = sorted(path.name.rsplit("-", 1)[0] for path in (tmp_path / "c-frozen").iterdir())
    assert places == ["params-policy", "params-reference"]
    restored = checkpoint.restore(tmp_path / "c", state(0)).state
    np.testing.assert_array_equal(restored["params"]["policy"]["base"], np.arange(64.0))
    np.testing.assert_array_equal(restored["params"]["reference"]["base"], np.arange(64.0) + 1)
    np.testing.assert_array_equal(restored["params"]["policy"]["adapter"], np.full(4, 2.0))
    with checkpoint.Checkpointer(tmp_path / "d") as store:
        store.commit(1, {"base": jnp.arange(1 << 14), "moves": jnp.zeros(1)}, {}, frozen={"base"})
    written = [file.stat().st_size for file in (tmp_path / "d" / "1").rglob("*") if file.is_file()]
    assert sum(written) < 1 << 14  # a quarter of the frozen array's bytes


def test_a_run_with_adapters_freezes_its_base_and_one_without_them_its_reference(tmp_path):
    def frozen(name, **changes):
        parts = setup.build(config.load(runs.tiny_run(tmp_path / name, warm_start=None, **changes)))
        state = parts.template(parts.stages[0])
        return loop.never_changing(parts, parts.stages[0], state), fingerprints.named(state.params)

    model = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 16, "lora": {"rank": 2}}
    found, params = frozen("lora", model=model)
    adapters = {name for name in params if "lora" in name}
    assert adapters
    assert found == {f"params/{name}" for name in params if name not in adapters}
    found, params = frozen("whole", method={"name": "grpo", "beta": 0.1})
    assert found == {f"params/{name}" for name in params if name.startswith("reference/")} != set()
    roles = {"reference": {"refresh": "every", "every": 2}}
    assert frozen("renewed", method={"name": "grpo", "beta": 0.1}, roles=roles)[0] == set()


def test_what_was_called_frozen_but_has_changed_is_written_again(tmp_path):
    with checkpoint.Checkpointer(tmp_path / "c") as store:
        store.commit(1, {"w": jnp.zeros(3), "n": jnp.zeros(1)}, {}, frozen={"w"})
        store.commit(2, {"w": jnp.ones(3), "n": jnp.zeros(1)}, {}, frozen={"w"})
    like = {"w": jnp.zeros(3), "n": jnp.zeros(1)}
    assert checkpoint.restore(tmp_path / "c", like).state["w"].tolist() == [1.0, 1.0, 1.0]
    assert len(list((tmp_path / "c-frozen").iterdir())) == 2


def test_a_part_is_read_alone_and_nothing_else_is_looked_at(tmp_path):
    checkpoint.save(tmp_path / "c", 1, state(1))
    with checkpoint.Checkpointer(tmp_path / "c") as store:
        store.commit(2, state(2), {"a": 1}, frozen=FROZEN)
    # Without the reference the whole state cannot be read, the policy can.
    shutil.rmtree(next((tmp_path / "c-frozen").glob("params-reference-*")))
    wanted = {"params": {"policy": state(0)["params"]["policy"]}}
    with checkpoint.Checkpointer(tmp_path / "c", read_only=True) as store:
        found = store.restore(lambda run: wanted, partial=True)
    assert (found.step, found.run) == (2, {"a": 1})
    assert found.state["params"]["policy"]["adapter"].tolist() == [2.0] * 4
    with checkpoint.Checkpointer(tmp_path / "c", read_only=True) as store:
        assert store.restore(lambda run: state(0)).step == 1
        with pytest.raises(checkpoint.MismatchError, match="params/policy/other: nothing saved"):
            store.restore(lambda run: {"params": {"policy": {"other": jnp.zeros(1)}}}, partial=True)


def test_a_frozen_array_that_was_damaged_is_noticed(tmp_path):
    with checkpoint.Checkpointer(tmp_path / "c") as store:
        store.commit(1, state(1), {}, frozen=FROZEN)
    for file in (file for file in (tmp_path / "c-frozen").rglob("d/*") if file.is_file()):
        file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(checkpoint.CheckpointError, match="checkpoint 1 is damaged"):
        checkpoint.restore(tmp_path / "c", state(0))


def test_a_commit_is_tried_again_while_the_store_fails(tmp_path, monkeypatch, caplog):
    with checkpoint.Checkpointer(tmp_path / "c") as store:
        store.commit(1, state(1), {})
        failing_store(monkeypatch, 2)
        store.commit(2, state(2), {})
        assert store.steps() == [1, 2]
    assert caplog.text.count("checkpoint 2 could not be saved (OSError: 503 Service Unavailable); trying again") == 2
    assert checkpoint.restore(tmp_path / "c", state(0)).step == 2


def test_a_store_that_goes_on_failing_is_an_error_and_leaves_what_was_saved(tmp_path, monkeypatch):
    with checkpoint.Checkpointer(tmp_path / "c") as store:
        store.commit(1, state(1), {})
        failing_store(monkeypatch, 99)
        with pytest.raises(
            checkpoint.CheckpointError, match=r"tried 4 times \(OSError: 503.*the newest is that of step 1"
        ):
            store.commit(2, state(2), {})
    monkeypatch.undo()
    restored = checkpoint.restore(tmp_path / "c", state(0))
    assert (restored.step, restored.damaged) == (1, [])


def test_what_goes_wrong_before_its_arrays_are_read_does_not_make_a_checkpoint_damaged(tmp_path):
    checkpoint.save(tmp_path / "c", 1, state(1))

    def template(run):
        raise FileNotFoundError("train.jsonl")

    with checkpoint.Checkpointer(tmp_path / "c") as store:
        with pytest.raises(FileNotFoundError, match=r"train\.jsonl"):
            store.restore(template)
        assert store.steps() == [1]
    assert not (tmp_path / "c-damaged").exists()


def test_a_save_that_fails_in_the_background_is_told_once_and_the_next_one_holds(tmp_path, monkeypatch):
    with checkpoint.Checkpointer(tmp_path / "c", keep=2) as store:
        assert store.failure() is None
        store.save(1, state(1), {})
        failing_store(monkeypatch, 1, where="/2")
        store.save(2, state(2), {})
        told = None
        for _ in range(1000):
            if told := store.failure():
                break
            time.sleep(0.01)
        assert told is not None
        assert "503 Service Unavailable" in told
        assert "the newest is that of step 1" in told
        assert store.failure() is None
        store.save(3, state(3), {})
        store.wait()
        assert store.steps() == [1, 3]
        store.commit(4, state(4), {})
        assert store.steps() == [3, 4]  # the oldest is pruned as ever
    assert checkpoint.restore(tmp_path / "c", state(0)).step == 4


def test_a_save_that_is_still_being_written_and_then_fails_does_not_stop_the_next_one(tmp_path, monkeypatch, caplog):
    with checkpoint.Checkpointer(tmp_path / "c") as store:
        store.save(1, state(1), {})
        failing_store(monkeypatch, 1, where="/2", after=1.0)
        store.save(2, state(2), {})
        assert store.failure() is None  # not yet
        store.save(3, state(3), {})
        assert "could not be saved (OSError: 503 Service Unavailable); trying again" in caplog.text
        store.wait()
        assert store.steps() == [1, 3]
    assert checkpoint.restore(tmp_path / "c", state(0)).step == 3


def test_what_is_frozen_is_written_anew_in_a_bucket_where_it_was_left_unfinished(tmp_path, monkeypatch):
    """In a bucket a directory has its name from the start, and a file in it says that it is complete."""
    kind = atomicity.CommitFileTemporaryPath
    for name in ("get_default_temporary_path_class", "get_item_default_temporary_path_class"):
        monkeypatch.setattr(atomicity_defaults, name, lambda *_, **__: kind)
    failing_store(monkeypatch, 1, where="frozen", kind=kind)
    with checkpoint.Checkpointer(tmp_path / "c") as store:
        store.commit(1, state(1), {}, frozen=FROZEN)
    assert len(list((tmp_path / "c-frozen").glob("*/commit_success.txt"))) == 2
    assert checkpoint.restore(tmp_path / "c", state(0)).step == 1


def test_rollouts_that_the_store_refuses_do_not_hold_up_a_stop(tmp_path, monkeypatch, caplog):
    path = runs.tiny_run(tmp_path, warm_start=None, eval={"problems": 0})
    left = failing_store(monkeypatch, 99, where="in-flight")
    sample = sampler.Sampler.begin

    def and_stop(*given, **named):
        signal.raise_signal(signal.SIGTERM)
        return sample(*given, **named)

    monkeypatch.setattr(sampler.Sampler, "begin", and_stop)
    with pytest.raises(KeyboardInterrupt):
        loop.run(config.load(path))
    assert left == [98]  # tried once
    assert "were not saved and will be sampled again" in caplog.text
    assert (tmp_path / "run/checkpoints/0").is_dir()


def test_a_slow_store_is_reported(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint, "SLOW_SECONDS", 0.0)
    checkpoint.save(tmp_path / "c", 7, state(7))
    assert "saving step 7 kept training waiting" in caplog.text

"""Checkpoints of everything that a run is: asynchronous, atomic, verified when read.

Orbax writes and commits, to local disks and to `gs://` buckets alike; this file adds what it leaves open: a fingerprint
of every array, so that a damaged checkpoint is noticed; the way back to the newest one that is whole; one copy of what
never changes, in place of one in every checkpoint; and what happens when the store fails.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from jaxrl_post.training import distributed
from jaxrl_post.training.fingerprints import content, fingerprints, named, shapes
from jaxrl_post.types import Array, PyTree

logger = logging.getLogger(__name__)

ATTEMPTS = 4
"""How often a save is tried."""

PAUSE_SECONDS = 2.0
"""Between the first two of them; twice as long each time."""

SLOW_SECONDS = 60.0
"""A save that keeps training waiting for longer is reported."""


BACKGROUND_SECONDS = 1200
"""How long a save may take in the background. Where one of several processes fails in it, the others wait for so long
before all of them try again."""


class CheckpointError(ValueError):
    """No checkpoint could be read."""


class MismatchError(CheckpointError):
    """A checkpoint is whole, but holds other arrays than were asked for."""


class Restored(NamedTuple):
    """What `Checkpointer.restore` found.

    Attributes:
        step: the checkpoint's step.
        state: the state, laid out as the template was.
        run: the JSON-able rest (data position, counters, ...).
        damaged: one line for each newer checkpoint that could not be read.
    """

    step: int
    state: PyTree
    run: dict[str, Any]
    damaged: list[str]


def _with_raw_keys(tree: PyTree) -> PyTree:
    """Typed keys as their data, which every version of the storage format can hold."""

    def raw(x: Any) -> Any:
        if not _is_key(x):
            return x
        return jax.random.key_data(x) if isinstance(x, jax.Array) else jax.eval_shape(jax.random.key_data, x)

    return jax.tree.map(raw, tree)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _check_shapes(step: int, saved: Mapping[str, str], wanted: Mapping[str, str], partial: bool) -> None:
    lines = [
        f"\n  {name}: {saved.get(name, 'nothing')} saved, {wanted.get(name, 'nothing')} wanted"
        for name in sorted(wanted.keys() if partial else saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if lines:
        more = f"\n  and {len(lines) - 5} more" if len(lines) > 5 else ""
        raise MismatchError(
            f"checkpoint {step} does not fit this model, method and optimizer:{''.join(lines[:5])}{more}"
            "\nuse the configuration that it was trained with"
        )


class Checkpointer:
    """The checkpoints of one run, in `<directory>/<step>/`; what never changes is in `<directory>-frozen/`.

    Of several processes all make one, on a directory that all of them reach, and call it alike.

    Args:
        directory: made if it does not exist; local, or in a bucket (`gs://...`).
        keep: how many of the newest to keep; at least 2, or a damaged one leaves nothing to fall back to.
        read_only: change nothing in the directory: for whoever looks at a run that another process may be training.

    Raises:
        CheckpointError: if it is to be read only and does not exist.
    """

    def __init__(self, directory: str | Path | epath.Path, *, keep: int = 2, read_only: bool = False):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        path = epath.Path(directory)
        self.directory = path if "://" in str(directory) else path.absolute()
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
        elif not self.directory.is_dir():
            raise CheckpointError(f"there is no directory {directory}")
        self._keep = keep
        self._read_only = read_only
        self._manager = self._open()

    def _open(self):
        if self._read_only:
            options = self._ocp.CheckpointManagerOptions(read_only=True)
        else:
            options = self._ocp.CheckpointManagerOptions(
                max_to_keep=self._keep,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                async_options=self._ocp.AsyncOptions(timeout_secs=BACKGROUND_SECONDS),
            )
        return self._ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: PyTree, run: dict[str, Any], *, frozen: Collection[str] = ()) -> None:
        """Save in the background, after what is being saved. Returns once `state` may be donated.

        A store that fails before that, or has failed with the save before, is tried again; what goes wrong later
        `failure` tells.

        Args:
            step: larger than any step saved before; nothing is done if it is saved already.
            state: arrays.
            run: what else the run needs, as JSON.
            frozen: paths (`params/policy/embedding`) of arrays that do not change: they are written once, and again
                only if they have changed after all.

        Raises:
            CheckpointError: if it failed every time.
        """
        started = time.monotonic()
        self._try(step, lambda: self._write(step, state, run, frozen), ATTEMPTS)
        if (seconds := time.monotonic() - started) > SLOW_SECONDS:
            logger.warning("saving step %d kept training waiting for %.0f s: the store is slow", step, seconds)

    def _write(self, step: int, state: PyTree, run: dict[str, Any], frozen: Collection[str]) -> None:
        leaves = named(_with_raw_keys(state))
        prints = fingerprints(leaves)
        groups: dict[str, dict[str, Array]] = {}
        for name, leaf in leaves.items():
            if name in frozen:
                groups.setdefault("-".join(name.split("/")[:2]), {})[name] = leaf
        kept = {f"{group}-{content(some, prints)}": some for group, some in groups.items()}
        for place, some in kept.items():
            self._save_frozen(place, some)
        record = {
            "run": run,
            "shapes": shapes(leaves),
            "fingerprint": prints,
            "frozen": {name: place for place, some in kept.items() for name in some},
        }
        moving = {name: leaf for name, leaf in leaves.items() if name not in frozen}
        args = self._ocp.args.Composite(state=self._ocp.args.PyTreeSave(moving), record=self._ocp.args.JsonSave(record))
        self._manager.save(step, args=args, force=True)

    def _save_frozen(self, place: str, leaves: dict[str, Array]) -> None:
        target = self._frozen / place
        # In a bucket there is no renaming: a directory has its name before all of it is written.
        if distributed.on_main(lambda: self._ocp.utils.is_checkpoint_finalized(target)):
            return
        with self._ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(target, leaves, force=True)

    @property
    def _frozen(self) -> epath.Path:
        return self.directory.with_name(self.directory.name + "-frozen")

    def failure(self) -> str | None:
        """What went wrong with a save in the background, told once; None if nothing did. Save again if it did."""
        problem: str | None = None
        try:
            if not self._manager.is_saving_in_progress():
                self._manager.wait_until_finished()  # nothing to wait for; raises what went wrong
        except Exception as error:
            problem = _reason(error)
        if not distributed.any_process(problem is not None):
            return None
        self._reopen()
        return f"a checkpoint could not be saved ({problem or 'on another host'}); the newest is {self._newest()}"

    def commit(
        self,
        step: int,
        state: PyTree,
        run: dict[str, Any],
        *,
        frozen: Collection[str] = (),
        attempts: int = ATTEMPTS,
    ) -> None:
        """`save` and wait until it is there; a store that fails meanwhile is tried again, `attempts` times in all.

        Raises:
            CheckpointError: if it failed every time.
        """

        def write() -> None:
            self._write(step, state, run, frozen)
            self.wait()

        self._try(step, write, attempts)

    def _try(self, step: int, write: Callable[[], None], attempts: int) -> None:
        for attempt in range(1, attempts + 1):
            problem: str | None = None
            try:
                self.wait()  # for a save under way, which may be of this step
                if step not in self.steps():
                    write()
            except Exception as error:
                if distributed.lost_peer(error):
                    raise
                problem = _reason(error)
            if not distributed.any_process(problem is not None):
                return
            problem = problem or "on another host"
            self._reopen()
            if attempt < attempts:
                logger.warning("checkpoint %d could not be saved (%s); trying again", step, problem)
                time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
        raise CheckpointError(
            f"checkpoint {step} could not be saved to {self.directory}, tried {attempts} times ({problem}); the newest "
            f"is {self._newest()}. Look for a full disk or missing permissions, and resume the run"
        )

    def _newest(self) -> str:
        steps = self.steps()
        return f"that of step {steps[-1]}" if steps else "none"

    def _reopen(self) -> None:
        """Begin anew: after a failure the manager takes what it was writing for a checkpoint, or raises once more."""
        try:
            self._manager.close()
        except Exception as error:
            logger.debug("closing after a failed save: %s", error)
        self._manager = self._open()

    def restore(self, template: Callable[[dict[str, Any]], PyTree], *, partial: bool = False) -> Restored | None:
        """The newest checkpoint that is whole.

        Args:
            template: makes, from the checkpoint's `run`, a state of the right structure, shapes and shardings; what it
                raises is passed on.
            partial: read only the arrays that the template has, found by their paths.

        Returns:
            None if there has never been a checkpoint. A damaged checkpoint is moved to `<directory>-damaged/`
            (unless this is read only) and the one before it is tried.

        Raises:
            CheckpointError: if there are checkpoints and all of them are damaged, or the newest whole one holds other
                arrays than the template.
        """
        args, damaged = self._ocp.args, dict[int, str]()
        for step in reversed(self.steps()):
            record: dict[str, Any] | None = None
            found: PyTree | None = None
            reason = "on another host"
            try:
                record = self._manager.restore(step, args=args.Composite(record=args.JsonRestore()))["record"]
            except Exception as error:  # whatever a damaged file makes the storage layers raise
                reason = _reason(error)
            like = None if record is None else template(record["run"])  # what it raises is no damage
            try:
                found = None if record is None else self._read(step, record, like, partial)
            except MismatchError:
                raise
            except Exception as error:
                reason = _reason(error)
            if distributed.any_process(found is None) or found is None or record is None:
                damaged[step] = f"checkpoint {step} is damaged ({reason})"
                logger.warning("%s; trying the one before it", damaged[step])
                continue
            if not self._read_only:
                for bad in damaged:
                    self._set_aside(bad)
            return Restored(step, found, record["run"], list(damaged.values()))
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {self.directory} can be read:\n  "
                + "\n  ".join(damaged.values())
                + "\nremove the directory to start again, or put back an intact copy"
            )
        return None

    def _read(self, step: int, record: dict[str, Any], like: PyTree, partial: bool) -> PyTree:
        args = self._ocp.args
        wanted = named(_with_raw_keys(like))
        _check_shapes(step, record["shapes"], shapes(wanted), partial)
        places: dict[str | None, dict[str, jax.ShapeDtypeStruct]] = {}
        for name, x in wanted.items():
            abstract = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            places.setdefault(record["frozen"].get(name), {})[name] = abstract
        leaves: dict[str, Array] = {}
        for place, some in places.items():
            given = {
                "item": some,
                "restore_args": self._ocp.checkpoint_utils.construct_restore_args(some),
                "partial_restore": True,
            }
            if place is None:
                leaves |= self._manager.restore(step, args=args.Composite(state=args.PyTreeRestore(**given)))["state"]
            else:
                with self._ocp.PyTreeCheckpointer() as checkpointer:
                    leaves |= checkpointer.restore(self._frozen / place, args=args.PyTreeRestore(**given))
        leaves = {name: leaves[name] for name in wanted}
        prints = fingerprints(leaves)
        if wrong := [name for name in prints if prints[name] != record["fingerprint"][name]]:
            raise CheckpointError(f"its arrays are not those that were saved, e.g. {wrong[0]}")
        raw = jax.tree.unflatten(jax.tree.structure(like), list(leaves.values()))
        return jax.tree.map(
            lambda x, t: jax.random.wrap_key_data(x, impl=jax.random.key_impl(t)) if _is_key(t) else x, raw, like
        )

    def _set_aside(self, step: int) -> None:
        self._manager.close()
        if distributed.is_main():
            aside = self.directory.with_name(self.directory.name + "-damaged")
            aside.mkdir(exist_ok=True)
            target = aside / str(step)
            if target.exists():
                target.rmtree()
            (self.directory / str(step)).rename(target)
        distributed.any_process(False)  # nobody looks before it is gone
        self._manager = self._open()

    def wait(self) -> None:
        """Wait until what was saved is committed; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Commit what is under way and release the directory."""
        self._manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error the other processes may be gone, and a commit would wait for them.
        if kind is None:
            self.close()
        elif issubclass(kind, KeyboardInterrupt) or jax.process_count() == 1:
            try:
                self.close()
            except Exception as error:  # what ended the run is told, and not only what came of it
                logger.warning("a checkpoint could not be saved (%s); the newest is %s", _reason(error), self._newest())


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}"


def save(directory: str | Path, step: int, state: PyTree, run: dict[str, Any] | None = None, *, keep: int = 2) -> None:
    """Save one checkpoint and wait until it is committed; see `Checkpointer.save`."""
    with Checkpointer(directory, keep=keep) as checkpointer:
        checkpointer.save(step, state, run or {})


def restore(directory: str | Path, like: PyTree) -> Restored:
    """The newest whole checkpoint of `directory`, laid out as `like`.

    Raises:
        CheckpointError: if there is none.
    """
    with Checkpointer(directory, read_only=True) as checkpointer:
        restored = checkpointer.restore(lambda run: like)
    if restored is None:
        raise CheckpointError(f"there is no checkpoint in {directory}")
    return restored

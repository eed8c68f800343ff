"""Checkpoints of everything that a run is: asynchronous, atomic, verified when read.

Orbax writes and commits; this file adds what it leaves open: a fingerprint of every array, so that a damaged checkpoint
is noticed, and the way back to the newest one that is whole.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post.types import Array, PyTree

logger = logging.getLogger(__name__)


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


@jax.jit
def fingerprint(tree: PyTree) -> Array:
    """One number per leaf that changes with any of its bits; the same for every sharding.

    A sum modulo 2**32 of the elements' bits, each multiplied by an odd number that depends on its place.

    Example:
        >>> a, b = fingerprint({"x": jnp.arange(3.0)}), fingerprint({"x": jnp.array([0.0, 2.0, 1.0])})
        >>> bool(a[0] == b[0])
        False
    """

    def one(x: Array) -> Array:
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        width = np.dtype(x.dtype).itemsize
        bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[width])
        place = jnp.zeros(bits.shape, jnp.uint32)
        for axis, size in enumerate(bits.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        return jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1) * jnp.uint32(0x9E3779B1), dtype=jnp.uint32)

    return jnp.stack([one(leaf) for leaf in jax.tree.leaves(tree)])


def _with_raw_keys(tree: PyTree) -> PyTree:
    """Typed keys as their data, which every version of the storage format can hold."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def shapes(tree: PyTree) -> dict[str, str]:
    """Shape and dtype of every array by its path, as text.

    Example:
        >>> shapes({"w": jnp.zeros((2, 3)), "n": ()})
        {"['w']": 'float32[2, 3]'}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _check_shapes(step: int, saved: dict[str, str], wanted: dict[str, str]) -> None:
    lines = [
        f"\n  {name}: {saved.get(name, 'nothing')} saved, {wanted.get(name, 'nothing')} wanted"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if lines:
        more = f"\n  and {len(lines) - 5} more" if len(lines) > 5 else ""
        raise MismatchError(
            f"checkpoint {step} does not fit this model, method and optimizer:{''.join(lines[:5])}{more}"
            "\nuse the configuration that it was trained with"
        )


class Checkpointer:
    """The checkpoints of one run, in `<directory>/<step>/`.

    Args:
        directory: made if it does not exist.
        keep: how many of the newest to keep; at least 2, or a damaged one leaves nothing to fall back to.
        read_only: change nothing in the directory: for whoever looks at a run that another process may be training.

    Raises:
        CheckpointError: if it is to be read only and does not exist.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2, read_only: bool = False):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.directory = Path(directory).absolute()
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
                max_to_keep=self._keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
            )
        return self._ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: PyTree, run: dict[str, Any]) -> None:
        """Save in the background. Returns once `state` may be donated.

        Args:
            step: larger than any step saved before.
            state: arrays.
            run: what else the run needs, as JSON.
        """
        raw = _with_raw_keys(state)
        record = {"run": run, "shapes": shapes(raw), "fingerprint": np.asarray(fingerprint(raw)).tolist()}
        args = self._ocp.args.Composite(state=self._ocp.args.StandardSave(raw), record=self._ocp.args.JsonSave(record))
        self._manager.save(step, args=args, force=True)

    def restore(self, template: Callable[[dict[str, Any]], PyTree]) -> Restored | None:
        """The newest checkpoint that is whole.

        Args:
            template: makes, from the checkpoint's `run`, a state of the right structure, shapes and shardings.

        Returns:
            None if there has never been a checkpoint. A damaged checkpoint is moved to `<directory>-damaged/`
            (unless this is read only) and the one before it is tried.

        Raises:
            CheckpointError: if there are checkpoints and all of them are damaged, or the newest whole one holds other
                arrays than the template.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                record = self._manager.restore(
                    step, args=self._ocp.args.Composite(record=self._ocp.args.JsonRestore())
                )["record"]
                like = template(record["run"])
                _check_shapes(step, record["shapes"], shapes(_with_raw_keys(like)))
                abstract = jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _with_raw_keys(like)
                )
                raw = self._manager.restore(
                    step, args=self._ocp.args.Composite(state=self._ocp.args.StandardRestore(abstract))
                )["state"]
                if np.asarray(fingerprint(raw)).tolist() != record["fingerprint"]:
                    raise CheckpointError("its arrays are not those that were saved")
            except MismatchError:
                raise
            except Exception as error:  # whatever a damaged file makes the storage layers raise
                reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
                damaged[step] = f"checkpoint {step} is damaged ({type(error).__name__}: {reason})"
                logger.warning("%s; trying the one before it", damaged[step])
                continue
            if not self._read_only:
                for bad in damaged:
                    self._set_aside(bad)
            state = jax.tree.map(
                lambda x, t: jax.random.wrap_key_data(x, impl=jax.random.key_impl(t)) if _is_key(t) else x, raw, like
            )
            return Restored(step, state, record["run"], list(damaged.values()))
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {self.directory} can be read:\n  "
                + "\n  ".join(damaged.values())
                + "\nremove the directory to start again, or put back an intact copy"
            )
        return None

    def _set_aside(self, step: int) -> None:
        self._manager.close()
        aside = self.directory.with_name(self.directory.name + "-damaged")
        aside.mkdir(exist_ok=True)
        target = aside / str(step)
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(self.directory / str(step), target)
        self._manager = self._open()

    def wait(self) -> None:
        """Wait until what was saved is committed; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Commit what is under way and release the directory."""
        self._manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


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

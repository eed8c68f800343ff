"""Rollouts that were sampled when the run was asked to stop: kept beside the checkpoint that they belong to.

Sampling is most of a step's time. A machine that is taken away leaves no time for the update, and whoever goes on must
not have to sample again. Without them the same rollouts are sampled once more: they are a function of the checkpoint.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath

from jaxrl_post import mesh as mesh_lib
from jaxrl_post.training import distributed
from jaxrl_post.training.batches import Batch, Cursor
from jaxrl_post.training.checkpoint import Checkpointer, CheckpointError
from jaxrl_post.training.setup import Setup, Stage

logger = logging.getLogger(__name__)


class Waiting(NamedTuple):
    """A batch that waits to be trained on.

    Attributes:
        batch: the batch; its texts are gone, but for those to be shown.
        cursor: where the run was, with the data after the batch.
    """

    batch: Batch
    cursor: Cursor


class InFlight:
    """The rollouts in flight of one run, at most one batch of them.

    Args:
        directory: made when there is something to keep.
    """

    def __init__(self, directory: str | Path | epath.Path):
        self._directory = epath.Path(directory)
        self._store: Checkpointer | None = None

    def save(self, setup: Setup, step: int, batch: Batch, cursor: Cursor) -> bool:
        """Keep a batch, if the store takes it at once: there may be little time left, and it can be sampled again.

        Args:
            setup: the run's parts.
            step: of the checkpoint with whose parameters it was sampled.
            batch: not trained on yet.
            cursor: that of the checkpoint, with the data's position after the batch.

        Returns:
            Whether it is kept; what stood in the way is logged.
        """
        if batch.rollouts is None:
            raise ValueError("there is nothing to keep of a batch without rollouts")
        # What only each process has by itself (budgets) goes onto the mesh, where all arrays of a checkpoint are.
        rollouts = mesh_lib.place(batch.rollouts, mesh_lib.rollout_shardings(batch.rollouts, setup.mesh))
        kept = {name: getattr(batch, name) for name in ("metrics", "sequences", "tokens", "shown")}
        try:
            self._store = self._store or Checkpointer(self._directory, keep=1)
            self._store.commit(step, rollouts, {**kept, "cursor": dataclasses.asdict(cursor)}, attempts=1)
        except Exception as error:  # whatever the store raises
            if distributed.lost_peer(error):
                raise
            logger.warning("the rollouts in flight were not saved and will be sampled again: %s", error)
            return False
        return True

    def restore(self, setup: Setup, stage: Stage, step: int, cursor: Cursor) -> Waiting | None:
        """The batch that waits after a step, if there is one.

        Args:
            setup: the run's parts.
            stage: the stage that the next step belongs to.
            step: the last step taken.
            cursor: where the run is.
        """
        if stage.kind != "rollouts" or not self._directory.is_dir():
            return None
        with Checkpointer(self._directory, read_only=True) as store:
            if store.steps() != [step]:
                return None
            try:
                found = store.restore(lambda run: _template(setup, stage))
            except CheckpointError:
                return None  # another configuration of the rollouts, or damaged: they are sampled again
        if found is None:
            return None
        run: dict[str, Any] = dict(found.run)
        saved = Cursor(**run.pop("cursor"))
        if dataclasses.replace(saved, data=cursor.data) != cursor:
            return None
        return Waiting(Batch(rollouts=found.state, sampled=None, **run), saved)

    def __enter__(self) -> InFlight:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._store is not None:
            self._store.close()


def _template(setup: Setup, stage: Stage) -> Any:
    shapes = setup.rollout_shapes(stage)
    layout = mesh_lib.rollout_shardings(shapes, setup.mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)

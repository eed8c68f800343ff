"""What each step trains on: sampled with the policy of the moment, or given by the data."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post import curation, data
from jaxrl_post import mesh as mesh_lib
from jaxrl_post.rollout import SamplingParams
from jaxrl_post.training import distributed
from jaxrl_post.training.given import GREEDY_REWARD, given_rollouts, wanted_columns
from jaxrl_post.training.problem_setup import TrainingError, given_columns, given_fits
from jaxrl_post.training.sampler import Begun, Sampled, Sampler, sampled_metrics
from jaxrl_post.training.setup import Setup, Stage
from jaxrl_post.training.shares import make_share
from jaxrl_post.training.state import TrainState
from jaxrl_post.training.subgroups import make_budgets
from jaxrl_post.types import FINISH_NONE, PyTree, Rollouts

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Cursor:
    """Where a run is, beside the state on the device; saved with every checkpoint.

    Attributes:
        stage: index of the stage.
        stage_step: steps taken in it.
        ended: the stage has reached what it was to reach.
        next_id: id of the next sequence to be sampled.
        num_tokens: completion tokens sampled or given so far.
        updates: updates made in the stage, which its learning rate depends on.
        nonfinite: skipped updates in a row.
        empty: steps without anything to train on in a row.
        data: position in the stage's data; None at its beginning.
    """

    stage: int = 0
    stage_step: int = 0
    ended: bool = False
    next_id: int = 0
    num_tokens: int = 0
    updates: int = 0
    nonfinite: int = 0
    empty: int = 0
    data: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a step trains on.

    Attributes:
        rollouts: None if nothing is left to train on.
        metrics: of the batch as it was sampled.
        sampled: its completions, if they were sampled.
        sequences: number of sequences sampled.
        tokens: number of completion tokens.
        shown: prompt, completion and reward of a few of them, for the log.
        waiting: problems that have completions to go on with; where all have, there is nothing to be learned from yet.
    """

    rollouts: Rollouts | None
    metrics: dict[str, float]
    sampled: Sampled | None
    sequences: int
    tokens: int
    shown: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    waiting: int = 0


class Batches:
    """The batches of a stage, from a position that a checkpoint can hold.

    Args:
        setup: the run's parts.
        stage: the stage.
        cursor: where it is.
        carried: what the step before left to be gone on with, or trained on; `()` if nothing.

    Attributes:
        problems: those of the last batch.
    """

    def __init__(self, setup: Setup, stage: Stage, cursor: Cursor, carried: PyTree = ()):
        config, problems = setup.config, setup.problems
        self._setup, self._stage = setup, stage
        warm = stage.name == "warm_start"
        self._names = given_columns(stage.kind, problems.train)
        fits = given_fits(config, setup.tokenizer, self._names, self._prompt_fits(), stage.name)
        # Fresh problems for the method: what the warm start has shown the answers of is left out as well. Files may
        # hold no others.
        shown = frozenset(map(data.identity, problems.warm_start))
        exclude = problems.exclude if warm or config.data.files else problems.exclude | shown
        source = problems.warm_start if warm else problems.train
        if len(source) < stage.batch_size:
            raise TrainingError(
                f"{stage.name} trains on {stage.batch_size} different problems a step, but there are only "
                f"{len(source)}; make the batch smaller or give more problems"
            )
        # Completions that go on keep their problems, of which the others take the next ones singly.
        partial = stage.kind == "rollouts" and config.rollout.tokens_per_step is not None
        each = 1 if partial else stage.batch_size
        shuffle = config.curriculum.name == "uniform"
        self._stream = data.stream(
            source, batch_size=each, seed=config.seed, exclude=exclude, keep=fits, shuffle=shuffle
        )
        if cursor.data is not None:
            self._stream.set_state(cursor.data)
        self.problems: list[data.Problem] = []
        self._told_of_filtered = False
        self._share = make_share(stage.batch_size, setup.mesh)
        if stage.kind == "rollouts":
            sampler = functools.partial(
                Sampler,
                setup,
                prompts=stage.batch_size,
                prompt_length=config.data.max_prompt_length,
            )
            budgets = make_budgets(config)
            self._sampler = sampler(setup.trained_generation(), name="rollout", budgets=budgets, server=setup.server)
            self._greedy = sampler(setup.generation(SamplingParams(greedy=True)), name="rollout/greedy")
            self._select = jax.jit(curation.select_groups, static_argnums=1)
            self._carries, self._partial, self._ahead = setup.carries(stage), partial, config.rollout.ahead
            self._begun: Begun | None = None
            if self._carries and carried != ():
                ids = distributed.to_host(carried.prompt_id)
                self._begun = Begun([source[int(i)] for i in ids], stage.batch_size, cursor.stage_step - 1, carried)

    def position(self) -> dict[str, Any]:
        """Where the data is, as JSON."""
        return self._stream.get_state()

    def carried(self) -> PyTree:
        """What the last batch left to the next, as a checkpoint holds it."""
        if not self._setup.carries(self._stage) or self._begun is None:
            return ()
        # What only each process has by itself (budgets) goes onto the mesh.
        rollouts = self._begun.rollouts
        return mesh_lib.place(rollouts, mesh_lib.rollout_shardings(rollouts, self._setup.rollout_mesh))

    def next(self, state: TrainState, cursor: Cursor) -> Batch:
        """The next batch: sampled with the state's policy, or given by the data."""
        if self._stage.kind == "rollouts":
            batch = self._sample(state, cursor)
        else:
            self.problems = self._drawn()
            batch = self._given()
        if filtered := self._stream.counts["filtered"]:
            batch.metrics["data/filtered_problems"] = float(filtered)
            if not self._told_of_filtered:
                self._told_of_filtered = True
                logger.warning(
                    "%s leaves out problems that are too long: the prompt for data.max_prompt_length = %d tokens, or a "
                    "completion that the data give for rollout.max_new_tokens = %d (%d so far, %d kept)",
                    self._stage.name,
                    self._setup.config.data.max_prompt_length,
                    self._setup.config.rollout.max_new_tokens,
                    filtered,
                    self._stream.counts["kept"],
                )
        if skipped := getattr(self._setup.problems.train, "skipped", 0):
            batch.metrics["data/skipped_rows"] = float(skipped)
        return batch

    def _drawn(self) -> list[data.Problem]:
        problems = next(self._stream)
        data.check_disjoint(map(data.identity, problems), self._setup.problems.exclude)
        return problems

    def _begin(self, state: TrainState, cursor: Cursor, before: Begun | None) -> Begun:
        """Have the next completions sampled: of other problems, or where those of the call before go on."""
        carried = None if before is None else before.rollouts
        if not self._partial:
            problems, carried = self._drawn(), None
        elif before is None or carried is None:
            problems, carried = [self._drawn()[0] for _ in range(self._stage.batch_size)], self._none_going_on()
        else:
            going = distributed.to_host(jnp.any(carried.finish == FINISH_NONE, axis=1))
            problems = [old if on else self._drawn()[0] for old, on in zip(before.problems, going, strict=True)]
        (begun,) = self._sampler.begin(
            state.params["policy"],
            problems,
            jax.random.fold_in(self._setup.key, 4),
            first_id=cursor.next_id,
            version=cursor.stage_step,
            carried=carried,
        )
        return begun

    def _none_going_on(self) -> Rollouts:
        shapes = self._setup.carried(self._stage)
        layout = jax.tree.map(lambda x: x.sharding, shapes)
        ones = jax.jit(lambda: jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes), out_shardings=layout)
        return ones()  # of which `finish` says that all have ended

    def _sample(self, state: TrainState, cursor: Cursor) -> Batch:
        config = self._setup.config
        begun = self._begun
        if begun is None or not self._ahead:
            begun = self._begin(state, cursor, begun)
        if self._ahead:
            # Before anything waits for what is sampled already.
            later = dataclasses.replace(cursor, next_id=cursor.next_id + begun.rollouts.batch_size)
            self._begun = self._begin(state, later, begun)
        elif self._partial:
            self._begun = begun
        self.problems = begun.problems
        elsewhere = self._carries or self._setup.server is not None
        sampled = self._sampler.score([begun], cursor.stage_step if elsewhere else None)
        metrics = sampled_metrics(sampled, config.eval.correct_at)
        if self._partial:
            metrics["completions/waiting_groups"] = float(len(begun.problems) - len(sampled.ended))
        if GREEDY_REWARD in self._stage.method.wants:
            greedy = self._greedy(state.params["policy"], self.problems, self._setup.key).rollouts
            known = distributed.to_host(greedy.valid)
            if known.any():
                metrics["rewards/greedy"] = float(distributed.to_host(greedy.reward)[known].mean())
            metrics["rewards/greedy_unscored"] = float(1.0 - known.mean())
            sampled = sampled._replace(rollouts=with_greedy_reward(sampled.rollouts, greedy))
        columns = wanted_columns(self._setup, self._stage, self.problems, self._share)
        every = sampled.rollouts.replace(extras={**sampled.rollouts.extras, **columns})
        if self._stage.method.partial:
            every = every.replace(valid=every.valid | (every.finish == FINISH_NONE))
        valid = distributed.to_host(every.valid)
        chosen: Rollouts | None = every if valid.any() else None
        if config.curriculum.oversample > 1:
            useful = np.asarray(
                curation.informative(jnp.asarray(distributed.to_host(every.reward)), jnp.asarray(valid))
            )
            metrics["curriculum/informative_groups"] = float(useful.mean())
            if chosen is not None:
                some = useful.any() or not self._stage.method.contrasts
                chosen = self._select(every, config.rollout.prompts) if some else None
        tokens = int(sampled.rows["new_tokens"].sum())
        waiting = len(self.problems) - len(sampled.ended)
        return Batch(chosen, metrics, sampled, every.batch_size, tokens, shown(sampled, self.problems), waiting)

    def _prompt_fits(self) -> Callable[[data.Problem], bool]:
        """Whether a problem's prompt is within the limit, with every sentence about a budget that may follow it."""
        options, stage = self._setup.config.data, self._stage
        fits = data.prompt_fits(self._setup.tokenizer, options.max_prompt_length, on_long_prompt=options.on_long_prompt)
        budgets = make_budgets(self._setup.config) if stage.kind == "rollouts" else None
        if budgets is None:
            return fits
        every = budgets.within(stage.steps)
        return lambda problem: all(fits(data.extend_prompt(problem, budgets.prompt("", budget))) for budget in every)

    def _given(self) -> Batch:
        rollouts = given_rollouts(self._setup, self._stage, self.problems, self._names, self._share)
        tokens = int(jnp.sum(rollouts.mask))
        return Batch(rollouts, {"completions/mean_length": tokens / rollouts.batch_size}, None, 0, tokens)


def shown(sampled: Sampled, problems: list[data.Problem]) -> list[dict[str, Any]]:
    """The first completion of some problems, with its reward."""
    assert sampled.scored is not None
    reward, valid = sampled.scored.total, sampled.scored.valid
    group = sampled.rollouts.group_size
    return [
        {
            "prompt": problems[problem]["prompt"],
            "completion": completion,
            "reward": float(reward[index * group]) if valid[index * group] else None,
        }
        for index, (problem, completion) in enumerate(zip(sampled.ended, sampled.shown, strict=False))
    ]


def with_greedy_reward(rollouts: Rollouts, greedy: Rollouts) -> Rollouts:
    """Rollouts with `extras["greedy_reward"]`.

    Where the greedy completion could not be scored, there is no baseline, and the prompt's group is not valid.

    Args:
        rollouts: `P` groups.
        greedy: of the same prompts, groups of one.
    """
    return rollouts.replace(
        valid=rollouts.valid & greedy.valid,
        extras={**rollouts.extras, GREEDY_REWARD: jnp.where(greedy.valid, greedy.reward, 0.0)[:, 0]},
    )

"""A run from its configuration to its last checkpoint, to be read from top to bottom.

Each step draws problems, samples and scores completions (or takes the given ones), updates, and writes one line of
metrics; every so often it evaluates and saves. Whatever a later step depends on is in the checkpoint: the state on the
device, and the `Cursor`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post import curation, data
from jaxrl_post.rollout import SamplingParams
from jaxrl_post.training import config as configs
from jaxrl_post.training import setup as setups
from jaxrl_post.training.checkpoint import Checkpointer
from jaxrl_post.training.config import Config
from jaxrl_post.training.evaluate import Evaluator
from jaxrl_post.training.plot import plot
from jaxrl_post.training.progress import Progress
from jaxrl_post.training.roles import make_refresh
from jaxrl_post.training.run_log import RunLog, prepare_run_dir
from jaxrl_post.training.sampling import Sampled, Sampler, sampled_metrics
from jaxrl_post.training.setup import Setup, Stage
from jaxrl_post.training.state import TrainState
from jaxrl_post.training.step import make_step
from jaxrl_post.types import Rollouts

SHOWN_COMPLETIONS = 4


class TrainingError(ValueError):
    """The run cannot go on; the message says what was seen and what to try."""


@dataclasses.dataclass(frozen=True)
class Cursor:
    """Where a run is, beside the state on the device; saved with every checkpoint.

    Attributes:
        stage: index of the stage.
        stage_step: steps taken in it.
        ended: the stage has reached what it was to reach.
        next_id: id of the next sequence to be sampled.
        num_tokens: completion tokens sampled or given so far.
        nonfinite: skipped updates in a row.
        empty: steps without anything to train on in a row.
        data: position in the stage's data; None at its beginning.
    """

    stage: int = 0
    stage_step: int = 0
    ended: bool = False
    next_id: int = 0
    num_tokens: int = 0
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
    """

    rollouts: Rollouts | None
    metrics: dict[str, float]
    sampled: Sampled | None
    sequences: int
    tokens: int


def run(config: Config) -> None:
    """Train as `config` says, or go on with the run in its `run_dir`.

    Raises:
        ValueError: for whatever the user can change; the message says what.
    """
    resume = prepare_run_dir(config)
    setup = setups.build(config)
    directory = Path(config.run_dir)
    with Checkpointer(directory / "checkpoints", keep=config.training.keep_checkpoints) as checkpoints:
        restored = None
        if resume:
            restored = checkpoints.restore(lambda saved: setup.template(setup.stages[saved["stage"]]))
        cursor = Cursor(**restored.run) if restored else Cursor()
        state = restored.state if restored else None
        done = restored.step if restored else 0
        total = done - cursor.stage_step + sum(stage.steps for stage in setup.stages[cursor.stage :])
        log = RunLog(
            directory,
            resume_from=done,
            tensorboard=config.logging.tensorboard,
            wandb=config.logging.wandb,
            config=configs.to_dict(config),
        )
        with log, Progress(total, config.logging.progress) as progress:
            if restored:
                for line in restored.damaged:
                    progress.message(f"{line}; it was moved to checkpoints-damaged/")
                progress.message(f"resuming {directory} from step {done}")
            params = setup.initial_params() if state is None else None
            evaluator = Evaluator(setup)
            for index in range(cursor.stage, len(setup.stages)):
                stage = setup.stages[index]
                if state is None:
                    state = setup.begin(stage, params, step=done)
                state, cursor, done = run_stage(
                    setup, stage, state, cursor, done, evaluator, checkpoints, log, progress
                )
                if index + 1 < len(setup.stages):
                    params, state = state.params["policy"], None
                    cursor = dataclasses.replace(
                        cursor, stage=index + 1, stage_step=0, ended=False, data=None, nonfinite=0, empty=0
                    )
            checkpoints.wait()
        plot([directory], directory / "curves.png")


def run_stage(
    setup: Setup,
    stage: Stage,
    state: TrainState,
    cursor: Cursor,
    done: int,
    evaluator: Evaluator,
    checkpoints: Checkpointer,
    log: RunLog,
    progress: Progress,
) -> tuple[TrainState, Cursor, int]:
    """Train one stage to its end.

    Args:
        setup: the run's parts.
        stage: the stage.
        state: after step `done`.
        cursor: likewise.
        done: steps taken in the whole run.
        evaluator: of the held-out and validation problems.
        checkpoints: where to save.
        log: where to write metrics.
        progress: where to show them.

    Returns:
        State, cursor and number of steps at the end of the stage.
    """
    config = setup.config
    if cursor.ended or cursor.stage_step >= stage.steps:
        return state, cursor, done
    batches = Batches(setup, stage, cursor)
    step = make_step(
        setup.scores(stage),
        stage.method,
        stage.optimizer,
        micro_batches=stage.micro_batches,
        epochs=stage.epochs,
        refresh=make_refresh(stage.roles),
        mesh=setup.mesh,
    )
    while not (cursor.ended or cursor.stage_step >= stage.steps):
        started = time.perf_counter()
        batch = batches.next(state, cursor)
        prepared = time.perf_counter()
        metrics = {
            **batch.metrics,
            "learning_rate": float(np.asarray(stage.schedule(cursor.stage_step * stage.epochs))),
        }
        if batch.rollouts is None:
            state = state.replace(step=state.step + 1)
            updated = {"nonfinite_updates": 0.0}
        else:
            state, updated = step(state, batch.rollouts)
            updated = {name: float(value) for name, value in jax.device_get(updated).items()}
        metrics |= updated
        done += 1
        cursor = dataclasses.replace(
            cursor,
            stage_step=cursor.stage_step + 1,
            next_id=cursor.next_id + batch.sequences,
            num_tokens=cursor.num_tokens + batch.tokens,
            nonfinite=cursor.nonfinite + 1 if updated["nonfinite_updates"] else 0,
            empty=cursor.empty + 1 if batch.rollouts is None else 0,
            data=batches.position(),
        )
        seconds = time.perf_counter() - started
        metrics |= {
            "stage": stage.name,
            "num_tokens": cursor.num_tokens,
            "empty_steps": float(batch.rollouts is None),
            "step_time": seconds,
            "time/batch": prepared - started,
            "time/update": seconds - (prepared - started),
            "tokens_per_second": batch.tokens / seconds,
        }
        if stage.until is not None and cursor.stage_step % stage.check_every == 0:
            accuracy = evaluator.greedy_accuracy(state.params["policy"], setup.problems.validation)
            metrics["warm_start/accuracy"] = accuracy
            cursor = dataclasses.replace(cursor, ended=accuracy >= stage.until)
        last = cursor.ended or cursor.stage_step >= stage.steps
        if last or (config.eval.every and cursor.stage_step % config.eval.every == 0):
            metrics |= evaluator(state.params["policy"])
        log.write(done, metrics)
        every = config.training.log_completions_every
        if batch.sampled is not None and every and (last or cursor.stage_step % every == 1 % every):
            rows = shown_completions(batch.sampled, batches.problems, SHOWN_COMPLETIONS)
            log.completions(done, rows)
            progress.completions(done, rows)
        progress.update(done, metrics, stage=stage.name)
        stop_if_stuck(config, cursor, metrics)
        if last or cursor.stage_step % config.training.checkpoint_every == 0:
            checkpoints.save(done, state, dataclasses.asdict(cursor))
    if stage.until is not None and not cursor.ended:
        progress.message(
            f"the warm start took all its {stage.steps} steps without reaching an accuracy of {stage.until}; going on"
        )
    return state, cursor, done


def stop_if_stuck(config: Config, cursor: Cursor, metrics: dict[str, Any]) -> None:
    """Raise TrainingError after too many skipped or empty steps in a row."""
    limit = config.training.max_nonfinite_steps
    if cursor.nonfinite >= limit:
        seen = {name: metrics[name] for name in ("loss", "grad_norm", "learning_rate") if name in metrics}
        raise TrainingError(
            f"{limit} updates in a row had gradients or losses that are not finite and were skipped (the last: "
            f"{seen}). The parameters are those before the first of them. Lower training.optimizer.learning_rate, set "
            "training.optimizer.max_grad_norm, or look for extreme rewards in completions.jsonl; "
            "training.max_nonfinite_steps is this limit"
        )
    limit = config.training.max_empty_steps
    if cursor.empty >= limit:
        raise TrainingError(
            f"{limit} steps in a row had nothing to train on: no group had valid rewards that differ (the last reward "
            f"was {metrics.get('reward')}, {metrics.get('rewards/unscored', 0):.0%} of the rows were unscored). The "
            "task is too hard or too easy for the policy, or the reward functions fail; try another warm start, larger "
            "groups or more oversampling; training.max_empty_steps is this limit"
        )


def shown_completions(sampled: Sampled, problems: Sequence[data.Problem], count: int) -> list[dict[str, Any]]:
    """The first completion of some problems, with its reward."""
    reward, valid = jax.device_get((sampled.rollouts.reward, sampled.rollouts.valid))
    group = reward.shape[1]
    return [
        {
            "prompt": problem["prompt"],
            "completion": sampled.completions[index * group],
            "reward": float(reward[index, 0]) if valid[index, 0] else None,
        }
        for index, problem in enumerate(problems[:count])
    ]


class Batches:
    """The batches of a stage, from a position that a checkpoint can hold.

    Attributes:
        problems: those of the last batch.
    """

    def __init__(self, setup: Setup, stage: Stage, cursor: Cursor):
        config, problems = setup.config, setup.problems
        self._setup, self._stage = setup, stage
        warm = stage.name == "warm_start"
        fits = data.prompt_fits(
            setup.tokenizer, config.data.max_prompt_length, on_long_prompt=config.data.on_long_prompt
        )
        # Fresh problems for the method: what the warm start has shown the answers of is left out as well. Files may
        # hold no others.
        shown = frozenset(problem["prompt"] for problem in problems.warm_start)
        exclude = problems.exclude if warm or config.data.task is None else problems.exclude | shown
        self._stream = data.stream(
            problems.warm_start if warm else problems.train,
            batch_size=stage.batch_size,
            seed=config.seed,
            exclude=exclude,
            keep=fits,
        )
        if cursor.data is not None:
            self._stream.set_state(cursor.data)
        self.problems: list[data.Problem] = []
        rollout = config.rollout
        self._length = config.data.max_prompt_length + rollout.max_new_tokens
        if stage.kind == "rollouts":
            options = rollout.sampling
            self._sampler = Sampler(
                setup,
                SamplingParams(options.temperature, options.top_k, options.top_p, options.min_p),
                group_size=rollout.group_size,
                max_new_tokens=rollout.max_new_tokens,
                prompts=stage.batch_size,
                prompt_length=config.data.max_prompt_length,
            )
            self._select = jax.jit(curation.select_groups, static_argnums=1)

    def position(self) -> dict[str, Any]:
        """Where the data is, as JSON."""
        return self._stream.get_state()

    def next(self, state: TrainState, cursor: Cursor) -> Batch:
        """The next batch: sampled with the state's policy, or given by the data."""
        self.problems = next(self._stream)
        data.check_disjoint((problem["prompt"] for problem in self.problems), self._setup.problems.exclude)
        batch = self._sample(state, cursor) if self._stage.kind == "rollouts" else self._given()
        if filtered := self._stream.counts["filtered"]:
            batch.metrics["data/filtered_prompts"] = float(filtered)
        return batch

    def _sample(self, state: TrainState, cursor: Cursor) -> Batch:
        config = self._setup.config
        sampled = self._sampler(
            state.params["policy"],
            self.problems,
            jax.random.fold_in(self._setup.key, 4),
            first_id=cursor.next_id,
            version=cursor.stage_step,
            on_reward_error=config.on_reward_error,
        )
        metrics = sampled_metrics(sampled, config.eval.correct_at)
        rollouts: Rollouts | None = sampled.rollouts
        tokens, sequences = int(jnp.sum(rollouts.mask)), rollouts.batch_size
        if config.curriculum.oversample > 1:
            useful = np.asarray(curation.informative(rollouts.reward, rollouts.valid))
            metrics["curriculum/informative_groups"] = float(useful.mean())
            rollouts = self._select(rollouts, config.rollout.prompts) if useful.any() else None
        elif not np.asarray(rollouts.valid).any():
            rollouts = None
        return Batch(rollouts, metrics, sampled, sequences, tokens)

    def _given(self) -> Batch:
        tokenizer = self._setup.tokenizer
        stop = [tokenizer.eos_ids[0]]
        names = ("chosen", "rejected") if self._stage.kind == "pairs" else ("answer",)
        completions = []
        for problem in self.problems:
            if missing := [name for name in names if not isinstance(problem.get(name), str)]:
                raise TrainingError(
                    f"{self._stage.name} trains on given completions, but a problem has no {missing[0]!r}: "
                    f"{problem['prompt'][:80]!r}; set data.{missing[0]} to a template over its columns"
                )
            completions.append([[*tokenizer.encode(problem[name]), *stop] for name in names])
        rollouts = data.to_rollouts(
            [tokenizer.encode(problem["prompt"]) for problem in self.problems],
            completions,
            length=self._length,
            prompt_id=[problem["prompt_id"] for problem in self.problems],
        )
        tokens = int(np.sum(np.asarray(rollouts.mask)))
        return Batch(rollouts, {"completions/mean_length": tokens / rollouts.batch_size}, None, 0, tokens)

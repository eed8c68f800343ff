"""A run from its configuration to its last checkpoint, to be read from top to bottom.

Each step draws problems, samples and scores completions (or takes the given ones), updates, and writes one line of
metrics; every so often it evaluates and saves. Whatever a later step depends on is in the checkpoint: the state on the
device, and the `Cursor`. Of several processes all run this; what only one of them can know (an error, a signal) they
tell each other at places that all of them reach, and the first one writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl_post.training import config as configs
from jaxrl_post.training import distributed
from jaxrl_post.training import setup as setups
from jaxrl_post.training.batches import Batches, Cursor
from jaxrl_post.training.checkpoint import Checkpointer
from jaxrl_post.training.compilations import Compilations
from jaxrl_post.training.config import Config
from jaxrl_post.training.evaluate import Evaluator
from jaxrl_post.training.fingerprints import named
from jaxrl_post.training.held_out import HeldOutLoss
from jaxrl_post.training.in_flight import InFlight
from jaxrl_post.training.interrupt import stop_requests
from jaxrl_post.training.model_setup import export
from jaxrl_post.training.optimizers import parted
from jaxrl_post.training.plot import plot
from jaxrl_post.training.problem_setup import TrainingError
from jaxrl_post.training.progress import Progress
from jaxrl_post.training.roles import Refresh, make_refresh
from jaxrl_post.training.run_files import RunFiles
from jaxrl_post.training.run_log import CHECKPOINTS, NoLog, RunLog, lock_run_dir, prepare_run_dir
from jaxrl_post.training.setup import Setup, Stage
from jaxrl_post.training.state import TrainState


class Services(NamedTuple):
    """What a stage uses and does not own.

    Attributes:
        evaluator: of the held-out and the validation problems.
        checkpoints: where to save.
        in_flight: where to save rollouts that there is no time to train on.
        files: where the log's files are, to be copied with each checkpoint.
        log: where to write metrics.
        progress: where to show them.
        compilations: that go on meanwhile.
        stop_requested: asked after sampling and after each step; the same answer on every process.
    """

    evaluator: Evaluator
    checkpoints: Checkpointer
    in_flight: InFlight
    files: RunFiles
    log: RunLog
    progress: Progress
    compilations: Compilations
    stop_requested: Callable[[], bool]


def run(config: Config, *, executables: str | None = None) -> None:
    """Train as `config` says, or go on with the run in its `run_dir`.

    Args:
        config: of the run.
        executables: a directory of programs that need not be compiled, see `executables`.

    Raises:
        ValueError: for whatever the user can change; the message says what.
        Stopped: on SIGINT or SIGTERM, after the step under way has been saved; it is a KeyboardInterrupt.
    """
    with contextlib.ExitStack() as held:
        asked = held.enter_context(stop_requests())
        files = RunFiles(config.run_dir)
        distributed.on_main(lambda: held.enter_context(lock_run_dir(files.local)) is None)
        setup = distributed.together(lambda: prepared(config, executables))
        # Last, so that a set-up that fails leaves nothing that the corrected configuration would be held against.
        resume = distributed.on_main(lambda: begin(config, files))
        if distributed.is_main():
            held.callback(files.push)
        run_stages(setup, files, resume, lambda: distributed.any_process(asked()))


def begin(config: Config, files: RunFiles) -> bool:
    """Prepare the run directory; tells whether there is a run to be resumed."""
    files.pull()
    return prepare_run_dir(config, files)


def prepared(config: Config, executables: str | None = None) -> Setup:
    """The run's parts, with problems and reward functions made, so that what is wrong with them shows."""
    setup = setups.build(config, executables=executables)
    setup.prepare()
    return setup


def run_stages(setup: Setup, files: RunFiles, resume: bool, stop_requested: Callable[[], bool]) -> None:
    """Train every stage that the run's checkpoints do not show as done.

    Args:
        setup: the run's parts.
        files: where its files are.
        resume: whether the run directory holds this run already.
        stop_requested: asked after sampling and after each step; the same answer on every process.
    """
    config = setup.config
    directory, main = files.root, distributed.is_main()
    with (
        Checkpointer(directory / CHECKPOINTS, keep=config.training.keep_checkpoints) as checkpoints,
        InFlight(directory / f"{CHECKPOINTS}-in-flight") as in_flight,
    ):
        restored = None
        if resume:
            restored = checkpoints.restore(lambda saved: setup.template(setup.stages[saved["stage"]]))
        cursor = Cursor(**restored.run) if restored else Cursor()
        state = restored.state if restored else None
        done = restored.step if restored else 0
        total = done - cursor.stage_step + sum(stage.steps for stage in setup.stages[cursor.stage :])
        log = distributed.together(lambda: make_log(config, files, resume_from=done) if main else NoLog())
        progress = Progress(total, config.logging.progress and main, messages=main)
        with log, progress, Compilations() as compilations:
            if restored:
                for line in restored.damaged:
                    progress.message(f"{line}; it was moved to checkpoints-damaged/")
                progress.message(f"resuming {directory} from step {done}")
            params = setup.initial_params() if state is None else None
            evaluator = Evaluator(setup)
            services = Services(evaluator, checkpoints, in_flight, files, log, progress, compilations, stop_requested)
            for index in range(cursor.stage, len(setup.stages)):
                stage = setup.stages[index]
                if state is None:
                    state = setup.begin(stage, params, step=done)
                    params = None  # of which the state has copies
                state, cursor, done = run_stage(setup, stage, state, cursor, done, services)
                if index + 1 < len(setup.stages):
                    params, state = state.params["policy"], None
                    cursor = dataclasses.replace(
                        cursor, stage=index + 1, stage_step=0, ended=False, data=None, updates=0, nonfinite=0, empty=0
                    )
            if config.model.export is not None and state is not None:
                export(setup.models, config.model, setup.tokenizer, state.params["policy"], config.model.export)
                progress.message(f"the policy is in {config.model.export}, as a Hugging Face checkpoint")
            progress.message(f"{directory} is complete with step {done}")
        if main:
            plot([files.local], files.local / "curves.png")


def make_log(config: Config, files: RunFiles, *, resume_from: int) -> RunLog:
    """The run's log, from which everything after the step `resume_from` is cut."""
    return RunLog(
        files.local,
        resume_from=resume_from,
        tensorboard=config.logging.tensorboard,
        wandb=config.logging.wandb,
        config=configs.to_dict(config),
    )


def run_stage(
    setup: Setup,
    stage: Stage,
    state: TrainState,
    cursor: Cursor,
    done: int,
    services: Services,
) -> tuple[TrainState, Cursor, int]:
    """Train one stage to its end.

    Args:
        setup: the run's parts.
        stage: the stage.
        state: after step `done`.
        cursor: likewise.
        done: steps taken in the whole run.
        services: what measures, saves, writes and shows.

    Returns:
        State, cursor and number of steps at the end of the stage.

    Raises:
        Stopped: if it was asked to stop, after saving.
    """
    config = setup.config
    evaluator, checkpoints, in_flight, files, log, progress, compilations, stop_requested = services
    if cursor.ended or cursor.stage_step >= stage.steps:
        return state, cursor, done
    frozen, main, carries = never_changing(setup, stage, state), distributed.is_main(), setup.carries(stage)
    waiting = in_flight.restore(setup, stage, done, cursor)
    batches = Batches(setup, stage, cursor if waiting is None else waiting.cursor, state.curriculum_state)
    state = state.replace(curriculum_state=())
    refresh = make_refresh(stage.roles)
    skip = make_skip(refresh)
    held_out_loss = HeldOutLoss(setup, stage)
    step = setup.program(setup.step_name(stage), setup.step(stage))
    while not (cursor.ended or cursor.stage_step >= stage.steps):
        started, _ = time.perf_counter(), compilations.since()  # saving may compile a copy
        batch, waiting = batches.next(state, cursor) if waiting is None else waiting.batch, None
        if batch.sampled is not None and batch.rollouts is not None and not carries and stop_requested():
            checkpoints.commit(done, state, dataclasses.asdict(cursor), frozen=frozen)
            kept = in_flight.save(setup, done, batch, dataclasses.replace(cursor, data=batches.position()))
            also = " with the rollouts of the next one" if kept else ""
            progress.message(f"stopped after step {done}, which is saved{also}")
            raise distributed.Stopped
        prepared = time.perf_counter()
        metrics = {**batch.metrics, "learning_rate": float(np.asarray(stage.schedule(cursor.updates)))}
        all_wait = batch.sampled is not None and batch.waiting == len(batches.problems)
        if batch.rollouts is None:
            state, skipped, updates, empty = skip(state), 0, 0, not all_wait
        else:
            state, updated = step(state, batch.rollouts)
            metrics |= {name: float(value) for name, value in jax.device_get(updated).items()}
            skipped, updates = int(metrics["nonfinite_updates"]), int(metrics.pop("updates"))
            # Rollouts of which the method has kept nothing are as good as none.
            empty = bool(metrics["empty_updates"]) and not skipped and not updates
        done += 1
        cursor = dataclasses.replace(
            cursor,
            stage_step=cursor.stage_step + 1,
            next_id=cursor.next_id + batch.sequences,
            num_tokens=cursor.num_tokens + batch.tokens,
            updates=cursor.updates + updates,
            nonfinite=cursor.nonfinite + 1 if skipped else 0,
            empty=cursor.empty + 1 if empty else cursor.empty if all_wait else 0,
            data=batches.position(),
        )
        seconds = time.perf_counter() - started
        metrics |= {
            "stage": stage.name,
            "num_tokens": cursor.num_tokens,
            "empty_steps": float(empty),
            "nonfinite_updates": float(skipped),
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
            metrics |= evaluator(state.params["policy"]) | held_out_loss(state.params, state.method_state)
        metrics["compilations"], metrics["time/compile"] = compilations.since()
        log.write(done, metrics)
        every = config.training.log_completions_every
        if batch.shown and every and (last or cursor.stage_step % every == 1 % every):
            log.completions(done, batch.shown)
            progress.completions(done, batch.shown)
        later = sum(following.steps for following in setup.stages[cursor.stage + 1 :])
        total = done + later + (0 if cursor.ended else stage.steps - cursor.stage_step)
        progress.update(done, metrics, stage=stage.name, total_steps=total, later=later)
        stop_if_stuck(config, cursor, metrics)
        stopping = stop_requested() or distributed.preemption_noticed(done)
        if failure := checkpoints.failure():
            progress.message(f"{failure}; saving again")
        saved = dataclasses.asdict(cursor)
        if last or stopping:
            checkpoints.commit(done, state.replace(curriculum_state=batches.carried()), saved, frozen=frozen)
        elif failure or cursor.stage_step % config.training.checkpoint_every == 0:
            checkpoints.save(done, state.replace(curriculum_state=batches.carried()), saved, frozen=frozen)
            if main:
                files.push()
        if stopping:
            progress.message(f"stopped after step {done}, which is saved")
            raise distributed.Stopped
    if stage.until is not None and not cursor.ended:
        progress.message(
            f"the warm start took all its {stage.steps} steps without reaching an accuracy of {stage.until}; going on"
        )
    return state, cursor, done


def never_changing(setup: Setup, stage: Stage, state: TrainState) -> frozenset[str]:
    """Paths of the parameters that stay as they are for the whole stage: a frozen base, a reference."""
    trainable, found = setup.trainable(stage), set()
    for role, params in state.params.items():
        if role in stage.method.trains:
            _, params = parted(params, trainable.get(role))
        elif role in stage.roles and stage.roles[role].every:
            continue
        found |= {f"params/{role}/{name}" for name in named(params)}
    return frozenset(found)


def make_skip(refresh: Refresh | None) -> Callable[[TrainState], TrainState]:
    """A step that updates nothing, but counts, and renews the roles that are due."""

    def skip(state: TrainState) -> TrainState:
        taken = state.step + 1
        params = state.params if refresh is None else refresh(state.params, taken)
        return state.replace(step=taken, params=params)

    def keeping_layout(state: TrainState) -> TrainState:
        layout = jax.tree.map(lambda x: x.sharding, state)
        return jax.jit(skip, donate_argnums=0, out_shardings=layout)(state)

    return keeping_layout


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

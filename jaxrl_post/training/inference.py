"""Using what a run has trained: completing prompts and measuring accuracy."""

from __future__ import annotations

import dataclasses
import logging
import math
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl_post import data
from jaxrl_post.rollout import SamplingParams
from jaxrl_post.training import config as configs
from jaxrl_post.training import setup as setups
from jaxrl_post.training.checkpoint import Checkpointer, CheckpointError
from jaxrl_post.training.evaluate import Evaluator
from jaxrl_post.training.held_out import HeldOutLoss, measured_problems
from jaxrl_post.training.run_files import RunFiles
from jaxrl_post.training.run_log import CHECKPOINTS, CONFIG_FILE
from jaxrl_post.training.sampler import Sampler
from jaxrl_post.training.setup import Setup
from jaxrl_post.types import FINISH_ABORT, FINISH_LENGTH, FINISH_STOP, Params

logger = logging.getLogger(__name__)


def load_run(
    run_dir: str | Path, overrides: Sequence[str] = (), *, mesh: configs.MeshConfig | None = None
) -> tuple[Setup, Params]:
    """The parts of a run and the policy's parameters in its newest checkpoint.

    Args:
        run_dir: the run's directory.
        overrides: `key=value` changes of its configuration.
        mesh: where to lay the parameters; None for the run's own mesh.

    Raises:
        FileNotFoundError: if the directory is not one of a run.
        CheckpointError: if it holds no checkpoint that can be read.
    """
    setup, params = load_roles(run_dir, lambda _: {"policy"}, overrides, mesh=mesh)
    return setup, params["policy"]


def load_roles(
    run_dir: str | Path,
    roles: Callable[[Setup], Collection[str]],
    overrides: Sequence[str] = (),
    *,
    mesh: configs.MeshConfig | None = None,
    measured_only: bool = False,
) -> tuple[Setup, dict[str, Params]]:
    """`load_run` with parameters by role.

    Args:
        run_dir: the run's directory.
        roles: which of the run's roles are wanted; one that the newest checkpoint does not have is left out.
        overrides: as for `load_run`, as is `mesh`.
        measured_only: see `make_problems`.
    """
    files = RunFiles(run_dir)
    checkpoint_dir = files.root / CHECKPOINTS

    def quiet() -> AbstractContextManager[Any]:
        # Whoever trained it was warned.
        if overrides:
            return nullcontext()
        return warnings.catch_warnings(action="ignore", category=configs.ConfigWarning)

    with files.reading(CONFIG_FILE) as path, quiet():
        # The data that it was trained on may be gone by now.
        config = configs.load(path, overrides, check_files=False)
    if mesh is not None:
        config = _laid_out(config, mesh)
    sizes = dataclasses.asdict(config.mesh)
    if math.prod(sizes.values()) > jax.device_count():
        logger.warning("the run's mesh %s needs more than the %d devices here; using one", sizes, jax.device_count())
        config = _laid_out(config, configs.MeshConfig())
    with quiet():
        setup = setups.build(config, measured_only=measured_only)
    if not checkpoint_dir.is_dir():
        raise CheckpointError(f"{run_dir} holds no checkpoint yet; train first, or wait for the first save")
    wanted = roles(setup)

    def template(saved: dict[str, Any]) -> dict[str, Any]:
        # Parameters do not depend on how many problems there are.
        params = setup.state_shapes(setup.stages[saved["stage"]], num_prompts=1).params
        return {"params": {role: params[role] for role in wanted if role in params}}

    with Checkpointer(checkpoint_dir, read_only=True) as checkpoints:
        restored = checkpoints.restore(template, partial=True)
    if restored is None:
        raise CheckpointError(f"{run_dir} holds no checkpoint yet; train first, or wait for the first save")
    return setup, restored.state["params"]


def _laid_out(config: configs.Config, mesh: configs.MeshConfig) -> configs.Config:
    return dataclasses.replace(config, mesh=mesh, rollout=dataclasses.replace(config.rollout, mesh=None))


def evaluate_run(run_dir: str | Path, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Accuracy, pass@k and lengths of a run's policy on its held-out problems.

    Where it was trained on completions or pairs that the data gives, the loss on the held-out ones too.

    Args:
        run_dir: the run's directory.
        overrides: `key=value` changes of its configuration, e.g. `eval.samples=64`, or
            `data.eval_files=[other.jsonl]` for other problems.

    Raises:
        ValueError: if the run has no held-out problems, or neither rewards nor such a loss.
    """

    def roles(setup: Setup) -> set[str]:
        stage = setup.stages[-1]
        if not measured_problems(setup, stage):
            return {"policy"}
        return {"policy", *stage.method.roles} - set(setup.borrows(stage))

    setup, params = load_roles(run_dir, roles, overrides, measured_only=True)
    results, stage = Evaluator(setup)(params["policy"]), setup.stages[-1]
    if missing := roles(setup) - set(params):
        logger.warning("no loss of %s on held-out data: the newest checkpoint has no %s", stage.name, sorted(missing))
    elif measured_problems(setup, stage):
        state = setup.state_shapes(stage, num_prompts=1).method_state
        if state == ():
            results |= HeldOutLoss(setup, stage)(params, ())
        else:
            logger.warning("no loss of %s on held-out data: it depends on a state that training keeps", stage.name)
    if not results:
        raise ValueError("nothing to evaluate: the run holds out no problems (data.eval_files) or has no rewards")
    return results


def _in_conversations(setup: Setup) -> bool:
    options = setup.config.data
    if options.chat or not options.files:
        return options.chat
    try:
        return "prompt_messages" in setup.problems.train[0]
    except (ImportError, OSError, ValueError) as error:
        logger.warning("whether the run was trained on messages cannot be seen (%s); prompts are plain text", error)
        return False


def generate_text(
    run_dir: str | Path,
    prompts: Sequence[str],
    *,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int | None = None,
    chat: bool | None = None,
) -> list[list[dict[str, Any]]]:
    """Complete prompts with a run's policy.

    Where it was trained to act in turns, a completion is one action, which nobody answers.

    Args:
        run_dir: the run's directory.
        prompts: texts.
        samples: completions per prompt.
        temperature: divides the logits; 0 takes the most probable token.
        seed: of the random streams.
        max_new_tokens: longest completion; the run's own limit if None, of an action where it acted in turns.
        chat: whether a prompt is a user's message, and goes through the chat template; None for what the run was
            trained on, by `data.chat` or, while its files are there, by messages in them.

    Returns:
        For each prompt `samples` dicts: `text`, `logp` (of the completion, nats, at this temperature), `finish`
        (`stop`, `length`, or `abort` where logits were no numbers).

    Raises:
        ValueError: for an empty prompt, or characters that the tokenizer does not know.
    """
    setup, params = load_run(run_dir)
    if setup.turns is not None and max_new_tokens is None:
        max_new_tokens = setup.turns.max_turn_tokens
    options = setup.config.data
    problems: list[data.Problem] = [{"prompt": text.lower() if options.lowercase else text} for text in prompts]
    if _in_conversations(setup) if chat is None else chat:
        source = data.ChatSource(problems, system=options.system)
        problems = [source[i] for i in range(len(source))]
    lengths = [len(data.encode_prompt(setup.tokenizer, problem)) for problem in problems]
    sampler = Sampler(
        setup,
        setup.generation(
            SamplingParams(temperature=temperature or 1.0, greedy=temperature == 0),
            samples,
            max_new_tokens=max_new_tokens,
        )._replace(turns=None),  # whoever gives the prompt answers
        prompts=len(prompts),
        prompt_length=max(lengths),
        rewarded=False,
    )
    sampled = sampler(params, problems, jax.random.key(seed))
    logp, finish = jax.device_get((sampled.rollouts.logp, sampled.rollouts.finish))
    names = {FINISH_STOP: "stop", FINISH_LENGTH: "length", FINISH_ABORT: "abort"}
    sums = np.sum(logp, axis=1).reshape(len(prompts), samples)
    return [
        [
            {
                "text": sampled.completions[row * samples + column],
                "logp": float(sums[row, column]),
                "finish": names[int(finish[row, column])],
            }
            for column in range(samples)
        ]
        for row in range(len(prompts))
    ]

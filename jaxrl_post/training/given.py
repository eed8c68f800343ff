"""What a batch has from the data: given completions as rollouts, and the columns that a method reads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from numpy.typing import NDArray

from jaxrl_post import data
from jaxrl_post.rollout import BUDGET, EXIT
from jaxrl_post.training.problem_setup import TrainingError
from jaxrl_post.training.setup import Setup, Stage
from jaxrl_post.training.shares import Share
from jaxrl_post.types import ANSWER_TOKENS, Rollouts

GREEDY_REWARD = "greedy_reward"
"""What a method wants (`Method.wants`) that is sampled for it alone."""

NO_COLUMNS = frozenset({GREEDY_REWARD, ANSWER_TOKENS, BUDGET, EXIT})
"""What a method may want that is not a column of the data."""


def given_rollouts(
    setup: Setup, stage: Stage, problems: Sequence[data.Problem], names: Sequence[str], share: Share
) -> Rollouts:
    """The given completions as rollouts; a process makes those that its devices hold.

    Args:
        setup: the run's parts.
        stage: whose method reads them.
        problems: `P` of them.
        names: the columns of the completions, one after the other in each group.
        share: of a batch of `P`.
    """
    held = [problems[i] for i in share.held]
    local = data.to_rollouts(
        [data.encode_prompt(setup.tokenizer, problem) for problem in held],
        [[data.encode_completion(setup.tokenizer, problem, name) for name in names] for problem in held],
        length=setup.config.data.max_prompt_length + setup.config.rollout.max_new_tokens,
        prompt_id=[problem["prompt_id"] for problem in held],
        rows=share.held,
    )
    rollouts = share.place(local)
    return rollouts.replace(extras={**rollouts.extras, **wanted_columns(setup, stage, problems, share)})


def wanted_columns(setup: Setup, stage: Stage, problems: Sequence[data.Problem], share: Share) -> dict[str, jax.Array]:
    """What the method wants of the data: columns of numbers, `[P]` each, and the answers' tokens.

    Args:
        setup: the run's parts.
        stage: whose method reads them.
        problems: `P` of them.
        share: of a batch of `P`.

    Raises:
        TrainingError: if a problem does not have what is wanted.
    """
    found = {}
    held = [problems[i] for i in share.held]
    if ANSWER_TOKENS in stage.method.wants:
        found[ANSWER_TOKENS] = _answer_tokens(setup, stage, held)
    for name in sorted(stage.method.wants - NO_COLUMNS):
        values = [problem.get(name) for problem in held]
        for problem, value in zip(held, values, strict=True):
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise TrainingError(
                    f"{stage.name} reads the column {name!r} of the data, which must hold a number for every "
                    f"problem, but is {value!r} for {problem['prompt'][:80]!r}"
                )
        found[name] = np.asarray(values, np.float32)
    return share.place(found)


def _answer_tokens(setup: Setup, stage: Stage, problems: Sequence[data.Problem]) -> NDArray[np.int32]:
    """`[H, N]`: -1 behind the tokens, and everywhere for an answer that is longer than a completion may be."""
    room = setup.config.rollout.max_new_tokens
    found = np.full((len(problems), room), -1, np.int32)
    for row, problem in zip(found, problems, strict=True):
        if not isinstance(problem.get("answer"), str):
            raise TrainingError(
                f"{stage.name} reads the right answers, but a problem has no 'answer': "
                f"{problem['prompt'][:80]!r}; set data.answer to a template over its columns"
            )
        tokens = setup.tokenizer.encode(problem["answer"])
        row[: len(tokens)] = tokens if len(tokens) <= room else -1
    return found

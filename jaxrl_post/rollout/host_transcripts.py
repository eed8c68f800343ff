"""Transcripts of policy and environment as arrays on the host: prompts, actions cut out, observations put in.

Nothing is sampled and no environment is called here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrl_post.rollout.host_calls import Outcome
from jaxrl_post.rollout.host_environment import Step, TextTokenizer
from jaxrl_post.types import FINISH_ABORT, FINISH_LENGTH, FINISH_NONE, FINISH_STOP, Array, Rollouts

_LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass
class Record:
    """What the host knows of `B` sequences, changed in place.

    Attributes:
        states: of the environment.
        rewards: `[B, T]` float32.
        limits: `[B]` int32, the most tokens of each.
        turns: `[B]` int32, actions answered.
        errors: `[B]` int32, calls that failed, time-outs included.
        timeouts: `[B]` int32.
        in_a_row: `[B]` int32, failures since the last call that did not fail.
    """

    states: list[Any]
    rewards: np.ndarray
    limits: np.ndarray
    turns: np.ndarray
    errors: np.ndarray
    timeouts: np.ndarray
    in_a_row: np.ndarray


def failure_tokens(error: str, tokenizer: TextTokenizer, on_error: str) -> list[int]:
    """Token ids that tell the policy of a failure.

    Args:
        error: what went wrong; left out where the tokenizer cannot encode it.
        tokenizer: of the policy.
        on_error: text in which `{error}` stands for it.

    Raises:
        ValueError: if the tokenizer cannot encode `on_error` itself.

    Example:
        >>> from jaxrl_post import data
        >>> tokenizer = data.CharTokenizer("failed: ")
        >>> [tokenizer.decode(failure_tokens(error, tokenizer, "failed: {error}")) for error in ("idea", "é")]
        ['failed: idea', 'failed: ']
    """
    # Not `str.format`: templates of chats may hold other braces.
    try:
        return tokenizer.encode(on_error.replace("{error}", error))
    except ValueError:
        return tokenizer.encode(on_error.replace("{error}", ""))


def opened(
    outcomes: Sequence[Outcome],
    tokenizer: TextTokenizer,
    max_length: int,
    group_size: int,
    max_new_tokens: int | None = None,
) -> tuple[Record, list[list[int] | None]]:
    """What `reset` gave: the record, and for each sequence its prompt's tokens, None where it failed."""
    if all(outcome.error is not None for outcome in outcomes):
        raise RuntimeError(f"environment.reset failed for every sequence, the first with: {outcomes[0].error}")
    record = Record(
        states=[None] * len(outcomes),
        rewards=np.zeros((len(outcomes), max_length), np.float32),
        limits=np.full(len(outcomes), max_length, np.int32),
        turns=np.zeros(len(outcomes), np.int32),
        errors=np.array([outcome.error is not None for outcome in outcomes], np.int32),
        timeouts=np.array([outcome.timed_out for outcome in outcomes], np.int32),
        in_a_row=np.zeros(len(outcomes), np.int32),
    )
    prompts: list[list[int] | None] = []
    for row, outcome in enumerate(outcomes):
        if outcome.error is not None:
            prompts.append(None)
            continue
        if not isinstance(outcome.value, tuple) or len(outcome.value) != 2:
            raise TypeError(f"environment.reset must return (state, prompt), got {outcome.value!r}")
        record.states[row], prompt = outcome.value
        tokens = _prompt_tokens(prompt, row // group_size, tokenizer, max_length)
        if max_new_tokens is not None:
            record.limits[row] = min(len(tokens) + max_new_tokens, max_length)
        prompts.append(tokens)
    return record, prompts


def _prompt_tokens(prompt: str | Sequence[int], task: int, tokenizer: TextTokenizer, max_length: int) -> list[int]:
    try:
        tokens = _tokens(tokenizer, prompt)
    except ValueError as error:
        raise ValueError(f"the prompt of task {task} cannot be encoded: {error}") from error
    if not 1 <= len(tokens) < max_length:
        raise ValueError(
            f"the prompt of task {task} has {len(tokens)} tokens; it needs at least 1, and fewer than "
            f"max_length={max_length} (in a configuration data.max_prompt_length + rollout.max_new_tokens), so that "
            "there is room for an action: raise that or shorten the prompt"
        )
    return tokens


def _tokens(tokenizer: TextTokenizer, text: str | Sequence[int]) -> list[int]:
    """Token ids of a text, or those given, checked."""
    if isinstance(text, str):
        return tokenizer.encode(text)
    if isinstance(text, bytes):
        raise TypeError("an observation must be a text or token ids, got bytes")
    found = [int(token) for token in text]
    if wrong := [token for token in found if not 0 <= token < tokenizer.vocab_size]:
        raise ValueError(f"token ids must be 0 .. {tokenizer.vocab_size - 1}, got {wrong[0]}")
    return found


def unsampled(
    prompts: Sequence[Sequence[int] | None],
    width: int,
    group_size: int,
    ids: Array | None,
    prompt_id: Array | None,
    *,
    truncated: bool,
) -> Rollouts:
    """Sequences that hold their prompts only; without one a sequence is given up, and stands there with one token."""
    batch = len(prompts)
    grouped = (batch // group_size, group_size)
    some_ids = np.arange(batch).reshape(grouped) if ids is None else np.asarray(ids)
    some_prompt_id = np.arange(grouped[0]) if prompt_id is None else np.asarray(prompt_id)
    if some_ids.shape != grouped or some_prompt_id.shape != grouped[:1]:
        raise ValueError(
            f"id must be [P, G] = {list(grouped)} and prompt_id [P] = [{grouped[0]}], "
            f"got shapes {some_ids.shape} and {some_prompt_id.shape}"
        )
    shown = [[0] if prompt is None else prompt for prompt in prompts]
    tokens = np.zeros((batch, width), np.int32)
    for row, prompt in enumerate(shown):
        tokens[row, : len(prompt)] = prompt
    lost = np.array([prompt is None for prompt in prompts]).reshape(grouped)
    nothing = np.zeros((batch, width), np.float32)
    nowhere = np.full((batch, width), -1, np.int32)
    fields: dict[str, Any] = {
        "tokens": tokens,
        "mask": nothing,
        "logp": nothing,
        "step": nowhere,
        "version": nowhere,
        "reward": np.zeros(grouped, np.float32),
        "rewards": {},
        "valid": ~lost,
        "length": np.array(list(map(len, shown)), np.int32).reshape(grouped),
        "finish": np.where(lost, FINISH_ABORT, FINISH_NONE).astype(np.int8),
        "id": some_ids.astype(np.uint32),
        "prompt_id": some_prompt_id.astype(np.int32),
        # From the first turn on what later turns have, so that one program serves all.
        "extras": {"entropy": nothing} | ({"sampler_logp": nothing} if truncated else {}),
    }
    return Rollouts(**fields)


def sampled(rollouts: Rollouts) -> np.ndarray:
    """`[P, G]` int32: tokens of each sequence that the policy chose."""
    return np.asarray(np.sum(np.asarray(rollouts.mask) > 0, axis=1)).astype(np.int32).reshape(rollouts.length.shape)


def actions(before: Rollouts, after: Rollouts, tokenizer: TextTokenizer) -> tuple[np.ndarray, list[str]]:
    """Which sequences have acted, `[A]`, and the text that each has sampled."""
    acted = (before.finish == FINISH_NONE) & (after.finish != FINISH_ABORT)
    rows = np.flatnonzero(acted)
    begin, end = before.length.reshape(-1), after.length.reshape(-1)
    return rows, [tokenizer.decode(after.tokens[row, begin[row] : end[row]].tolist()) for row in rows]


def understood(
    record: Record, rows: np.ndarray, outcomes: Sequence[Outcome], tokenizer: TextTokenizer, on_error: str
) -> list[Step]:
    """Steps with their observations as token ids; for a call that failed, one that says so. Counts the time-outs."""
    record.timeouts[rows] += [outcome.timed_out for outcome in outcomes]
    return [
        _understood(outcome, record.states[row], tokenizer, on_error)
        for row, outcome in zip(rows, outcomes, strict=True)
    ]


def _understood(outcome: Outcome, state: Any, tokenizer: TextTokenizer, on_error: str) -> Step:
    error = outcome.error
    if error is None:
        if not isinstance(outcome.value, tuple) or not 4 <= len(outcome.value) <= len(Step._fields):
            raise TypeError(
                f"environment.step must return Step or (state, observation, reward, done), got {outcome.value!r}"
            )
        step = Step(*outcome.value)
        try:
            observation = [] if step.done else _tokens(tokenizer, step.observation)
            return step._replace(observation=observation, reward=float(step.reward))
        except (ValueError, TypeError, OverflowError) as wrong:
            state, error = step.state, str(wrong)
    return Step(state, failure_tokens(error, tokenizer, on_error), failed=True)


def answered(
    rollouts: Rollouts, record: Record, rows: np.ndarray, steps: Sequence[Step], max_errors: int, *, is_last: bool
) -> Rollouts:
    """Rollouts with the observations behind the actions of `rows`, and how the sequences go on; `record` is updated."""
    tokens, valid = np.array(rollouts.tokens), np.array(rollouts.valid).reshape(-1)
    length, finish = np.array(rollouts.length).reshape(-1), np.array(rollouts.finish).reshape(-1)
    for row, step in zip(rows, steps, strict=True):
        end = length[row]
        behind = end + len(step.observation)
        sound = abs(step.reward) <= _LARGEST  # which no NaN is
        record.states[row] = step.state
        record.turns[row] += 1
        record.rewards[row, end - 1] = step.reward if sound else 0.0
        wrong = step.failed or not sound
        record.errors[row] += wrong
        record.in_a_row[row] = record.in_a_row[row] + 1 if wrong else 0
        if not sound or (record.in_a_row[row] >= max_errors and not step.done):
            finish[row], valid[row] = FINISH_ABORT, False
        elif step.done:
            finish[row] = FINISH_STOP
        elif is_last or behind >= record.limits[row]:
            finish[row] = FINISH_LENGTH
        else:
            tokens[row, end:behind] = step.observation
            length[row], finish[row] = behind, FINISH_NONE
    grouped = rollouts.length.shape
    return rollouts.replace(
        tokens=tokens, length=length.reshape(grouped), finish=finish.reshape(grouped), valid=valid.reshape(grouped)
    )


def closed(rollouts: Rollouts, record: Record) -> Rollouts:
    """Rollouts with what the record holds."""
    grouped = rollouts.length.shape
    counts = {
        "turns": record.turns,
        "environment_errors": record.errors,
        "environment_timeouts": record.timeouts,
    }
    return rollouts.replace(
        reward=record.rewards.sum(axis=1).reshape(grouped),
        rewards={"environment": record.rewards},
        extras=rollouts.extras | {name: count.reshape(grouped) for name, count in counts.items()},
    )

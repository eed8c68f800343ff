"""Environments on the host: the policy acts on the device, then Python answers, turn by turn.

How a segment is sampled is in `resume`, how functions are called without waiting for ever in `host_calls`, and tools
that a policy calls in `host_tools`. Environments written in JAX need none of this.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post.rollout import host_transcripts as transcripts
from jaxrl_post.rollout.generate import PLAIN
from jaxrl_post.rollout.host_calls import Caller
from jaxrl_post.rollout.host_environment import HostEnvironment, TextTokenizer
from jaxrl_post.rollout.resume import resume
from jaxrl_post.sampling import SamplingParams, StopStrings, is_truncating
from jaxrl_post.types import FINISH_NONE, Array, Params, Policy, PyTree, Rollouts


class Processes(NamedTuple):
    """How several processes of `jax.distributed` act together, each for tasks of its own.

    Attributes:
        place: from host arrays of this process's tasks, `[P, ...]` or `[P * G, ...]`, to arrays of all on the devices.
        read: back, to host arrays of this process's tasks.
        any: whether a flag is set in any of them; called by all alike.
    """

    place: Callable[[PyTree], PyTree]
    read: Callable[[PyTree], PyTree]
    any: Callable[[bool], bool]


ALONE = Processes(place=lambda tree: tree, read=jax.device_get, any=bool)


def host_turns(
    policy: Policy,
    params: Params,
    environment: HostEnvironment,
    tasks: Sequence[Any],
    key: Array,
    *,
    tokenizer: TextTokenizer,
    sampling: SamplingParams = PLAIN,
    max_turns: int,
    max_turn_tokens: int,
    max_length: int,
    max_new_tokens: int | None = None,
    group_size: int = 1,
    version: Array | int = 0,
    cache_dtype: jnp.dtype | None = None,
    prompt_id: Array | None = None,
    id: Array | None = None,
    timeout: float = 30.0,
    max_errors: int = 3,
    on_error: str = "error: {error}",
    concurrency: int = 256,
    processes: Processes = ALONE,
) -> Rollouts:
    """Sample `group_size` sequences for each task, in turns of the policy and an environment in Python.

    A turn samples one action of every sequence that is running, up to a stop token or `max_turn_tokens`, by one
    compiled program for all turns; then `environment.step` answers all actions at once. Transcripts are tokens in,
    tokens out: an action is decoded for the environment only, an observation is encoded by itself and appended, and
    what was sampled is never encoded again. Sequences wait for each other at the end of a turn, and a turn reads the
    transcripts again; an environment that can be written in JAX has neither cost. It is no jitted function; several
    processes call it alike, each with tasks of its own, which its environment answers.

    A call that raises or runs out of time answers with `on_error` and reward 0, and is counted; `max_errors` of them
    in a row end the sequence with `FINISH_ABORT`, not `valid`, as do a failed `reset`, a reward that is not finite and
    logits that hold NaN. A sequence ends with `FINISH_STOP` where the environment is done, and with `FINISH_LENGTH`
    after `max_turns` or where the observation and one more token do not fit.

    Args:
        policy: the model; the same object from call to call, or the program is compiled again.
        params: its parameters.
        environment: see `HostEnvironment`; `reset` is called for each sequence.
        tasks: `P` of what `reset` takes.
        key: of the random streams, see `generate`.
        tokenizer: of the policy.
        sampling: see `resume`; `stop_tokens`, `stop_sequences` and `stop_strings` end an action. What counts tokens
            counts those of all actions.
        max_turns: the most actions of a sequence.
        max_turn_tokens: the most tokens of an action.
        max_length: `T`, the most tokens of a sequence with prompt and observations.
        max_new_tokens: the most tokens behind a prompt, of actions and observations; None: as many as fit in `T`.
        group_size: `G`.
        version: recorded for every sampled token.
        cache_dtype: see `generate`.
        prompt_id: `[P]` int32, indices of the tasks; `arange(P)` if None.
        id: `[P, G]` uint32, see `Prompts`; `arange(P * G)` if None.
        timeout: seconds for each call of the environment.
        max_errors: calls that may fail in a row, at least 1.
        on_error: the observation after a call that failed, of characters that the tokenizer knows; `{error}` is what
            went wrong, left out where the tokenizer cannot encode it.
        concurrency: calls of the environment at a time.
        processes: how several processes act together; `tasks`, `prompt_id` and `id` are then those of this one, at
            least one, and arrays in `sampling` scalars.

    Returns:
        `Rollouts`, of the tasks of all processes, whose mask is 1 on sampled tokens, with their turn as `step`.
        `rewards["environment"]` `[B, T]` holds each reward on the last token of its action, `reward` their sum. Extras
        beside those of `generate`,
        `[P, G]` int32: `turns`, actions answered; `environment_errors`, calls that failed; `environment_timeouts`, the
        time-outs among them.

    Raises:
        ValueError: if there are no tasks, a prompt is empty or leaves no room, a size is below 1, `on_error` cannot be
            encoded, or as `resume`.
        TypeError: if `reset` or `step` returns something else.
        RuntimeError: if `reset` fails for all sequences.

    Example:
        >>> from jaxrl_post import data, models
        >>> from jaxrl_post.rollout.host_environment import Step
        >>> class Echo:
        ...     async def reset(self, task):
        ...         return 0, task
        ...     async def step(self, state, action):
        ...         return Step(state + 1, "b", reward=action.count("a"), done=state == 1)
        >>> tokenizer = data.CharTokenizer("ab: eorx")
        >>> policy = models.decoder(vocab_size=tokenizer.vocab_size, width=8, layers=1, heads=2)
        >>> out = host_turns(
        ...     policy, jax.jit(policy.init)(jax.random.key(0)), Echo(), ["ab", "b"], jax.random.key(1),
        ...     tokenizer=tokenizer, max_turns=3, max_turn_tokens=2, max_length=12,
        ... )  # fmt: skip
        >>> out.length.tolist(), out.extras["turns"].tolist(), out.step[0].tolist()
        ([[7], [6]], [[2], [2]], [-1, -1, 0, 0, -1, 1, 1, -1, -1, -1, -1, -1])
    """
    if max_new_tokens is not None:
        _check_sizes(max_new_tokens=max_new_tokens)
    _check_sizes(max_turns=max_turns, max_turn_tokens=max_turn_tokens, group_size=group_size, max_errors=max_errors)
    if not len(tasks):
        raise ValueError("tasks hold no task; give at least one")
    transcripts.failure_tokens("", tokenizer, on_error)  # so that one that cannot be encoded is found at once
    arrays = {name: x for name, x in sampling._asdict().items() if isinstance(x, jax.Array | np.ndarray | StopStrings)}
    act = functools.partial(
        _segment,
        policy=policy,
        fixed=sampling._replace(**dict.fromkeys(arrays)),
        max_new_tokens=min(max_turn_tokens, max_length - 1),
        cache_dtype=cache_dtype,
    )
    caller = Caller(timeout=timeout, concurrency=concurrency)
    begun = caller([(environment.reset, (task,)) for task in tasks for _ in range(group_size)])
    record, prompts = transcripts.opened(begun, tokenizer, max_length, group_size, max_new_tokens)
    rollouts = transcripts.unsampled(prompts, max_length, group_size, id, prompt_id, truncated=is_truncating(sampling))
    for turn in range(max_turns):
        before = rollouts
        if not processes.any(bool(np.any(before.finish == FINISH_NONE))):
            break
        total = transcripts.sampled(before) + record.limits.reshape(before.length.shape) - before.length
        placed, room = processes.place((before, total))
        rollouts = processes.read(act(params, placed, key, turn, version, room, arrays))
        rows, actions = transcripts.actions(before, rollouts, tokenizer)
        outcomes = caller(
            [(environment.step, (record.states[row], action)) for row, action in zip(rows, actions, strict=True)]
        )
        steps = transcripts.understood(record, rows, outcomes, tokenizer, on_error)
        rollouts = transcripts.answered(rollouts, record, rows, steps, max_errors, is_last=turn + 1 == max_turns)
    return jax.tree.map(jnp.asarray, processes.place(transcripts.closed(rollouts, record)))


@functools.partial(jax.jit, static_argnames=("policy", "fixed", "max_new_tokens", "cache_dtype"))
def _segment(
    params: Params,
    rollouts: Rollouts,
    key: Array,
    turn: Array | int,
    version: Array | int,
    total: Array,
    arrays: Mapping[str, Array],
    *,
    policy: Policy,
    fixed: SamplingParams,
    max_new_tokens: int,
    cache_dtype: Any,
) -> Rollouts:
    """One action of every sequence that is running; `arrays` are the sampling parameters that are not `fixed`."""
    return resume(
        policy,
        params,
        rollouts,
        key,
        sampling=fixed._replace(**arrays),
        max_new_tokens=max_new_tokens,
        total=total,
        step=turn,
        version=version,
        cache_dtype=cache_dtype,
    )


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
